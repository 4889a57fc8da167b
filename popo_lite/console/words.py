"""Figures and foreign text as words for a terminal. Free of rich."""

from __future__ import annotations

import math
import unicodedata
from datetime import datetime, timedelta

ABSENT = "-"

# Characters that the console draws with, and what stands in for each where the encoding lacks it. One
# character for one character, so that nothing moves.
_TWINS = str.maketrans(
    {"━": "=", "─": "-", "█": "#", "▇": "%", "▆": "*", "▅": "+", "▄": "=", "▃": "-", "▂": ":", "▁": "."}
    | {"▓": "+", "░": ".", "…": "~", "✓": "v", "✗": "x", "·": "|", "×": "x", "±": "~", "\ufffd": "?"}
)


def figure(value: float | None) -> str:
    """A number in at most seven characters."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.0f}"


def decimals(value: float | None, places: int) -> str:
    """A number with a fixed number of decimals."""
    return ABSENT if value is None else f"{value:,.{places}f}"


def share(value: float | None) -> str:
    """A share in [0, 1] as a percentage."""
    return ABSENT if value is None else f"{value:.1%}" if math.isfinite(value) else str(value)


def lines(count: int) -> str:
    """So many lines."""
    return f"{count:,} line" if count == 1 else f"{count:,} lines"


def memory(size_bytes: int) -> str:
    """Bytes in GiB or MiB."""
    gib = size_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.1f} MiB"


def duration(seconds: float | None) -> str:
    """3.2 s, 12:03 or 1:12:03."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock_time(now: datetime, seconds_ahead: float) -> str:
    """The local time in `seconds_ahead` seconds, with weekday or date where it is another day."""
    then = now + timedelta(seconds=seconds_ahead)
    days = (then.date() - now.date()).days
    return f"{then:%H:%M}" if days == 0 else f"{then:%a %H:%M}" if days < 7 else f"{then:%d %b %H:%M}"


def clean(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal would obey.

    Models write escape sequences, control characters, direction overrides and lone surrogates; each would
    move the cursor, recolour the screen or fail to encode. White space becomes one blank, invisible format
    characters vanish, everything else of that kind becomes a replacement mark.
    """
    kept = []
    for character in " ".join(text.split()):
        kind = unicodedata.category(character)
        # Variation selectors change how wide the character before them is drawn.
        if kind == "Cf" or "\ufe00" <= character <= "\ufe0f":
            continue
        kept.append("\ufffd" if kind[0] == "C" else character)
    return "".join(kept)


def encodable(text: str, encoding: str) -> str:
    """`text` with the same number of characters, all of which `encoding` has."""
    if encoding.lower().replace("-", "").startswith("utf"):
        return text
    return text.translate(_TWINS).encode(encoding, "replace").decode(encoding)
