"""Published benchmarks by name: where their rows are, what their columns hold, and which rows are refused.

`docs/evaluation.md` says where each fact of the table is from, and which could not be confirmed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from popo_lite.errors import DataError, UserInputError, nearest
from popo_lite.recipe import EvalRecipe
from popo_lite.tasks.tables import Place, load_table, parse_lines
from popo_lite.types import Problem

_RESULT_LINE = re.compile(r"^####(?!#)[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
_NUMBER = re.compile(r"-?(\d+|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?")
_AIME_ANSWER = re.compile(r"\d{1,3}")

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
    if isinstance(cell, int | float) and not isinstance(cell, bool) and math.isfinite(cell):
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


def open_benchmark(name: str, file: Path | None = None) -> list[Problem]:
    """All problems of the benchmark, from `file` in the form that the Hub has, or from the Hub.

    Ids are `name/row`, rows counted from 1. A `tolerance` in a problem's meta is how far a number may be off.
    Raises DataError where the rows cannot be had, or any of them is not of the benchmark's form: all are listed.
    """
    benchmark = BENCHMARKS[name]
    place = _BenchmarkPlace(section="eval", dataset=str(file or benchmark.hub_id), benchmark=name, local=bool(file))
    rows = list(_rows(benchmark, file, place))
    problems, faults = [], []
    for number, (label, row) in enumerate(rows, 1):
        try:
            if isinstance(row, str):
                raise _BadCellError(row)
            problems.append(_problem(benchmark, f"{name}/{number}", row))
        except _BadCellError as fault:
            faults.append(f"{label}: {fault}")
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


def _rows(benchmark: Benchmark, file: Path | None, place: Place) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Where each row is, and its cells; what is wrong with it where it has none."""
    if file is None or file.suffix != ".jsonl" or not file.is_file():
        part = EvalRecipe(
            dataset=place.dataset,
            config=None if file else benchmark.config,
            split=None if file else benchmark.split,
        )
        table = load_table(part, place)[1]
        _require_columns(benchmark, table.column_names, place)
        yield from ((f"row {row + 1}", table.row(row)) for row in range(len(table)))
        return
    # One by one, so that lines that are no JSON and rows of another form are listed together.
    found = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                records, faults = parse_lines([line])
                if faults or records:
                    found.append((f"line {number}", faults[0].partition(": ")[2] if faults else records[0]))
    except (OSError, UnicodeDecodeError) as error:
        raise place.error(f"cannot be read: {error}", "write the file anew, in UTF-8") from error
    if not found:
        raise place.error("holds no rows", "name a file with at least one row")
    _require_columns(benchmark, {name: None for _, row in found if isinstance(row, dict) for name in row}, place)
    yield from found


def _problem(benchmark: Benchmark, problem_id: str, cells: Mapping[str, Any]) -> Problem:
    question = _read(_text, benchmark.prompt_column, cells)
    if benchmark.context_column is not None and cells.get(benchmark.context_column):
        question = f"{_read(_text, benchmark.context_column, cells)}\n{question}"
    meta = {}
    if benchmark.tolerance_column is not None and cells.get(benchmark.tolerance_column):
        meta["tolerance"] = _read(_tolerance, benchmark.tolerance_column, cells)
    return Problem(
        id=problem_id,
        messages=({"role": "user", "content": question},),
        answer=_read(benchmark.read_answer, benchmark.answer_column, cells),
        meta=meta,
    )


def _read(read: Callable[[object], T], column: str, cells: Mapping[str, Any]) -> T:
    try:
        if cells.get(column) is None:
            raise _BadCellError("is missing")
        return read(cells[column])
    except _BadCellError as fault:
        raise _BadCellError(f'column "{column}" {fault}') from fault


def _tolerance(cell: object) -> float:
    """OlympiadBench: text such as 1e-2."""
    try:
        found = float(str(cell))
    except ValueError as error:
        raise _BadCellError(f"is {_shown(cell)}, not a number") from error
    if not 0 <= found < math.inf:
        raise _BadCellError(f"is {_shown(cell)}, not a tolerance")
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
