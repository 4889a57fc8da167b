"""Manage the folder of a sweep: its layout, its runs, its lock, and refusing to continue a different sweep.

recipe.toml (a copy of the base), sweep.toml (the request, a sweep file itself), <variant>/seed-N/ (run folders),
<variant>/seed-N.log, results.jsonl, failures.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from popo_lite.errors import PopoError, UserInputError
from popo_lite.recipe_file import flatten
from popo_lite.run_folder import RunFolder, is_leftover, keep_lines, may_change_on_resume, write_atomically
from popo_lite.tools.sweep.file import SEED, Sweep, Variant, dump_sweep, load_sweep

RECIPE = "recipe.toml"
MOST_CHANGES = 8
"""Differences that are listed when another sweep is refused."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One variant with one seed. `settings` is what it sets over the base recipe: shared settings and its own."""

    variant: Variant
    seed: int
    settings: Mapping[str, Any]
    folder: RunFolder

    @property
    def name(self) -> str:
        """Return the name shown to users."""
        return f"{self.variant.name} seed {self.seed}"

    @property
    def log_path(self) -> Path:
        """Return the file for everything the run prints; beside its folder, which belongs to the run."""
        return self.folder.path.with_name(f"{self.folder.path.name}.log")

    @property
    def finished(self) -> bool:
        """Return True if the run has ended."""
        return self.folder.summary_path.is_file()

    @property
    def begun(self) -> bool:
        """Return True if there is something to resume."""
        return self.folder.recipe_path.is_file() and not self.finished

    @property
    def steps_saved(self) -> int:
        """Return the steps in its newest checkpoint, step-NNNNNN; 0 without one."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.checkpoints.glob("step-*")), default=0)

    def result(self) -> dict[str, Any]:
        """Return the finished run's line of results.jsonl."""
        summary = json.loads(self.folder.summary_path.read_text(encoding="utf-8"))
        before, after = summary["before"] or {}, summary["after"] or {}
        return {
            "variant": self.variant.name,
            "seed": self.seed,
            "overrides": dict(self.variant.overrides),
            "run": f"{self.variant.name}/{self.folder.path.name}",
            "steps": summary["steps"],
            "pass_at_1_before": before.get("pass_at_1"),
            **{key: after.get(key) for key in ("pass_at_1", "pass_at_k", "completion_tokens_mean")},
            **{key: summary[key] for key in ("rollouts", "rollout_tokens", "trained_tokens", "peak_memory_bytes")},
            "seconds": summary["seconds"]["total"],
        }


class SweepFolder:
    """Paths inside one sweep's folder, and its files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sweep_path = path / "sweep.toml"
        self.recipe_path = path / RECIPE
        self.results_path = path / "results.jsonl"
        self.failures_path = path / "failures.jsonl"
        self.lock_path = path / ".lock"

    def runs(self, sweep: Sweep) -> list[SweepRun]:
        """Return every run of the sweep: all variants with the first seed, then with the next."""
        return [
            SweepRun(
                variant=variant,
                seed=seed,
                settings={**sweep.shared, **variant.overrides},
                folder=RunFolder(self.path / variant.name / f"seed-{seed}"),
            )
            for seed in sweep.seeds
            for variant in sweep.variants
        ]

    def start_files(self, sweep: Sweep) -> None:
        """Write recipe.toml and sweep.toml."""
        base = sweep.base_path.read_text(encoding="utf-8-sig")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe_path, base)
            write_atomically(self.sweep_path, dump_sweep(sweep, RECIPE))

    def write_results(self, runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
        """Replace results.jsonl and return its lines."""
        lines = [run.result() for run in runs if run.finished]
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
    if not folder.sweep_path.is_file():
        if folder.path.exists() and (not folder.path.is_dir() or _holds_something_else(folder)):
            what = "the folder is not empty and holds no sweep"
            raise UserInputError(what, where=f"--output {folder.path}", next_step="name another folder")
        return
    changes = list(_changes(load_sweep(folder.sweep_path), sweep))
    if changes:
        more = f"\n... and {len(changes) - MOST_CHANGES} more" if len(changes) > MOST_CHANGES else ""
        raise UserInputError(
            "the sweep differs from the one that was started here:\n" + "\n".join(changes[:MOST_CHANGES]) + more,
            where=str(folder.sweep_path),
            next_step="name another folder with --output, or continue the old sweep with "
            f"popo-lite sweep {folder.sweep_path} --output {folder.path}",
        )


def _holds_something_else(folder: SweepFolder) -> bool:
    """Return True if there is more than the files of a sweep killed before it wrote its sweep.toml.

    The lock is created first, so a recipe.toml without it belongs to the user.
    """
    names = {path.name for path in folder.path.iterdir() if not is_leftover(path)}
    return not names <= ({folder.lock_path.name, RECIPE} if folder.lock_path.is_file() else set())


def _changes(before: Sweep, now: Sweep) -> Iterator[str]:
    """Yield one line for every difference that would change the runs asked for before."""
    if gone := [seed for seed in before.seeds if seed not in now.seeds]:
        yield f"seeds: {', '.join(map(str, gone))} gone"
    variants = {variant.name: variant for variant in now.variants}
    for old in before.variants:
        new = variants.get(old.name)
        if new is None:
            yield f"variant {old.name}: gone"
            continue
        was, now_is = flatten(old.recipe), flatten(new.recipe)
        for key in sorted((was.keys() | now_is.keys()) - may_change_on_resume(new.recipe) - {SEED}):
            if was.get(key) != now_is.get(key):
                yield f"variant {old.name}: {key} was {was.get(key)!r} and is {now_is.get(key)!r}"
