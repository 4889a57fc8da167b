"""Sweep files: a base recipe, seeds, and variants of the recipe, every fault of them at once. Free of torch."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import RecipeError, nearest
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SWEEPS, find_recipe, load_recipe, read_toml, shipped_folder, to_toml

KEYS = ("recipe", "seeds", "set", "variants", "over")
SEED = "train.seed"
"""The recipe's key that belongs to the sweep."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
RESERVED = ("comparison", "failures.jsonl", "recipe.toml", "results.jsonl", "sweep.toml")
"""Names in a sweep's folder that no variant can have."""
LONGEST_NAME = 200
"""Characters of a variant's name, which names a folder; most file systems end at 255."""
ONLY_VARIANT = "base"
"""Name of the variant of a sweep over seeds alone."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe under a name. `overrides` maps `section.key` to what differs from the sweep's base."""

    name: str
    overrides: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Every variant with every seed.

    `base` is the recipe that the variants differ from: the file at `base_path` with the settings in `shared`, which
    maps `section.key` to a value. Defaults that hang on other keys are a variant's own, so it is not made from `base`.
    """

    name: str
    base_path: Path
    shared: Mapping[str, Any]
    base: Recipe
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]


def load_sweep(source: str | Path, overrides: Sequence[str] = (), seeds: str | None = None) -> Sweep:
    """Read the sweep at the path `source`, or the shipped sweep of that name.

    `overrides` have the form of `--set` and change the base, so a variant's own settings win over them. `seeds`,
    such as "0-4" or "0,3", replaces the file's.

    Raises RecipeError with one line for every fault of file, base and variants.
    """
    path = find_sweep(source)
    shown = str(source)
    written = read_toml(path, shown)
    faults = [f"{shown}: {fault}" for fault in _unknown_keys(written)]
    shared = _flat(written.get("set", {}), f"{shown}: [set]", faults)
    named = _named_variants(written, shown, faults)
    chosen_seeds = _seeds(written.get("seeds", [0]), f"{shown}: seeds", faults)
    if seeds is not None:
        chosen_seeds = _seeds(seeds, "--seeds", faults)
    overridden = [override.partition("=")[0].strip() for override in overrides]
    if SEED in overridden:
        faults.append(f"--set {SEED}: the sweep sets it; give --seeds")
    if not isinstance(written.get("recipe"), str):
        faults.append(f"{shown}: recipe: must name the base recipe, a shipped one or a path ending in .toml")
        raise _refused(faults)

    base_path = _base_path(path, written["recipe"])
    base = _load(functools.partial(load_recipe, base_path, as_options(shared)), f"{shown}: [set] ", faults)
    if base is not None and overrides:
        base = _load(functools.partial(load_recipe, base_path, (*as_options(shared), *overrides)), "--set ", faults)
    if base is None:
        raise _refused(faults)
    resolved = flat_recipe(base)
    shared |= {key: resolved[key] for key in overridden}
    variants = []
    for name, changes in named.items():
        options = as_options(shared | changes)
        place = f"{shown}: variant {name}: "
        recipe = _load(functools.partial(load_recipe, base_path, options), place, faults, owner=place)
        if recipe is not None:
            variants.append(Variant(name=name, overrides=changes, recipe=recipe))
    if faults:
        raise _refused(faults)
    return Sweep(
        name=path.stem,
        base_path=base_path,
        shared=shared,
        base=base,
        seeds=chosen_seeds,
        variants=tuple(variants),
    )


def shipped_sweeps() -> dict[str, Path]:
    """Name -> file of the sweeps that come with the package, sorted."""
    return {path.stem: path for path in sorted((shipped_folder() / SWEEPS).glob("*.toml"))}


def find_sweep(source: str | Path) -> Path:
    """The file that `source` means: an existing file, else the shipped sweep of exactly that name."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_sweeps()
    if str(source) in shipped:
        return shipped[str(source)]
    what = f"{source}: is a folder, not a sweep file" if path.is_dir() else f"{source}: no such sweep file"
    guess = nearest(path.stem, shipped)
    if guess:
        what += f"; did you mean the shipped sweep {guess}?"
    raise RecipeError(
        f"{what} (shipped: {', '.join(shipped)})", next_step="see docs/experiments.md for the form of the file"
    )


def dump_sweep(sweep: Sweep, recipe: str) -> str:
    """The sweep as TOML over a copy of its base at `recipe`; a grid is written out as the variants it stands for."""
    tables = {"set": sweep.shared} | {f"variants.{to_toml(one.name)}": one.overrides for one in sweep.variants}
    lines = [f"recipe = {to_toml(recipe)}", f"seeds = {to_toml(list(sweep.seeds))}"]
    for name, settings in tables.items():
        lines += ["", f"[{name}]", *(f"{to_toml(key)} = {to_toml(value)}" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def as_options(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings by `section.key` as arguments of `--set`."""
    return tuple(f"{key}={to_toml(value)}" for key, value in settings.items())


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """`section.key` -> value of every key that is set."""
    return {f"{section}.{key}": value for section, keys in recipe.to_dict().items() for key, value in keys.items()}


def _base_path(sweep_path: Path, recipe: str) -> Path:
    """A path is seen from the sweep file, so that a sweep means the same wherever it is called from."""
    return find_recipe(sweep_path.parent / recipe if recipe.endswith(".toml") else recipe)


def _load(load: Callable[[], Recipe], place: str, faults: list[str], *, owner: str = "") -> Recipe | None:
    """What `load` gives; else None, and its faults are added to `faults`.

    Those of overrides are told as faults of `place`; `owner` goes in front of the others.
    """
    try:
        return load()
    except RecipeError as error:
        for fault in error.what.split("\n"):
            override = fault.removeprefix("--set ")
            faults.append(f"{owner}{fault}" if override == fault else f"{place}{override}")
        return None


def _refused(faults: Iterable[str]) -> RecipeError:
    return RecipeError(
        "\n".join(dict.fromkeys(faults)),
        next_step="see docs/experiments.md for the form of the file, and `popo-lite recipe show` for the keys",
    )


def _unknown_keys(written: Mapping[str, Any]) -> Iterator[str]:
    for key in written.keys() - set(KEYS):
        guess = nearest(key, KEYS)
        yield f"{key}: unknown key; " + (f"did you mean {guess}?" if guess else f"there are {', '.join(KEYS)}")


def _flat(table: Any, place: str, faults: list[str]) -> dict[str, Any]:
    """`section.key` -> value of settings written `"objective.similarity_coef" = 0`, `objective.similarity_coef = 0` or in subtables."""
    if not isinstance(table, dict):
        faults.append(f"{place}: must be a table of recipe keys")
        return {}
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if "." not in key and not isinstance(value, dict):
            faults.append(f"{place}: {key}: must be a recipe key, section.key = value")
            continue
        settings = {key: value} if "." in key else {f"{key}.{inner}": item for inner, item in value.items()}
        faults += [
            f"{place}: {name}: is there twice, with and without quotes" for name in sorted(settings.keys() & flat)
        ]
        flat |= settings
    if SEED in flat:
        faults.append(f"{place}: {SEED}: the sweep sets it; write seeds = [...] at the top of the file")
    return flat


def _named_variants(written: Mapping[str, Any], shown: str, faults: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> overrides: each of `variants` with each point of the grid `over`."""
    tables = written.get("variants", {})
    if not isinstance(tables, dict):
        faults.append(f"{shown}: variants: must be tables, [variants.name]")
        tables = {}
    variants = {name: _flat(table, f"{shown}: variant {name}", faults) for name, table in tables.items()}
    points = _grid(_flat(written.get("over", {}), f"{shown}: over", faults), f"{shown}: over", faults)
    found: dict[str, dict[str, Any]] = {}
    spellings: dict[str, str] = {}  # by what a disk that ignores case makes of a name
    for (name, settings), point in itertools.product(variants.items() or [("", {})], points):
        full = ",".join(filter(None, (name, _point_name(point, points)))) or ONLY_VARIANT
        other = spellings.setdefault(full.casefold(), full)
        if full in found:
            faults.append(f"{shown}: variant {full}: is there twice")
        elif other != full:
            faults.append(f"{shown}: variant {full}: not every disk can tell it from {other}")
        if len(full) > LONGEST_NAME:
            faults.append(f"{shown}: variant {full[:40]}...: is longer than {LONGEST_NAME} characters")
        if full.casefold() in RESERVED:
            faults.append(f"{shown}: variant {full}: is the name of a file or folder of the sweep's own")
        elif not NAME.fullmatch(full):
            faults.append(f"{shown}: variant {full}: cannot name a folder; use letters, digits and . _ = , + -")
        found[full] = settings | point
    return found


def _grid(over: Mapping[str, Any], place: str, faults: list[str]) -> list[dict[str, Any]]:
    for key, values in over.items():
        if not isinstance(values, list) or not values:
            faults.append(f"{place}: {key}: must be a list of values")
            return [{}]
    return [dict(zip(over, point, strict=True)) for point in itertools.product(*over.values())]


def _point_name(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    """`alpha=0.1,beta=0.01`; with the section where two keys of the grid end alike."""
    ends = [key.partition(".")[2] for key in points[0]]
    names = [key if ends.count(end) > 1 else end for key, end in zip(point, ends, strict=True)]
    values = [value if isinstance(value, str) else to_toml(value) for value in point.values()]
    parts = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "-", ",".join(parts))


def _seeds(written: Any, place: str, faults: list[str]) -> tuple[int, ...]:
    """Seeds of a list of whole numbers, or of text such as "0-4,7"."""
    seeds: list[int] = []
    if isinstance(written, str):
        for part in written.split(","):
            found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if found is not None:
                seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
            else:
                seeds.clear()
                break
    elif isinstance(written, list) and all(type(seed) is int and seed >= 0 for seed in written):
        seeds = written
    if not seeds or len(set(seeds)) < len(seeds):
        faults.append(f"{place} = {to_toml(written)}: must be different whole numbers, such as 0-4 or 0,2,5")
    return tuple(seeds)
