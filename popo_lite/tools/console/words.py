"""Format numbers and untrusted text for a terminal. Does not import rich."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from popo_lite.metrics import Unit

ABSENT = "-"
# Characters that the console draws with, and an ASCII substitute for each: one for one keeps columns aligned.
_SUBSTITUTES = str.maketrans("━╸╺─█▇▆▅▄▃▂▁▓░…✓✗·×±\ufffd", "=  -#%*+=-:.+.~vx|x~?")


def quantity(value: Any, unit: Unit) -> str:
    """Return a metric's value with its unit."""
    if unit in ("count", "tokens"):
        return decimals(value, 0 if isinstance(value, int) else 1)
    return {"ratio": share, "seconds": duration, "bytes": memory}.get(unit, figure)(value)


def spoken(name: str) -> str:
    """Return the name of a task's figure as words: step_by_step_ratio as "step by step"."""
    return name.removesuffix("_ratio").replace("_", " ")


def figure(value: float | None) -> str:
    """Return a number in at most eight characters."""
    if value is None or not math.isfinite(value):
        return ABSENT if value is None else str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.0f}"


def decimals(value: float | None, places: int) -> str:
    """Return a number with a fixed number of decimals."""
    return ABSENT if value is None else f"{value:,.{places}f}"


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
    """Return `text` on one line without escape sequences, direction overrides and lone surrogates, which models write.

    White space becomes one blank, format characters vanish, other control characters become replacement marks.
    """
    kinds = ((character, unicodedata.category(character)) for character in " ".join(text.split()))
    # Variation selectors change how wide the character before them is drawn.
    kept = ((c, kind) for c, kind in kinds if kind != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return "".join("\ufffd" if kind[0] == "C" else c for c, kind in kept)


def encodable(text: str, encoding: str) -> str:
    """Return `text` with every character that `encoding` lacks replaced by one that it has."""
    if encoding.lower().replace("-", "").startswith("utf"):
        return text
    return text.translate(_SUBSTITUTES).encode(encoding, "replace").decode(encoding)
