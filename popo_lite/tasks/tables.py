"""Rows as a table: read from a local file, or fetched from the Hub.

JSON and CSV files are read here rather than by the `datasets` library, which guesses types where a reference
answer must stay as it was written: "007" would become 7, "1e5" 100000.0, a date a timestamp, and the text "04" in
a column that also holds numbers 4.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
FAULTS_SHOWN = 5

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """A Hub dataset with a short name. `eval_split` is None where no part of it is meant for evaluation."""

    hub_id: str
    config: str | None = None
    train_split: str
    eval_split: str | None
    prompt_column: str
    answer_column: str


KNOWN: Mapping[str, KnownDataset] = {
    "deepscaler": KnownDataset(
        hub_id="agentica-org/DeepScaleR-Preview-Dataset",
        train_split="train",
        eval_split=None,
        prompt_column="problem",
        answer_column="answer",
    ),
    "gsm8k": KnownDataset(
        hub_id="openai/gsm8k",
        config="main",
        train_split="train",
        eval_split="test",
        prompt_column="question",
        answer_column="answer",
    ),
    "math500": KnownDataset(
        hub_id="HuggingFaceH4/MATH-500",
        train_split="test",
        eval_split="test",
        prompt_column="problem",
        answer_column="answer",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the recipe a dataset is named. Makes the errors about it."""

    section: Literal["data", "eval"]
    dataset: str

    def error(self, what: str, next_step: str) -> DataError:
        """An error about this dataset."""
        return DataError(what, where=f'{self.section}.dataset "{self.dataset}"', next_step=next_step)

    def refusal(self, what: str, faults: Sequence[str], next_step: str) -> DataError:
        """An error that shows the first of `faults`."""
        lines = [f"{what}:", *faults[:FAULTS_SHOWN]]
        if len(faults) > FAULTS_SHOWN:
            lines.append(f"and {len(faults) - FAULTS_SHOWN} more")
        return self.error("\n    ".join(lines), next_step)


class Table(Protocol):
    """Rows, numbered from 0, with named columns."""

    @property
    def column_names(self) -> Sequence[str]:
        """Every column that occurs."""

    def __len__(self) -> int:
        """Rows."""

    def row(self, index: int) -> dict[str, Any]:
        """A copy of one row's cells by column."""

    def column(self, name: str) -> list[Any]:
        """One cell per row; None where a row has none."""


@dataclass(frozen=True)
class RecordTable:
    """Rows of a JSON or CSV file, held as they were parsed."""

    records: Sequence[Mapping[str, Any]]

    @property
    def column_names(self) -> list[str]:
        """Columns in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record))

    def __len__(self) -> int:
        return len(self.records)

    def row(self, index: int) -> dict[str, Any]:
        """A copy of one record."""
        return dict(self.records[index])

    def column(self, name: str) -> list[Any]:
        """One cell per record; None where it lacks the column."""
        return [record.get(name) for record in self.records]


@dataclass(frozen=True)
class ArrowTable:
    """Rows of the `datasets` library, which stay on disk, mapped into memory."""

    dataset: Dataset

    @property
    def column_names(self) -> list[str]:
        """Columns in the dataset's order."""
        return list(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, index: int) -> dict[str, Any]:
        """One row as Python values."""
        return dict(self.dataset[index])

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        return list(self.dataset[name][:])


def load_table(part: DatasetRecipe, place: Place) -> tuple[str, Table]:
    """The rows that `part` names, unfiltered, and how they are called in logs: file name, or dataset and split.

    Raises DataError for a dataset that cannot be found, fetched or read, or that has no rows.
    """
    path = Path(place.dataset).expanduser()
    if path.suffix in SUFFIXES:
        for key in ("config", "split"):
            if getattr(part, key) is not None:
                raise place.error(
                    f'is a file, and {place.section}.{key} = "{getattr(part, key)}" is for datasets of the Hub',
                    f"remove {place.section}.{key}",
                )
        name, table = path.name, _read_file(path, place)
    elif (known := KNOWN.get(place.dataset)) is not None:
        split = part.split or (known.train_split if place.section == "data" else known.eval_split)
        if split is None:
            raise place.error(
                "has no split for evaluation",
                "set eval.split, or leave eval.dataset out to hold problems out of the training data",
            )
        name = f"{place.dataset}/{split}"
        table = _fetch(known.hub_id, part.config or known.config, split, place)
    elif path.is_file():
        raise place.error(f"is not a file of a known kind ({', '.join(SUFFIXES)})", "name such a file")
    elif path.is_dir() or _HUB_ID.fullmatch(place.dataset):
        split = part.split or ("train" if place.section == "data" else "test")
        name = f"{place.dataset if _HUB_ID.fullmatch(place.dataset) else path.name}/{split}"
        table = _fetch(str(path) if path.is_dir() else place.dataset, part.config, split, place)
    else:
        likely = nearest(place.dataset, [*KNOWN, "arithmetic"])
        raise place.error(
            f"is neither a known name, nor a {'/'.join(SUFFIXES)} file, nor a Hub id like owner/name",
            f'did you mean "{likely}"?'
            if likely
            else f"name a file, a Hub id, or one of arithmetic, {', '.join(KNOWN)}",
        )
    if not len(table):
        raise place.error("holds no rows", "name a dataset with at least one row")
    return name, table


def _fetch(hub_id: str, config: str | None, split: str, place: Place) -> ArrowTable:
    import datasets

    try:
        return ArrowTable(datasets.load_dataset(hub_id, config, split=split))
    except Exception as error:
        # The library lets errors of httpx, fsspec, pyarrow and pandas through. All mean: it cannot be had.
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            reason = _one_line(error.__cause__)
        else:
            reason = _one_line(error)
        if isinstance(error, ValueError):
            next_step = f"set {place.section}.config and {place.section}.split to names that the dataset has"
        else:
            next_step = (
                "check the name and the connection (with HF_HUB_OFFLINE=1 only cached datasets open); run "
                "`hf auth login` for a gated or private one; or download it elsewhere and name the file in "
                f"{place.section}.dataset"
            )
        of_config = f', config "{config}"' if config else ""
        raise place.error(f'split "{split}" of {hub_id}{of_config} cannot be loaded: {reason}', next_step) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _read_file(path: Path, place: Place) -> Table:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        likely = nearest(path.name, siblings)
        raise place.error("there is no such file", f'did you mean "{likely}"?' if likely else "correct the path")
    try:
        if path.suffix == ".parquet":
            return ArrowTable(Dataset.from_parquet(str(path)))
        records, faults = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
        if faults:
            raise place.refusal(f"cannot be read, faults: {len(faults)}", faults, "correct these places in the file")
        return RecordTable(records)
    except (OSError, ValueError, DatasetsError) as error:
        raise place.error(f"cannot be read: {_one_line(error)}", "correct the file, or write it anew") from error


def _read_json(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, faults) of one array of objects, or of one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "")
        file.seek(0)
        return _parse_array(file.read()) if start.lstrip().startswith("[") else parse_lines(file)


def _parse_array(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        return [], [f"line {error.lineno}: {error.msg} (column {error.colno})"]
    return records, [
        f"row {number}: not a JSON object" for number, row in enumerate(records, 1) if not isinstance(row, dict)
    ]


def parse_lines(lines: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Records of a JSONL file, and what is wrong with the lines that are none."""
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            faults.append(f"line {number}: {error.msg} (column {error.colno})")
            continue
        if not isinstance(record, dict):
            faults.append(f"line {number}: not a JSON object")
        records.append(record)
    return records, faults


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, faults) of a CSV file with a header. Every cell is text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        records: list[dict[str, Any]] = []
        faults: list[str] = []
        try:
            header = reader.fieldnames or []
            if len(set(header)) < len(header):
                return [], ["line 1: names a column twice"]
            for record in reader:
                # The reader's mark for cells too many is the key None, for cells too few the value None.
                if None in record or None in record.values():
                    faults.append(f"line {reader.reader.line_num}: does not have the {len(header)} cells of the header")
                records.append(record)
        except csv.Error as error:
            faults.append(f"line {reader.reader.line_num}: {error}")
    return records, faults
