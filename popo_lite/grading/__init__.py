"""Grade texts in processes that can be killed, and stop the run if too many cannot be graded."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

from popo_lite.errors import GradingError
from popo_lite.grading.math import decide_exactly, final_answer
from popo_lite.grading.pool import WorkerPool
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Outcome, Problem, Reward, count_outcomes

__all__ = ["GradeRequest", "Grader", "refuse_ungraded", "ungraded_ratio"]


@dataclass(frozen=True, kw_only=True)
class GradeRequest:
    """The text of one completion and the problem it answers."""

    text: str
    problem: Problem


class Grader(AbstractContextManager["Grader"]):
    """Grade answers with the recipe's reward function. A context manager; leaving it ends all processes.

    Processes are started when an answer needs one. An answer that hangs is a TIMEOUT. An answer that ends its
    process twice is an ERROR, never a silent 0. May be used from any thread.
    """

    def __init__(self, reward: RewardRecipe) -> None:
        self._exact = reward.function == "math"
        self._max_characters = reward.max_answer_characters
        self._pool = WorkerPool(reward.function, size=reward.workers, timeout_seconds=reward.timeout_seconds)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check(self) -> None:
        """Load the reward function in one worker. Raises UserInputError if that fails."""
        self._pool.start()

    def grade(self, requests: Sequence[GradeRequest]) -> list[Reward]:
        """Return one reward per request, in order.

        Raises UserInputError if the reward function cannot be loaded, and GradingError if a worker can no longer
        be started.
        """
        rewards: list[Reward | None] = []
        lines: dict[int, bytes] = {}
        texts = [request.text[-self._max_characters :] for request in requests]
        for index, (text, request) in enumerate(zip(texts, requests, strict=True)):
            problem = request.problem
            rewards.append(decide_exactly(text, problem) if self._exact else None)
            if rewards[index] is not None:
                continue
            content: dict[str, Any] = {"id": problem.id, "answer": problem.answer}
            if not self._exact:
                content |= {"question": problem.question, "meta": dict(problem.meta)}
            try:
                lines[index] = json.dumps({"text": text, "problem": content}).encode() + b"\n"
            except (TypeError, ValueError) as error:
                detail = f"problem {problem.id!r} has a meta value that JSON cannot hold: {error}"
                rewards[index] = Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
        for index, reward in zip(lines, self._pool.grade(list(lines.values())), strict=True):
            rewards[index] = reward if reward.answer is not None else replace(reward, answer=final_answer(texts[index]))
        return cast("list[Reward]", rewards)

    def close(self) -> None:
        """End all grading processes; may be called again."""
        self._pool.close()


def ungraded_ratio(rewards: Sequence[Reward]) -> float:
    """Return the share of `rewards`, in [0, 1], without a verdict; 0 if there are no rewards."""
    return sum(not reward.outcome.is_graded for reward in rewards) / len(rewards) if rewards else 0.0


def refuse_ungraded(rewards: Sequence[Reward], limit: float, where: str) -> None:
    """Raise GradingError if more than the share `limit` of `rewards` has no verdict. `where` names their source.

    To a positive-only objective a broken grader looks like a hard task; training on would hide it.
    """
    if ungraded_ratio(rewards) <= limit:
        return
    ungraded = [reward for reward in rewards if not reward.outcome.is_graded]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in count_outcomes(rewards).items() if count)
    details = [textwrap.shorten(reward.detail, 300) for reward in ungraded[:2]]
    raise GradingError(
        f"{len(ungraded)} of {len(rewards)} answers could not be graded ({counts}), more than "
        f"reward.max_ungraded_ratio = {limit:g} allows; the first: {' | '.join(details)}",
        where=where,
        next_step="for timeouts raise reward.timeout_seconds or lower reward.max_answer_characters; "
        "for errors correct reward.function or the data it names",
    )
