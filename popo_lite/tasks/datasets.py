"""Make problems from the rows of a local file, a Hub dataset, or one of the names in `tables.KNOWN`."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

from popo_lite.errors import DataError, nearest
from popo_lite.recipe import DatasetRecipe
from popo_lite.seeding import stream_seed
from popo_lite.tasks.tables import Place, column, column_names, load_table
from popo_lite.types import Problem

PROMPT_COLUMNS = ("prompt", "problem", "question")
ID_COLUMNS = ("id", "unique_id")
MAX_META_CHARACTERS = 2000
VALUES_SHOWN = 10

_RESULT_LINE = re.compile(r"^####(?!#)[ \t]*(\S[^\n]*?)\s*\Z", re.MULTILINE)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_GROUPED_NUMBER = re.compile(r"[-+$]*\d[\d,]*(\.\d+)?%?")


class DatasetTask:
    """Make problems on demand from the rows that `part`, which stands in `section` of the recipe, describes.

    Opened as `data`, all rows are for training except `held_out` of them, chosen by a hash of the question;
    other rows with the same question are used for neither. Opened as `eval`, all rows are held out, in an order
    given by a hash of their id. Ids are `name/row`, or the rows' own if those are unique; rows count from 1 in
    ids and messages, before filtering, and from 0 here.

    Raises DataError if the dataset cannot be loaded, lacks a column, or has rows that cannot be used.
    """

    def __init__(self, part: DatasetRecipe, *, section: Literal["data", "eval"], held_out: int = 0) -> None:
        if part.dataset is None:
            raise DataError("names no dataset", where=f"{section}.dataset", next_step="name a file or a Hub dataset")
        place = Place(section=section, dataset=part.dataset)
        self.name, self._rows = load_table(part, place)
        columns = column_names(self._rows)
        prompts = PROMPT_COLUMNS if part.prompt_column is None else [part.prompt_column]
        self._prompt_column = _column(prompts, "prompt_column", place, columns)
        self._answer_column = _column([part.answer_column or "answer"], "answer_column", place, columns)
        self._own_ids = _own_ids(self._rows, columns)
        self._training: Sequence[int] = _filtered(part, place, self._rows, columns)[: part.limit]
        self._held_out: Sequence[int] = ()
        if faults := self._faults():
            raise place.refusal(
                f"{len(faults)} of {len(self._training)} rows cannot be used",
                faults,
                f"correct these rows, or leave them out by {section}.filter",
            )
        if section == "eval":
            self._held_out = sorted(self._training, key=lambda row: stream_seed("dataset/held-out row", self._id(row)))
            self._training = ()
        elif held_out:
            self._hold_out(held_out)

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
        return self._problem(self._training[order[position]])

    def held_out(self, count: int) -> list[Problem]:
        """Return the first `count` held-out problems; a larger count only adds problems."""
        if count > len(self._held_out):
            raise DataError(
                f"{count} held-out problems are asked for; {self.name} has {len(self._held_out)}",
                where="eval.problems",
                next_step=f"set eval.problems to at most {len(self._held_out)}",
            )
        return [self._problem(row) for row in self._held_out[:count]]

    def drop_training(self, unwanted: Callable[[Problem], bool]) -> int:
        """Remove `unwanted` problems from training and return how many. Raises DataError if none remains."""
        kept = [row for row in self._training if not unwanted(self._problem(row))]
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
        return Problem(
            id=self._id(row),
            messages=_messages(cells.pop(self._prompt_column)),
            answer=_answer(cells.pop(self._answer_column)),
            meta={key: cell for key, cell in cells.items() if _fits_meta(cell)},
        )

    def _faults(self) -> list[str]:
        """Return an error message for each row that cannot be used."""
        prompts, answers = (column(self._rows, name) for name in (self._prompt_column, self._answer_column))
        # One answer in GSM8K's form means that all have to be: a row without its last line would otherwise have
        # its whole working taken for the answer.
        results = any(isinstance(answers[row], str) and _RESULT_LINE.search(answers[row]) for row in self._training)
        faults = []
        for row in self._training:
            found = (
                _fault(self._prompt_column, _messages, prompts[row]),
                _fault(self._answer_column, partial(_answer, needs_result=results), answers[row]),
            )
            if any(found):
                faults.append(f"row {row + 1}: {', '.join(filter(None, found))}")
        return faults

    def _hold_out(self, count: int) -> None:
        """Hold out one row each of `count` questions, white space ignored, and train on no other row of them."""
        prompts = column(self._rows, self._prompt_column)
        questions = {}
        for row in self._training:
            texts = (" ".join(text.split()) for message in _messages(prompts[row]) for text in message.values())
            questions[row] = stream_seed("dataset/held-out question", *texts)
        first_row = {question: row for row, question in reversed(questions.items())}
        if count >= len(first_row):
            raise DataError(
                f"{count} problems are to be held out of {self.name}, which has {len(first_row)} different questions, "
                "and at least one has to stay for training",
                where="eval.problems",
                next_step=f"set eval.problems to at most {len(first_row) - 1}, or name another dataset in eval.dataset",
            )
        chosen = dict.fromkeys(sorted(first_row)[:count])
        self._held_out = [first_row[question] for question in chosen]
        self._training = [row for row, question in questions.items() if question not in chosen]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """Return the permutation of range(size) for (seed, epoch)."""
    stream = random.Random(stream_seed("dataset/epoch", seed, epoch))  # noqa: S311 - an order, not a secret
    # random() is the one draw that stays the same in every Python version; shuffle() is not.
    return tuple(sorted(range(size), key=lambda _: stream.random()))


class _BadCellError(Exception):
    """Report a cell without a usable question or answer. The message continues "column ... "."""


def _fault(name: str, read: Callable[[object], object], cell: object) -> str | None:
    try:
        read(cell)
    except _BadCellError as error:
        return f'column "{name}" {error}'
    return None


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


def _answer(cell: object, *, needs_result: bool = False) -> str:
    """Return a cell's reference answer: its text, its number as text, or the result of a last line `#### result`."""
    if cell is None:
        raise _BadCellError("is empty")
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        raise _BadCellError(f"is {_shown(cell)}, neither text nor a number")
    if isinstance(cell, float) and not math.isfinite(cell):
        raise _BadCellError(f"is {cell}, which no answer equals")
    text = _text(_plain(cell)).strip()
    if (line := _RESULT_LINE.search(text)) is None:
        if needs_result:
            raise _BadCellError('does not end in a line "#### result", as it does in other rows')
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


def _column(wanted: Sequence[str], key: str, place: Place, columns: Sequence[str]) -> str:
    """Return the one of the `wanted` columns that there is."""
    found = [name for name in wanted if name in columns]
    if len(found) == 1:
        return found[0]
    quoted, there = (", ".join(f'"{name}"' for name in names) for names in (found, columns))
    what = f'no column "{wanted[0]}"'
    if len(wanted) > 1:
        what = f"{quoted or 'no ' + ' or '.join(wanted)} for the column with the question"
    likely = next((close for name in wanted if (close := nearest(name, columns))), None)
    raise place.error(
        f"has {what}; its columns are {there}",
        f"name one of them in {place.section}.{key}" + (f', perhaps "{likely}"' if likely else ""),
    )


def _own_ids(rows: Any, columns: Sequence[str]) -> Sequence[int | str] | None:
    """Return the rows' own ids if each is text or a whole number and occurs once."""
    for name in ID_COLUMNS:
        ids = column(rows, name) if name in columns else [None]
        usable = all(isinstance(own, str | int) and not isinstance(own, bool) and own != "" for own in ids)
        if usable and len({str(own) for own in ids}) == len(ids):
            return ids
    return None


def _filtered(part: DatasetRecipe, place: Place, rows: Any, columns: Sequence[str]) -> list[int]:
    kept = list(range(len(rows)))
    for name, value in part.filter.items():
        cells = [_plain(cell) for cell in column(rows, _column([name], "filter", place, columns))]
        wanted = {_plain(one) for one in (value if isinstance(value, tuple) else (value,))}
        found = Counter(cells[row] for row in kept)
        kept = [row for row in kept if cells[row] in wanted]
        if not kept:
            values = ", ".join(f"{_shown(text)} ({count})" for text, count in found.most_common(VALUES_SHOWN))
            rest = f" and {len(found) - VALUES_SHOWN} more" if len(found) > VALUES_SHOWN else ""
            raise place.error(
                f'no row is left by the filter {name} = {_shown(value)}; the values of "{name}" and their rows: '
                f"{values}{rest}",
                f"set {place.section}.filter to values that occur",
            )
    return kept
