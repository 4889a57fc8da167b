"""Read published benchmarks, check every row, and compare numbers within a tolerance."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from popo_lite.errors import DataError, UserInputError, nearest
from popo_lite.grading import Grader
from popo_lite.grading.math import normalise, plain_number, unwrap
from popo_lite.recipe import EvalRecipe
from popo_lite.tasks.datasets import RESULT_LINE, CellError, load_table, read_records, read_text, shown
from popo_lite.types import Outcome, Problem, Reward

_NUMBER = re.compile(r"-?(\d+|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?")
_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{(\d+)\}\{(0*[1-9]\d*)\}|(\d+)/(0*[1-9]\d*))")
_TOLERANCE = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)


def _number(cell: object) -> str:
    """Read a number, as text or as the floating-point number that AMC's table on the Hub holds: 27.0."""
    text = str(cell).strip()
    number = plain_number(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
    if number is None:
        raise CellError(f"is {shown(cell)}, not a number")
    return number


def _integer(cell: object) -> str:
    """Read an AIME answer, an integer from 0 to 999 that may have leading zeros: 033."""
    number = plain_number(str(cell).strip()) or ""
    if not re.fullmatch(r"\d{1,3}", number):
        raise CellError(f"is {shown(cell)}, not an integer from 0 to 999")
    return number


def _final_answers(cell: object) -> str:
    """Read OlympiadBench's list of LaTeX texts; an answer must name all of them, in any order."""
    if not isinstance(cell, list) or not cell:
        raise CellError(f"is {shown(cell)}, not a list of answers")
    return ", ".join(map(read_text, cell))


def _result_line(cell: object) -> str:
    """Read the result from the last line of a GSM8K solution: `#### 1,200`."""
    if (line := RESULT_LINE.search(read_text(cell))) is None:
        raise CellError('does not end in a line "#### result"')
    return _number(line[1].replace("$", ""))


def _tolerances(cell: object) -> tuple[str, ...]:
    """Read OlympiadBench's tolerances: 1e-2, or 1e-1,1e-2 for several answers; an empty part is 0."""
    tolerances = tuple(part.strip() or "0" for part in str(cell).split(","))
    if not all(map(_TOLERANCE.fullmatch, tolerances)):
        raise CellError(f"is {shown(cell)}, not a tolerance or several between commas")
    return tolerances


@dataclass(frozen=True)
class Benchmark:
    """A published set of problems; `read_answer` raises CellError for cells of another form."""

    title: str
    hub_id: str
    config: str | None
    split: str
    prompt_column: str
    answer_column: str
    problems: int
    read_answer: Callable[[object], str]
    context_column: str | None = None
    tolerance_column: str | None = None


BENCHMARKS: Mapping[str, Benchmark] = {  # docs/evaluation.md: source of each entry, and which are not confirmed
    "math500": Benchmark("MATH-500", "HuggingFaceH4/MATH-500", None, "test", "problem", "answer", 500, read_text),
    "amc23": Benchmark("AMC23", "math-ai/amc23", None, "test", "question", "answer", 40, _number),
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024", None, "train", "problem", "answer", 30, _integer),
    "aime25": Benchmark("AIME25", "math-ai/aime25", None, "test", "problem", "answer", 30, _integer),
    "olympiadbench": Benchmark(
        "OlympiadBench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", 674,
        _final_answers, context_column="context", tolerance_column="error",
    ),
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k", "main", "test", "question", "answer", 1319, _result_line),
}  # fmt: skip

PAPER = ("math500", "amc23", "aime24", "aime25", "olympiadbench")  # those that POPO was published with, in its order


def benchmark_names(text: str) -> tuple[str, ...]:
    """Return the benchmarks named in `paper` or a comma-separated list, each once. Raises UserInputError."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name != "paper" and name not in BENCHMARKS:
            likely = nearest(name, [*BENCHMARKS, "paper"])
            next_step = f'did you mean "{likely}"?' if likely else f"choose from paper, {', '.join(BENCHMARKS)}"
            raise UserInputError(f'there is no benchmark "{name}"', where="--benchmarks", next_step=next_step)
        names += PAPER if name == "paper" else [name]
    return tuple(dict.fromkeys(names))


def open_benchmark(name: str, file: Path | None = None) -> list[Problem]:
    """Return all problems of the benchmark, from `file` in the form of the Hub's rows, or from the Hub.

    Ids are `name/row`, with rows numbered from 1. `meta["tolerance"]` holds how far the numbers of an answer may be
    off, as decimals: one for all of them, or one for each in order. Raises DataError if the rows cannot be loaded, or
    with a list of all rows that are not of the benchmark's form.
    """
    benchmark = BENCHMARKS[name]
    try:
        hub = EvalRecipe(dataset=benchmark.hub_id, config=benchmark.config, split=benchmark.split)
        table = read_records(file) if file else load_table(hub, "eval")[1]
        rows = table if isinstance(table, list) else [(f"row {number}", row) for number, row in enumerate(table, 1)]
        columns = list(dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row))
        if not rows:
            raise DataError("holds no rows", next_step="name a file with at least one row")
        for wanted in (benchmark.prompt_column, benchmark.answer_column):
            if columns and wanted not in columns:
                likely = nearest(wanted, columns)
                next_step = f'rename "{likely}"' if likely else "rename the column that holds it"
                raise DataError(f'has no column "{wanted}"; its columns are {", ".join(columns)}', next_step=next_step)
        read = {label: _problem(benchmark, f"{name}/{n}", row) for n, (label, row) in enumerate(rows, 1)}
        if errors := [f"{label}: {row}" for label, row in read.items() if isinstance(row, str)]:
            what = "\n    ".join([f"{len(errors)} of {len(rows)} rows are not {benchmark.title}'s:", *errors])
            next_step = "correct these rows; without them this would be another benchmark"
            raise DataError(what, next_step=next_step)
    except DataError as error:
        where = f"--data {name}={file}" if file else f"{name} ({benchmark.hub_id})"
        local_copy = f"check the connection, or give a local copy of it with --data {name}=FILE"
        raise DataError(error.what, where=where, next_step=error.next_step if file else local_copy) from error
    return [problem for problem in read.values() if isinstance(problem, Problem)]


def _problem(benchmark: Benchmark, problem_id: str, row: Mapping[str, Any] | str) -> Problem | str:
    """Return the problem in `row`, or an error message."""
    if isinstance(row, str):
        return row
    readers = [(benchmark.prompt_column, read_text), (benchmark.answer_column, benchmark.read_answer)]
    optional = [(benchmark.context_column, read_text), (benchmark.tolerance_column, _tolerances)]
    cells: dict[str | None, Any] = {}
    for column, read in [*readers, *((column, read) for column, read in optional if column and row.get(column))]:
        try:
            if row.get(column) is None:
                raise CellError("is missing")
            cells[column] = read(row[column])
        except CellError as error:
            return f'column "{column}" {error}'
    asked = filter(None, (cells.get(benchmark.context_column), cells[benchmark.prompt_column]))
    message = {"role": "user", "content": "\n".join(asked)}
    meta = {"tolerance": cells[benchmark.tolerance_column]} if benchmark.tolerance_column in cells else {}
    return Problem(id=problem_id, messages=(message,), answer=cells[benchmark.answer_column], meta=meta)


def unreadable_references(problems: Sequence[Problem], grader: Grader) -> dict[str, str]:
    """Return problem id -> why nothing can be graded against its answer, for each problem that cannot be graded."""
    found = grader.unreadable(problems)
    for problem in problems:
        tolerances, numbers = problem.meta.get("tolerance", ()), _numbers(unwrap(problem.answer))
        if numbers is not None and len(tolerances) not in (0, 1, len(numbers)):
            what = f"it names {len(tolerances)} tolerances for the {len(numbers)} numbers of {problem.answer!r}"
            found[problem.id] = what
    return found


def within_tolerance(reward: Reward, problem: Problem) -> Reward:
    """Return `reward`, made correct if its numbers, in any order, are within the problem's `tolerance`.

    Numbers are integers, decimals and fractions of integers, compared exactly.
    """
    if reward.outcome is not Outcome.INCORRECT or "tolerance" not in problem.meta or reward.answer is None:
        return reward
    given, wanted = _numbers(reward.answer), _numbers(unwrap(problem.answer))
    if given is None or wanted is None or len(given) != len(wanted):
        return reward
    tolerances = [Fraction(text) for text in problem.meta["tolerance"]]
    tolerances *= len(wanted) if len(tolerances) == 1 else 1
    # Matching each interval, in order of its upper end, with the least number in it finds a full match if there is one.
    rest = sorted(given)
    for high, low in sorted((x + off, x - off) for x, off in zip(wanted, tolerances, strict=True)):
        inside = next((number for number in rest if low <= number <= high), None)
        if inside is None:
            return reward
        rest.remove(inside)
    return replace(reward, value=1.0, outcome=Outcome.CORRECT, positive=True)


def _numbers(answer: str) -> list[Fraction] | None:
    """Return the number, or the numbers between commas, of an answer in normal form; None for other answers."""
    numbers = []
    for part in [answer] if plain_number(answer) else map(normalise, answer.split(",")):
        fraction = _FRACTION.fullmatch(part)
        number = fraction.expand(r"\1\2\4/\3\5") if fraction else plain_number(part)
        if number is None:
            return None
        numbers.append(Fraction(number))
    return numbers
