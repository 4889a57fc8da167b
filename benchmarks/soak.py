"""Train 2,000 short steps and see whether the process grows: `python benchmarks/soak.py`.

The tiny model, 3 x 4 short answers a step, a checkpoint every 50 steps, an evaluation every 200, the plain view. Every
20 steps: the bytes in use of malloc and the blocks in use of Python's own allocator, resident and virtual memory, open
descriptors, threads, child processes, and the bytes of the run folder's files. Lines are fitted to what follows the
first quarter, the warm-up. Standard errors allow for residuals that follow their predecessor (AR(1)).

What malloc has in use is "flat" if its slope is less than two standard errors above zero, or if even the slope plus two
standard errors would add less than 1 % in 10,000 steps: this finds leaks of tensors. Resident memory is no measure of
them, as the allocator keeps the fragments between blocks that were freed. So it may grow, but its line may add at most
5 % in 10,000 steps; so may virtual memory and Python's blocks, among which are these measurements. malloc's bytes need
mallinfo2 of glibc 2.33; elsewhere they are left out.

Counts are flat if none is higher after the warm-up than at its end. Files that a step appends to must grow along a line
(R^2 above 0.99), that of evaluations along a line over the evaluations, the log at most to its limit, and the others
not at all. Exit code 1 if anything is not so.
Writes benchmarks/results/soak.json, or soak-vllm.json with --engine vllm.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil

from popo_lite.api import train
from popo_lite.callbacks import Callback
from popo_lite.events import LOG_BYTES, OLDER_LOGS
from popo_lite.metrics import StepRecord
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import environment

RESULTS = Path(__file__).parent / "results"
OVERRIDES = (
    "data.prompts_per_step=3", "rollout.num_generations=4", "rollout.max_completion_length=24",
    "optimizer.learning_rate=1e-4", "eval.problems=8", "eval.every=200", "train.save_steps=50", "train.device=cpu",
)  # fmt: skip
"""Answers must sometimes be right and must not all become so, else most steps would be skipped."""
EVERY = 20
IN_USE = ("malloc",)
MEMORY = ("python_blocks", "rss", "vms")
COUNTS = ("descriptors", "threads", "children")
APPENDED = ("metrics.jsonl", "samples.jsonl")
"""Files to which every step appends."""
LONG_RUN = 10_000
"""Steps of a run that lasts a night."""
MOST_ADDED = 0.05
"""Part of each of `MEMORY` that a long run may add."""
LOG_LIMIT = LOG_BYTES * (1 + OLDER_LOGS)
"""Bytes of log.txt with its older files."""


class _Mallinfo2(ctypes.Structure):
    """Counters of glibc's malloc, <malloc.h>."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    )  # fmt: skip


def malloc_bytes() -> int | None:
    """Return the bytes that malloc has handed out and not got back, in all arenas and mappings; None without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Gauge(Callback):
    """Measure this process and its run folder every `EVERY` steps."""

    def __init__(self, folder: Path, *, trace_from: int | None) -> None:
        self._folder, self._process, self._trace_from = folder, psutil.Process(), trace_from
        self.measured: list[dict[str, Any]] = []
        self.skipped = 0
        self._before: tracemalloc.Snapshot | None = None

    def step(self, record: StepRecord) -> None:  # noqa: D102
        self.skipped += record["skipped_reason"] is not None
        done = record["step"] + 1
        if done % EVERY == 0:
            memory = self._process.memory_info()
            self.measured.append(
                {
                    "step": done,
                    "malloc": malloc_bytes(),
                    "python_blocks": sys.getallocatedblocks(),
                    "rss": memory.rss,
                    "vms": memory.vms,
                    "descriptors": self._process.num_fds(),
                    "threads": self._process.num_threads(),
                    "children": len(self._process.children(recursive=True)),
                    "files": file_bytes(self._folder),
                    "evaluations": line_count(self._folder / "evaluations.jsonl"),
                }
            )
        if done == self._trace_from:
            tracemalloc.start()
        if self._trace_from and done == 2 * self._trace_from:
            gc.collect()
            self._before = tracemalloc.take_snapshot()

    def close(self) -> None:  # noqa: D102
        if self._before is not None:
            gc.collect()
            for entry in tracemalloc.take_snapshot().compare_to(self._before, "lineno")[:25]:
                print(entry, file=sys.stderr)
            self._before = None


def file_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file, those of checkpoints and of a rotated log together."""
    found = Counter[str]()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                name = str(path.relative_to(folder))
                found[re.sub(r"^checkpoints/.*", "checkpoints/", re.sub(r"\.txt\.\d+$", ".txt", name))] += (
                    path.stat().st_size
                )
    return dict(found)


def line_count(path: Path) -> int:
    """Return the number of lines of a file, 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def fit(steps: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Return slope per step, its standard error, R^2 (1 for a constant), and the fitted value at the last step."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    residuals = y - y.mean() - slope * centred
    total, rest = float(((y - y.mean()) ** 2).sum()), float((residuals**2).sum())
    error = math.sqrt(rest / (len(x) - 2) / float(centred @ centred))
    # Residuals that resemble their predecessor carry less information: the usual correction of the sample size.
    follow = min(max(float(residuals[1:] @ residuals[:-1]) / rest, 0.0), 0.95) if rest else 0.0
    error *= math.sqrt((1 + follow) / (1 - follow))
    end = float(y.mean() + slope * centred[-1])
    return {"slope": slope, "error": error, "r2": 1 - rest / total if total else 1.0, "end": end}


def judge(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the fit and the verdict of everything that was measured."""
    late = samples[len(samples) // 4 :]
    steps, found = [sample["step"] for sample in late], dict[str, dict[str, Any]]()
    evaluations = [sample["evaluations"] for sample in late]
    for name in (name for name in (*IN_USE, *MEMORY, *COUNTS) if late[0][name] is not None):
        values = [sample[name] for sample in late]
        line = fit(steps, values)
        added = LONG_RUN * line["slope"] / line["end"]
        if name in COUNTS:
            fine = max(values[len(values) // 2 :]) <= max(values[: len(values) // 2])
        elif name in MEMORY:
            fine = added <= MOST_ADDED
        else:
            upper = line["slope"] + 2 * line["error"]
            fine = line["slope"] < 2 * line["error"] or upper * LONG_RUN < 0.01 * line["end"]
        verdict = "GROWS" if not fine else f"{added:+.1%} in {LONG_RUN:,} steps" if name in MEMORY else "flat"
        found[name] = {**line, "least": min(values), "most": max(values), "verdict": verdict, "fine": fine}
    for name in sorted({name for sample in late for name in sample["files"]}):
        values = [sample["files"].get(name, 0) for sample in late]
        line = fit(steps, values)
        constant = max(values) - min(values) < 0.01 * max(values)
        fine, verdict = constant, "flat"
        if name == "log.txt":
            fine, verdict = max(values) <= LOG_LIMIT, f"at most {LOG_LIMIT:,}"
        elif name in APPENDED:
            fine, verdict = line["r2"] > 0.99 and not constant, "linear"
        elif name == "evaluations.jsonl" and not constant:
            fine, verdict = fit(evaluations, values)["r2"] > 0.99, "linear in evaluations"
        found[name] = {
            **line, "least": min(values), "most": max(values), "verdict": verdict if fine else "GROWS", "fine": fine
        }  # fmt: skip
    return found


def main() -> int:
    """Train, judge, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--trace", action="store_true", help="print which lines of Python allocated what is new")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import torch

    from popo_lite.tools.console.views import open_view

    recipe = load_recipe(
        {"hf": "tiny_cpu", "vllm": "tiny_vllm"}[arguments.engine], (*OVERRIDES, f"train.steps={arguments.steps}")
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="popo-soak-") as temporary:
        folder = Path(temporary) / "run"
        gauge = Gauge(folder, trace_from=arguments.steps // 4 if arguments.trace else None)
        with (Path(temporary) / "output.txt").open("w") as output, contextlib.redirect_stdout(output):
            train(recipe, output=folder, callbacks=[open_view("plain"), gauge])
    verdicts = judge(gauge.measured)
    seconds = time.perf_counter() - start
    print(f"{arguments.steps} steps with {arguments.engine} in {seconds:.0f} s, {gauge.skipped} of them skipped")
    print(f"\n{'':<28}{'from':>14}{'to':>14}{'slope a step':>16}{'std. error':>13}{'R^2':>7}  verdict")
    for name, line in verdicts.items():
        shown = f"{line['slope']:>16.3f}{line['error']:>13.3f}{line['r2']:>7.3f}"
        print(f"{name:<28}{line['least']:>14,}{line['most']:>14,}{shown}  {line['verdict']}")
    fine = all(line["fine"] for line in verdicts.values())
    print(f"\nafter the warm-up of {arguments.steps // 4} steps: {'all as it should be' if fine else 'NOT all flat'}")
    result = {
        "command": shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
        "steps": arguments.steps,
        "engine": arguments.engine,
        "overrides": OVERRIDES,
        "seconds": round(seconds, 1),
        "skipped_steps": gauge.skipped,
        "verdicts": verdicts,
        "samples": gauge.measured,
        "environment": environment(torch.device("cpu")),
    }
    output = arguments.output or RESULTS / ("soak.json" if arguments.engine == "hf" else "soak-vllm.json")
    output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
