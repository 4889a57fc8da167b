"""Manage the folder of a sweep: its layout, its runs, its lock, and refusing to continue a different sweep.

recipe.toml (a copy of the base), sweep.toml (the request, a sweep file itself), <variant>/seed-N/ (run folders),
<variant>/seed-N.log, results.jsonl, failures.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import filelock

from popo_lite.errors import PopoError, UserInputError
from popo_lite.recipe_file import flatten
from popo_lite.run_folder import RunFolder, is_leftover, keep_lines, may_change_on_resume, write_atomically
from popo_lite.tools.sweep.file import SEED, Sweep, Variant, dump_sweep, load_sweep

MOST_CHANGES = 8
"""Differences that are listed when another sweep is refused."""


class SweepRun:
    """One variant with one seed. `settings` is what it sets over the base recipe: shared settings and its own.

    `log_path` is for everything the run prints; it is beside the run's folder, which belongs to the run.
    """

    def __init__(self, sweep_path: Path, variant: Variant, seed: int, shared: Mapping[str, Any]) -> None:
        self.variant, self.seed, self.settings = variant, seed, {**shared, **variant.overrides}
        self.name = f"{variant.name} seed {seed}"
        self.folder = RunFolder(sweep_path / variant.name / f"seed-{seed}")
        self.log_path = sweep_path / variant.name / f"seed-{seed}.log"

    @property
    def state(self) -> Literal["finished", "unfinished", "new"]:
        """Return "finished" if the run has ended, "unfinished" if there is something to resume."""
        if self.folder.summary_path.is_file():
            return "finished"
        return "unfinished" if self.folder.recipe_path.is_file() else "new"

    @property
    def steps_saved(self) -> int:
        """Return the steps in its newest checkpoint, step-NNNNNN; 0 without one."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.checkpoints.glob("step-*")), default=0)

    def result(self) -> dict[str, Any]:
        """Return the finished run's line of results.jsonl."""
        summary = json.loads(self.folder.summary_path.read_text(encoding="utf-8"))
        before, after = summary["before"] or {}, summary["after"] or {}
        return {
            "variant": self.variant.name, "seed": self.seed, "overrides": self.variant.overrides,
            "run": f"{self.variant.name}/{self.folder.path.name}",
            "steps": summary["steps"], "pass_at_1_before": before.get("pass_at_1"),
            **{key: after.get(key) for key in ("pass_at_1", "pass_at_k", "completion_tokens_mean")},
            **{key: summary[key] for key in ("rollouts", "rollout_tokens", "trained_tokens", "peak_memory_bytes")},
            "seconds": summary["seconds"]["total"],
        }  # fmt: skip


class SweepFolder:
    """Paths inside one sweep's folder, and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sweep_path, self.recipe_path = path / "sweep.toml", path / "recipe.toml"
        self.results_path, self.failures_path = path / "results.jsonl", path / "failures.jsonl"
        self.lock_path = path / ".lock"

    def runs(self, sweep: Sweep) -> list[SweepRun]:
        """Return every run of the sweep: all variants with the first seed, then with the next."""
        return [SweepRun(self.path, each, seed, sweep.shared) for seed in sweep.seeds for each in sweep.variants]

    def start_files(self, sweep: Sweep) -> None:
        """Write recipe.toml and sweep.toml."""
        base = sweep.base_path.read_text(encoding="utf-8-sig")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe_path, base)
            write_atomically(self.sweep_path, dump_sweep(sweep, self.recipe_path.name))

    def write_results(self, runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
        """Replace results.jsonl and return its lines."""
        lines = [run.result() for run in runs if run.state == "finished"]
        with writing(self.results_path):
            write_atomically(self.results_path, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def forget_failure(self, run: SweepRun) -> None:
        """Drop the run's line of failures.jsonl before it is retried."""
        with writing(self.failures_path):
            keep_lines(self.failures_path, lambda line: (line["variant"], line["seed"]) != (run.variant.name, run.seed))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a PopoError with `path` and the reason."""
    try:
        yield
    except OSError as error:
        next_step = "fix this and rerun the command; finished work is kept"
        raise PopoError(f"cannot be written: {error.strerror}", where=str(path), next_step=next_step) from error


@contextmanager
def locked(folder: SweepFolder) -> Iterator[int]:
    """Lock the folder and yield the lock's file descriptor. Raises UserInputError if another process holds it.

    Runs inherit the descriptor, so a run that outlives a killed sweep keeps the lock.
    """
    with writing(folder.lock_path):
        folder.path.mkdir(parents=True, exist_ok=True)
        file = folder.lock_path.open("w")
    with file:
        if not filelock.lock_descriptor(file.fileno(), blocking=False):
            busy = "another sweep, or a run that outlived one, is at work in this folder"
            raise UserInputError(busy, where=str(folder.path), next_step="wait for it, or stop it")
        yield file.fileno()


def refuse_other_sweep(folder: SweepFolder, sweep: Sweep) -> None:
    """Raise UserInputError if `folder` holds something else, or `sweep` would change the runs in it.

    Variants and seeds may be added; settings of speed and bookkeeping may change.
    """
    if folder.sweep_path.is_file():
        changes = list(_changes(load_sweep(folder.sweep_path), sweep))
        if changes:
            more = [f"... and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
            told = ["the sweep differs from the one that was started here:", *changes[:MOST_CHANGES], *more]
            next_step = ("name another folder with --output, or continue the old sweep with "
                         f"popo-lite sweep {folder.sweep_path} --output {folder.path}")  # fmt: skip
            raise UserInputError("\n".join(told), where=str(folder.sweep_path), next_step=next_step)
    elif folder.path.exists():
        # A sweep killed before it wrote sweep.toml leaves these. The lock is created first, so a recipe.toml without
        # it belongs to the user.
        own = {folder.lock_path, folder.recipe_path} if folder.lock_path.is_file() else set()
        if not folder.path.is_dir() or {path for path in folder.path.iterdir() if not is_leftover(path)} - own:
            what = "the folder is not empty and holds no sweep"
            raise UserInputError(what, where=f"--output {folder.path}", next_step="name another folder")


def _changes(before: Sweep, now: Sweep) -> Iterator[str]:
    """Yield one line for every difference that would change the runs asked for before."""
    if gone := [seed for seed in before.seeds if seed not in now.seeds]:
        yield f"seeds: {', '.join(map(str, gone))} gone"
    variants = {variant.name: variant.recipe for variant in now.variants}
    for old in before.variants:
        if old.name not in variants:
            yield f"variant {old.name}: gone"
            continue
        was, now_is = flatten(old.recipe), flatten(variants[old.name])
        for key in sorted((was.keys() | now_is.keys()) - may_change_on_resume(variants[old.name]) - {SEED}):
            if was.get(key) != now_is.get(key):
                yield f"variant {old.name}: {key} was {was.get(key)!r} and is {now_is.get(key)!r}"
