"""Compare answers that need algebra by math-verify. Only workers import it, as it can hang or exhaust memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from math_verify import parse, verify

from popo_lite.grading.functions import describe_exception
from popo_lite.grading.math import (
    THINKING_TAGS,
    after_thinking,
    decide_exactly,
    final_answer,
    plain_number,
    too_complex,
    unwrap,
)
from popo_lite.types import Outcome, Problem, Reward

# Its one warning says that its timeouts are off. They are signal.alarm, whole seconds and main thread only;
# the parent's deadline takes their place.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_UNESCAPED_DOLLAR = re.compile(r"(?<!\\)\$")

_parse: Callable[[str], list[Any]] = partial(parse, parsing_timeout=None, raise_on_error=True)
"""Return what math-verify extracts: a sympy expression, if it could build one, and the source string."""


def grade_math(
    text: str,
    problem: Mapping[str, Any],
    *,
    thinking_tags: tuple[str, str] = THINKING_TAGS,
    thinking_open: bool = False,
) -> Reward:
    """Check whether the final answer of `text` equals `problem["answer"]`.

    The final answer is the last box; in a text without one, the expression or number that math-verify takes
    for it. A reference answer that cannot be parsed is an ERROR: it says nothing about the text.
    """
    plain = Problem(id=problem["id"], messages=(), answer=problem["answer"])
    if decided := decide_exactly(text, plain, thinking_tags=thinking_tags, thinking_open=thinking_open):
        return decided
    text = after_thinking(text, thinking_tags, thinking_open) or ""
    reference = unwrap(problem["answer"])
    if reason := _unreadable(reference):
        detail = f"the reference answer of problem {problem['id']!r} is {reason}"
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
    gold = _parse_expression(reference)
    answer = final_answer(text)
    # Only the last box: given the whole text, math-verify joins all boxes of it to a set.
    found = _parse(text) if answer is None else _parse_expression(answer)
    if not found:
        return Reward(value=0.0, outcome=Outcome.UNPARSED, answer=answer)
    if answer is None:
        answer = next((item for item in found if isinstance(item, str)), None)
    if verify(gold, found, timeout_seconds=None, raise_on_error=True):
        return Reward(value=1.0, outcome=Outcome.CORRECT, answer=answer)
    return Reward(value=0.0, outcome=Outcome.INCORRECT if _holds_expression(found) else Outcome.UNPARSED, answer=answer)


def check_math(problem: Mapping[str, Any]) -> str | None:
    """Return why the reference answer of `problem` cannot be read, or None."""
    reference = unwrap(problem["answer"])
    # Parsing takes 10 ms, so references that differ in digits alone are judged together, unless that fails. Not if a
    # power or factorial is in them, which a digit more can make endless, nor by the digit 0, as in a denominator.
    alike = reference if {"^", "!"} & {*reference} else re.sub("[1-9]", "1", reference)
    if plain_number(reference) or _unreadable(alike) is None:
        return None
    reason = _unreadable(reference)
    return f"the reference answer is {reason}" if reason else None


@lru_cache(maxsize=2**16)
def _unreadable(reference: str) -> str | None:
    reason = too_complex(reference)
    try:
        if reason is None and not _holds_expression(_parse_expression(reference)):
            reason = "not an expression that math-verify can parse"
    except Exception as error:
        reason = describe_exception(error)
    return f"{reason}: {reference[:80]!r}" if reason else None


@lru_cache(maxsize=1024)
def _parse_expression(expression: str) -> list[Any]:
    # Bare LaTeX has to be in a box to be seen as such; text with formulas marks them itself.
    return _parse(expression if _UNESCAPED_DOLLAR.search(expression) else rf"\boxed{{{expression}}}")


def _holds_expression(extracted: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in extracted)
