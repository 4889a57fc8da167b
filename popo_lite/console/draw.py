"""Bars, charts and text that fit a given number of terminal cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_CEILINGS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def bar(part: float, width: int, style: str) -> Text:
    """A progress bar, `part` in [0, 1] of it heavy. It reads without colour too."""
    filled = round(min(max(part, 0.0), 1.0) * width)
    return Text.assemble(("━" * filled, style), ("─" * (width - filled), "dim"))


def stacked_bar(parts: Sequence[tuple[int, str, str]], width: int) -> Text:
    """(amount, character, style) side by side, in proportion, `width` cells in all."""
    total = sum(amount for amount, _, _ in parts)
    drawn = Text()
    below = 0
    for amount, character, style in parts:
        start, below = below, below + amount
        # Rounding the boundaries and not the lengths keeps the whole exactly `width` wide.
        cells = round(below * width / total) - round(start * width / total) if total else 0
        drawn.append(character * cells, style)
    return drawn


def ceiling(values: Sequence[float | None]) -> float:
    """The round share of which `values`, shares themselves, all stay below: the top of their chart."""
    highest = max((value for value in values if value is not None), default=0.0)
    return next((top for top in _CEILINGS if highest <= top), highest)


def chart(
    values: Sequence[float | None], width: int, height: int, low: float, high: float, expected: int = 0
) -> list[str]:
    """Columns over time, `height` rows from top to bottom, all values in at most `width` columns.

    Where there are more values than columns, each column is a mean; where `expected` values will leave room,
    each has several columns. The lowest value is drawn as a thin line and None as a gap, so that 0 and "not
    measured" look different.
    """
    each = max(width // max(expected, len(values), 1), 1)
    columns = []
    for value in _binned([value for value in values for _ in range(each)], width):
        if value is None:
            columns.append(0)
            continue
        part = (value - low) / (high - low) if high > low else 0.5
        columns.append(max(1, round(min(max(part, 0.0), 1.0) * 8 * height)))
    return ["".join(_EIGHTHS[min(max(level - 8 * row, 0), 8)] for level in columns) for row in reversed(range(height))]


def sparkline(values: Sequence[float | None], width: int, expected: int = 0) -> str:
    """A chart one row high between the lowest and the highest column: it shows shape, not size."""
    binned = _binned(values, width)
    known = [value for value in binned if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    # Rounding of the means is no course: a flat line, and not noise blown up to full height.
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        binned = [None if value is None else low for value in binned]
        high = low
    return chart(binned, width, 1, low, high, expected)[0]


def _binned(values: Sequence[float | None], width: int) -> list[float | None]:
    bins = min(len(values), width)
    means: list[float | None] = []
    for index in range(bins):
        part = values[index * len(values) // bins : (index + 1) * len(values) // bins]
        found = [value for value in part if value is not None]
        means.append(sum(found) / len(found) if found else None)
    return means


def cut_end(text: str, width: int) -> str:
    """`text` in at most `width` cells, its end replaced where it is longer."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(width - 1, 0)).rstrip() + "…"[:width]


def cut_middle(text: str, width: int) -> str:
    """`text` in at most `width` cells, its middle replaced where it is longer: an answer's end counts most."""
    if cell_len(text) <= width:
        return text
    if width < 5:
        return cut_end(text, width)
    room = width - 3
    head = set_cell_size(text, room // 2).rstrip()
    tail = text[-(room - room // 2) :]
    while cell_len(tail) > room - room // 2:
        tail = tail[1:]
    return f"{head} … {tail.lstrip()}"


def wrap(text: str, width: int, height: int) -> list[str]:
    """`text` broken between words into at most `height` lines of at most `width` cells, cut in the middle."""
    room = width * height
    lines = _wrapped(cut_middle(text, room), width)
    while len(lines) > height:
        # Breaking between words wastes cells, so less text than `room` fits.
        room -= max(width // 4, 1)
        lines = _wrapped(cut_middle(text, room), width)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        while cell_len(word) > width:
            head = set_cell_size(word, width).rstrip() or word[0]
            lines[-1], word = head, word[len(head) :]
            lines.append("")
        lines[-1] = word
    return [line for line in lines if line] or [""]
