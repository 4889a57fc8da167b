"""Say in plain words that nothing is learned, or that something goes wrong, and what to do. Free of torch."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator

from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe

ADVISE_AFTER = 5
"""Give advice after this many steps in a row that changed nothing."""

WINDOW = 10
"""Steps that are looked at together: in a single one chance is larger than any of the limits below."""

COLLAPSED, LEARNED = 0.1, 0.9
"""The entropy has collapsed below the first, a fraction of its start, unless the pass rate reaches the second: a model
that has learned is sure of its answers. tiny_cpu ends at 0.3 of the start and a pass rate of 0.96."""

EXPLODED = 3.0
"""The entropy explodes above this multiple of its start. Healthy runs here stay below 1.3."""

SOLVED = 0.99
"""Above this pass rate nearly every group is all right. tiny_cpu, which goes on learning, reaches 0.97."""

TRUNCATED = 0.3
"""With more answers cut off, what is measured is the limit and not the model. Finished answers stay in the minority of
the trained tokens from some 0.3 on, because those cut off are the longest."""

NEAR_LIMIT, GROWN = 0.8, 1.5
"""Answers drift towards the limit if their mean length passes this part of it and has grown by this factor."""

GAP_GROWN, SMALLEST_GAP = 5.0, 0.01
"""The gap of log-probs grows if it is this many times that of the first steps, and not just rounding: 0.01 nats are one
per cent of a token's probability. The limit that stops the run is samplers/probe.py's."""

SHOWN_AS_ZERO = 5e-4
"""A loss below this is 0.000 in views."""


class Verdicts:
    """Judge the steps of a run, one after another; a run that resumes begins with those it has. `engine` samples."""

    def __init__(self, recipe: Recipe, engine: str, done: Iterable[StepRecord] = ()) -> None:
        self._recipe, self._engine = recipe, engine
        self._in_a_row: Counter[str] = Counter()
        self._said = set[str]()
        self._recent: deque[StepRecord] = deque(maxlen=WINDOW)
        self._first: list[StepRecord] = []  # the first steps, for comparison
        for record in done:  # what was said of them is not said again
            self.of(record, planned=record["skipped_reason"] is None, equals_base=False)

    def of(self, record: StepRecord, *, planned: bool, equals_base: bool) -> list[str]:
        """Return what to tell the user of a step.

        `planned`: its answers had something to learn from. `equals_base`: the adapter changes nothing in the base.
        """
        optimizer, step = self._recipe.optimizer, record["step"] + 1
        skipped, gradient, moved = (record[name] for name in ("skipped_reason", "grad_norm", "update_norm"))
        found = {
            "skipped": not planned,
            "no gradient": gradient == 0,
            "no change": bool(gradient) and moved == 0,
            "base": skipped is None and equals_base,
        }
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name, is_so in found.items() if is_so})
        texts = []
        if (count := self._in_a_row["skipped"]) and count % ADVISE_AFTER == 0:
            advice = "easier problems (data.filter) or more rollout.num_generations help; "
            advice += "or, in a new run, a warm start (lora.init_from)"
            if record["pass_rate"] > 0.5:
                advice = "harder problems (data.filter, data.curriculum) help: most answers are right"
            texts.append(f"{count} steps changed nothing: {skipped}; {advice}")
        if self._in_a_row["no gradient"] == 1:
            texts.append(
                f"step {step}: the gradient is exactly zero, so nothing is learned: check the coefficients in "
                "[objective], and that rewards differ between answers (pass rate, samples.jsonl)"
            )
        if self._in_a_row["no change"] == 1:
            texts.append(
                f"step {step}: the weights do not move, although the gradient's norm is {gradient:.3g}: "
                f"optimizer.learning_rate = {optimizer.learning_rate:g} is too small for their precision"
            )
        elif self._in_a_row["base"] == 1:
            texts.append(
                f"step {step}: the adapter still equals the base (every B is 0), so answers cannot change: "
                f"raise optimizer.learning_rate = {optimizer.learning_rate:g}"
            )
        grpo = self._recipe.objective.algorithm == "grpo"
        if grpo and gradient and abs(record["loss"]) < SHOWN_AS_ZERO:
            texts += self._once(
                "loss",
                "a loss of 0 is normal for grpo: a group's advantages add up to 0 as long as policy and sampler "
                f"agree. It learns from the gradient, whose norm is {gradient:.3g}",
            )
        if record.get("lag"):  # a run that began with an older version has none
            record = {**record, "logp_gap_mean": None}  # it includes an update
        self._recent.append(record)
        if len(self._first) < WINDOW:
            self._first.append(record)
        if len(self._recent) == WINDOW:
            for name, text in self._trends():
                texts += [f"step {step}: {line}" for line in self._once(name, text)]
        return texts

    def _once(self, name: str, text: str) -> list[str]:
        """Return the text, unless the run has said it."""
        new = name not in self._said
        self._said.add(name)
        return [text] if new else []

    def _trends(self) -> Iterator[tuple[str, str]]:
        """Yield name and text of what the last steps show together."""
        passed, cut = self._mean("pass_rate") or 0.0, self._mean("truncated_ratio") or 0.0
        entropy, limit = self._mean("entropy_over_start"), self._recipe.rollout.max_completion_length
        if entropy is not None and entropy < COLLAPSED and passed < LEARNED:
            advice = "raise objective.entropy_coef, or lower optimizer.learning_rate"
            if not hasattr(self._recipe.objective, "entropy_coef"):
                advice = "lower optimizer.learning_rate, or raise rollout.temperature"
            text = f"the entropy is down to {entropy:.0%} of its start at a pass rate of {passed:.0%}: answers "
            yield "collapse", f"{text}hardly vary any more, so little new is found; {advice}"
        if entropy is not None and entropy > EXPLODED:
            text = f"the entropy is {entropy:.1f} times that of the start: answers become random; lower "
            bonus = " or objective.entropy_coef" if getattr(self._recipe.objective, "entropy_coef", 0.0) else ""
            yield "explosion", f"{text}optimizer.learning_rate{bonus}"
        if passed > SOLVED and not self._in_a_row["skipped"]:  # of skipped steps, `of` says it
            text = f"{passed:.1%} of the answers are right, so there is hardly anything left to learn: stop here, "
            yield "solved", f"{text}or use harder problems (data.filter, data.curriculum)"
        shorter = "raise it in a new run, or reward shorter answers (the function length, docs/rewards.md)"
        length, length_before = (self._mean("completion_tokens_mean", first=first) or 0.0 for first in (False, True))
        if cut > TRUNCATED:
            text = f"{cut:.0%} of the answers are cut off at rollout.max_completion_length = {limit}: "
            yield "length", text + shorter
        elif length > max(NEAR_LIMIT * limit, GROWN * length_before):
            text = f"answers have grown to {length:.0f} tokens on average, and rollout.max_completion_length is {limit}"
            yield "length", f"{text}: {shorter}"
        gap, gap_before = (self._mean("logp_gap_mean", first=first) for first in (False, True))
        if gap is not None and gap_before is not None and gap > max(GAP_GROWN * gap_before, SMALLEST_GAP):
            text = f"log-probs of sampler and trainer differ by {gap:.2g} nats, and did by {gap_before:.2g} in the "
            text += "first steps: answers come less and less from the policy that learns; "
            other = "model.attn_implementation=eager" if self._engine == "hf" else "rollout.engine=hf"
            yield "gap", f"{text}resume with --set {other} to compare"
        rewards = [record["rewards"] for record in self._recent]
        for name in rewards[-1] if len(rewards[-1]) > 1 else ():
            values = {step.get(name) for step in rewards}
            if values in ({0}, {1}):
                text = f"the reward function {name} has given {values.pop():g} to every answer of {WINDOW} steps, so "
                text += "it teaches nothing: look at samples.jsonl, then correct the function or leave it out"
                yield f"reward {name}", f"{text}, in a new run (docs/rewards.md)"

    def _mean(self, name: str, *, first: bool = False) -> float | None:
        """Return the mean of a metric over the last or the first steps that have it."""
        values = [record[name] for record in (self._first if first else self._recent) if record[name] is not None]
        return statistics.fmean(values) if values else None
