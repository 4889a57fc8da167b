"""What torchrun and `accelerate launch` tell a process by its environment. Free of torch."""

from __future__ import annotations

import os

from popo_lite.errors import UserInputError


def count_of(name: str, default: int) -> int:
    """Return a number of processes from the environment, `default` if it is not set. Raises UserInputError."""
    value = os.environ.get(name, "").strip()
    if value and not (value.isascii() and value.isdigit() and int(value)):
        raise UserInputError(f"{value!r} is no number of processes", where=name, next_step=f"unset {name}")
    return int(value or default)


def processes_of_run() -> int:
    """Return how many processes, or ranks, train together."""
    return count_of("WORLD_SIZE", 1)
