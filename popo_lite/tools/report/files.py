"""Read the files of a run for its report, also while it trains. The files may be old, damaged or a stranger's."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from popo_lite.errors import CheckpointError
from popo_lite.formats import read_json, reading
from popo_lite.lock import owner_of
from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, checkpoint_folders, read_lines

LOG_BYTES = 100_000
"""Bytes read from the end of log.txt, which may have a megabyte."""
LARGEST = 1e15
"""A larger figure is damage: no metric is that large, and sums and differences of larger ones may overflow."""

State = Literal["finished", "running", "stopped", "unknown"]
"""Unknown: the run was last trained on another machine, and may still be."""


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What the files of a run say. `summary` lacks what is only known at the end if the run has not ended."""

    folder: RunFolder
    recipe: Recipe
    state: State
    steps: Sequence[StepRecord]
    evaluations: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    log: str
    unreadable: Sequence[str]
    """Files that are left out because they cannot be read."""


def read_run(path: Path) -> RunFiles:
    """Read the run at `path`. Raises CheckpointError if there is none, or its metrics are damaged."""
    run = RunFolder(path)
    recipe = run.recipe()
    if not run.environment_path.is_file() and not run.metrics_path.is_file():
        what = "there is no run here: a recipe alone is none"
        raise CheckpointError(what, where=str(path), next_step=f"popo-lite train {shlex.quote(str(run.recipe_path))}")
    steps = read_lines(run.metrics_path, growing=True) if run.metrics_path.is_file() else []
    for number, record in enumerate(steps, 1):
        with reading(run.metrics_path, f"line {number}"):
            if not 0 <= record["step"] + 1 <= LARGEST:
                raise ValueError(f"a run has no step {record['step']}")
    evaluations = read_lines(run.evaluations_path, growing=True) if run.evaluations_path.is_file() else []
    evaluations = [line for line in evaluations if number_in(line, "pass_at_1") is not None]
    state: State = "finished" if run.ended else "running" if owner_of(run.lock_path) is not None else "stopped"
    if state == "stopped" and _is_elsewhere(run):
        state = "unknown"
    unreadable: list[str] = []
    summary: Mapping[str, Any] = {}
    if state == "finished":
        summary = run.summary()
    else:
        for folder in reversed(checkpoint_folders(run.checkpoints)):
            try:
                summary = run.summary(folder)
                break
            except CheckpointError as error:
                if folder.is_dir():  # else the run has deleted it meanwhile
                    unreadable.append(str(error))
    environment: Mapping[str, Any] = {}
    try:
        environment = read_json(run.environment_path) if run.environment_path.is_file() else {}
    except CheckpointError as error:
        unreadable.append(str(error))
    return RunFiles(
        folder=run, recipe=recipe, state=state, steps=steps, evaluations=evaluations, summary=summary,
        environment=environment, log=_end_of(run.log_path), unreadable=unreadable,
    )  # fmt: skip


def number_in(table: Any, *keys: str) -> float | None:
    """Return the number at `keys` of nested tables, or None if there is none that can be drawn."""
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table if _is_number(table) else None


def names_in(records: Sequence[StepRecord], metric: str) -> list[str]:
    """Return the names that a metric with several figures, such as `rewards`, has in any record."""
    tables = [record[metric] for record in records if isinstance(record.get(metric), Mapping)]
    return list(dict.fromkeys(str(name) for table in tables for name in table))


def _is_elsewhere(run: RunFolder) -> bool:
    """Return True if another machine took the run's lock last: nothing here says whether it still trains there."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads(run.lock_path.read_text(encoding="utf-8").strip("\n\0"))["host"] != platform.node())
    return False


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST and math.isfinite(value)


def _end_of(path: Path) -> str:
    """Return the last whole lines of a text file, or nothing if there is none."""
    if not path.is_file():
        return ""
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_BYTES))
        text = file.read(LOG_BYTES)
    return (text if size <= LOG_BYTES else text.partition(b"\n")[2]).decode(errors="replace")
