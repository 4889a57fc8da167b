"""The task that ships for real models: which of two numbers is larger."""

from __future__ import annotations

from decimal import Decimal

import pytest

from popo_lite.errors import DataError
from popo_lite.grading import Grader
from popo_lite.recipe import RewardRecipe
from popo_lite.tasks import ComparisonTask
from popo_lite.tasks.generated import is_held_out
from popo_lite.types import Outcome


def test_problems_are_pure_and_their_answers_right():
    task = ComparisonTask()
    problems = [task.train_problem(3, index) for index in range(400)]
    assert problems == [ComparisonTask().train_problem(3, index) for index in range(400)]
    assert problems[:20] != [task.train_problem(4, index) for index in range(20)]
    for problem in problems:
        pair = problem.question.removesuffix("?").split(" or ")
        assert problem.answer == max(pair, key=Decimal)
        assert min(pair, key=Decimal) != problem.answer
        lengths = sorted(map(len, pair))
        assert lengths in ([2, 2], [3, 4])
    decimals = [problem for problem in problems if "." in problem.answer]
    assert 0.4 < len(decimals) / len(problems) < 0.6
    # The longer of two decimals is the larger one about as often as not.
    assert 0.3 < sum(len(problem.answer) == 4 for problem in decimals) / len(decimals) < 0.7
    (longest,) = task.longest_candidates()
    assert len(longest.question) == max(len(problem.question) for problem in problems)


def test_a_pair_is_held_out_in_either_order():
    task = ComparisonTask()
    problems = task.held_out(task.available)
    held_out = {frozenset(p.question.removesuffix("?").split(" or ")) for p in problems}
    assert len(held_out) == len(problems)
    assert task.held_out(40) == problems[:40]
    trained = {
        frozenset(task.train_problem(seed, i).question.removesuffix("?").split(" or "))
        for seed in range(3)
        for i in range(2000)
    }
    assert not held_out & trained
    assert not held_out & {frozenset(("3.45", "3.6")), frozenset(("52", "17"))}  # the examples
    with pytest.raises(DataError, match="only 945 problems of comparison are held out, 946 were asked for"):
        task.held_out(946)


def test_every_pair_that_is_held_out_counts_once():
    whole = ((100 * a, 100 * b) for a in range(10, 100) for b in range(10, a))
    tails = [(tenth, n) for tenth in range(1, 10) for n in range(11, 100) if n % 10 and n // 10 != tenth]
    decimals = ((100 * whole + 10 * tenth, 100 * whole + n) for whole in range(1, 10) for tenth, n in tails)
    count = sum(is_held_out("comparison", *pair) for pairs in (whole, decimals) for pair in pairs)
    assert ComparisonTask().available == count


def test_exact_accepts_the_reference_and_nothing_else():
    problem = ComparisonTask().held_out(1)[0]
    right = problem.answer
    with Grader(RewardRecipe(functions="exact", workers=1)) as grader:
        texts = [right, f" {right}\n", f"{right}.", f"{right} is larger.", f"0{right}", "", f"\\boxed{{{right}}}"]
        rewards = grader.grade([(text, problem) for text in texts])
    assert [reward.outcome for reward in rewards] == [
        Outcome.CORRECT,
        Outcome.CORRECT,
        Outcome.INCORRECT,
        Outcome.INCORRECT,
        Outcome.INCORRECT,
        Outcome.UNPARSED,
        Outcome.INCORRECT,
    ]
