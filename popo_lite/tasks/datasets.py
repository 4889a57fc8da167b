"""Make problems from the rows of a local file, a Hub dataset, or one of the names in `tables.KNOWN`."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe
from popo_lite.seeding import stream_seed
from popo_lite.tasks.tables import KNOWN, Place, Table, load_table
from popo_lite.types import Problem

PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMN = "answer"
ID_COLUMNS = ("id", "unique_id")
MAX_META_CHARACTERS = 2000
VALUES_SHOWN = 10

_RESULT_LINE = re.compile(r"^####(?!#)[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GROUPED_NUMBER = re.compile(r"[-+$]*\d[\d,]*(\.\d+)?%?")


class DatasetTask:
    """Make problems on demand from the rows of a table. Opened by `open_dataset`."""

    def __init__(self, *, rows: _Rows, training: Sequence[int], held_out: Sequence[int]) -> None:
        self._rows = rows
        self._training = training
        self._held_out = held_out

    @property
    def name(self) -> str:
        """Return the file's name, or the dataset and its split."""
        return self._rows.name

    @property
    def train_size(self) -> int:
        """Return the number of training rows, the length of an epoch; 0 if the task was opened for evaluation."""
        return len(self._training)

    def train_problem(self, seed: int, index: int) -> Problem:
        """Return the `index`-th problem of `seed`'s stream; each epoch has a new order of all training rows.

        Raises DataError if the task was opened for evaluation.
        """
        if not self._training:
            raise DataError(f"{self.name} was opened for evaluation; none of its rows is trained on")
        epoch, position = divmod(index, len(self._training))
        order = _epoch_order(seed, epoch, len(self._training))
        return self._rows.problem(self._training[order[position]])

    def held_out(self, count: int) -> list[Problem]:
        """Return the first `count` held-out problems; a larger count only adds problems."""
        if count > len(self._held_out):
            raise DataError(
                f"{count} held-out problems are asked for; {self.name} has {len(self._held_out)}",
                where="eval.problems",
                next_step=f"set eval.problems to at most {len(self._held_out)}",
            )
        return [self._rows.problem(row) for row in self._held_out[:count]]

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Remove `unwanted` problems from training and return how many. Raises DataError if none remains."""
        kept = [row for row in self._training if not unwanted(self._rows.problem(row))]
        dropped = len(self._training) - len(kept)
        if not kept:
            raise DataError(
                f"none of the {dropped} training rows of {self.name} can be used",
                where="data.dataset",
                next_step="raise rollout.max_prompt_length, or choose other rows with data.filter",
            )
        self._training = kept
        return dropped

    def longest_candidates(self) -> Iterator[Problem]:
        """Yield all training problems, those with the most bytes of text first.

        Bytes only suggest the number of tokens: a row of digits can take more tokens than a longer sentence. A
        caller who knows that its tokenizer makes no more tokens than bytes may stop where the bytes fit.
        """
        sizes = self._rows.prompt_bytes(self._training)
        for _, row in sorted(zip(sizes, self._training, strict=True), reverse=True):
            yield self._rows.problem(row)

    def figures(self, texts: Sequence[str]) -> Mapping[str, float]:  # noqa: ARG002 - the protocol's signature
        """Return nothing: what counts as step-by-step work depends on the dataset."""
        return {}


def open_dataset(part: DatasetRecipe, *, section: Literal["data", "eval"], held_out: int = 0) -> DatasetTask:
    """Load and check the rows that `part`, which stands in `section` of the recipe, describes.

    Opened as `data`, all rows are for training except `held_out` of them, chosen by a hash of the question;
    other rows with the same question are used for neither. Opened as `eval`, all rows are held out, in an order
    given by a hash of their id. Ids are `name/row`, or the rows' own if those are unique; rows count from 1,
    before filtering.

    Raises DataError if the dataset cannot be loaded, lacks a column, or has rows that cannot be used.
    """
    if part.dataset is None:
        raise DataError("names no dataset", where=f"{section}.dataset", next_step="name a file or a Hub dataset")
    place = Place(section=section, dataset=part.dataset)
    name, table = load_table(part, place)
    known = KNOWN.get(part.dataset)
    rows = _Rows(
        name=name,
        table=table,
        prompt_column=_prompt_column(part, place, table.column_names),
        answer_column=_column(
            part.answer_column or (known.answer_column if known else ANSWER_COLUMN),
            "answer_column",
            place,
            table.column_names,
        ),
        own_ids=_own_ids(table),
    )
    kept = _filtered(part, place, table)[: part.limit]
    if problems := list(rows.problems(kept)):
        raise place.refusal(
            f"{len(problems)} of {len(kept)} rows cannot be used",
            problems,
            f"correct these rows, or leave them out by {section}.filter",
        )
    if section == "eval":
        return DatasetTask(
            rows=rows,
            training=(),
            held_out=sorted(kept, key=lambda row: stream_seed("dataset/held-out row", rows.id(row))),
        )
    if held_out == 0:
        return DatasetTask(rows=rows, training=kept, held_out=())
    training, held = _split_by_question(rows, kept, held_out)
    return DatasetTask(rows=rows, training=training, held_out=held)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """Return the permutation of range(size) for (seed, epoch)."""
    stream = random.Random(stream_seed("dataset/epoch", seed, epoch))  # noqa: S311 - an order, not a secret
    # random() is the one draw that stays the same in every Python version; shuffle() is not.
    return tuple(sorted(range(size), key=lambda _: stream.random()))


def _split_by_question(rows: _Rows, kept: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Return (training rows, held-out rows): one row of each held-out question, all rows of the other questions."""
    questions = rows.question_hashes(kept)
    first_row: dict[int, int] = {}
    for question, row in zip(questions, kept, strict=True):
        first_row.setdefault(question, row)
    if count >= len(first_row):
        raise DataError(
            f"{count} problems are to be held out of {rows.name}, which has {len(first_row)} different questions, "
            "and at least one has to stay for training",
            where="eval.problems",
            next_step=f"set eval.problems to at most {len(first_row) - 1}, or name another dataset in eval.dataset",
        )
    chosen = sorted(first_row)[:count]
    held = set(chosen)
    training = [row for question, row in zip(questions, kept, strict=True) if question not in held]
    return training, [first_row[question] for question in chosen]


class _BadCellError(Exception):
    """Report a cell without a usable question or answer. The message continues "column ... "."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Read problems from a table. Rows are numbered from 0 here, and from 1 in ids and messages."""

    name: str
    table: Table
    prompt_column: str
    answer_column: str
    own_ids: Sequence[int | str] | None

    def id(self, row: int) -> str:
        return f"{self.name}/{row + 1}" if self.own_ids is None else str(self.own_ids[row])

    def problem(self, row: int) -> Problem:
        cells = self.table.row(row)
        return Problem(
            id=self.id(row),
            messages=_messages(cells.pop(self.prompt_column)),
            answer=_answer(cells.pop(self.answer_column)),
            meta={key: cell for key, cell in cells.items() if _fits_meta(cell)},
        )

    def problems(self, kept: Sequence[int]) -> Iterator[str]:
        """Yield an error message for each row that cannot be used."""
        prompts, answers = self.table.column(self.prompt_column), self.table.column(self.answer_column)
        # One answer in GSM8K's form means that all have to be: a row without its last line would otherwise have
        # its whole working taken for the answer.
        results = any(_ends_in_result(answers[row]) for row in kept)
        for row in kept:
            found = []
            try:
                _messages(prompts[row])
            except _BadCellError as error:
                found.append(f'column "{self.prompt_column}" {error}')
            try:
                _answer(answers[row])
                if results and not _ends_in_result(answers[row]):
                    raise _BadCellError('does not end in a line "#### result", as it does in other rows')
            except _BadCellError as error:
                found.append(f'column "{self.answer_column}" {error}')
            if found:
                yield f"row {row + 1}: {', '.join(found)}"

    def prompt_bytes(self, kept: Sequence[int]) -> list[int]:
        """Return the UTF-8 bytes of each row's messages, without what a chat template adds."""
        prompts = self.table.column(self.prompt_column)
        return [sum(len(message["content"].encode()) for message in _messages(prompts[row])) for row in kept]

    def question_hashes(self, kept: Sequence[int]) -> list[int]:
        """Return one hash per row, equal for equal questions; white space is ignored."""
        prompts = self.table.column(self.prompt_column)
        return [
            stream_seed(
                "dataset/held-out question",
                *(" ".join(text.split()) for message in _messages(prompts[row]) for text in message.values()),
            )
            for row in kept
        ]


def _messages(cell: object) -> tuple[dict[str, str], ...]:
    """Return the chat messages of a prompt cell; plain text becomes a user message."""
    if isinstance(cell, str):
        return ({"role": "user", "content": _text(cell)},)
    if cell is None or cell == []:
        raise _BadCellError("is empty")
    if not isinstance(cell, list):
        raise _BadCellError(f"is {_shown(cell)}, neither text nor a list of chat messages")
    messages = tuple(_message(message) for message in cell)
    if messages[-1]["role"] != "user":
        raise _BadCellError(f'ends with a message of role "{messages[-1]["role"]}"; the last one has to be the user\'s')
    return messages


def _message(message: object) -> dict[str, str]:
    # A table gives every message all the keys that any of them has, with None for those it lacks.
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if given.keys() != {"role", "content"}:
        raise _BadCellError(f'has {_shown(message)} for a message; it takes "role" and "content", nothing else')
    role, content = given["role"], given["content"]
    if role not in ("system", "user", "assistant"):
        raise _BadCellError(f'has a message of role {_shown(role)}; use "system", "user" or "assistant"')
    if not isinstance(content, str):
        raise _BadCellError(f"has a message with content {_shown(content)}; it has to be text")
    return {"role": role, "content": _text(content)}


def _answer(cell: object) -> str:
    """Return a cell's reference answer: its text, its number as text, or the result of a last line `#### result`."""
    if cell is None:
        raise _BadCellError("is empty")
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise _BadCellError(f"is {_shown(cell)}, neither text nor a number")
    if isinstance(cell, float) and not math.isfinite(cell):
        raise _BadCellError(f"is {cell}, which no answer equals")
    text = _text(_plain(cell)).strip()
    if (line := _RESULT_LINE.search(text)) is None:
        return text
    result = line[1]
    return result.replace(",", "") if _GROUPED_NUMBER.fullmatch(result) else result


def _text(text: str) -> str:
    """Return `text`; fail if it is blank or holds half a surrogate pair, which UTF-8 cannot encode."""
    if not text.strip():
        raise _BadCellError("is empty")
    if _SURROGATE.search(text):
        raise _BadCellError("holds half a surrogate pair, which is no character")
    return text


def _ends_in_result(cell: object) -> bool:
    return isinstance(cell, str) and _RESULT_LINE.search(cell) is not None


def _plain(cell: object) -> str:
    """Return a cell as text, equal for 4, 4.0 and "4": a fraction makes a column float, and CSV holds only text."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell)


def _fits_meta(cell: object) -> bool:
    """Check that JSON can hold the cell in `MAX_META_CHARACTERS`."""
    try:
        return len(json.dumps(cell, allow_nan=False, ensure_ascii=False)) <= MAX_META_CHARACTERS
    except (TypeError, ValueError):  # dates, bytes, NaN
        return False


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _prompt_column(part: DatasetRecipe, place: Place, columns: Sequence[str]) -> str:
    known = KNOWN.get(place.dataset)
    wanted = part.prompt_column or (known.prompt_column if known else None)
    if wanted is not None:
        return _column(wanted, "prompt_column", place, columns)
    found = [name for name in PROMPT_COLUMNS if name in columns]
    if len(found) != 1:
        likely = next((close for name in PROMPT_COLUMNS if (close := nearest(name, columns))), None)
        raise place.error(
            f"has {_quoted(found) if found else 'no ' + ' or '.join(PROMPT_COLUMNS)} for the column with the question; "
            f"its columns are {_quoted(columns)}",
            f"set {place.section}.prompt_column to one of them" + (f', perhaps "{likely}"' if likely else ""),
        )
    return found[0]


def _column(wanted: str, key: str, place: Place, columns: Sequence[str]) -> str:
    if wanted in columns:
        return wanted
    likely = nearest(wanted, columns)
    raise place.error(
        f'has no column "{wanted}"; its columns are {_quoted(columns)}',
        f"name one of them in {place.section}.{key}" + (f', perhaps "{likely}"' if likely else ""),
    )


def _own_ids(table: Table) -> Sequence[int | str] | None:
    """Return the rows' own ids if each is text or a whole number and occurs once."""
    for column in ID_COLUMNS:
        if column in table.column_names:
            ids = table.column(column)
            usable = all(isinstance(own, str | int) and not isinstance(own, bool) and own != "" for own in ids)
            if usable and len({str(own) for own in ids}) == len(ids):
                return ids
    return None


def _filtered(part: DatasetRecipe, place: Place, table: Table) -> list[int]:
    kept = list(range(len(table)))
    for column, value in part.filter.items():
        cells = [_plain(cell) for cell in table.column(_column(column, "filter", place, table.column_names))]
        wanted = {_plain(one) for one in (value if isinstance(value, tuple) else (value,))}
        found = Counter(cells[row] for row in kept)
        kept = [row for row in kept if cells[row] in wanted]
        if not kept:
            values = ", ".join(f"{_shown(text)} ({count})" for text, count in found.most_common(VALUES_SHOWN))
            rest = f" and {len(found) - VALUES_SHOWN} more" if len(found) > VALUES_SHOWN else ""
            raise place.error(
                f'no row is left by the filter {column} = {_shown(value)}; the values of "{column}" and their rows: '
                f"{values}{rest}",
                f"set {place.section}.filter to values that occur",
            )
    return kept
