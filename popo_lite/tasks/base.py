"""Define the interface of a task: a source of training and evaluation problems."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from popo_lite.types import Problem


class Task(Protocol):
    """A source of problems. `train_problem` and `held_out` are pure functions of their arguments."""

    @property
    def name(self) -> str:
        """Return the name for logs and reports."""

    def train_problem(self, seed: int, index: int) -> Problem:
        """Return the `index`-th problem of the endless training stream of `seed`."""

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct problems that no training stream yields. Raises DataError if there are fewer."""

    def longest_candidates(self) -> Iterable[Problem]:
        """Return training problems that include the one with the longest prompt, to check before a run."""

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Remove `unwanted` problems from training and return how many. Raises DataError if none remains."""

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Return what the task measures on answers, by name; empty for most tasks and if there are no `texts`."""
