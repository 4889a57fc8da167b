"""Load reward functions by name and interpret their return values."""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from popo_lite.errors import UserInputError, nearest
from popo_lite.grading.reasoning_gym import grade_reasoning_gym
from popo_lite.types import Outcome, Reward


def load_function(name: str) -> Callable[[str, Mapping[str, Any]], Reward]:
    """Return the grading function called `name`: `math`, `exact`, `reasoning_gym`, or `module:function` on `sys.path`.

    Raises UserInputError if the module cannot be imported or has no such function.
    """
    if name == "math":
        from popo_lite.grading.symbolic import grade_math  # sympy is for workers only

        return grade_math
    if name == "exact":
        return grade_exact
    if name == "reasoning_gym":
        return lambda text, problem: as_reward(grade_reasoning_gym(text, problem))

    def refusal(reason: str, next_step: str = "correct it or reward.function; see docs/rewards.md") -> UserInputError:
        return UserInputError(f'"{name}" cannot be used: {reason}', where="reward.function", next_step=next_step)

    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
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
        raise refusal(reason, f'set reward.function = "{module_name}:{likely}"') if likely else refusal(reason)
    function = getattr(module, attribute)
    try:
        inspect.signature(function).bind("text", {})
    except TypeError as error:  # also if it is not callable
        raise refusal(f"it must take (text, problem): {error}") from error
    except ValueError:
        pass  # a function in C without a signature; errors then appear when it is called
    return lambda text, problem: as_reward(function(text, dict(problem)))


def grade_exact(text: str, problem: Mapping[str, Any]) -> Reward:
    """Return CORRECT if the answer is the reference, but for white space around them."""
    answer = text.strip()
    if not answer:
        return Reward(value=0.0, outcome=Outcome.UNPARSED)
    return as_reward(answer == problem["answer"].strip())


def as_reward(returned: object) -> Reward:
    """Convert a reward function's return value. Anything but None and numbers in [0, 1] is an ERROR."""
    if returned is None:
        return Reward(value=0.0, outcome=Outcome.UNPARSED)
    value = float(returned) if isinstance(returned, Real) else math.nan
    if not 0 <= value <= 1:  # written so that NaN is refused
        detail = f"the reward function returned {returned!r:.80}; a reward is a number from 0 to 1, a bool or None"
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
    return Reward(value=value, outcome=Outcome.CORRECT if value > 0.5 else Outcome.INCORRECT)


def describe_exception(error: BaseException) -> str:
    """Return the last line of the traceback and its place, such as `ValueError: no (rewards.py:12)`."""
    line = f"{type(error).__name__}: {error}".removesuffix(": ")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    if not frames or isinstance(error, SyntaxError):  # a SyntaxError names its file itself
        return line
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
