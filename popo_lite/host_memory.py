"""Measure host memory: the machine's, or the container's if its limit (cgroup v2) is lower. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

OWN_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """Return all memory that this process could have, whatever else runs."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """Return how much memory is left without swapping."""
    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, used) of this process's control group and of those around it, if they have a limit.

    In a container its own group is the root, the only root with a limit.
    """
    try:
        name = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):  # another system, or cgroup v1 alone
        return
    parts = PurePosixPath(name).parts[1:]
    for depth in range(len(parts) + 1):
        folder = CGROUPS.joinpath(*parts[:depth])
        try:
            limit, used = ((folder / f"memory.{what}").read_text().strip() for what in ("max", "current"))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            cached = int(statistics["inactive_file"]) + int(statistics["active_file"])  # files; dropped when needed
            yield int(limit), int(used) - cached
