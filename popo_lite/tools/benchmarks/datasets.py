"""Read published benchmarks and check every row.

`docs/evaluation.md` says where each entry of the table is from, and which could not be confirmed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from popo_lite.errors import DataError, UserInputError, nearest
from popo_lite.recipe import EvalRecipe
from popo_lite.tasks.datasets import SUFFIXES, Place, Record, load_table, read_records
from popo_lite.types import Problem

_RESULT_LINE = re.compile(r"^####(?!#)[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
_NUMBER = re.compile(r"-?(\d+|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?")
_AIME_ANSWER = re.compile(r"\d{1,3}")
_TOLERANCE = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.IGNORECASE)

T = TypeVar("T")


class _CellError(Exception):
    """A cell of another form than the benchmark's. The message continues "column ... "."""


def _text(cell: object) -> str:
    """Read LaTeX or other text."""
    if not isinstance(cell, str):
        raise _CellError(f"is {_shown(cell)}, not text")
    if not cell.strip():
        raise _CellError("is empty")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise _CellError("holds half a surrogate pair, which is not a character") from error
    return cell.strip()


def _number(cell: object) -> str:
    """Read a number, as text or as the floating-point number that AMC's table on the Hub holds: 27.0."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, float) and math.isfinite(cell):
        return str(int(cell)) if cell == int(cell) else str(cell)
    if isinstance(cell, str) and _NUMBER.fullmatch(cell.strip()):
        plain = cell.strip().replace(",", "")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    raise _CellError(f"is {_shown(cell)}, not a number")


def _integer(cell: object) -> str:
    """Read an AIME answer, an integer from 0 to 999 that may have leading zeros: 033."""
    answer = cell.strip() if isinstance(cell, str) else _number(cell)
    if not _AIME_ANSWER.fullmatch(answer):
        raise _CellError(f"is {_shown(cell)}, not an integer from 0 to 999")
    return str(int(answer))


def _final_answers(cell: object) -> str:
    """Read OlympiadBench's list of LaTeX texts; an answer must name all of them, in any order."""
    if not isinstance(cell, list) or not cell:
        raise _CellError(f"is {_shown(cell)}, not a list of answers")
    return ", ".join(map(_text, cell))


def _result_line(cell: object) -> str:
    """Read the result from the last line of a GSM8K solution: `#### 1,200`."""
    line = _RESULT_LINE.search(_text(cell))
    if line is None:
        raise _CellError('does not end in a line "#### result"')
    return _number(line[1].replace("$", ""))


def _tolerances(cell: object) -> tuple[str, ...]:
    """Read OlympiadBench's tolerances: 1e-2, or 1e-1,1e-2 for several answers; an empty part is 0."""
    tolerances = tuple(part.strip() or "0" for part in str(cell).split(","))
    if not all(map(_TOLERANCE.fullmatch, tolerances)):
        raise _CellError(f"is {_shown(cell)}, not a tolerance or several between commas")
    return tolerances


@dataclass(frozen=True)
class Benchmark:
    """A published set of problems; `read_answer` raises _CellError for cells of another form."""

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


BENCHMARKS: Mapping[str, Benchmark] = {
    "math500": Benchmark("MATH-500", "HuggingFaceH4/MATH-500", None, "test", "problem", "answer", 500, _text),
    "amc23": Benchmark("AMC23", "math-ai/amc23", None, "test", "question", "answer", 40, _number),
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024", None, "train", "problem", "answer", 30, _integer),
    "aime25": Benchmark("AIME25", "math-ai/aime25", None, "test", "problem", "answer", 30, _integer),
    "olympiadbench": Benchmark(
        "OlympiadBench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", 674,
        _final_answers, context_column="context", tolerance_column="error",
    ),
    "gsm8k": Benchmark("GSM8K", "openai/gsm8k", "main", "test", "question", "answer", 1319, _result_line),
}  # fmt: skip

PAPER = ("math500", "amc23", "aime24", "aime25", "olympiadbench")
"""The benchmarks that POPO was published with, in its order."""


def benchmark_names(text: str) -> tuple[str, ...]:
    """Return the benchmarks named in `paper` or a comma-separated list, each once. Raises UserInputError."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if name != "paper" and name not in BENCHMARKS:
            likely = nearest(name, [*BENCHMARKS, "paper"])
            raise UserInputError(
                f'there is no benchmark "{name}"',
                where="--benchmarks",
                next_step=f'did you mean "{likely}"?' if likely else f"choose from paper, {', '.join(BENCHMARKS)}",
            )
        names += PAPER if name == "paper" else [name]
    return tuple(dict.fromkeys(names))


def open_benchmark(
    name: str,
    file: Path | None = None,
    *,
    check_references: Callable[[Sequence[Problem]], Sequence[str | None]] | None = None,
) -> list[Problem]:
    """Return all problems of the benchmark, from `file` in the form of the Hub's rows, or from the Hub.

    Ids are `name/row`, with rows numbered from 1. `meta["tolerance"]` holds how far the numbers of an answer may be
    off, as decimals: one for all of them, or one for each in order. `check_references` returns for each problem why
    nothing can be graded against its answer, or None.

    Raises DataError if the rows cannot be loaded, or with a list of all rows that are not of the benchmark's form.
    """
    benchmark = BENCHMARKS[name]
    place = _BenchmarkPlace(section="eval", dataset=str(file or benchmark.hub_id), benchmark=name, local=bool(file))
    rows = _rows(benchmark, file, place)
    read = [_problem(benchmark, f"{name}/{number}", row) for number, (_, row) in enumerate(rows, 1)]
    problems = [problem for problem in read if isinstance(problem, Problem)]
    reasons = iter(check_references(problems) if check_references else [None] * len(problems))
    errors = [
        f"{label}: {error}"
        for (label, _), result in zip(rows, read, strict=True)
        if (error := result if isinstance(result, str) else next(reasons))
    ]
    if errors:
        raise place.error(
            "\n    ".join([f"{len(errors)} of {len(rows)} rows are not {benchmark.title}'s:", *errors]),
            "correct these rows; without them this would be another benchmark",
        )
    return problems


@dataclass(frozen=True, kw_only=True)
class _BenchmarkPlace(Place):
    """Name a benchmark's place on the command line."""

    benchmark: str
    local: bool

    def error(self, what: str, next_step: str) -> DataError:
        """Return an error about this benchmark; for the Hub's, the next step is a local copy."""
        where = f"--data {self.benchmark}={self.dataset}" if self.local else f"{self.benchmark} ({self.dataset})"
        local_copy = f"check the connection, or give a local copy of it with --data {self.benchmark}=FILE"
        return DataError(what, where=where, next_step=next_step if self.local else local_copy)


def _rows(benchmark: Benchmark, file: Path | None, place: Place) -> Sequence[Record]:
    if file is not None and file.suffix not in SUFFIXES:
        raise place.error(f"is not a file of a known kind ({', '.join(SUFFIXES)})", "name such a file")
    columns: Collection[str]
    records: Sequence[Record]
    if file is None or file.suffix == ".parquet":
        config, split = (None, None) if file else (benchmark.config, benchmark.split)
        table = load_table(EvalRecipe(dataset=place.dataset, config=config, split=split), place)[1]
        columns, records = table.column_names, [(f"row {number}", row) for number, row in enumerate(table, 1)]
    else:
        records = read_records(file, place)
        columns = {name: None for _, row in records if isinstance(row, dict) for name in row}
    if not records:
        raise place.error("holds no rows", "name a file with at least one row")
    for wanted in (benchmark.prompt_column, benchmark.answer_column):
        if columns and wanted not in columns:
            likely = nearest(wanted, columns)
            raise place.error(
                f'has no column "{wanted}"; its columns are {", ".join(columns)}',
                f'rename "{likely}"' if likely else "rename the column that holds it",
            )
    return records


def _problem(benchmark: Benchmark, problem_id: str, row: Mapping[str, Any] | str) -> Problem | str:
    """Return the problem in `row`, or an error message."""
    if isinstance(row, str):
        return row
    context, tolerance = benchmark.context_column, benchmark.tolerance_column
    try:
        question = _read(_text, benchmark.prompt_column, row)
        if context and row.get(context):
            question = f"{_read(_text, context, row)}\n{question}"
        return Problem(
            id=problem_id,
            messages=({"role": "user", "content": question},),
            answer=_read(benchmark.read_answer, benchmark.answer_column, row),
            meta={"tolerance": _read(_tolerances, tolerance, row)} if tolerance and row.get(tolerance) else {},
        )
    except _CellError as error:
        return str(error)


def _read(read: Callable[[object], T], column: str, cells: Mapping[str, Any]) -> T:
    try:
        if cells.get(column) is None:
            raise _CellError("is missing")
        return read(cells[column])
    except _CellError as error:
        raise _CellError(f'column "{column}" {error}') from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
