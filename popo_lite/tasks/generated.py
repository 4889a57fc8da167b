"""Generate the built-in tasks: each problem is a pure function of (seed, index).

What a problem asks alone decides whether it is held out, so no seed and no order can bring it into training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta

from popo_lite.errors import DataError
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem

HELD_OUT_ONE_IN = 10


def is_held_out(task: str, *asked: int) -> bool:
    """Check whether a problem is held out, as one in ten is; the order of the numbers asked about does not matter."""
    return stream_seed(f"{task}/split", *sorted(asked)) % HELD_OUT_ONE_IN == 0


class GeneratedTask:
    """Problems drawn without end; `available` of them are held out at least. A subclass draws one."""

    name: str
    available: int
    settings: tuple[int, ...] = ()

    def draw(self, source: random.Random) -> tuple[tuple[int, ...], Problem]:
        """Return the numbers that a problem asks about, and the problem."""
        raise NotImplementedError

    def train_problem(self, seed: int, index: int) -> Problem:
        """Return the `index`-th training problem of `seed`, drawn uniformly from those not held out."""
        return self._draw(random.Random(stream_seed(f"{self.name}/train", seed, index)), held_out=False)  # noqa: S311

    def held_out(self, count: int) -> list[Problem]:
        """Return `count` distinct held-out problems, the same for every seed. Raises DataError for too many."""
        if count > self.available:
            what = f"only {self.available} problems of {self.name} are held out, {count} were asked for"
            next_step = f"set eval.problems to at most {self.available}"
            raise DataError(what, where="eval.problems", next_step=next_step)
        source = random.Random(stream_seed(f"{self.name}/held-out", *self.settings))  # noqa: S311
        chosen: dict[str, Problem] = {}
        while len(chosen) < count:
            problem = self._draw(source, held_out=True)
            chosen[problem.id] = problem
        return list(chosen.values())

    def longest_candidates(self) -> list[Problem]:
        """Return problems, one of which is as long as any."""
        return [self.train_problem(0, 0)]

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Return 0. Raises DataError if a problem is unwanted: generated problems fit all or not at all."""
        if any(map(unwanted, self.longest_candidates())):
            what = f"problems of {self.name} do not fit into prompts of rollout.max_prompt_length"
            raise DataError(what, where="data.dataset", next_step="raise rollout.max_prompt_length")
        return 0

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


class DatesTask(GeneratedTask):
    """Dates as people write them, to be written as ISO 8601 has them. The answer is the date and nothing else."""

    name = "dates"
    first, days = date(1950, 1, 1), 27_000
    available = 2_000

    def draw(self, source: random.Random) -> tuple[tuple[int, ...], Problem]:
        """Return the number of a day, and its date in one of the written forms."""
        number, form = source.randrange(self.days), source.randrange(3)
        return (number,), self._problem(self.first + timedelta(days=number), form)

    def longest_candidates(self) -> list[Problem]:
        """Return the longest day of every month in every form."""
        return [self._problem(date(1999, month, 22), form) for month in range(1, 13) for form in range(3)]

    def _problem(self, day: date, form: int) -> Problem:
        ending = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
        month = MONTHS[day.month - 1]
        written = (
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month} {day.year}",
            f"the {day.day}{ending} of {month}, {day.year}",
        )[form]
        messages = (*EXAMPLES, {"role": "user", "content": written})
        return Problem(id=f"dates/{written}", messages=messages, answer=day.isoformat())


# Not strftime's, which follow the locale.
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
EXAMPLES = (
    {"role": "system", "content": "You write dates as YYYY-MM-DD."},
    {"role": "user", "content": "March 5, 1999"},
    {"role": "assistant", "content": "1999-03-05"},
    {"role": "user", "content": "24 December 2010"},
    {"role": "assistant", "content": "2010-12-24"},
)
