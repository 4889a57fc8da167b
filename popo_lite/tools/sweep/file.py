"""Read and write sweep files: a base recipe, seeds, and variants of the recipe. Free of torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from popo_lite.errors import RecipeError, nearest
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SECTIONS, SWEEPS, find_recipe, load_recipe, read_toml, shipped_folder, to_toml

KEYS = ("recipe", "seeds", "set", "variants", "over")
SEED = "train.seed"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
RESERVED = ("comparison", "failures.jsonl", "recipe.toml", "results.jsonl", "sweep.toml")
"""Names in a sweep's folder that no variant can have."""
LONGEST_NAME = 200
"""Characters of a variant's name, which names a folder; most file systems end at 255."""
HELP = "see docs/experiments.md for the form of the file"


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
    path = find_sweep(source)
    written = read_toml(path, str(source))
    errors: list[str] = []
    for key in written.keys() - set(KEYS):
        hint = f"did you mean {guess}?" if (guess := nearest(key, KEYS)) else f"there are {', '.join(KEYS)}"
        errors.append(f"{source}: {key}: unknown key; {hint}")
    shared = _flat(written.get("set", {}), f"{source}: [set]", errors)
    named = _named_variants(written, source, errors)
    own_seeds = _seeds(written.get("seeds", [0]), f"{source}: seeds", errors)
    chosen_seeds = own_seeds if seeds is None else _seeds(seeds, "--seeds", errors)
    overridden = [override.partition("=")[0].strip() for override in overrides]
    if SEED in overridden:
        errors.append(f"--set {SEED}: the sweep sets it; give --seeds")
    recipe, base, variants = written.get("recipe"), None, []
    if isinstance(recipe, str):
        # Relative to the sweep file, so that the sweep means the same in every working folder.
        base_path = find_recipe(path.parent / recipe if recipe.endswith(".toml") else recipe)
        base = _load(base_path, as_options(shared), f"{source}: [set] ", errors)
        if base is not None and overrides:
            base = _load(base_path, (*as_options(shared), *overrides), "--set ", errors)
    else:
        errors.append(f"{source}: recipe: must name the base recipe, a shipped one or a path ending in .toml")
    if base is not None:
        shared |= {key: attrgetter(key)(base) for key in overridden}
        for name, changes in named.items():
            place = f"{source}: variant {name}: "
            # From the file and not from `base`: defaults that depend on other settings are resolved per variant.
            if variant := _load(base_path, as_options(shared | changes), place, errors, owner=place):
                variants.append(Variant(name, changes, variant))
    if errors or base is None:
        next_step = f"{HELP}, and `popo-lite recipe show` for the keys"
        raise RecipeError("\n".join(dict.fromkeys(errors)), next_step=next_step)
    return Sweep(path.stem, base_path, shared, base, chosen_seeds, variants)


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of the sweeps that come with the package, sorted."""
    return {path.stem: path for path in sorted((shipped_folder() / SWEEPS).glob("*.toml"))}


def find_sweep(source: str | Path) -> Path:
    """Return the file that `source` names: an existing file, else the shipped sweep of exactly that name."""
    path, shipped = Path(source), shipped_sweeps()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    what = f"{source}: is a folder, not a sweep file" if path.is_dir() else f"{source}: no such sweep file"
    if guess := nearest(path.stem, shipped):
        what += f"; did you mean the shipped sweep {guess}?"
    raise RecipeError(f"{what} (shipped: {', '.join(shipped)})", next_step=HELP)


def dump_sweep(sweep: Sweep, recipe: str) -> str:
    """Return the sweep as TOML over a copy of its base at `recipe`; a grid is written as the variants it stands for."""
    tables = {"set": sweep.shared} | {f"variants.{to_toml(each.name)}": each.overrides for each in sweep.variants}
    lines = [f"recipe = {to_toml(recipe)}", f"seeds = {to_toml(list(sweep.seeds))}"]
    for name, settings in tables.items():
        lines += ["", f"[{name}]", *(f"{to_toml(key)} = {to_toml(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def as_options(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as arguments of `--set`."""
    return tuple(f"{key}={to_toml(value)}" for key, value in settings.items())


def named_values(settings: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return `key=value` of each of `keys`; with the section if two of them end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    names = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    values = [settings.get(key, "unset") for key in keys]
    shown = [value if isinstance(value, str) else to_toml(value) for value in values]
    return [f"{name}={value}" for name, value in zip(names, shown, strict=True)]


def _load(path: Path, options: Sequence[str], place: str, errors: list[str], *, owner: str = "") -> Recipe | None:
    """Load the recipe at `path`, or add its errors: those of options as errors of `place`, others behind `owner`."""
    try:
        return load_recipe(path, options)
    except RecipeError as error:
        for line in error.what.split("\n"):
            setting = line.removeprefix("--set ")
            errors.append(f"{owner}{line}" if setting == line else f"{place}{setting}")
        return None


def _flat(table: Any, place: str, errors: list[str]) -> dict[str, Any]:
    """Return `section.key` -> value of settings written with dotted keys, quoted or not, or in subtables."""
    if not isinstance(table, dict):
        errors.append(f"{place}: must be a table of recipe keys")
        return {}
    flat: dict[str, Any] = {}
    pending = list(table.items())
    while pending:
        name, value = pending.pop(0)
        # A table at the top is entered even if no section has its name: load_recipe reports its keys.
        if isinstance(value, dict) and (name in SECTIONS or "." not in name):
            pending = [*((f"{name}.{key}", nested) for key, nested in value.items()), *pending]
        elif "." not in name:
            errors.append(f"{place}: {name}: must be a recipe key, section.key = value")
        elif name in flat:
            errors.append(f"{place}: {name}: is there twice, with and without quotes")
        else:
            flat[name] = value
    if SEED in flat:
        errors.append(f"{place}: {SEED}: the sweep sets it; write seeds = [...] at the top of the file")
    return flat


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
    found: dict[str, dict[str, Any]] = {}
    spellings: dict[str, str] = {}  # by name without case: some file systems ignore it
    for (name, settings), point in itertools.product(variants.items() or [("", {})], points):
        grid_name = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(named_values(point, list(point))))
        full = ",".join(filter(None, (name, grid_name))) or "base"
        place = f"{source}: variant {full}"
        other = spellings.setdefault(full.casefold(), full)
        if full in found:
            errors.append(f"{place}: is there twice")
        elif other != full:
            errors.append(f"{place}: differs from {other} in case alone, which some file systems ignore")
        if len(full) > LONGEST_NAME:
            errors.append(f"{source}: variant {full[:40]}...: is longer than {LONGEST_NAME} characters")
        if full.casefold() in RESERVED:
            errors.append(f"{place}: is the name of one of the sweep's own files or folders")
        elif not NAME.fullmatch(full):
            errors.append(f"{place}: cannot name a folder; use letters, digits and . _ = , + -")
        found[full] = settings | point
    return found


def _seeds(written: Any, place: str, errors: list[str]) -> tuple[int, ...]:
    """Return the seeds of a list of whole numbers, or of text such as "0-4,7"."""
    seeds: list[int] = []
    if isinstance(written, str):
        ranges = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) for part in written.split(",")]
        if all(ranges):
            seeds = [seed for each in ranges if each for seed in range(int(each[1]), int(each[2] or each[1]) + 1)]
    elif isinstance(written, list) and all(type(seed) is int and seed >= 0 for seed in written):
        seeds = written
    if not seeds or len(set(seeds)) < len(seeds):
        errors.append(f"{place} = {to_toml(written)}: must be different whole numbers, such as 0-4 or 0,2,5")
    return tuple(seeds)
