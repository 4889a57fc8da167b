"""Propose a reward function for a kind of answers, and try it on references with the real grader."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

from popo_lite.errors import RecipeError, UserInputError
from popo_lite.grading import Grader
from popo_lite.recipe import (
    EnvironmentFunction,
    LanguageFunction,
    LengthFunction,
    MathFunction,
    OwnFunction,
    PythonTestsFunction,
    Recipe,
    RegexFunction,
)
from popo_lite.tools.init.data import DataFacts, choices_in, schema_in
from popo_lite.types import Problem

TRIED = 3
"""References that are graded before the recipe is written."""
SOLUTIONS = ("solution", "canonical_solution", "code")
"""Columns that may hold a solution which passes the tests."""


class Proposal(NamedTuple):
    """A value of `reward.functions`, why it is chosen, how to ask for such answers, and their usual length."""

    functions: Any
    why: str
    system_prompt: str | None = None
    completion_tokens: int = 1024


class Trial(NamedTuple):
    """A reference, what was graded in its place, and the verdicts: None if there is nothing to grade."""

    reference: str
    answer: str | None
    is_right: bool | None
    empty_is_right: bool
    detail: str


BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def propose(data: DataFacts) -> Proposal | None:
    """Return the built-in function for the answers in `data`, or None if none can say whether an answer is right."""
    answers = [problem.answer for problem in data.usual]
    if data.part.dataset == "comparison":
        return Proposal("exact", "the number alone is asked for, not a sentence with it", None, 16)
    if data.kind == "gym":
        answer = "Put your final answer, and nothing else, between <answer> and </answer>."
        return Proposal("reasoning_gym", "the task's own verifier", answer)
    if data.kind in ("number", "math"):
        return Proposal("math", "compares the final answer with the reference as mathematics", BOXED)
    if data.kind == "choice":
        prompt = "Think step by step. End with: The answer is X, where X is the letter of the right choice."
        table = {"name": "choice", "choices": choices_in(answers)}
        return Proposal([table], "compares the last choice that the answer states", prompt)
    if data.kind == "json":
        schema = schema_in(answers)
        keys = ", ".join(f'"{key}"' for key in schema.get("properties", ()))
        prompt = f"Reply with a JSON object that has the keys {keys}, and nothing else." if keys else "Reply with JSON."
        table = {"name": "json_schema", "schema": schema, "equals_reference": True}
        return Proposal([table], "valid by the references' schema, and equal to the reference", prompt, 512)
    if data.kind == "tests":
        prompt = "Reply with the Python code in one fenced block."
        return Proposal("python_tests", "runs the code against the tests, contained", prompt)
    if data.kind == "short text":
        prompt = "Reply with the answer alone, without a sentence around it."
        return Proposal("exact", "the answer must be the reference itself", prompt, 64)
    return None


def read_functions(text: str) -> Any:
    """Return `--reward`, a name or TOML such as `{name = "numeric", tolerance = 0.01}`, as recipes hold it."""
    if not text.startswith(("{", "[")):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError as error:
        next_step = """give a name, or --reward '{name = "numeric", tolerance = 0.01}'"""
        raise RecipeError(f"{text!r:.80} is not TOML: {error}", where="--reward", next_step=next_step) from error
    return [value] if isinstance(value, dict) else value


def try_reward(recipe: Recipe, problems: Sequence[Problem]) -> list[Trial]:
    """Grade the references of the first problems as answers, and an empty answer to each.

    Raises UserInputError if an empty answer is right, or if a built-in function finds a reference wrong.
    """
    tried = list({problem.answer: problem for problem in problems}.values())[:TRIED]
    if any(isinstance(one, EnvironmentFunction) for one in recipe.reward.functions or ()):
        next_step = "write that recipe by hand: docs/environments.md, examples/guessing_game"
        raise UserInputError("a conversation has no single answer to look at", where="--reward", next_step=next_step)
    answers = [_as_answer(recipe, problem) for problem in tried]
    with Grader(recipe.grading) as grader:
        grader.check(tried)
        unreadable = grader.unreadable(tried)
        pairs = [(answer or "", problem) for answer, problem in zip(answers, tried, strict=True)]
        right, empty = grader.grade(pairs), grader.grade([("", problem) for problem in tried])
    trials = []
    for problem, answer, verdict, nothing in zip(tried, answers, right, empty, strict=True):
        is_right = None if answer is None else verdict.positive
        detail = unreadable.get(problem.id) or ("" if is_right else verdict.detail)
        trials.append(Trial(problem.answer, answer, is_right, nothing.positive, detail))
        if nothing.positive:
            what = f"an empty answer to problem {problem.id} counts as right"
            raise UserInputError(what, where="--reward", next_step="choose or correct the function (docs/rewards.md)")
        own = any(isinstance(one, OwnFunction) for one in recipe.reward.functions or ())
        if problem.id in unreadable or (is_right is False and not own):
            what = f"the reference of problem {problem.id}, {problem.answer!r:.60}, given as answer is not right"
            what += f": {detail}" if detail else ""
            next_step = "choose another --reward (docs/rewards.md), or another column with --answer-column"
            raise UserInputError(what, where="--reward", next_step=next_step)
    return trials


def _as_answer(recipe: Recipe, problem: Problem) -> str | None:
    """Return the reference in the form of an answer; None for tests that come without a solution."""
    form = (RegexFunction, LengthFunction, LanguageFunction)
    main = next((one for one in recipe.grading.functions or () if not isinstance(one, form)), None)
    if isinstance(main, PythonTestsFunction):
        return next((str(problem.meta[name]) for name in SOLUTIONS if problem.meta.get(name)), None)
    return rf"\boxed{{{problem.answer}}}" if isinstance(main, MathFunction) else problem.answer
