"""Make problems from the rows of a local file, a Hub dataset, or one of the names in `KNOWN`.

JSON and CSV files are read here rather than by the `datasets` library, which guesses types, while a
reference answer must stay as it was written: "007" would become 7, "1e5" 100000.0, a date a timestamp, and the
text "04" in a column that also holds numbers 4.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import math
import random
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
PROMPT_COLUMNS = ("prompt", "problem", "question")
ID_COLUMNS = ("id", "unique_id")
ERRORS_SHOWN = 5
VALUES_SHOWN = 10
MAX_META_CHARACTERS = 2000
MAX_UNUSABLE_RATIO = 0.1  # of rows; with more of them the column is likely the wrong one

KNOWN: dict[str, tuple[str, str | None, str, str | None]] = {
    "deepscaler": ("agentica-org/DeepScaleR-Preview-Dataset", None, "train", None),
    "gsm8k": ("openai/gsm8k", "main", "train", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "test"),
}
"""Datasets with a short name: Hub id, configuration, split to train on, and split to evaluate on if there is one."""

RESULT_LINE = re.compile(r"^####(?!#)[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
"""The last line of a GSM8K solution, `#### result`."""

Record = tuple[str, dict[str, Any] | str]
"""A row's position in its file, such as "line 3", and its cells, or an error message if it is not a row."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GROUPED_NUMBER = re.compile(r"[-+$]*\d[\d,]*(\.\d+)?%?")


class DatasetTask:
    """Make problems on demand from the rows that `part`, which stands in `section` of the recipe, describes.

    Opened as `data`, all rows are for training except `held_out` of them, chosen by a hash of the question;
    other rows with the same question are used for neither. Opened as `eval`, all rows are held out, in an order
    given by a hash of their id. Ids are `name/row`, or the rows' own if those are unique; rows count from 1 in
    ids and messages, before filtering, and from 0 here. The distinct values of `level_column`, sorted, are levels.
    Rows that cannot be used are left out; `notices` says which.

    Raises DataError if the dataset cannot be loaded, lacks a column, or has too many rows that cannot be used.
    """

    def __init__(
        self,
        part: DatasetRecipe,
        *,
        section: Literal["data", "eval"],
        held_out: int = 0,
        level_column: str | None = None,
    ) -> None:
        self.notices: list[str] = []
        try:
            self.name, self._rows = load_table(part, section)
            is_list = isinstance(self._rows, list)
            columns = [*dict.fromkeys(chain.from_iterable(self._rows))] if is_list else self._rows.column_names
            prompts = PROMPT_COLUMNS if part.prompt_column is None else [part.prompt_column]
            self._prompt_column = _column(prompts, f"{section}.prompt_column", columns)
            self._answer_column = _column([part.answer_column or "answer"], f"{section}.answer_column", columns)
            if self._prompt_column == self._answer_column:
                what = f'would take column "{self._prompt_column}" for both the question and the answer'
                raise DataError(what, next_step=f"name different ones in {section}.prompt_column and .answer_column")
            self._training = _filtered(part.filter, f"{section}.filter", self._rows, columns)[: part.limit]
            self._level_values = self._read_levels(level_column, columns)
            if errors := self._cell_errors():
                what = f"{len(errors)} of {len(self._training):,} rows cannot be used"
                if len(errors) > MAX_UNUSABLE_RATIO * len(self._training):
                    next_step = (
                        f"correct {section}.answer_column, {section}.prompt_column or these rows, or leave them "
                    )
                    raise DataError(what + first(errors.values()), next_step=f"{next_step}out by {section}.filter")
                self.notices.append(f"{self.name}: {what} and are left out{first(errors.values())}")
                self._training = [row for row in self._training if row not in errors]
        except DataError as error:
            raise error.within(f'{section}.dataset "{part.dataset}"') from error
        self._by_level: list[list[int]] | None = None
        self._own_ids: Sequence[int | str] | None = None
        for ids in (column(self._rows, name) for name in ID_COLUMNS if name in columns):
            if all(type(own) in (str, int) and own != "" for own in ids) and len({*map(str, ids)}) == len(ids):
                self._own_ids = ids
                break
        self._held_out: list[int] = []
        if section == "eval":
            self._held_out = sorted(self._training, key=lambda row: stream_seed("dataset/held-out row", self._id(row)))
            self._training = []
        elif held_out:
            self._hold_out(held_out)

    @property
    def levels(self) -> int:
        """Number of levels with training rows; 1 without `level_column`."""
        return len(self._rows_by_level())

    def train_problem(self, seed: int, index: int, level: int = 0) -> Problem:
        """Return the `index`-th problem of `seed`'s stream at `level`; each epoch has a new order of all its rows."""
        if not self._training:
            raise DataError(f"{self.name} was opened for evaluation; none of its rows is trained on")
        rows = self._rows_by_level()[level]
        epoch, position = divmod(index, len(rows))
        return self._problem(rows[_epoch_order(seed, epoch, len(rows))[position]])

    def held_out(self, count: int) -> list[Problem]:
        """Return the first `count` held-out problems; a larger count only adds problems."""
        if count > len(self._held_out):
            what = f"{count} held-out problems are asked for; {self.name} has {len(self._held_out)}"
            most = f"set eval.problems to at most {len(self._held_out)}"
            raise DataError(what, where="eval.problems", next_step=most)
        return [self._problem(row) for row in self._held_out[:count]]

    def training(self) -> list[Problem]:
        """Return all training problems, in the order of their rows."""
        return list(map(self._problem, self._training))

    def drop_training(self, reason: Callable[[Problem], str | None]) -> list[str]:
        """Remove the problems that have a `reason` from training; return "row 3: reason" for each.

        Raises DataError if no problem remains.
        """
        self._by_level = None
        dropped = {row: why for row in self._training if (why := reason(self._problem(row)))}
        if len(dropped) == len(self._training):
            what = f"none of the {len(dropped)} training rows of {self.name} can be used"
            next_step = "raise rollout.max_prompt_length, or choose other rows with data.filter"
            raise DataError(what, where="data.dataset", next_step=next_step)
        self._training = [row for row in self._training if row not in dropped]
        return [f"row {row + 1}: {why}" for row, why in dropped.items()]

    def longest_candidates(self) -> Iterator[Problem]:
        """Yield all training problems, those with the most bytes of text, likely the longest, first."""
        prompts = column(self._rows, self._prompt_column)
        sizes = {row: sum(len(one["content"].encode()) for one in _messages(prompts[row])) for row in self._training}
        yield from map(self._problem, sorted(sizes, key=lambda row: -sizes[row]))

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:  # noqa: ARG002 - as ArithmeticTask has it
        """Return nothing: what counts as step-by-step work depends on the dataset."""
        return {}

    def _id(self, row: int) -> str:
        return f"{self.name}/{row + 1}" if self._own_ids is None else str(self._own_ids[row])

    def _problem(self, row: int) -> Problem:
        cells = dict(self._rows[row])
        messages, answer = _messages(cells.pop(self._prompt_column)), cells[self._answer_column]
        # Reward functions that were written for TRL take the answer's cell by its column, such as `solution`.
        meta = {key: cell for key, cell in cells.items() if key == self._answer_column or _fits_meta(cell)}
        return Problem(id=self._id(row), messages=messages, answer=_answer(False, answer), meta=meta)

    def _cell_errors(self) -> dict[int, str]:
        """Return row -> an error message for each row that cannot be used."""
        prompts, answers = (column(self._rows, name) for name in (self._prompt_column, self._answer_column))
        # One answer in GSM8K's form means that all have to be: a row without its last line would otherwise have
        # its whole working taken for the answer.
        results = any(isinstance(answers[row], str) and RESULT_LINE.search(answers[row]) for row in self._training)
        readers = (self._prompt_column, prompts, _messages), (self._answer_column, answers, partial(_answer, results))
        errors: dict[int, list[str]] = {}
        for row, (name, cells, read) in product(self._training, readers):
            try:
                if cells[row] in (None, []):
                    raise CellError("is empty")
                read(cells[row])
            except CellError as error:
                errors.setdefault(row, []).append(f'column "{name}" {error}')
        return {row: f"row {row + 1}: {', '.join(of_row)}" for row, of_row in errors.items()}

    def _read_levels(self, name: str | None, columns: Sequence[str]) -> dict[int, float | str]:
        """Return row -> its value in the column of levels; empty without one. Numbers are compared as numbers."""
        if name is None:
            return {}
        key = "data.curriculum.column"
        cells = column(self._rows, _column([name], key, columns))
        if empty := [row for row in self._training if cells[row] in (None, "")]:
            what = f'row {empty[0] + 1} and {len(empty) - 1} others have no value in column "{name}"'
            raise DataError(what, next_step=f"leave them out by data.filter, or name another column in {key}")
        texts = {row: _plain(cells[row]) for row in self._training}
        if len(there := sorted(set(texts.values()))) < 2:
            what = f'all rows have "{there[0]}" in column "{name}", which gives {key} a single level'
            raise DataError(what, next_step=f"name a column with several values in {key}")
        try:
            return {row: float(text) for row, text in texts.items()}
        except ValueError:
            return {**texts}

    def _rows_by_level(self) -> list[list[int]]:
        """Return the training rows of each level, easiest first."""
        if self._by_level is None:
            rows: dict[float | str, list[int]] = {}
            for row in self._training:
                rows.setdefault(self._level_values.get(row, ""), []).append(row)
            self._by_level = [of_level for _, of_level in sorted(rows.items())]
        return self._by_level

    def _hold_out(self, count: int) -> None:
        """Hold out one row each of `count` questions, white space ignored, and train on no other row of them."""
        prompts = column(self._rows, self._prompt_column)
        questions = {}
        for row in self._training:
            texts = (" ".join(text.split()) for message in _messages(prompts[row]) for text in message.values())
            questions[row] = stream_seed("dataset/held-out question", *texts)
        first_row = {question: row for row, question in reversed(questions.items())}
        if count >= len(first_row):
            what = f"{count} problems are to be held out of {self.name}, which has {len(first_row)} different questions"
            most = f"set eval.problems to at most {len(first_row) - 1}, or name another dataset in eval.dataset"
            raise DataError(f"{what}, and at least one has to stay for training", where="eval.problems", next_step=most)
        chosen = dict.fromkeys(sorted(first_row)[:count])
        self._held_out = [first_row[question] for question in chosen]
        self._training = [row for row, question in questions.items() if question not in chosen]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """Return the permutation of range(size) for (seed, epoch)."""
    stream = random.Random(stream_seed("dataset/epoch", seed, epoch))  # noqa: S311 - an order, not a secret
    # random() is the one draw that stays the same in every Python version; shuffle() is not.
    return tuple(sorted(range(size), key=lambda _: stream.random()))


class CellError(Exception):
    """A cell that cannot be used. The message continues `column "name" `."""


def shown(value: object) -> str:
    """Return at most 60 characters of `repr(value)`."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_text(cell: object) -> str:
    """Return a cell's text, stripped. Raises CellError if it is none, blank, or holds half a surrogate pair."""
    if not isinstance(cell, str):
        raise CellError(f"is {shown(cell)}, not text")
    if not cell.strip():
        raise CellError("is empty")
    if _SURROGATE.search(cell):
        raise CellError("holds half a surrogate pair, which is not a character")
    return cell.strip()


def _messages(cell: object) -> tuple[dict[str, str], ...]:
    """Return the chat messages of a prompt cell; plain text becomes a user message."""
    if not isinstance(cell, str | list):
        raise CellError(f"is {shown(cell)}, neither text nor a list of chat messages")
    messages = []
    for one in [{"role": "user", "content": cell}] if isinstance(cell, str) else cell:
        # A table gives every message all the keys that any of them has, with None for those it lacks.
        given = {key: value for key, value in one.items() if value is not None} if isinstance(one, dict) else {}
        role, content = given.pop("role", None), given.pop("content", None)
        if given or role not in ("system", "user", "assistant") or not isinstance(content, str):
            takes = '"role" (system, user or assistant) and "content" (text), nothing else'
            raise CellError(f"has {shown(one)} for a message; it takes {takes}")
        read_text(content)
        messages.append({"role": role, "content": content})
    if role != "user":
        raise CellError(f'ends with a message of role "{role}"; the last one has to be the user\'s')
    return tuple(messages)


def _answer(needs_result: bool, cell: object) -> str:
    """Return a cell's reference answer: its text, its number as text, or the result of a last line `#### result`."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise CellError(f"is {shown(cell)}, neither text nor a number")
    if isinstance(cell, float) and not math.isfinite(cell):
        raise CellError(f"is {cell}, which no answer equals")
    text = read_text(_plain(cell))
    line = RESULT_LINE.search(text)
    if line is None:
        if needs_result:
            raise CellError('does not end in a line "#### result", as it does in other rows')
        return text
    return line[1].replace(",", "") if _GROUPED_NUMBER.fullmatch(line[1]) else line[1]


def _plain(cell: object) -> str:
    """Return a cell as text, equal for 4, 4.0 and "4": a fraction makes a column float, and CSV holds only text."""
    plain = int(cell) if isinstance(cell, float) and cell.is_integer() else cell
    return str(plain).lower() if isinstance(plain, bool) else str(plain)


def _fits_meta(cell: object) -> bool:
    """Check that JSON can hold the cell in `MAX_META_CHARACTERS`."""
    try:
        return len(json.dumps(cell, allow_nan=False, ensure_ascii=False)) <= MAX_META_CHARACTERS
    except (TypeError, ValueError):  # dates, bytes, NaN
        return False


def _column(wanted: Sequence[str], key: str, columns: Sequence[str]) -> str:
    """Return the one of the `wanted` columns that there is."""
    found = [name for name in wanted if name in columns]
    if len(found) == 1:
        return found[0]
    several, there = (", ".join(f'"{name}"' for name in names) for names in (found, columns))
    question = f"{several or 'no ' + ' or '.join(wanted)} for the column with the question"
    what = question if len(wanted) > 1 else f'no column "{wanted[0]}"'
    likely = next((f', perhaps "{close}"' for name in wanted if (close := nearest(name, columns))), "")
    raise DataError(f"has {what}; its columns are {there}", next_step=f"name one of them in {key}{likely}")


def _filtered(wanted: Mapping[str, Any], key: str, rows: Any, columns: Sequence[str]) -> list[int]:
    kept = list(range(len(rows)))
    for name, value in wanted.items():
        cells = [_plain(cell) for cell in column(rows, _column([name], key, columns))]
        values = {_plain(one) for one in (value if isinstance(value, tuple) else (value,))}
        found = Counter(cells[row] for row in kept)
        kept = [row for row in kept if cells[row] in values]
        if not kept:
            there = ", ".join(f"{shown(text)} ({count})" for text, count in found.most_common(VALUES_SHOWN))
            rest = f" and {len(found) - VALUES_SHOWN} more" if len(found) > VALUES_SHOWN else ""
            what = f'no row is left by the filter {name} = {shown(value)}; the values of "{name}" and their rows: '
            raise DataError(what + there + rest, next_step=f"set {key} to values that occur")
    return kept


def first(errors: Collection[str]) -> str:
    """Return a colon, the first of `errors`, each on a line of its own, and how many more there are."""
    more = [f"and {len(errors) - ERRORS_SHOWN:,} more"] if len(errors) > ERRORS_SHOWN else []
    return ":" + "".join(f"\n    {line}" for line in [*islice(errors, ERRORS_SHOWN), *more])


def digests(problems: Iterable[Problem]) -> dict[str, str]:
    """Return problem id -> a hash of all that was read of it, in order."""
    contents = {each.id: [each.messages, each.answer, each.meta] for each in problems}
    texts = {name: json.dumps(content, default=str, sort_keys=True) for name, content in contents.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return how many rows are "2 new, 1 gone, 3 changed" between two `digests`; an empty string for equal ones."""
    both = before.keys() & now.keys()
    counts = {
        "new": len(now) - len(both),
        "gone": len(before) - len(both),
        "changed": sum(before[name] != now[name] for name in both),
    }
    found = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count)
    return found or ("" if list(before) == list(now) else "the order changed")


def load_table(part: DatasetRecipe, section: Literal["data", "eval"]) -> tuple[str, Any]:
    """Return the name for logs (file name, or dataset and split) and the unfiltered rows that `part` names.

    The rows are a list of dicts, which may differ in their keys, or a `datasets.Dataset` mapped into memory.
    """
    dataset = part.dataset
    if dataset is None:
        raise DataError("names no dataset", next_step="name a file or a Hub dataset")
    path, is_hub_id = Path(dataset).expanduser(), _HUB_ID.fullmatch(dataset)
    if path.suffix in SUFFIXES or (path.is_file() and dataset not in KNOWN):
        for key in ("config", "split"):
            if (given := getattr(part, key)) is not None:
                what = f'is a file, and {section}.{key} = "{given}" is for datasets of the Hub'
                raise DataError(what, next_step=f"remove {section}.{key}")
        name, rows = path.name, read_records(path)
        if path.suffix != ".parquet":
            if bad := [f"{where}: {row}" for where, row in rows if isinstance(row, str)]:
                what = f"cannot be read, errors: {len(bad)}{first(bad)}"
                raise DataError(what, next_step="correct these places in the file")
            rows = [row for _, row in rows]
    elif dataset in KNOWN or path.is_dir() or is_hub_id:
        # The library reads names of its own, such as "pandas", from other files, even pickles.
        unknown = (str(path.resolve()) if path.is_dir() else dataset, None, "train", "test")
        hub_id, config, train_split, eval_split = KNOWN.get(dataset, unknown)
        split = part.split or (train_split if section == "data" else eval_split)
        if split is None:
            next_step = "set eval.split, or leave eval.dataset out to hold problems out of the training data"
            raise DataError("has no split for evaluation", next_step=next_step)
        name = f"{dataset if is_hub_id else path.name}/{split}"
        rows = _fetch(hub_id, part.config or config, split, section)
    else:
        likely = nearest(dataset, [*KNOWN, "arithmetic"])
        what = f"is neither a known name, nor a {'/'.join(SUFFIXES)} file, nor a Hub id like owner/name"
        other = f"name a file, a Hub id, or one of arithmetic, {', '.join(KNOWN)}"
        raise DataError(what, next_step=f'did you mean "{likely}"?' if likely else other)
    if not len(rows):
        raise DataError("holds no rows", next_step="name a dataset with at least one row")
    return name, rows


def column(rows: Any, name: str) -> list[Any]:
    """Return one cell per row; None if the row lacks the column."""
    return [row.get(name) for row in rows] if isinstance(rows, list) else list(rows[name][:])


def read_records(path: Path) -> Any:
    """Return a Parquet file as a table, and any other as a list of one `Record` per row, in order."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    if path.suffix not in SUFFIXES:
        raise DataError(f"is not a file of a known kind ({', '.join(SUFFIXES)})", next_step="name such a file")
    if not path.is_file():
        likely = nearest(path.name, [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else [])
        next_step = f'did you mean "{likely}"?' if likely else "correct the path"
        raise DataError("there is no such file", next_step=next_step)
    try:
        if path.suffix == ".parquet":
            rows = Dataset.from_parquet(str(path))
            rows.data.table.validate(full=True)  # a damaged file may hold text that is not UTF-8
            return rows
        if encoding := _other_encoding(path):
            what, copy = f"is {encoding}, not UTF-8", shlex.quote(str(path.with_stem(f"{path.stem}-utf8")))
            command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {copy}"
            raise DataError(what, next_step=f"save it as UTF-8: {command}")
        return _csv_records(path) if path.suffix == ".csv" else _json_records(path)
    except (OSError, ValueError, RecursionError, csv.Error, DatasetsError, ArrowException) as error:
        raise DataError(f"cannot be read: {_one_line(error)}", next_step="correct the file or rewrite it") from error


def _other_encoding(path: Path) -> str | None:
    """Return the encoding of a text file if it is not UTF-8, as iconv calls it. Of those of one byte, CP1252 is taken.

    Raises UnicodeDecodeError if it is none of those.
    """
    content = path.read_bytes()
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "UTF-16"
    if 0 in content[:2]:  # the other half of an ASCII character
        return "UTF-16BE" if content[0] == 0 else "UTF-16LE"
    try:
        content.decode()
    except UnicodeDecodeError:
        content.decode("cp1252")
        return "CP1252"
    return None


def _fetch(hub_id: str, config: str | None, split: str, section: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:
        # The library lets errors of httpx, fsspec, pyarrow and pandas through. All mean that loading failed.
        wrapped = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        next_step = (
            "check the name and the connection (with HF_HUB_OFFLINE=1 only cached datasets open); run `hf auth login` "
            f"for a gated or private one; or download it elsewhere and name the file in {section}.dataset"
        )
        if isinstance(error, ValueError):
            next_step = f"set {section}.config and {section}.split to names that the dataset has"
        what = f'split "{split}" of {hub_id}' + (f', config "{config}"' if config else "") + " cannot be loaded: "
        raise DataError(what + _one_line(wrapped or error), next_step=next_step) from error


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 300, placeholder="...") or type(error).__name__


def _json_records(path: Path) -> list[Record]:
    """Read one array of objects, or one object per line."""
    with path.open(encoding="utf-8-sig") as file:
        start = next((line for line in file if line.strip()), "")
        file.seek(0)
        if start.lstrip().startswith("["):
            rows = enumerate(json.load(file), 1)
            return [(f"row {number}", row if isinstance(row, dict) else "not a JSON object") for number, row in rows]
        return [(f"line {number}", _object(line)) for number, line in enumerate(file, 1) if line.strip()]


def _object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return f"{error.msg} (column {error.colno})"
    except ValueError:  # Python refuses integers of thousands of digits
        return "an integer has more digits than can be read"
    except RecursionError:
        return "it is nested too deep"
    return row if isinstance(row, dict) else "not a JSON object"


def _csv_records(path: Path) -> list[Record]:
    """Read a CSV file with a header; each row is named by the line on which it starts. Every cell is text."""
    records: list[Record] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        header_line = next(filter(str.strip, file), "").strip()
        for sign, name in ((";", "semicolons"), ("\t", "tabs")):
            if sign in header_line and "," not in header_line:
                what = f"has one column named {shown(header_line)}: its fields are separated by {name}, not by commas"
                program = "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={!r}))"
                command = f'PYTHONIOENCODING=utf-8-sig python3 -c "{program}"'
                files = f"< {shlex.quote(str(path))} > {shlex.quote(str(path.with_stem(f'{path.stem}-commas')))}"
                raise DataError(what, next_step=f"save it with commas: {command.format(sign)} {files}")
        file.seek(0)
        reader = csv.reader(file, strict=True)
        try:
            header = next(filter(None, reader), [])
        except csv.Error as error:
            return [(f"line {reader.line_num}", str(error))]
        if len(set(header)) < len(header):
            return [(f"line {reader.line_num}", "names a column twice")]
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                records.append((where, str(error)))
                continue  # with the next line
            if cells is None:
                return records
            if len(cells) == len(header):
                records.append((where, dict(zip(header, cells, strict=True))))
            elif cells:
                records.append((where, f"does not have the {len(header)} cells of the header"))
