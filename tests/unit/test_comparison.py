"""The task that ships for real models: which of two numbers is larger."""

from __future__ import annotations

from decimal import Decimal

import pytest

from popo_lite.errors import DataError
from popo_lite.grading import Grader
from popo_lite.recipe import RewardRecipe
from popo_lite.tasks import ComparisonTask
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
        # Of two decimals the longer one is not always the larger one.
    decimals = [problem for problem in problems if "." in problem.answer]
    assert 0.4 < len(decimals) / len(problems) < 0.6
    assert 0.3 < sum(len(problem.answer) == 4 for problem in decimals) / len(decimals) < 0.7


def test_a_pair_is_held_out_in_either_order():
    task = ComparisonTask()
    held_out = {frozenset(p.question.removesuffix("?").split(" or ")) for p in task.held_out(task.available)}
    trained = {
        frozenset(task.train_problem(seed, i).question.removesuffix("?").split(" or "))
        for seed in range(3)
        for i in range(2000)
    }
    assert not held_out & trained
    assert not held_out & {frozenset(("3.45", "3.6"))}  # the example
    with pytest.raises(DataError, match="only 1500 problems of comparison are held out, 1501 were asked for"):
        task.held_out(1501)


def test_exact_accepts_the_reference_and_nothing_else():
    problem = ComparisonTask().held_out(1)[0]
    right = problem.answer
    with Grader(RewardRecipe(function="exact", workers=1)) as grader:
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
