"""Format numbers and untrusted text for a terminal. Does not import rich."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from unicodedata import category

from popo_lite.metrics import Unit
from popo_lite.redaction import redact

ABSENT = "-"
MAX_ACCENTS = 3  # on one letter, more than any language needs
# Characters that the console draws with, and an ASCII substitute for each: one for one keeps columns aligned.
_SUBSTITUTES = str.maketrans("━╸╺─█▇▆▅▄▃▂▁▓░…✓✗·×±\ufffd", "=  -#%*+=-:.+.~vx|x~?")


def quantity(value: Any, unit: Unit) -> str:
    """Return a metric's value with its unit."""
    if unit in ("count", "tokens"):
        return ABSENT if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
    return {"ratio": share, "seconds": duration, "bytes": memory}.get(unit, figure)(value)


def figure(value: float | None) -> str:
    """Return a number in at most eight characters."""
    if value is None or not math.isfinite(value):
        return ABSENT if value is None else str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.0f}"


def share(value: float | None) -> str:
    """Return a ratio in [0, 1] as a percentage."""
    return ABSENT if value is None else f"{value:.1%}" if math.isfinite(value) else str(value)


def memory(size_bytes: int | None) -> str:
    """Return bytes as GiB or MiB."""
    if size_bytes is None:
        return ABSENT
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def duration(seconds: float | None) -> str:
    """Return seconds as 3.2 s, 12:03 or 1:12:03."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock_time(now: datetime, seconds_ahead: float) -> str:
    """Return the local time in `seconds_ahead` seconds, with weekday or date if that is another day."""
    then = now + timedelta(seconds=seconds_ahead)
    days = (then.date() - now.date()).days
    return f"{then:%H:%M}" if days == 0 else f"{then:%a %H:%M}" if days < 7 else f"{then:%d %b %H:%M}"


def by_stage(seconds: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """Return the seconds of each stage, and of all: the entry "total" if there is one, else the sum."""
    stages = {name: value for name, value in seconds.items() if name != "total"}
    return stages, seconds.get("total", sum(stages.values()))


def clean(text: str) -> str:
    """Return untrusted `text` on one line, without secrets and format characters, other control characters as marks."""
    return _drawable(" ".join(redact(text).split()))


def printable(text: str) -> str:
    """Return untrusted `text` as `clean` does, but with its lines and blanks; a tab becomes blanks."""
    return "\n".join(_drawable(line.expandtabs()) for line in redact(text).splitlines())


def _drawable(line: str) -> str:
    # Models write escape sequences, direction overrides and lone surrogates. Variation selectors change how wide the
    # character before them is drawn, and many accents on one letter are drawn over the lines above and below.
    if line.isascii() and line.isprintable():
        return line
    kept, accents = [], 0
    for character in line:
        kind = category(character)
        accents = accents + 1 if kind in ("Mn", "Me") else 0
        if kind == "Cf" or accents > MAX_ACCENTS or "\ufe00" <= character <= "\ufe0f" or character >= "\U000e0000":
            continue
        kept.append("\ufffd" if kind[0] == "C" else character)
    return "".join(kept)


def encodable(text: str, encoding: str) -> str:
    """Return `text` with every character that `encoding` lacks replaced by one that it has."""
    if encoding.lower().replace("-", "").startswith("utf"):
        return text
    return text.translate(_SUBSTITUTES).encode(encoding, "replace").decode(encoding)
