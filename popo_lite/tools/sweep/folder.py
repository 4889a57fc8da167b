"""Read and write sweeps: a file with a base recipe, seeds and variants, and a folder with the runs. Free of torch.

The folder has recipe.toml (a copy of the base), sweep.toml (the request, a sweep file itself), <variant>/seed-N/ (run
folders), <variant>/seed-N.log, results.jsonl and failures.jsonl.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from popo_lite.errors import RecipeError, UserInputError, nearest
from popo_lite.formats import reading, stamped
from popo_lite.lock import locked, writing
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SECTIONS, find_recipe, flatten, load_recipe, read_toml, shipped_sweeps, to_toml
from popo_lite.resuming import free_keys
from popo_lite.run_folder import (
    RunFolder,
    checkpoint_folders,
    checkpoint_step,
    differences,
    keep_lines,
    write_atomically,
)
from popo_lite.tools.work_folder import refuse_foreign

KEYS = ("recipe", "seeds", "set", "variants", "over")
SEED = "train.seed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
RESERVED = ("comparison", "failures.jsonl", "recipe.toml", "results.jsonl", "sweep.toml")  # names in a sweep's folder
LONGEST_NAME = 200  # of a variant, which names a folder; most file systems end at 255
MOST_CHANGES = 8  # differences that are listed when another sweep is refused
HELP = "see docs/experiments.md for the form of the file, and `popo-lite recipe show` for the keys"


class Variant(NamedTuple):
    """A recipe under a name. `overrides` maps `section.key` to what differs from the sweep's base."""

    name: str
    overrides: Mapping[str, Any]
    recipe: Recipe


class Sweep(NamedTuple):
    """All variants and seeds. `base` is the recipe at `base_path` with the settings `shared` by all variants."""

    name: str
    base_path: Path
    shared: Mapping[str, Any]
    base: Recipe
    seeds: Sequence[int]
    variants: Sequence[Variant]


def load_sweep(source: str | Path, overrides: Sequence[str] = (), seeds: str | None = None) -> Sweep:
    """Read the sweep at the path `source`, or the shipped sweep of that name.

    `overrides` have the form of `--set` and change the base, so a variant's own settings win over them. `seeds`, such
    as "0-4" or "0,3", replaces the file's. Raises RecipeError with one line for every error of file, base and variants.
    """
    path, shipped = Path(source), shipped_sweeps()
    if not path.is_file() and str(source) not in shipped:
        what = "is a folder, not a sweep file" if path.is_dir() else "no such sweep file"
        hint = f"; did you mean the shipped sweep {guess}?" if (guess := nearest(path.stem, shipped)) else ""
        raise RecipeError(f"{source}: {what}{hint} (shipped: {', '.join(shipped)})", next_step=HELP)
    path = path if path.is_file() else shipped[str(source)]
    written = read_toml(path, str(source))
    errors: list[str] = []
    for key in written.keys() - set(KEYS):
        hint = f"did you mean {guess}?" if (guess := nearest(key, KEYS)) else f"there are {', '.join(KEYS)}"
        errors.append(f"{source}: {key}: unknown key; {hint}")
    shared = _flat(written.get("set", {}), f"{source}: [set]", errors)
    named = _named_variants(written, source, errors)
    for place, text in {f"{source}: seeds": written.get("seeds", [0]), "--seeds": seeds}.items():
        if text is not None and not (chosen_seeds := seeds_in(text)):
            errors.append(f"{place} = {to_toml(text)}: must be different whole numbers, such as 0-4 or 0,2,5")
    overridden = [override.partition("=")[0].strip() for override in overrides]
    if SEED in overridden:
        errors.append(f"--set {SEED}: the sweep sets it; give --seeds")
    recipe, base, variants = written.get("recipe"), None, []
    if isinstance(recipe, str):
        # Relative to the sweep file, so that the sweep means the same in every working folder.
        base_path = find_recipe(path.parent / recipe if recipe.endswith(".toml") else recipe)
        base = _load(base_path, as_options(shared), f"{source}: [set] ", errors)
        if base and overrides:
            base = _load(base_path, (*as_options(shared), *overrides), "--set ", errors)
    else:
        errors.append(f"{source}: recipe: must name the base recipe, a shipped one or a path ending in .toml")
    if base:
        shared |= {key: flatten(base).get(key) for key in overridden}
        for name, changes in named.items():
            place = f"{source}: variant {name}: "
            # From the file and not from `base`: defaults that depend on other settings are resolved per variant.
            if variant := _load(base_path, as_options(shared | changes), place, errors, owner=place):
                variants.append(Variant(name, changes, variant))
    if errors or not base:
        raise RecipeError("\n".join(dict.fromkeys(errors)), next_step=HELP)
    return Sweep(path.stem, base_path, shared, base, chosen_seeds, variants)


def as_options(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as arguments of `--set`."""
    return tuple(f"{key}={to_toml(value)}" for key, value in settings.items())


def named_values(settings: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return `key=value` of each of `keys`; with the section if two of them end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    values = [settings.get(key, "unset") for key in keys]
    shown = [value if isinstance(value, str) else to_toml(value) for value in values]
    return [f"{key if ends.count(end) > 1 else end}={value}" for key, end, value in zip(keys, ends, shown, strict=True)]


def _load(path: Path, options: Sequence[str], place: str, errors: list[str], *, owner: str = "") -> Recipe | None:
    """Load the recipe at `path`, or add its errors: those of options with the prefix `place`, others with `owner`."""
    try:
        return load_recipe(path, options)
    except RecipeError as error:
        lines = error.what.split("\n")
        errors += [place + line.removeprefix("--set ") if line.startswith("--set ") else owner + line for line in lines]
        return None


def _flat(table: Any, place: str, errors: list[str], section: str = "") -> dict[str, Any]:
    """Return `section.key` -> value of settings written with dotted keys, quoted or not, or in subtables."""
    if not isinstance(table, dict):
        errors.append(f"{place}: must be a table of recipe keys")
        return {}
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = section + key
        # A table at the top is entered even if no section has its name: load_recipe reports its keys.
        is_section = isinstance(value, dict) and (name in SECTIONS or "." not in name)
        settings = _flat(value, place, errors, f"{name}.") if is_section else {name: value}
        errors += [f"{place}: {each}: is there twice, with and without quotes" for each in settings if each in flat]
        flat |= settings
    errors += [f"{place}: {name}: must be a recipe key, section.key = value" for name in flat if "." not in name]
    if SEED in flat:
        errors.append(f"{place}: {SEED}: the sweep sets it; write seeds = [...] at the top of the file")
    return {name: value for name, value in flat.items() if "." in name}


def _named_variants(written: Mapping[str, Any], source: str | Path, errors: list[str]) -> dict[str, dict[str, Any]]:
    """Return name -> overrides: each of `variants` with each point of the grid `over`."""
    if not isinstance(tables := written.get("variants", {}), dict):
        errors.append(f"{source}: variants: must be tables, [variants.name]")
        tables = {}
    variants = {name: _flat(table, f"{source}: variant {name}", errors) for name, table in tables.items()}
    over = _flat(written.get("over", {}), f"{source}: over", errors)
    wrong = [key for key, values in over.items() if not isinstance(values, list) or not values]
    errors += [f"{source}: over: {key}: must be a list of values" for key in wrong]
    points = [dict(zip(over, point, strict=True)) for point in itertools.product(*over.values())] if not wrong else [{}]
    named: dict[str, dict[str, Any]] = {}
    spellings: dict[str, str] = {}  # by name without case: some file systems ignore it
    for (name, settings), point in itertools.product(variants.items() or [("", {})], points):
        grid_name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(named_values(point, list(point))))
        full = ",".join(filter(None, (name, grid_name))) or "base"
        other = spellings.setdefault(full.casefold(), full)
        checks = {
            "is there twice": full in named,
            f"differs from {other} in case alone, which some file systems ignore": full != other,
            f"is longer than {LONGEST_NAME} characters": len(full) > LONGEST_NAME,
            "is the name of one of the sweep's own files or folders": full.casefold() in RESERVED,
            "cannot name a folder; use letters, digits and . _ = , + -": not NAME.fullmatch(full),
        }
        shown = full if len(full) <= LONGEST_NAME else f"{full[:40]}..."
        errors += [f"{source}: variant {shown}: {what}" for what, is_wrong in checks.items() if is_wrong]
        named[full] = settings | point
    return named


def seeds_in(written: Any) -> tuple[int, ...]:
    """Return the different seeds of a list of whole numbers, or of text such as "0-4,7"; none if it is neither."""
    parts = written.split(",") if isinstance(written, str) else []
    if isinstance(written, list):
        parts = [to_toml(seed) for seed in written]
    ranges = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) for part in parts]
    seeds = [seed for each in ranges if each for seed in range(int(each[1]), int(each[2] or each[1]) + 1)]
    return tuple(seeds) if all(ranges) and len(set(seeds)) == len(seeds) else ()


class SweepRun:
    """One variant with one seed. `settings` is what it sets over the base recipe: shared settings and its own."""

    def __init__(self, sweep_path: Path, variant: Variant, seed: int, shared: Mapping[str, Any]) -> None:
        self.variant, self.seed, self.settings = variant, seed, {**shared, **variant.overrides}
        self.name = f"{variant.name} seed {seed}"
        self.folder = RunFolder(sweep_path / variant.name / f"seed-{seed}")
        self.log_path = self.folder.path.with_suffix(".log")  # of all it prints; the folder itself belongs to the run

    @property
    def state(self) -> Literal["finished", "unfinished", "new"]:
        """Return "finished" if the run has ended, "unfinished" if there is something to resume."""
        if not self.folder.recipe_path.is_file():
            return "new"
        return "finished" if self.folder.ended else "unfinished"

    @property
    def steps_saved(self) -> int:
        """Return the steps in its newest checkpoint; 0 without one."""
        return max(map(checkpoint_step, checkpoint_folders(self.folder.checkpoints)), default=0)

    def result(self) -> dict[str, Any]:
        """Return the finished run's line of results.jsonl."""
        summary = self.folder.summary()
        with reading(self.folder.summary_path):
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
        self.path, self.lock_path = path, path / ".lock"
        self.sweep_path, self.recipe_path = path / "sweep.toml", path / "recipe.toml"
        self.results_path, self.failures_path = path / "results.jsonl", path / "failures.jsonl"

    def locked(self) -> AbstractContextManager[int]:
        """Lock the folder. Runs inherit the descriptor, so one that outlives a killed sweep keeps the lock."""
        busy = "another sweep, or a run that outlived one, is at work in this folder"
        return locked(self.lock_path, busy, "wait for it, stop it, or change --output")

    def runs(self, sweep: Sweep) -> list[SweepRun]:
        """Return every run of the sweep: all variants with the first seed, then with the next."""
        return [SweepRun(self.path, each, seed, sweep.shared) for seed in sweep.seeds for each in sweep.variants]

    def start_files(self, sweep: Sweep) -> None:
        """Write recipe.toml and sweep.toml; a grid is written as the variants that it stands for."""
        base = sweep.base_path.read_text(encoding="utf-8-sig")
        tables = {"set": sweep.shared} | {f"variants.{to_toml(each.name)}": each.overrides for each in sweep.variants}
        lines = [f"recipe = {to_toml(self.recipe_path.name)}", f"seeds = {to_toml(list(sweep.seeds))}"]
        for name, settings in tables.items():
            lines += ["", f"[{name}]", *(f"{to_toml(key)} = {to_toml(value)}" for key, value in settings.items())]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe_path, base)
            write_atomically(self.sweep_path, "\n".join(lines) + "\n")

    def write_results(self, runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
        """Replace results.jsonl and return its lines."""
        lines = [run.result() for run in runs if run.state == "finished"]
        with writing(self.results_path):
            write_atomically(self.results_path, "".join(json.dumps(stamped(line)) + "\n" for line in lines))
        return lines

    def forget_failure(self, run: SweepRun) -> None:
        """Drop the run's line of failures.jsonl before it is retried."""
        with writing(self.failures_path):
            keep_lines(self.failures_path, lambda line: (line["variant"], line["seed"]) != (run.variant.name, run.seed))


def refuse_other_sweep(folder: SweepFolder, sweep: Sweep) -> None:
    """Raise UserInputError if `folder` holds something else, or `sweep` changes more than the speed of runs in it."""
    if not folder.sweep_path.is_file():
        # A killed sweep leaves these. The lock is created first, so a recipe.toml without it belongs to the user.
        own = {folder.lock_path, folder.recipe_path} if folder.lock_path.is_file() else set()
        refuse_foreign(folder.path, "sweep", own)
        return
    before = load_sweep(folder.sweep_path)
    gone = [str(seed) for seed in before.seeds if seed not in sweep.seeds]
    changes = [f"seeds: {', '.join(gone)} gone"] if gone else []
    recipes = {variant.name: variant.recipe for variant in sweep.variants}
    for name, _, recipe in before.variants:
        now = recipes.get(name)
        found = differences(flatten(recipe), flatten(now), free_keys(now) | {SEED}) if now else ["gone"]
        changes += [f"variant {name}: {each}" for each in found]
    changes[MOST_CHANGES:] = [f"... and {len(changes) - MOST_CHANGES} more"] if len(changes) > MOST_CHANGES else []
    if changes:
        what = "\n".join(["the sweep differs from the one that was started here:", *changes])
        next_step = f"change --output or resume the old one: popo-lite sweep {folder.sweep_path} --output {folder.path}"
        raise UserInputError(what, where=str(folder.sweep_path), next_step=next_step)
