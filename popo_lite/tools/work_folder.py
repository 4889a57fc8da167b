"""Refuse a folder for an evaluation or a sweep that holds something else. Free of torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from popo_lite.errors import UserInputError
from popo_lite.run_folder import is_leftover


def refuse_foreign(path: Path, kind: str, own: Collection[Path]) -> None:
    """Raise UserInputError if `path` holds more than `own`, the files of a `kind` that was killed at its start."""
    if path.exists() and (not path.is_dir() or {each for each in path.iterdir() if not is_leftover(each)} - {*own}):
        raise UserInputError(f"is not empty and holds no {kind}", where=f"--output {path}", next_step="use another one")
