"""Say in plain words that nothing is learned, and why. Free of torch."""

from __future__ import annotations

from collections import Counter

from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe

ADVISE_AFTER = 5
"""Give advice after this many steps in a row that changed nothing."""

SHOWN_AS_ZERO = 5e-4
"""A loss below this is 0.000 in views."""


class Verdicts:
    """Judge the steps of a run, one after another."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._in_a_row: Counter[str] = Counter()
        self._said_loss = False

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
        if grpo and gradient and abs(record["loss"]) < SHOWN_AS_ZERO and not self._said_loss:
            self._said_loss = True
            texts.append(
                "a loss of 0 is normal for grpo: a group's advantages add up to 0 as long as policy and sampler "
                f"agree. It learns from the gradient, whose norm is {gradient:.3g}"
            )
        return texts
