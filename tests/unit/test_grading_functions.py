"""Finding a user's reward function, and the meaning of what it returns."""

from fractions import Fraction

import numpy
import pytest
from pydantic import ValidationError

from popo_lite.errors import UserInputError
from popo_lite.grading.functions import WrongReturnError, as_reward, describe_exception, load_functions
from popo_lite.recipe import RewardRecipe
from popo_lite.types import Outcome


@pytest.mark.parametrize(
    ("returned", "value", "outcome"),
    [
        (True, 1.0, Outcome.CORRECT),
        (False, 0.0, Outcome.INCORRECT),
        (1, 1.0, Outcome.CORRECT),
        (0.51, 0.51, Outcome.CORRECT),
        (0.5, 0.5, Outcome.INCORRECT),
        (0.0, 0.0, Outcome.INCORRECT),
        (Fraction(3, 4), 0.75, Outcome.CORRECT),
        (numpy.float32(0.25), 0.25, Outcome.INCORRECT),
        (numpy.bool_(True), 1.0, Outcome.CORRECT),
        (numpy.array(0.75), 0.75, Outcome.CORRECT),
        (None, 0.0, Outcome.UNPARSED),
    ],
)
def test_a_reward_is_a_number_from_0_to_1_or_none(returned, value, outcome):
    reward = as_reward(returned)
    assert (reward.value, reward.outcome) == (value, outcome)
    assert type(reward.value) is float


@pytest.mark.parametrize(
    "returned", [2.0, -0.001, 1.0000001, float("nan"), float("inf"), "1", [1.0], 1j, object(), (1, "because")]
)
def test_anything_else_is_an_error_that_names_it(returned):
    with pytest.raises(WrongReturnError) as caught:
        as_reward(returned)
    assert repr(returned)[:80] in str(caught.value)
    assert caught.value.next_step


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a name that no other test uses, and returns that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"rewards_{abs(hash((str(tmp_path), source)))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def load(*functions: object):
    """Return what `grade` of the first of `functions` returns."""
    return load_functions(RewardRecipe(functions=list(functions)), thinking_open=False)[0].grade


def refused(name: str) -> UserInputError:
    with pytest.raises(UserInputError) as caught:
        load(name)
    assert caught.value.exit_code == 2
    assert caught.value.where == "reward.functions"
    assert f'"{name}"' in caught.value.what
    assert caught.value.next_step
    return caught.value


def test_a_function_is_called_with_text_and_problem(module):
    name = module(
        "def grade(text, problem):\n    return problem['meta']['worth'] if text == problem['answer'] else 0\n"
    )
    grade = load(f"{name}:grade")
    assert (
        grade("7", {"id": "a", "question": "q", "messages": [], "answer": "7", "meta": {"worth": 0.75}}).value == 0.75
    )
    assert grade("8", {"id": "a", "question": "q", "messages": [], "answer": "7", "meta": {"worth": 0.75}}).value == 0.0


def test_a_module_that_is_not_there_is_refused():
    error = refused("no_such_rewards:grade")
    assert "there is no module 'no_such_rewards'" in error.what
    assert "PYTHONPATH" in error.next_step


def test_a_module_whose_own_import_is_missing_is_told_from_one_that_is_not_there(module):
    error = refused(module("import no_such_library") + ":grade")
    assert "ModuleNotFoundError: No module named 'no_such_library' (rewards_" in error.what
    assert ".py:1)" in error.what


def test_a_module_that_raises_or_exits_is_refused(module):
    assert "importing it failed: ValueError: no data" in refused(module('raise ValueError("no data")') + ":grade").what
    assert "importing it failed: SystemExit: 3" in refused(module("import sys; sys.exit(3)") + ":grade").what
    assert "importing it failed: SyntaxError" in refused(module("def grade(:") + ":grade").what


def test_a_misspelt_attribute_gets_the_nearest_name(module):
    name = module("def grade(text, problem): ...\n")
    error = refused(f"{name}:grad")
    assert "has no attribute 'grad'" in error.what
    assert f"{name}.py" in error.what
    assert f'set reward.functions = "{name}:grade"' in error.next_step


def test_an_attribute_that_cannot_be_called_so_is_refused(module):
    assert (
        "must take (text, problem), or TRL's (completions, ...): 3 is not a callable object"
        in refused(module("grade = 3") + ":grade").what
    )
    error = refused(module("def grade(text): ...") + ":grade")
    assert "must take (text, problem), or TRL's (completions, ...): too many positional arguments" in error.what
    assert "missing a required argument: 'strict'" in refused(module("def grade(t, p, strict): ...") + ":grade").what


def test_a_name_without_a_function_is_refused():
    with pytest.raises(ValidationError):
        RewardRecipe(functions="json")


def test_an_exception_is_described_with_its_place():
    try:
        int("x")
    except ValueError as error:
        line = describe_exception(error)
    assert line.startswith("ValueError: invalid literal for int() with base 10: 'x' (test_grading_functions.py:")
    assert describe_exception(MemoryError()) == "MemoryError"
