"""Load rows from a local file or from the Hub.

JSON and CSV files are read here rather than by the `datasets` library, which guesses types, while a
reference answer must stay as it was written: "007" would become 7, "1e5" 100000.0, a date a timestamp, and the
text "04" in a column that also holds numbers 4.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ERRORS_SHOWN = 5

KNOWN: dict[str, tuple[str, str | None, str, str | None]] = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train", None),
    "gsm8k": ("openai/gsm8k", "main", "train", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test"),
}
"""Datasets with a short name: Hub id, configuration, split to train on, and split to evaluate on if there is one."""

Record = tuple[str, dict[str, Any] | str]
"""A row's position in its file, such as "line 3", and its cells, or an error message if it is not a row."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_T = TypeVar("_T")


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
        more = [f"and {len(problems) - ERRORS_SHOWN} more"] if len(problems) > ERRORS_SHOWN else []
        return self.error("\n    ".join([f"{what}:", *problems[:ERRORS_SHOWN], *more]), next_step)


def load_table(part: DatasetRecipe, place: Place) -> tuple[str, Any]:
    """Return the name for logs (file name, or dataset and split) and the unfiltered rows that `part` names.

    The rows are a list of dicts, which may differ in their keys, or a `datasets.Dataset` mapped into memory.
    Raises DataError if the dataset cannot be found, fetched or read, or has no rows.
    """
    path = Path(place.dataset).expanduser()
    is_hub_id = _HUB_ID.fullmatch(place.dataset)
    if path.suffix in SUFFIXES:
        for key in ("config", "split"):
            if (given := getattr(part, key)) is not None:
                what = f'is a file, and {place.section}.{key} = "{given}" is for datasets of the Hub'
                raise place.error(what, f"remove {place.section}.{key}")
        name, rows = path.name, _read_file(path, place)
    elif place.dataset in KNOWN or path.is_dir() or (is_hub_id and not path.is_file()):
        unknown = (str(path) if path.is_dir() else place.dataset, None, "train", "test")
        hub_id, config, train_split, eval_split = KNOWN.get(place.dataset, unknown)
        split = part.split or (train_split if place.section == "data" else eval_split)
        if split is None:
            next_step = "set eval.split, or leave eval.dataset out to hold problems out of the training data"
            raise place.error("has no split for evaluation", next_step)
        name = f"{place.dataset if is_hub_id else path.name}/{split}"
        rows = _fetch(hub_id, part.config or config, split, place)
    elif path.is_file():
        raise place.error(f"is not a file of a known kind ({', '.join(SUFFIXES)})", "name such a file")
    else:
        likely = nearest(place.dataset, [*KNOWN, "arithmetic"])
        raise place.error(
            f"is neither a known name, nor a {'/'.join(SUFFIXES)} file, nor a Hub id like owner/name",
            f'did you mean "{likely}"?'
            if likely
            else f"name a file, a Hub id, or one of arithmetic, {', '.join(KNOWN)}",
        )
    if not len(rows):
        raise place.error("holds no rows", "name a dataset with at least one row")
    return name, rows


def column_names(rows: Any) -> list[str]:
    """Return the names of all columns of `rows`, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row) if isinstance(rows, list) else rows.column_names)


def column(rows: Any, name: str) -> list[Any]:
    """Return one cell per row; None if the row lacks the column."""
    return [row.get(name) for row in rows] if isinstance(rows, list) else list(rows[name][:])


def read_records(path: Path, place: Place) -> list[Record]:
    """Return every row of a JSON or CSV file in order; invalid rows come with an error message.

    Raises DataError if the file does not exist or cannot be read at all.
    """
    return _read(path, place, _csv_records if path.suffix == ".csv" else _json_records)


def _fetch(hub_id: str, config: str | None, split: str, place: Place) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        # The library lets errors of httpx, fsspec, pyarrow and pandas through. All mean that loading failed.
        wrapped = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        if isinstance(error, ValueError):
            next_step = f"set {place.section}.config and {place.section}.split to names that the dataset has"
        else:
            next_step = (
                "check the name and the connection (with HF_HUB_OFFLINE=1 only cached datasets open); run "
                "`hf auth login` for a gated or private one; or download it elsewhere and name the file in "
                f"{place.section}.dataset"
            )
        what = f'split "{split}" of {hub_id}' + (f', config "{config}"' if config else "") + " cannot be loaded: "
        raise place.error(what + _one_line(wrapped or error), next_step) from error


def _read_file(path: Path, place: Place) -> Any:
    if path.suffix == ".parquet":
        from datasets import Dataset

        return _read(path, place, lambda path: Dataset.from_parquet(str(path)))
    records = read_records(path, place)
    if invalid := [f"{where}: {row}" for where, row in records if isinstance(row, str)]:
        raise place.refusal(f"cannot be read, errors: {len(invalid)}", invalid, "correct these places in the file")
    return [row for _, row in records]


def _read(path: Path, place: Place, read: Callable[[Path], _T]) -> _T:
    from datasets.exceptions import DatasetsError

    if not path.is_file():
        likely = nearest(path.name, [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise place.error("there is no such file", f'did you mean "{likely}"?' if likely else "correct the path")
    try:
        return read(path)
    except (OSError, ValueError, DatasetsError) as error:
        raise place.error(f"cannot be read: {_one_line(error)}", "correct the file, or write it again") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _json_records(path: Path) -> list[Record]:
    """Read one array of objects, or one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "")
        file.seek(0)
        if not start.lstrip().startswith("["):
            return [(f"line {number}", _object(line)) for number, line in enumerate(file, 1) if line.strip()]
        try:
            rows = enumerate(json.load(file), 1)
        except json.JSONDecodeError as error:
            return [(f"line {error.lineno}", f"{error.msg} (column {error.colno})")]
    return [(f"row {number}", row if isinstance(row, dict) else "not a JSON object") for number, row in rows]


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
    records: list[Record] = []
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return records
            except csv.Error as error:  # the reader continues with the next line
                records.append((where, str(error)))
                if not header:
                    return records
                continue
            if header and len(cells) == len(header):
                records.append((where, dict(zip(header, cells, strict=True))))
            elif header and cells:
                records.append((where, f"does not have the {len(header)} cells of the header"))
            elif len(set(cells)) < len(cells):
                return [(where, "names a column twice")]
            elif not header:
                header = cells
