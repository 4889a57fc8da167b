"""The folder of a sweep: its layout, which of its runs are done, and refusing to go on as another sweep.

recipe.toml (a copy of the base), sweep.toml (what was asked, a sweep file itself), <variant>/seed-N/ (run folders),
<variant>/seed-N.log, results.jsonl, failures.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import PopoError, UserInputError
from popo_lite.run_folder import RunFolder, is_leftover, keep_lines, may_change_on_resume, write_atomically
from popo_lite.tools.sweep.file import SEED, Sweep, Variant, dump_sweep, flat_recipe, load_sweep

RECIPE = "recipe.toml"


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One variant with one seed. `settings` is what it sets over the base recipe: all variants' own and its own."""

    variant: Variant
    seed: int
    settings: Mapping[str, Any]
    folder: RunFolder

    @property
    def name(self) -> str:
        """What people are told."""
        return f"{self.variant.name} seed {self.seed}"

    @property
    def log_path(self) -> Path:
        """All that the run printed; beside its folder, which belongs to the run."""
        return self.folder.path.with_name(f"{self.folder.path.name}.log")

    @property
    def finished(self) -> bool:
        """Whether it went to its end."""
        return self.folder.summary_path.is_file()

    @property
    def begun(self) -> bool:
        """Whether there is something to resume."""
        return self.folder.recipe_path.is_file() and not self.finished

    @property
    def steps_saved(self) -> int:
        """Steps behind its newest checkpoint, step-NNNNNN; 0 where it has none."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.checkpoints.glob("step-*")), default=0)


@dataclass(frozen=True)
class SweepFolder:
    """Paths inside one sweep's folder."""

    path: Path

    @property
    def sweep_path(self) -> Path:
        """What was asked."""
        return self.path / "sweep.toml"

    @property
    def recipe_path(self) -> Path:
        """A copy of the base recipe."""
        return self.path / RECIPE

    @property
    def results_path(self) -> Path:
        """One line a finished run."""
        return self.path / "results.jsonl"

    @property
    def failures_path(self) -> Path:
        """One line a run that failed when it was last tried."""
        return self.path / "failures.jsonl"

    @property
    def lock_path(self) -> Path:
        """Locked while a sweep, or a run of one, works in the folder."""
        return self.path / ".lock"

    def runs(self, sweep: Sweep) -> list[SweepRun]:
        """Every run of the sweep: all variants with the first seed, then with the next."""
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
        """Write results.jsonl anew and return its lines."""
        lines = [result_line(run, self.path) for run in runs if run.finished]
        with writing(self.results_path):
            write_atomically(self.results_path, "".join(json.dumps(line) + "\n" for line in lines))
        return lines

    def forget_failure(self, run: SweepRun) -> None:
        """Drop what failures.jsonl says of a run that is tried again."""
        with writing(self.failures_path):
            keep_lines(self.failures_path, lambda line: (line["variant"], line["seed"]) != (run.variant.name, run.seed))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise PopoError with `path` and the reason where writing there fails."""
    try:
        yield
    except OSError as error:
        raise PopoError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            next_step="mend this, then give the same command again: what is done is kept",
        ) from error


def refuse_other_sweep(folder: SweepFolder, sweep: Sweep) -> None:
    """Raise UserInputError where `folder` holds something else, or `sweep` would go on with other experiments in it.

    More variants and more seeds are welcome, and so is what changes speed and bookkeeping alone.
    """
    if not folder.sweep_path.is_file():
        if folder.path.exists() and (not folder.path.is_dir() or _holds_something_else(folder)):
            raise UserInputError(
                "the folder is not empty and holds no sweep",
                where=f"--output {folder.path}",
                next_step="name another folder",
            )
        return
    changes = list(_changes(load_sweep(folder.sweep_path), sweep))
    if changes:
        more = f"\n... and {len(changes) - 8} more" if len(changes) > 8 else ""
        raise UserInputError(
            "the sweep differs from the one that was started here:\n" + "\n".join(changes[:8]) + more,
            where=str(folder.sweep_path),
            next_step=f"name another folder with --output, or go on as it was with "
            f"popo-lite sweep {folder.sweep_path} --output {folder.path}",
        )


def result_line(run: SweepRun, parent: Path) -> dict[str, Any]:
    """One line of results.jsonl: a finished run's variant, seed, overrides and what it came to."""
    summary = json.loads(run.folder.summary_path.read_text(encoding="utf-8"))
    before, after = summary["before"] or {}, summary["after"] or {}
    return {
        "variant": run.variant.name,
        "seed": run.seed,
        "overrides": dict(run.variant.overrides),
        "run": str(run.folder.path.relative_to(parent)),
        "steps": summary["steps"],
        "pass_at_1_before": before.get("pass_at_1"),
        "pass_at_1": after.get("pass_at_1"),
        "pass_at_k": after.get("pass_at_k"),
        "completion_tokens_mean": after.get("completion_tokens_mean"),
        "rollouts": summary["rollouts"],
        "rollout_tokens": summary["rollout_tokens"],
        "trained_tokens": summary["trained_tokens"],
        "seconds": summary["seconds"]["total"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def _holds_something_else(folder: SweepFolder) -> bool:
    """Whether there is more than what a sweep leaves that ended before its sweep.toml was written.

    The lock comes first: a recipe.toml without it is somebody's own.
    """
    names = {path.name for path in folder.path.iterdir() if not is_leftover(path)}
    return not names <= ({folder.lock_path.name, RECIPE} if folder.lock_path.is_file() else set())


def _changes(before: Sweep, now: Sweep) -> Iterator[str]:
    """One line for every difference that makes other experiments of those that were asked for."""
    gone = [seed for seed in before.seeds if seed not in now.seeds]
    if gone:
        yield f"seeds: {', '.join(map(str, gone))} gone"
    variants = {variant.name: variant for variant in now.variants}
    for old in before.variants:
        new = variants.get(old.name)
        if new is None:
            yield f"variant {old.name}: gone"
            continue
        was, is_ = flat_recipe(old.recipe), flat_recipe(new.recipe)
        may_change = may_change_on_resume(new.recipe) | {SEED}
        for key in sorted(was.keys() | is_.keys()):
            if was.get(key) != is_.get(key) and key not in may_change:
                yield f"variant {old.name}: {key} was {was.get(key)!r} and is {is_.get(key)!r}"
