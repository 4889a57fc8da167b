"""Notice when right answers come to look alike, as they do when the reward is gamed. Free of torch.

The shape of an answer is its text with `_` for every number and name that it copies from the question. So "38 is larger
than 83." and "12 is larger than 90." have one shape, and two sums that were worked out do not: their results stand in
no question. A shape that several prompts share is a fixed text with copied parts, which takes no work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from popo_lite.metrics import StepRecord
from popo_lite.types import Group, Rollout

TAKES_OVER = 0.5
"""A shape takes over with this fraction of the positives: most of the update then comes from it."""

RARE = 0.1
"""Largest fraction of the first step's answers that counts as rare. More is a habit that the model came with."""

TAKEOVER_STEPS = 5
"""Report a shape when it has taken over in this many steps: in a single one, with few positives, it may be chance."""

_END = 100  # characters kept of either end of a long text
_WORD = re.compile(r"\d+|[^\W\d]+")


def shape_of(text: str, question: str) -> str:
    """Return the shape of `text`. Names are the words of the question that are not in lower case."""
    copied = {word for word in _WORD.findall(question) if not word.islower()}
    return _WORD.sub(lambda match: "_" if match[0] in copied else match[0], _ends(text))


def start_shapes(groups: Sequence[Group], first_round: int) -> dict[str, int]:
    """Count the shapes of the graded answers among the first `first_round` of each prompt."""
    rollouts = [rollout for group in groups for rollout in group.rollouts[:first_round]]
    graded = [rollout for rollout in rollouts if rollout.reward.outcome.is_graded]
    return dict(Counter(shape_of(r.completion.text, r.prompt.problem.question) for r in graded))


def shape_metrics(groups: Sequence[Group], start: Mapping[str, int]) -> dict[str, Any]:
    """Return the metrics of the positives' most frequent shape, of those that answers to several prompts share.

    Answers to a single prompt may well be equal, so what only they share says nothing. Without `start`, the shapes of
    the first step, the share at the start is unknown.
    """
    found = _positives_by_shape(groups)
    shared = [shape for shape, rollouts in found.items() if len({r.prompt.problem.id for r in rollouts}) > 1]
    top = max(shared, key=lambda shape: len(found[shape]), default=None)
    return {
        "top_shape": top,
        "top_shape_ratio": (0 if top is None else len(found[top])) / sum(map(len, found.values())) if found else None,
        "top_shape_start_ratio": start.get(top, 0) / sum(start.values()) if top is not None and start else None,
    }


def count_takeover(steps: Mapping[str, int], record: StepRecord) -> dict[str, int]:
    """Return `steps`, the number of steps in which each shape took over, with the step of `record` counted.

    A shape that was frequent at the start never takes over.
    """
    shape = record["top_shape"]
    return {**steps, shape: steps.get(shape, 0) + 1} if _takes_over(record) else dict(steps)


def takeover_message(record: StepRecord, groups: Sequence[Group], steps: Mapping[str, int]) -> str | None:
    """Return what to print if this is the step that makes `TAKEOVER_STEPS` for a shape; `steps` counts it."""
    shape, now, start = (record[name] for name in ("top_shape", "top_shape_ratio", "top_shape_start_ratio"))
    if not _takes_over(record) or steps[shape] != TAKEOVER_STEPS:
        return None
    by_prompt = {rollout.prompt.problem.id: rollout for rollout in _positives_by_shape(groups)[shape]}
    examples = [(r.completion.text, r.prompt.problem.answer) for r in by_prompt.values()]
    return "\n".join(
        (
            f'step {record["step"] + 1}: {now:.0%} of the right answers look alike: "{shape}"',
            f"(_ is copied from the question.) Of all answers of the first step, {start:.1%} did. Examples:",
            *(f'"{_ends(text)}" counts as right; the reference is {_ends(answer)}' for text, answer in examples[:2]),
            "Look at them, and at samples.jsonl. The model may have learned the form that you want. If such answers "
            "should not count as right, tighten the reward: reward.functions (docs/rewards.md)",
        )
    )


def _takes_over(record: StepRecord) -> bool:
    if record["top_shape_start_ratio"] is None or record["top_shape_start_ratio"] > RARE:
        return False
    # As long as few answers are right, a shape can have most of them and still be as rare as at the start.
    common = record["top_shape_ratio"] * record["positives"] > RARE * record["rollouts"]
    return common and bool(record["top_shape_ratio"] >= TAKES_OVER)


def _positives_by_shape(groups: Sequence[Group]) -> dict[str, list[Rollout]]:
    found: dict[str, list[Rollout]] = {}
    for rollout in (rollout for group in groups for rollout in group.positives):
        shape = shape_of(rollout.completion.text, rollout.prompt.problem.question)
        found.setdefault(shape, []).append(rollout)
    return found


def _ends(text: str) -> str:
    """Return `text` on one line, without the middle if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= 2 * _END else f"{text[:_END]} … {text[-_END:]}"
