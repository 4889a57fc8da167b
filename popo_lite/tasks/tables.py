"""Load rows as a table from a local file or from the Hub.

JSON and CSV files are read here rather than by the `datasets` library, which guesses types, while a
reference answer must stay as it was written: "007" would become 7, "1e5" 100000.0, a date a timestamp, and the
text "04" in a column that also holds numbers 4.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ERRORS_SHOWN = 5

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class KnownDataset:
    """Describe a Hub dataset that has a short name. Without `eval_split`, no part of it is meant for evaluation."""

    hub_id: str
    config: str | None = None
    train_split: str = "train"
    eval_split: str | None = "test"
    prompt_column: str = "problem"
    answer_column: str = "answer"


KNOWN: Mapping[str, KnownDataset] = {
    "deepscaler": KnownDataset(hub_id="agentica-org/DeepScaleR-Preview-Dataset", eval_split=None),
    "gsm8k": KnownDataset(hub_id="openai/gsm8k", config="main", prompt_column="question"),
    "math500": KnownDataset(hub_id="HuggingFaceH4/MATH-500", train_split="test"),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Name a dataset's place in the recipe and build the errors about it."""

    section: Literal["data", "eval"]
    dataset: str

    def error(self, what: str, next_step: str) -> DataError:
        """Return an error about this dataset."""
        return DataError(what, where=f'{self.section}.dataset "{self.dataset}"', next_step=next_step)

    def refusal(self, what: str, problems: Sequence[str], next_step: str) -> DataError:
        """Return an error that shows the first of `problems`."""
        lines = [f"{what}:", *problems[:ERRORS_SHOWN]]
        if len(problems) > ERRORS_SHOWN:
            lines.append(f"and {len(problems) - ERRORS_SHOWN} more")
        return self.error("\n    ".join(lines), next_step)


Record = tuple[str, dict[str, Any] | str]
"""A row's position in its file, such as "line 3", and its cells, or an error message if it is not a row."""


class Table:
    """Rows, numbered from 0, with named columns: parsed records, or a `datasets` table mapped into memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Dataset) -> None:
        table: Any = rows
        self._rows, self._is_arrow = table, not isinstance(rows, list)
        # Records may differ in their columns; they are listed in the order of their first appearance.
        names = table.column_names if self._is_arrow else dict.fromkeys(name for row in table for name in row)
        self.column_names: list[str] = list(names)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """Return a copy of one row's cells by column."""
        return dict(self._rows[index])

    def column(self, name: str) -> list[Any]:
        """Return one cell per row; None if the row lacks the column."""
        return list(self._rows[name][:]) if self._is_arrow else [row.get(name) for row in self._rows]


def load_table(part: DatasetRecipe, place: Place) -> tuple[str, Table]:
    """Return the name for logs (file name, or dataset and split) and the unfiltered rows that `part` names.

    Raises DataError if the dataset cannot be found, fetched or read, or has no rows.
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


def _fetch(hub_id: str, config: str | None, split: str, place: Place) -> Table:
    import datasets

    try:
        return Table(datasets.load_dataset(hub_id, config, split=split))
    except Exception as error:
        # The library lets errors of httpx, fsspec, pyarrow and pandas through. All mean that loading failed.
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


def read_records(path: Path, place: Place) -> list[Record]:
    """Return every row of a JSON or CSV file in order; invalid rows come with an error message.

    Raises DataError if the file does not exist or cannot be read at all.
    """
    _require_file(path, place)
    try:
        return _csv_records(path) if path.suffix == ".csv" else _json_records(path)
    except (OSError, ValueError) as error:
        raise _unreadable(error, place) from error


def _read_file(path: Path, place: Place) -> Table:
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    if path.suffix == ".parquet":
        _require_file(path, place)
        try:
            return Table(Dataset.from_parquet(str(path)))
        except (OSError, ValueError, DatasetsError) as error:
            raise _unreadable(error, place) from error
    records = read_records(path, place)
    if invalid := [f"{where}: {row}" for where, row in records if isinstance(row, str)]:
        raise place.refusal(f"cannot be read, errors: {len(invalid)}", invalid, "correct these places in the file")
    return Table([row for _, row in records if not isinstance(row, str)])


def _require_file(path: Path, place: Place) -> None:
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        likely = nearest(path.name, siblings)
        raise place.error("there is no such file", f'did you mean "{likely}"?' if likely else "correct the path")


def _unreadable(error: Exception, place: Place) -> DataError:
    return place.error(f"cannot be read: {_one_line(error)}", "correct the file, or write it again")


def _json_records(path: Path) -> list[Record]:
    """Read one array of objects, or one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "")
        file.seek(0)
        if start.lstrip().startswith("["):
            return _array_records(file.read())
        return [(f"line {number}", _object(line)) for number, line in enumerate(file, 1) if line.strip()]


def _array_records(text: str) -> list[Record]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return [(f"line {error.lineno}", f"{error.msg} (column {error.colno})")]
    return [
        (f"row {number}", row if isinstance(row, dict) else "not a JSON object") for number, row in enumerate(rows, 1)
    ]


def _object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return f"{error.msg} (column {error.colno})"
    except ValueError:  # Python refuses integers of thousands of digits
        return "an integer has more digits than can be read"
    return row if isinstance(row, dict) else "not a JSON object"


def _csv_records(path: Path) -> list[Record]:
    """Read a CSV file with a header; each row is named by the line on which it starts. Every cell is text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _csv_lines(file)
        number, header = next(lines, (1, []))
        if isinstance(header, str):
            return [(f"line {number}", header)]
        if len(set(header)) < len(header):
            return [(f"line {number}", "names a column twice")]
        records: list[Record] = []
        for number, cells in lines:
            if isinstance(cells, str):
                records.append((f"line {number}", cells))
            elif len(cells) != len(header):
                records.append((f"line {number}", f"does not have the {len(header)} cells of the header"))
            else:
                records.append((f"line {number}", dict(zip(header, cells, strict=True))))
        return records


def _csv_lines(file: Iterable[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line on which a row starts, its cells or an error message), without empty lines."""
    reader = csv.reader(file, strict=True)
    while True:
        number = reader.line_num + 1
        cells: list[str] | str
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader continues with the next line
            cells = str(error)
        if cells:
            yield number, cells
