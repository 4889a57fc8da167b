"""Read files of runs that may be damaged, or made up by a stranger. Free of torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError

RESTORE = "restore the file from a backup, or do without this run"


@contextmanager
def reading(path: Path, place: str = "") -> Iterator[None]:
    """Raise CheckpointError for whatever goes wrong inside, where the content of the file at `path` is read or used.

    `place` says where in the file, such as "line 3".
    """
    try:
        yield
    # The content may have any type at any place, and JSON may be nested too deep for the parser.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        detail = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
        where = f"{path}, {place}" if place else str(path)
        raise CheckpointError(f"the file is damaged: {detail}", where=where, next_step=RESTORE) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`. Raises CheckpointError if there is none."""
    with reading(path):
        return as_object(json.loads(path.read_text(encoding="utf-8")))


def as_object(content: Any) -> dict[str, Any]:
    """Return a JSON object. Raises TypeError for other content."""
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} in place of an object")
    return content
