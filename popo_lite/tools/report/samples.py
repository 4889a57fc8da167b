"""Choose answers of samples.jsonl that show how a run changed: the same prompts at several steps, or early to late."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from popo_lite.formats import checked, reading

ROWS = 4
"""Prompts shown."""
MOMENTS = 5
"""Steps at which a prompt that comes again is shown."""
GLANCE, LONGEST = 400, 4000
"""Characters of a text that are shown at once, and on a click: half of them its beginning, half its end."""


class Line(NamedTuple):
    """Where a group of answers is in the file, and what decides whether it is chosen."""

    offset: int
    step: int
    problem: str
    kinds: int  # 2 if it has right and wrong answers


def chosen_samples(path: Path) -> list[dict[str, Any]]:
    """Return rows of `title`, `question` (None: each card has its own) and `cards`, oldest card first.

    A card is a group at a step: a right and a wrong answer of it, as far as there are any. The file may be much larger
    than memory, so it is read twice, a line at a time.
    """
    if not path.is_file():
        return []
    with reading(path), path.open("rb") as file:
        lines = list(_index(file, path))
        by_problem: dict[str, list[Line]] = {}
        for line in lines:
            by_problem.setdefault(line.problem, []).append(line)
        # A prompt that came twice in a short time shows no change.
        half = (lines[-1].step - lines[0].step) / 2 if lines else 0
        again = [found for found in by_problem.values() if found[-1].step - found[0].step >= max(half, 1)]
        # Those seen over the longest part of the run, then those with right and wrong answers.
        again.sort(key=lambda found: (found[0].step - found[-1].step, -sum(line.kinds for line in found)))
        rows = []
        for found in again[:ROWS]:
            cards = [_card(file, path, line) for line in _spread(found, MOMENTS)]
            rows.append(
                {"title": _title("The same prompt at", cards), "question": cards[0]["question"], "cards": cards}
            )
        used = {line.problem for found in again[:ROWS] for line in found}
        for row in _early_to_late([line for line in lines if line.problem not in used], ROWS - len(rows)):
            cards = [_card(file, path, line) for line in row]
            rows.append({"title": _title("Prompts of", cards), "question": None, "cards": cards})
    return rows


def _index(file: BinaryIO, path: Path) -> Iterator[Line]:
    offset = 0
    for number, text in enumerate(file, 1):
        if text.endswith(b"\n") and text != b"\n":  # else it is still being written
            with reading(path, f"line {number}"):
                group = checked(json.loads(text), path)
                kinds = {bool(answer["positive"]) for answer in group["answers"]}
                yield Line(offset, group["step"] + 0, str(group["problem"]), len(kinds))
        offset += len(text)


def _spread(lines: Sequence[Line], count: int) -> list[Line]:
    """Return at most `count` of the lines, evenly spread, the first and the last among them."""
    last = len(lines) - 1
    return [lines[i] for i in dict.fromkeys(round(last * n / (count - 1)) for n in range(count))]


def _early_to_late(lines: Sequence[Line], count: int) -> Iterator[list[Line]]:
    """Yield up to `count` rows of a group from the first, middle and last part of the run, preferably mixed ones."""
    if not lines or count < 1:
        return
    first, last = lines[0].step, lines[-1].step
    bounds = [first + (last - first) * part / 10 for part in (0, 1.5, 4.25, 5.75, 8.5, 10)]
    parts = [[line for line in lines if low <= line.step <= high] for low, high in list(pairwise(bounds))[::2]]
    parts[-1].reverse()  # the very last ones rather than those just before
    parts = [sorted(part, key=lambda line: -line.kinds)[:count] for part in parts]
    if first == last:
        parts = parts[:1]
    for row in range(max(map(len, parts))):
        if found := [part[row] for part in parts if row < len(part)]:
            yield sorted(found, key=lambda line: line.step)


def _title(start: str, cards: Sequence[Mapping[str, Any]]) -> str:
    *steps, last = (f"{card['step']:,}" for card in cards)
    return f"{start} steps {', '.join(steps)} and {last}" if steps else f"{start} step {last}"


def _card(file: BinaryIO, path: Path, line: Line) -> dict[str, Any]:
    file.seek(line.offset)
    group = checked(json.loads(file.readline()), path)
    answers = group["answers"]
    shown = [next((each for each in answers if bool(each["positive"]) is kind), None) for kind in (True, False)]
    return {
        "step": line.step + 1,
        "question": shortened(str(group.get("question", ""))),
        "reference": shortened(str(group.get("reference", ""))),
        "right": sum(bool(each["positive"]) for each in answers),
        "count": len(answers),
        "answers": [_answer(each) for each in shown if each is not None],
    }


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    text = str(answer["text"])
    if messages := answer.get("messages"):  # a conversation with an environment
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    tokens = answer.get("tokens")
    return {
        "text": shortened(text),
        "whole": shortened(text, LONGEST) if shortened(text) != text else None,
        "positive": bool(answer["positive"]),
        "tokens": tokens if isinstance(tokens, int) else None,
        "cut": answer.get("finish_reason") == "length",
        "outcome": str(answer.get("outcome", "")),
    }


def shortened(text: str, longest: int = GLANCE) -> str:
    """Return `text` without its middle if it is long: the end of an answer has its result."""
    if len(text) <= 1.25 * longest:  # else a few characters are left out for a longer remark
        return text
    left_out = len(text) - longest
    return f"{text[: longest // 2]}\n[... {left_out:,} characters ...]\n{text[-longest // 2 :]}"
