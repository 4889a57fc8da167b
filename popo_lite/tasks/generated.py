"""Generate the built-in tasks: each problem is a pure function of (seed, index).

What a problem asks alone decides whether it is held out, so no seed and no order can bring it into training.
"""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from popo_lite.errors import DataError
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem

HELD_OUT_ONE_IN = 10


def is_held_out(task: str, *asked: int) -> bool:
    """Check whether a problem is held out, as one in ten is; the order of the numbers asked about does not matter."""
    return stream_seed(f"{task}/split", *sorted(asked)) % HELD_OUT_ONE_IN == 0


class GeneratedTask(ABC):
    """Problems drawn without end; `available` of them are held out at least. A subclass draws one."""

    name: str
    available: int
    settings: tuple[int, ...] = ()
    notices: Sequence[str] = ()
    levels = 1

    @abstractmethod
    def draw(self, source: random.Random) -> tuple[tuple[int, ...], Problem]:
        """Return the numbers that a problem asks about, and the problem."""

    def train_problem(self, seed: int, index: int, level: int = 0) -> Problem:  # noqa: ARG002 - there is one level
        """Return the `index`-th training problem of `seed`, drawn uniformly from those not held out."""
        return self._draw(random.Random(stream_seed(f"{self.name}/train", seed, index)), held_out=False)  # noqa: S311

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct held-out problems, the same for every seed. Raises DataError for too many."""
        if count > self.available:
            what = f"only {self.available} problems of {self.name} are held out, {count} were asked for"
            next_step = f"set eval.problems to at most {self.available}"
            raise DataError(what, where="eval.problems", next_step=next_step)
        source = random.Random(stream_seed(f"{self.name}/held-out", *self.settings))  # noqa: S311
        chosen: dict[object, Problem] = {}
        while len(chosen) < count:
            problem = self._draw(source, held_out=True)
            chosen.setdefault(self.identity(problem), problem)
        return list(chosen.values())

    def identity(self, problem: Problem) -> object:
        """Return what is equal for two problems that count as one of those held out."""
        return problem.id

    def longest_candidates(self) -> list[Problem]:
        """Return problems, one of which is as long as any."""
        return [self.train_problem(0, 0)]

    def training(self) -> list[Problem]:
        """Return an empty list: generated problems are without end, and their answers are known to be readable."""
        return []

    def drop_training(self, reason: Callable[[Problem], str | None]) -> list[str]:
        """Return an empty list. Raises DataError if a problem has a `reason`: either all of them fit, or none."""
        if any(map(reason, self.longest_candidates())):
            what = f"problems of {self.name} do not fit into prompts of rollout.max_prompt_length"
            raise DataError(what, where="data.dataset", next_step="raise rollout.max_prompt_length")
        return []

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:  # noqa: ARG002
        """Return ratios, by name, that describe answers to the task."""
        return {}

    def _draw(self, source: random.Random, *, held_out: bool) -> Problem:
        while True:
            asked, problem = self.draw(source)
            if is_held_out(self.name, *asked) == held_out:
                return problem


class ArithmeticTask(GeneratedTask):
    """Sums of two numbers of exactly `digits` digits each."""

    name = "arithmetic"

    def __init__(self, digits: int) -> None:
        self.settings = (digits,)
        self._numbers = range(10 ** (digits - 1), 10**digits)
        # Small ranges are counted; large ones always hold this many.
        self.available = len(self._numbers) ** 2 // (2 * HELD_OUT_ONE_IN)
        if digits <= 2:
            self.available = sum(is_held_out(self.name, a, b) for a in self._numbers for b in self._numbers)

    def draw(self, source: random.Random) -> tuple[tuple[int, ...], Problem]:
        """Return two numbers and their sum."""
        a, b = (source.randint(self._numbers[0], self._numbers[-1]) for _ in range(2))
        messages = ({"role": "user", "content": f"What is {a} + {b}?"},)
        return (a, b), Problem(id=f"arithmetic/{a}+{b}", messages=messages, answer=str(a + b))

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:
        """Return the share of texts that write an addition out before the boxed result; nothing without texts."""
        worked = sum("=" in text.split(r"\boxed{", maxsplit=1)[0] for text in texts)
        return {"step_by_step_ratio": worked / len(texts)} if texts else {}


class ComparisonTask(GeneratedTask):
    """Comparisons of two numbers, such as "38 or 83?" and "9.11 or 9.9?". The answer is the larger one."""

    name = "comparison"
    available = 945  # pairs in either order; test_comparison.py counts them
    examples = (
        {"role": "system", "content": "You reply with the larger number."},
        {"role": "user", "content": "3.45 or 3.6?"},
        {"role": "assistant", "content": "3.6"},
        {"role": "user", "content": "52 or 17?"},
        {"role": "assistant", "content": "52"},
    )

    def draw(self, source: random.Random) -> tuple[tuple[int, ...], Problem]:
        """Return two numbers in hundredths, and the problem: two digits each, or one and two decimals."""
        if source.random() < 0.5:
            pair = tuple(100 * number for number in source.sample(range(10, 100), 2))
        else:
            whole, tenth = source.randint(1, 9), source.randint(1, 9)
            others = [n for n in range(11, 100) if n % 10 and n // 10 != tenth]
            pair = (100 * whole + 10 * tenth, 100 * whole + source.choice(others))
            pair = pair if source.random() < 0.5 else pair[::-1]
        first, second = (f"{number / 100:g}" for number in pair)
        question = {"role": "user", "content": f"{first} or {second}?"}
        answer = first if pair[0] > pair[1] else second
        return pair, Problem(id=f"{self.name}/{first},{second}", messages=(*self.examples, question), answer=answer)

    def identity(self, problem: Problem) -> object:
        """Return the pair of numbers without its order."""
        return frozenset(problem.id.removeprefix(f"{self.name}/").split(","))

    def longest_candidates(self) -> list[Problem]:
        """Return a problem with decimals. All of these have the same number of characters."""
        problems = (self.train_problem(0, index) for index in itertools.count())
        return [next(problem for problem in problems if "." in problem.answer)]
