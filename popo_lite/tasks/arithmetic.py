"""Generate the built-in task: sums of whole numbers, a pure function of (seed, index).

The two numbers alone decide whether a sum is held out, so no seed and no order can bring it into training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from popo_lite.errors import DataError
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem

HELD_OUT_ONE_IN = 10


def is_held_out(a: int, b: int) -> bool:
    """Check whether a sum is held out, as one in ten is; a + b and b + a always get the same result."""
    return stream_seed("arithmetic/split", min(a, b), max(a, b)) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class ArithmeticTask:
    """Sums of two numbers of exactly `digits` digits each."""

    digits: int = 2
    name: str = "arithmetic"

    def _draw(self, source: random.Random, *, held_out: bool) -> Problem:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        while True:
            a, b = source.randint(low, high), source.randint(low, high)
            if is_held_out(a, b) == held_out:
                messages = ({"role": "user", "content": f"What is {a} + {b}?"},)
                return Problem(id=f"arithmetic/{a}+{b}", messages=messages, answer=str(a + b))

    def train_problem(self, seed: int, index: int) -> Problem:
        """Return the `index`-th training sum of `seed`, drawn uniformly from those not held out."""
        return self._draw(random.Random(stream_seed("arithmetic/train", seed, index)), held_out=False)  # noqa: S311

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct held-out sums, the same for every seed. Raises DataError if there are too few."""
        numbers = range(10 ** (self.digits - 1), 10**self.digits)
        # Small ranges are listed to know their size; large ones always hold enough.
        available = len(numbers) ** 2 // (2 * HELD_OUT_ONE_IN)
        if self.digits <= 2:
            available = sum(is_held_out(a, b) for a in numbers for b in numbers)
        if count > available:
            what = f"only {available} sums of {self.digits}-digit numbers are held out, {count} were asked for"
            next_step = f"set eval.problems to at most {available}, or raise data.digits"
            raise DataError(what, where="eval.problems", next_step=next_step)
        source = random.Random(stream_seed("arithmetic/held-out", self.digits))  # noqa: S311
        chosen: dict[str, Problem] = {}
        while len(chosen) < count:
            problem = self._draw(source, held_out=True)
            chosen[problem.id] = problem
        return list(chosen.values())

    def longest_candidates(self) -> list[Problem]:
        """Return one sum, as all have the same number of digits."""
        return [self.train_problem(0, 0)]

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Return 0, or fail if the sums are unwanted: all have the same length."""
        if unwanted(self.train_problem(0, 0)):
            raise DataError("every sum is unwanted, so nothing remains to train on", where="data.dataset")
        return 0

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Return the share of texts that write an addition out before the boxed result; nothing without texts."""
        worked = sum("=" in text.split(r"\boxed{", maxsplit=1)[0] for text in texts)
        return {"step_by_step_ratio": worked / len(texts)} if texts else {}
