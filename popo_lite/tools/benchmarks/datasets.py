"""Published benchmarks by name: where their rows are, what their columns hold, and which rows are refused.

`docs/evaluation.md` says where each fact of the table is from, and which could not be confirmed.
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


class _BadCellError(Exception):
    """A cell that is not what the benchmark has there. The message goes on from "column ... "."""


def _text(cell: object) -> str:
    """MATH: LaTeX, as it is."""
    if not isinstance(cell, str):
        raise _BadCellError(f"is {_shown(cell)}, not text")
    if not cell.strip():
        raise _BadCellError("is empty")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise _BadCellError("holds half a surrogate pair, which is no character") from error
    return cell.strip()


def _number(cell: object) -> str:
    """AMC: a number, which the Hub's table holds as a floating-point number: 27.0."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    if isinstance(cell, float) and math.isfinite(cell):
        return str(int(cell)) if cell == int(cell) else str(cell)
    if isinstance(cell, str) and _NUMBER.fullmatch(cell.strip()):
        plain = cell.strip().replace(",", "")
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    raise _BadCellError(f"is {_shown(cell)}, not a number")


def _integer(cell: object) -> str:
    """AIME: an integer from 0 to 999, often with leading zeros: 033."""
    found = cell.strip() if isinstance(cell, str) else _number(cell)
    if not _AIME_ANSWER.fullmatch(found):
        raise _BadCellError(f"is {_shown(cell)}, not an integer from 0 to 999")
    return str(int(found))


def _final_answers(cell: object) -> str:
    """OlympiadBench: a list of LaTeX texts, of which the answer has to name all, in any order."""
    if not isinstance(cell, list) or not cell:
        raise _BadCellError(f"is {_shown(cell)}, not a list of answers")
    return ", ".join(_text(one) for one in cell)


def _result_line(cell: object) -> str:
    """GSM8K: a worked solution whose last line is `#### 1,200`."""
    line = _RESULT_LINE.search(_text(cell))
    if line is None:
        raise _BadCellError('does not end in a line "#### result"')
    return _number(line[1].replace("$", ""))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published set of problems. `problems` is how many it has; `read_answer` raises for cells of another form."""

    title: str
    hub_id: str
    config: str | None = None
    split: str
    prompt_column: str
    answer_column: str
    problems: int
    read_answer: Callable[[object], str]
    context_column: str | None = None
    tolerance_column: str | None = None


BENCHMARKS: Mapping[str, Benchmark] = {
    "math500": Benchmark(
        title="MATH-500",
        hub_id="HuggingFaceH4/MATH-500",
        split="test",
        prompt_column="problem",
        answer_column="answer",
        problems=500,
        read_answer=_text,
    ),
    "amc23": Benchmark(
        title="AMC23",
        hub_id="math-ai/amc23",
        split="test",
        prompt_column="question",
        answer_column="answer",
        problems=40,
        read_answer=_number,
    ),
    "aime24": Benchmark(
        title="AIME24",
        hub_id="HuggingFaceH4/aime_2024",
        split="train",
        prompt_column="problem",
        answer_column="answer",
        problems=30,
        read_answer=_integer,
    ),
    "aime25": Benchmark(
        title="AIME25",
        hub_id="math-ai/aime25",
        split="test",
        prompt_column="problem",
        answer_column="answer",
        problems=30,
        read_answer=_integer,
    ),
    "olympiadbench": Benchmark(
        title="OlympiadBench",
        hub_id="Hothan/OlympiadBench",
        config="OE_TO_maths_en_COMP",
        split="train",
        prompt_column="question",
        answer_column="final_answer",
        problems=674,
        read_answer=_final_answers,
        context_column="context",
        tolerance_column="error",
    ),
    "gsm8k": Benchmark(
        title="GSM8K",
        hub_id="openai/gsm8k",
        config="main",
        split="test",
        prompt_column="question",
        answer_column="answer",
        problems=1319,
        read_answer=_result_line,
    ),
}

PAPER = ("math500", "amc23", "aime24", "aime25", "olympiadbench")
"""The benchmarks that POPO was published with, in its order."""


def benchmark_names(text: str) -> tuple[str, ...]:
    """`paper`, or names parted by commas, each once. Raises UserInputError for an unknown one."""
    names: dict[str, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if name == "paper":
            names |= dict.fromkeys(PAPER)
        elif name in BENCHMARKS:
            names[name] = None
        else:
            likely = nearest(name, [*BENCHMARKS, "paper"])
            raise UserInputError(
                f'there is no benchmark "{name}"',
                where="--benchmarks",
                next_step=f'did you mean "{likely}"?' if likely else f"name some of paper, {', '.join(BENCHMARKS)}",
            )
    return tuple(names)


def open_benchmark(
    name: str,
    file: Path | None = None,
    *,
    reference_faults: Callable[[Sequence[Problem]], Sequence[str | None]] | None = None,
) -> list[Problem]:
    """All problems of the benchmark, from `file` in the form that the Hub has, or from the Hub.

    Ids are `name/row`, rows counted from 1. `tolerance` in a problem's meta is how far the numbers of its answer may
    be off, as decimals: one for all of them, or one for each in their order. `reference_faults` says of each problem
    why its answer cannot be graded against, None where it can.

    Raises DataError where the rows cannot be had, or any of them is not of the benchmark's form: all are listed.
    """
    benchmark = BENCHMARKS[name]
    place = _BenchmarkPlace(section="eval", dataset=str(file or benchmark.hub_id), benchmark=name, local=bool(file))
    rows = _rows(benchmark, file, place)
    found = [_problem(benchmark, f"{name}/{number}", row) for number, (_, row) in enumerate(rows, 1)]
    problems = [one for one in found if isinstance(one, Problem)]
    ungradable = iter(reference_faults(problems) if reference_faults else [None] * len(problems))
    listed = [one if isinstance(one, str) else next(ungradable) for one in found]
    faults = [f"{label}: {fault}" for (label, _), fault in zip(rows, listed, strict=True) if fault]
    if faults:
        raise place.refusal(
            f"{len(faults)} of {len(rows)} rows are not {benchmark.title}'s",
            faults,
            "correct these rows; an evaluation that left them out would be of another benchmark",
        )
    return problems


@dataclass(frozen=True, kw_only=True)
class _BenchmarkPlace(Place):
    """Where on the command line a benchmark is named."""

    benchmark: str
    local: bool

    def error(self, what: str, next_step: str) -> DataError:
        """An error about this benchmark; for what is on the Hub, a local copy is the other way."""
        where = f"--data {self.benchmark}={self.dataset}" if self.local else f"{self.benchmark} ({self.dataset})"
        other = f"check the connection, or give a local copy of it with --data {self.benchmark}=FILE"
        return DataError(what, where=where, next_step=next_step if self.local else other)

    def refusal(self, what: str, faults: Sequence[str], next_step: str) -> DataError:
        """An error that shows all `faults`: every one of them has to be corrected."""
        return self.error("\n    ".join([f"{what}:", *faults]), next_step)


def _rows(benchmark: Benchmark, file: Path | None, place: Place) -> Sequence[Record]:
    if file is not None and file.suffix not in SUFFIXES:
        raise place.error(f"is not a file of a known kind ({', '.join(SUFFIXES)})", "name such a file")
    if file is None or file.suffix == ".parquet":
        part = EvalRecipe(
            dataset=place.dataset,
            config=None if file else benchmark.config,
            split=None if file else benchmark.split,
        )
        records = [(f"row {number}", row) for number, row in enumerate(load_table(part, place)[1], 1)]
    else:
        records = read_records(file, place)
    if not records:
        raise place.error("holds no rows", "name a file with at least one row")
    _require_columns(benchmark, {name: None for _, row in records if isinstance(row, dict) for name in row}, place)
    return records


def _problem(benchmark: Benchmark, problem_id: str, row: Mapping[str, Any] | str) -> Problem | str:
    """The problem in `row`, or what is wrong with the row."""
    if isinstance(row, str):
        return row
    try:
        question = _read(_text, benchmark.prompt_column, row)
        if benchmark.context_column is not None and row.get(benchmark.context_column):
            question = f"{_read(_text, benchmark.context_column, row)}\n{question}"
        meta = {}
        if benchmark.tolerance_column is not None and row.get(benchmark.tolerance_column):
            meta["tolerance"] = _read(_tolerances, benchmark.tolerance_column, row)
        return Problem(
            id=problem_id,
            messages=({"role": "user", "content": question},),
            answer=_read(benchmark.read_answer, benchmark.answer_column, row),
            meta=meta,
        )
    except _BadCellError as fault:
        return str(fault)


def _read(read: Callable[[object], T], column: str, cells: Mapping[str, Any]) -> T:
    try:
        if cells.get(column) is None:
            raise _BadCellError("is missing")
        return read(cells[column])
    except _BadCellError as fault:
        raise _BadCellError(f'column "{column}" {fault}') from fault


def _tolerances(cell: object) -> tuple[str, ...]:
    """OlympiadBench: text such as 1e-2, or 1e-1,1e-2 for several answers; nothing between commas is none."""
    found = tuple(part.strip() or "0" for part in str(cell).split(","))
    if not all(_TOLERANCE.fullmatch(part) for part in found):
        raise _BadCellError(f"is {_shown(cell)}, not a tolerance or several between commas")
    return found


def _require_columns(benchmark: Benchmark, columns: Collection[str], place: Place) -> None:
    for wanted in (benchmark.prompt_column, benchmark.answer_column):
        if columns and wanted not in columns:
            likely = nearest(wanted, columns)
            raise place.error(
                f'has no column "{wanted}"; its columns are {", ".join(columns)}',
                f'rename "{likely}"' if likely else "rename the column that holds it",
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
