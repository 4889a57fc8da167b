"""The interface of a task: problems with checkable answers, some for training and others for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from popo_lite.types import Problem


class Task(Protocol):
    """A source of problems. Problems are pure functions of the arguments."""

    @property
    def name(self) -> str:
        """Name of the task in logs and reports."""

    def train_problem(self, seed: int, index: int) -> Problem:
        """Return the `index`-th problem of the endless training stream of `seed`."""

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct problems that no training stream ever yields. Raises DataError if there are fewer."""

    def longest_candidates(self) -> Iterable[Problem]:
        """Yield training problems that include the one with the longest prompt, to check before a run."""

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Drop `unwanted` problems from training; return how many. Raises DataError if none remain."""

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Return figures of the task's own about some answers, such as ratios in [0, 1]; empty for most tasks."""
