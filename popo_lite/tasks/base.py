"""What a task is: problems with checkable answers, some to train on and others to measure with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from popo_lite.types import Problem


class Task(Protocol):
    """A source of problems. Both methods are pure functions of their arguments."""

    @property
    def name(self) -> str:
        """How the task is called in logs and reports."""

    def train_problem(self, seed: int, index: int) -> Problem:
        """The `index`-th problem of the endless training stream that belongs to `seed`."""

    def held_out(self, count: int) -> list[Problem]:
        """`count` distinct problems that no training stream ever yields. Raises DataError if there are fewer."""

    def longest_candidates(self) -> Iterable[Problem]:
        """Training problems among which is the one with the longest prompt, to be checked before a run."""

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Leave `unwanted` problems out of training; returns how many. Raises DataError where none remain."""

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Return what the task measures on answers, by name; empty for most tasks and if there are no `texts`."""
