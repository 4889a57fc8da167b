"""Load reward functions by name, call them in the form that each takes, and combine their values into a reward."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from popo_lite.errors import UserInputError, nearest
from popo_lite.grading.environment import Environment, import_own, play
from popo_lite.grading.math import after_thinking
from popo_lite.recipe import EnvironmentFunction, OwnFunction, PythonTestsFunction, RewardFunction, RewardRecipe
from popo_lite.types import Outcome, Reward

MODULES = {
    "math": "popo_lite.grading.symbolic",
    "python_tests": "popo_lite.grading.sandbox",
    "environment": "popo_lite.grading.environment",
    "reasoning_gym": "popo_lite.grading.reasoning_gym",
}
"""Modules of built-in functions that are not in `builtins`."""
WHOLE_TEXT = ("regex", "length", "language", "environment")
"""Built-in functions that get the thinking, too."""

Problem = Mapping[str, Any]
"""A problem as functions get it, with `KEYS`. Requests to workers add what only TRL's functions may ask for, and
`thinking_open`: whether the thinking is open where the text starts."""
KEYS = ("id", "question", "messages", "answer", "meta")


class WrongReturnError(Exception):
    """Raised if a function returns something that is not a reward; `next_step` says what to do."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step


@dataclass(frozen=True, kw_only=True)
class Function:
    """A loaded reward function. `grade` returns None if it does not apply to the answer.

    `check` returns why the problem's reference cannot be read, or None; it is None for functions that read none.
    """

    settings: RewardFunction
    grade: Callable[[str, Problem], Reward | None]
    check: Callable[[Problem], str | None] | None = None
    trl: TrlFunction | None = None
    environment: Callable[[], Environment] | None = None


def load_functions(reward: RewardRecipe, *, thinking_open: bool) -> list[Function]:
    """Load the recipe's reward functions. Raises UserInputError for one that cannot be loaded or called.

    `thinking_open` says whether the prompt ends with the opening thinking tag.
    """
    functions = reward.functions or ()
    loaded: dict[str, Function] = {}
    # First those that import libraries alone: the user's may put the working folder on the path.
    for settings in sorted(functions, key=lambda one: isinstance(one, OwnFunction | EnvironmentFunction)):
        loaded[settings.key] = (
            _load_own(settings)
            if isinstance(settings, OwnFunction)
            else _load_builtin(settings, reward.thinking_tags, thinking_open)
        )
    return [loaded[settings.key] for settings in functions]


def _load_builtin(settings: RewardFunction, thinking_tags: tuple[str, str], thinking_open: bool) -> Function:
    """Load `grade_NAME`, and `check_NAME` if there is one; each gets those of its options that it names."""
    module = importlib.import_module(MODULES.get(settings.name, "popo_lite.grading.builtins"))
    own = settings.model_dump(exclude={"name", "weight", "label"}, by_alias=False)

    def with_options(function: Callable[..., Any]) -> partial[Any]:
        takes = inspect.signature(function).parameters
        return partial(function, **{key: value for key, value in own.items() if key in takes})

    def grade(text: str, problem: Problem) -> Reward:
        if settings.name not in WHOLE_TEXT:
            text = after_thinking(text, thinking_tags, problem.get("thinking_open", thinking_open)) or ""
        return as_reward(graded(text, problem))

    try:
        prepare = getattr(module, f"prepare_{settings.name}", None)
        own |= prepare(**own) if prepare else {}
    except ValueError as error:
        what = f'"{settings.key}" cannot be used: {error}'
        raise UserInputError(what, where="reward.functions", next_step="correct it; see docs/rewards.md") from error
    graded, check = (
        with_options(getattr(module, f"grade_{settings.name}")),
        getattr(module, f"check_{settings.name}", None),
    )
    return Function(
        settings=settings,
        environment=own.get("make"),
        grade=grade,
        check=with_options(check) if check else None,
    )


def _load_own(settings: OwnFunction) -> Function:
    """Load a function of the form `grade(text, problem)`, or of TRL's form.

    TRL's have a parameter `completions`, or only `completion_ids`.
    """
    name = settings.name

    def refusal(reason: str, next_step: str = "correct it or reward.functions; see docs/rewards.md") -> UserInputError:
        return UserInputError(f'"{name}" cannot be used: {reason}', where="reward.functions", next_step=next_step)

    module_name, _, attribute = name.partition(":")
    try:
        module = import_own(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r} on sys.path or in {Path.cwd()}"
            next_step = "start popo-lite in the folder of that module, or put the folder on PYTHONPATH"
            raise refusal(reason, next_step) from error
        raise refusal(f"importing it failed: {describe_exception(error)}") from error
    if not hasattr(module, attribute):
        file = getattr(module, "__file__", None) or "built in"
        reason = f"module {module_name!r} ({file}) has no attribute {attribute!r}"
        likely = nearest(attribute, [key for key, value in vars(module).items() if callable(value)])
        raise refusal(reason, f'set reward.functions = "{module_name}:{likely}"') if likely else refusal(reason)
    function, trl = getattr(module, attribute), None
    try:
        signature = inspect.signature(function)
        if {"completions", "completion_ids"}.isdisjoint(signature.parameters):
            signature.bind("text", {})
        else:
            trl = TrlFunction(function, signature, settings)
    except TypeError as error:  # also if it is not callable
        raise refusal(f"it must take (text, problem), or TRL's (completions, ...): {error}") from error
    except ValueError:
        pass  # a function in C without a signature; errors then appear when it is called

    def grade(text: str, problem: Problem) -> Reward | None:
        returned = trl(text, problem) if trl else function(text, {key: problem[key] for key in KEYS})
        # None of TRL's form means that it does not apply; of ours, that there is no answer.
        return None if trl and returned is None else as_reward(returned, settings.range, name)

    return Function(settings=settings, grade=grade, trl=trl)


class TrlFunction:
    """Call a reward function that was written for TRL or Unsloth, with lists of one element.

    `form` is that of `completions`: "conversational", "text", or None as long as the function takes both.
    """

    def __init__(self, function: Callable[..., Any], signature: inspect.Signature, settings: OwnFunction) -> None:
        self._function, self._names, self._name = function, signature.parameters, settings.name
        self.form: str | None = settings.completions

    def __call__(self, text: str, problem: Problem) -> object:
        """Return the function's value for the answer. Raises WrongReturnError unless it returns a list of one."""
        if self.form is not None:
            return _only(self._call(text, problem, self.form))
        # A function for text may take a list of messages without an error, and give a wrong value.
        values, errors = {}, []
        for form in ("conversational", "text"):
            try:
                values[form] = _only(self._call(text, problem, form))
            except (WrongReturnError, MemoryError):
                raise
            except Exception as error:
                errors.append(f'with completions = "{form}": {describe_exception(error)}')
        if not values:
            raise WrongReturnError("; ".join(errors), "correct the function; see docs/rewards.md")
        if len({*map(repr, values.values())}) > 1:
            what = " and ".join(f'{value!r:.40} with completions = "{form}"' for form, value in values.items())
            table = f'{{name = "{self._name}", completions = "text"}}'
            next_step = (
                f'name the form that it is written for, "text" or "conversational": reward.functions = [{table}]'
            )
            raise WrongReturnError(f"it returned {what}", next_step)
        if errors:
            (self.form,) = values
        return next(iter(values.values()))

    def _call(self, text: str, problem: Problem, form: str) -> object:
        conversational, meta = form == "conversational", problem["meta"]
        columns = {"question": problem["question"], "answer": problem["answer"], **meta}
        if isinstance(columns["answer"], str):
            columns["answer"] = problem["answer"]  # of GSM8K's "working #### 42", only 42
        # As TRL 1.15 passes them, where trainer_state has more fields, and log_extra and log_metric write to its logs.
        state = {"global_step": 0, "max_steps": 1, **problem.get("trainer_state", {})}
        given = {name: [cell] for name, cell in columns.items() if name not in ("prompt", "completion")} | {
            "prompts": [[*problem["messages"]] if conversational else problem["question"]],
            "completions": [
                problem.get("conversation") or [{"role": "assistant", "content": text}] if conversational else text
            ],
            "completion_ids": [problem.get("completion_ids", [])],
            "trainer_state": SimpleNamespace(**state),
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
        }
        parameters = self._names.values()
        needed = {
            one.name
            for one in parameters
            if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        }
        if missing := sorted(needed - given.keys()):
            there = ", ".join(f'"{name}"' for name in ({"answer": 0} | meta))
            raise WrongReturnError(
                f'it needs the column "{missing[0]}", and the rows have {there}',
                f'give the rows a column "{missing[0]}" of at most 2,000 characters, or the parameter a default',
            )
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            given = {name: value for name, value in given.items() if name in self._names}
        returned = self._function(**given)
        return asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned


async def _awaited(returned: Any) -> object:
    return await returned


def _only(returned: Any) -> object:
    """Return the value of the only completion."""
    try:
        values = list(returned)
    except TypeError:
        values = []
    if len(values) != 1 or isinstance(returned, str | bytes | Mapping):
        what = f"returned {returned!r:.80} for one completion"
        raise WrongReturnError(what, "return a list with a number, or None, for each of the completions")
    return values[0]


def as_reward(returned: object, limits: tuple[float, float] = (0.0, 1.0), name: str = "") -> Reward:
    """Convert a function's return value, from `limits` to [0, 1].

    Raises WrongReturnError if it is not a number in `limits`.
    """
    if isinstance(returned, Reward):
        return returned
    if returned is None:
        return Reward(value=0.0, outcome=Outcome.UNPARSED)
    if getattr(returned, "ndim", None) == 0:  # a number of NumPy or torch
        returned = cast("Any", returned).item()
    number = float(returned) if isinstance(returned, Real) else math.nan
    low, high = limits
    if not low <= number <= high:  # written so that NaN is refused
        what = f"the reward function returned {returned!r:.80}"
        if not math.isfinite(number):
            raise WrongReturnError(f"{what}; a reward is a number, a bool or None", "correct the function")
        wanted = f"[{min(low, math.floor(number)):.15g}, {max(high, math.ceil(number)):.15g}]"
        table = f'{{name = "{name}", range = {wanted}}}'
        raise WrongReturnError(
            f"{what}, outside its range [{low:g}, {high:g}]",
            f"declare the least and the largest value that it can return, for instance reward.functions = [{table}]",
        )
    value = (number - low) / (high - low)
    return Reward(value=value, outcome=Outcome.CORRECT if value > 0.5 else Outcome.INCORRECT)


def combine(rewards: Mapping[str, Reward | None], recipe: RewardRecipe) -> Reward:
    """Return the reward of an answer from those of the functions, by key; None for one that does not apply.

    The value is the mean by weight, in which a penalty counts 1 minus its value. A function without a verdict leaves
    the answer without one. For `positive_if`, a function that does not apply counts 0, and so does code that fails a
    test.
    """
    given = {key: reward for key, reward in rewards.items() if reward is not None}
    several = len(rewards) > 1
    for key, reward in given.items():
        if not reward.outcome.is_graded:
            detail = f"{key}: {reward.detail}" if several else reward.detail
            return Reward(value=0.0, outcome=reward.outcome, answer=reward.answer, detail=detail)
    functions = {function.key: function for function in recipe.functions or ()}
    parts = {key: reward.value for key, reward in given.items()}
    value = _mean(parts, [function for key, function in functions.items() if key in given])
    decisive = {
        key: math.floor(part) if isinstance(functions[key], PythonTestsFunction) else part
        for key, part in parts.items()
    }
    if recipe.positive_if == "total":
        positive = _mean(decisive, functions.values()) > recipe.threshold
    else:
        positive = all(decisive.get(key, 0.0) > recipe.threshold for key in recipe.positive_if)
    first = next(iter(rewards.values()))
    outcome = Outcome.UNPARSED if first is None else first.outcome
    if several and positive:
        outcome = Outcome.CORRECT
    elif several and outcome is not Outcome.UNPARSED:
        outcome = Outcome.INCORRECT
    return Reward(
        value=value,
        outcome=outcome,
        positive=positive,
        answer=next((reward.answer for reward in given.values() if reward.answer is not None), None),
        detail="; ".join(reward.detail for reward in given.values() if reward.detail),
        parts=parts,
    )


def _mean(values: Mapping[str, float], functions: Iterable[RewardFunction]) -> float:
    """Return the mean of `values` by weight; a function without a value counts 0, also if it is a penalty."""
    total = size = 0.0
    for function in functions:
        size += abs(function.weight)
        if function.key in values:
            value = values[function.key]
            total += abs(function.weight) * (value if function.weight > 0 else 1 - value)
    return min(total / size, 1.0) if size else 0.0


def grade_by_all(functions: Iterable[Function], text: str, problem: Problem, recipe: RewardRecipe) -> Reward:
    """Grade an answer by every function. One that raises makes the answer an ERROR; MemoryError passes through."""
    rewards: dict[str, Reward | None] = {}
    for function in functions:
        try:
            rewards[function.settings.key] = function.grade(text, problem)
        except MemoryError:  # which may have left broken state
            raise
        except (Exception, SystemExit) as error:
            detail = describe_exception(error)
            if isinstance(error, WrongReturnError):
                detail = f"{error}; {error.next_step}"
            rewards[function.settings.key] = Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
    return combine(rewards, recipe)


def observe(functions: Iterable[Function], problem: Problem) -> str | Reward | None:
    """Return what the environment says to the problem's conversation, None if that is over, an ERROR if it raises."""
    make = next(one.environment for one in functions if one.environment)
    try:
        _, observation, done = play(make, problem, problem["conversation"])
    except MemoryError:  # which may have left broken state: it ends this process
        raise
    except (Exception, SystemExit) as error:
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=describe_exception(error))
    return None if done else observation


def try_functions(functions: Sequence[Function], text: str, problem: Problem) -> None:
    """Call every function once. Raises UserInputError if one raises or returns no reward.

    One may raise because of a reference that it cannot read, which is for `unreadable` to say.
    """
    for function in functions:
        try:
            function.grade(text, problem)
        except (Exception, SystemExit) as error:
            if unreadable([function], problem):
                continue
            source = _source(function.settings)
            what = str(error) if isinstance(error, WrongReturnError) else describe_exception(error)
            next_step = error.next_step if isinstance(error, WrongReturnError) else f"correct {source or 'it'}"
            raise UserInputError(
                f'"{function.settings.key}"{f" ({source})" if source else ""} fails on the answer {text!r:.60} to '
                f"problem {problem['id']}: {what}",
                where="reward.functions",
                next_step=next_step,
            ) from error


def _source(settings: RewardFunction) -> str:
    """Return `file:line` of a user's function, if it is known."""
    if not isinstance(settings, OwnFunction):
        return ""
    module, _, attribute = settings.name.partition(":")
    function = inspect.unwrap(getattr(importlib.import_module(module), attribute))
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def unreadable(functions: Iterable[Function], problem: Problem) -> str:
    """Return why a function cannot read the problem's reference, or an empty string."""
    for function in functions:
        try:
            reason = function.check(problem) if function.check else None
        except Exception as error:
            reason = describe_exception(error)
        if reason:
            return reason
    return ""


def describe_exception(error: BaseException) -> str:
    """Return the last line of the traceback and its place, such as `ValueError: no (rewards.py:12)`."""
    line = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    if not frames or isinstance(error, SyntaxError):  # a SyntaxError names its file itself
        return line
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
