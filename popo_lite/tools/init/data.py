"""Look at problems: their columns, how long the prompts are, and what kind of answers they have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from popo_lite.errors import DataError
from popo_lite.recipe import DataRecipe, EvalRecipe, Recipe
from popo_lite.recipe_rules import is_gym
from popo_lite.tasks import open_tasks
from popo_lite.tasks.datasets import KNOWN, PROMPT_COLUMNS, DatasetTask, load_table
from popo_lite.tools.init.hub import is_unreachable
from popo_lite.types import Problem

LOOKED_AT = 200
"""Rows that decide about columns and the kind of answers."""
MEASURED = 1000
"""Prompts that are tokenised, those with the most bytes first."""
PROMPT_NAMES = (*PROMPT_COLUMNS, "instruction", "input", "query", "text", "source")
ANSWER_NAMES = ("answer", "final_answer", "solution", "reference", "target", "label", "output", "expected", "tests",
                "test", "test_list", "gold", "record", "result")  # fmt: skip
"""Usual names of columns, the likeliest first."""
PARTS_OF_PROMPTS = ("choices", "options", "input", "context", "passage")
"""Columns without which a question may not be complete."""
USUAL = 0.95
"""Part of the answers that must be of a kind; the others are named."""
KINDS = {
    "number": "numbers",
    "math": "formulas",
    "choice": "letters of choices",
    "json": "JSON",
    "tests": "tests of code",
    "short text": "short texts",
    "free text": "free text",
    "gym": "answers that reasoning-gym verifies",
}
"""Kind of reference answers -> its name in a sentence."""


@dataclass(frozen=True)
class DataFacts:
    """What is known of the problems. `problems` is empty if they could not be looked at, which a note says then.

    `rows` and `questions`, of which no two are equal, are None for problems that are generated without end.
    """

    part: DataRecipe
    problems: tuple[Problem, ...]
    rows: int | None
    kind: str
    notes: tuple[str, ...] = ()
    questions: int | None = None

    @property
    def usual(self) -> list[Problem]:
        """Problems whose answers are of the kind that most are of."""
        fits = KINDS_BY_ANSWER.get(self.kind)
        return [problem for problem in self.problems if fits is None or fits(problem.answer)]

    def described(self) -> str:
        """Return the facts on one line."""
        count = "not looked at" if not self.problems else "generated" if self.rows is None else f"{self.rows:,} rows"
        columns = ""
        if self.part.prompt_column:
            columns = f', prompts in "{self.part.prompt_column}", answers in "{self.part.answer_column}"'
        return f"{count}{columns}, the answers are {KINDS[self.kind]}"


def columns_of(name: str) -> dict[str, list[Any]]:
    """Return the columns of a file or Hub dataset with their first cells; none for what has no columns to choose."""
    if name in (*KNOWN, "arithmetic", "comparison") or name.startswith("reasoning-gym:"):
        return {}
    try:
        rows = load_table(DataRecipe(dataset=name), "data")[1]
    except DataError as error:
        raise error.within(f'data.dataset "{name}"') from error
    first = [dict(row) for row in islice(iter(rows), LOOKED_AT)]
    return {key: [row.get(key) for row in first] for key in dict.fromkeys(chain.from_iterable(first))}


def likely_columns(columns: Mapping[str, Sequence[Any]]) -> tuple[str | None, str | None, bool]:
    """Return the likely columns of prompts and answers, and whether both have the names that a recipe needs not say."""
    lower = {name.lower(): name for name in reversed(list(columns))}
    prompts = [lower[name] for name in PROMPT_NAMES if name in lower]
    answers = [lower[name] for name in ANSWER_NAMES if name in lower and lower[name] not in prompts[:1]]
    sure = sum(name in columns for name in PROMPT_COLUMNS) == 1 and "answer" in columns
    return next(iter(prompts), None), next(iter(answers), None), sure


def look_at_data(part: DataRecipe) -> DataFacts:
    """Return what the problems that `part` names are like. Raises DataError if they cannot be used as they are."""
    name = part.dataset
    try:
        task = open_tasks(Recipe(data=part, eval=EvalRecipe(problems=0)))[0]  # the file may have few rows
    except DataError as error:
        if name not in KNOWN or not is_unreachable(error):
            raise
        kind = "number" if name == "gsm8k" else "math"
        return DataFacts(part, (), None, kind, (f"could not look at {name}: offline",))
    training = task.training() if isinstance(task, DatasetTask) else None
    rows = None if training is None else len(training)
    questions = None if training is None else len({" ".join(str(one.messages).split()) for one in training})
    problems = tuple(islice(task.longest_candidates(), MEASURED))
    looked = [task.train_problem(0, index) for index in range(min(LOOKED_AT, rows or LOOKED_AT))]
    kind = "gym" if is_gym(part) else kind_of([problem.answer for problem in looked])
    if name == "comparison":
        kind = "short text"  # only the number counts, not a sentence with it
    facts = DataFacts(part, (*looked, *problems), rows, kind, questions=questions)
    notes = (*getattr(task, "notices", ()), *(() if training is None else _doubts(facts, looked)))
    return replace(facts, notes=notes)


def _doubts(facts: DataFacts, looked: Sequence[Problem]) -> Iterator[str]:
    """Yield why a part of the questions may be in another column, and which answers are unlike the others."""
    if facts.rows is not None and facts.questions is not None and facts.questions < facts.rows / 2:
        yield f"only {facts.questions:,} of {facts.rows:,} questions differ: is a part of them in another column?"
    answer = facts.part.answer_column or "answer"
    left_out = {name for problem in looked for name, cell in problem.meta.items() if cell and name != answer}
    for name in sorted(name for name in left_out if name.lower() in PARTS_OF_PROMPTS):
        yield f'column "{name}" is not in the prompts; if the questions need it, write it into their column'
    usual = {problem.id for problem in facts.usual}
    if odd := {problem.id: problem.answer for problem in looked if problem.id not in usual}:
        first = ", ".join(f"{name}: {answer!r:.40}" for name, answer in islice(odd.items(), 3))
        yield f"{len(odd)} of the first {len(looked)} answers are not {KINDS[facts.kind]} ({first})"


def kind_of(answers: Sequence[str]) -> str:
    """Return what kind of answers nearly all references are: one of `KINDS`."""
    for kind, fits in KINDS_BY_ANSWER.items():
        if sum(map(fits, answers)) < USUAL * len(answers) or (kind == "choice" and len(set(answers)) == 1):
            continue
        if kind != "math" or sum(bool(re.search(r"[\\^=]|\d", answer)) for answer in answers) > len(answers) / 2:
            return kind
    return "short text" if sum(len(answer.split()) for answer in answers) <= 4 * len(answers) else "free text"


def choices_in(answers: Sequence[str]) -> int:
    """Return the number of choices: up to the last letter that is an answer, and at least 4."""
    return max(4, *(ord(answer.strip("( ")[0].upper()) - ord("A") + 1 for answer in answers))


def schema_in(answers: Sequence[str]) -> dict[str, Any]:
    """Return a JSON Schema that all answers follow: the types of keys, and the keys that all have."""
    values = [json.loads(answer) for answer in answers]
    if not all(isinstance(value, dict) for value in values):
        return {"type": sorted({_type(value) for value in values})}
    keys = dict.fromkeys(chain.from_iterable(values))
    types = {key: sorted({_type(value[key]) for value in values if key in value}) for key in keys}
    return {
        "type": "object",
        "properties": {key: {"type": kinds[0] if len(kinds) == 1 else kinds} for key, kinds in types.items()},
        "required": [key for key in keys if all(key in value for value in values)],
    }


def _type(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_tests(answer: str) -> bool:
    found = _json(answer)
    if isinstance(found, list) and found:
        return all(isinstance(one, str) and "assert" in one for one in found) or all(
            isinstance(one, dict) and {"input", "output"} <= one.keys() for one in found
        )
    return re.search(r"^\s*assert\s|^\s*def check\(", answer, re.MULTILINE) is not None


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda answer: re.fullmatch(pattern, answer) is not None


KINDS_BY_ANSWER: dict[str, Callable[[str], bool]] = {
    "tests": _is_tests,
    "json": lambda answer: isinstance(_json(answer), dict | list),
    "choice": _matches(r"\(?[A-Ha-h](\)?[.:]?|(\)[.:]?|[.:])\s+\S.*)"),  # with text only after a separator
    "number": _matches(r"[-+]?[$€£]?\d[\d,]*(\.\d+)?%?"),
    "math": lambda answer: len(answer.split()) <= 12,
}
"""Kind -> whether an answer can be of it, the narrowest first."""
