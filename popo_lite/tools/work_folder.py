"""Start and lock a folder of work that can be resumed: an evaluation or a sweep. Free of torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from popo_lite.errors import PopoError, UserInputError
from popo_lite.run_folder import is_leftover


def refuse_foreign(path: Path, kind: str, own: Collection[Path]) -> None:
    """Raise UserInputError if `path` holds more than `own`, the files of a `kind` that was killed at its start."""
    if path.exists() and (not path.is_dir() or {each for each in path.iterdir() if not is_leftover(each)} - {*own}):
        raise UserInputError(f"is not empty and holds no {kind}", where=f"--output {path}", next_step="use another one")


@contextmanager
def locked(lock: Path, busy: str) -> Iterator[int]:
    """Hold the lock file; yield its descriptor for child processes. Raises UserInputError `busy` if it is taken."""
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w", encoding="utf-8")
    with file:
        if not filelock.lock_descriptor(file.fileno(), blocking=False):
            raise UserInputError(busy, where=str(lock.parent), next_step="wait for it, stop it, or change --output")
        yield file.fileno()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a PopoError with `path` and the reason."""
    try:
        yield
    except OSError as error:
        next_step = "fix this and rerun the command; finished work is kept"
        raise PopoError(f"cannot be written: {error.strerror}", where=str(path), next_step=next_step) from error
