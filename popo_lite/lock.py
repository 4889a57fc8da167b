"""Lock a folder, and tell a second process who holds it. Free of torch."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import filelock

from popo_lite.errors import PopoError, UserInputError


@contextmanager
def locked(lock: Path, busy: str, next_step: str) -> Iterator[int]:
    """Hold the lock file, which says who holds it; yield its descriptor for child processes.

    Raises UserInputError with `busy`, owner and age if another process holds it, however that one was started. The
    system frees the lock of a process that ends in any way.
    """
    with writing(lock):
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # runs hold data, and what a model says
        file = lock.open("a+", encoding="utf-8")
    with file:
        with writing(lock):
            free = filelock.lock_descriptor(file.fileno(), blocking=False)
            if not free:  # it may only be `owner_of`, which holds it for an instant
                time.sleep(0.05)
                free = filelock.lock_descriptor(file.fileno(), blocking=False)
            # The last owner may have removed the file in between; the next one would lock another.
            free = free and lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
        if not free:
            what = f"{busy}: {_owner(file)}"
            raise UserInputError(what, where=str(lock.parent), next_step=next_step)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": platform.node(), "since": now}
        with writing(lock):
            file.truncate(0)
            file.write(f"\n{json.dumps(owner)}\n")
            file.flush()
        yield file.fileno()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a PopoError with `path` and the reason."""
    try:
        yield
    except OSError as error:
        next_step = "fix this and rerun the command; finished work is kept"
        raise PopoError(f"cannot be written: {error.strerror}", where=str(path), next_step=next_step) from error


def owner_of(lock: Path) -> str | None:
    """Return who holds the lock, or None if nobody does. Writes nothing, and holds the lock for an instant itself."""
    try:
        with lock.open(encoding="utf-8") as file:
            free = filelock.lock_descriptor(file.fileno(), blocking=False)
            return None if free else _owner(file)
    except OSError:  # no such file, or a file system without locks
        return None


def _owner(file: IO[str]) -> str:
    """Return process, host and age of the one that holds the lock, as it wrote them."""
    try:
        file.seek(1)  # Windows locks the first byte against reading
        owner = json.loads(file.read())
        age = datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(owner["since"])
        seconds = datetime.timedelta(seconds=int(age.total_seconds()))
        return f"process {owner['pid']:d} on {owner['host']}, for {seconds}"
    except (OSError, ValueError, TypeError, KeyError):
        return "an unknown process"  # it has not written its name yet
