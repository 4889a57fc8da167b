"""Stamp what a run writes with the version of its format, and read what older versions wrote. Free of torch.

Files may be damaged, or made up by a stranger.

A new key with a default needs no new version: readers ignore keys that they do not know. Whatever an older reader must
not ignore, or a newer one could not read (a key that is gone, renamed or means something else), needs one: append the
function that turns the old content into the new.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError

KEY = "format"
RESTORE = "restore the file from a backup, or do without this run"


def _unchanged(content: dict[str, Any], _name: str) -> dict[str, Any]:
    return content


UPGRADES: tuple[Callable[[dict[str, Any], str], dict[str, Any]], ...] = (_unchanged,)
"""The function at index N turns content of version N, in a file of that name, into version N + 1. Version 0 is content
without a stamp, and differs only in that from version 1."""
FORMAT = len(UPGRADES)


def stamped(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content with the version of its format, for a file."""
    return {KEY: FORMAT, **content}


def checked(content: Any, path: Path) -> dict[str, Any]:
    """Return the content of a file at `path` as this version writes it, without the stamp.

    Raises CheckpointError if it is no table, or if a newer popo-lite wrote it.
    """
    version = content.get(KEY, 0) if isinstance(content, dict) else None
    if type(version) is not int or version < 0:
        raise CheckpointError("the file is damaged: it is no file of a run", where=str(path), next_step=RESTORE)
    if version > len(UPGRADES):
        what = f"was written by a newer popo-lite, in format {version}; this one reads up to {len(UPGRADES)}"
        raise CheckpointError(what, where=str(path), next_step="update popo-lite")
    content = {key: value for key, value in content.items() if key != KEY}
    for upgrade in UPGRADES[version:]:
        content = upgrade(content, path.name)
    return content  # type: ignore[no-any-return]  # JSON and TOML have only keys of text


@contextmanager
def reading(path: Path, place: str = "") -> Iterator[None]:
    """Raise CheckpointError if the block, which reads or uses the content of the file at `path`, fails.

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
    """Return the JSON object in a file. Raises CheckpointError if it is damaged or too new."""
    with reading(path):
        return checked(json.loads(path.read_text(encoding="utf-8")), path)
