"""Complete names of recipes, and folders of runs, when a shell's user presses Tab. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import click

MOST_ENTRIES = 500
"""Entries of a folder that are looked at, so that Tab stays quick."""


def complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the shipped recipes and the TOML files that begin with `incomplete`."""
    from popo_lite.recipe_file import shipped_recipes

    return [*_beginning(shipped_recipes(), incomplete), *_paths(incomplete, _is_toml)]


def complete_sweep(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the shipped sweeps and the TOML files that begin with `incomplete`."""
    from popo_lite.recipe_file import shipped_sweeps

    return [*_beginning(shipped_sweeps(), incomplete), *_paths(incomplete, _is_toml)]


def complete_run(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the folders of runs that begin with `incomplete`."""
    return list(_paths(incomplete, lambda path: (path / "recipe.toml").is_file()))


def complete_run_or_sweep(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Return the folders of runs and sweeps that begin with `incomplete`."""
    return list(_paths(incomplete, lambda path: any((path / f"{n}.toml").is_file() for n in ("recipe", "sweep"))))


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _is_toml(path: Path) -> bool:
    return path.suffix == ".toml" and path.is_file()


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> Iterator[str]:
    """Yield what is wanted in the folder that is typed so far, and one level below it.

    A shell adds a blank after what it completes, so that folders on the way would have to be completed by hand.
    """
    typed, slash, start = incomplete.rpartition("/")
    for path in _entries(Path(typed + slash).expanduser(), start):
        if is_wanted(path):
            yield f"{typed}{slash}{path.name}"
        elif path.is_dir():
            for inner in _entries(path, ""):
                if is_wanted(inner):
                    yield f"{typed}{slash}{path.name}/{inner.name}"


def _entries(folder: Path, start: str) -> list[Path]:
    """Return what begins with `start` in a folder, sorted; hidden entries only if that is typed."""
    found: list[Path] = []
    with suppress(OSError):
        found = list(islice(folder.iterdir(), MOST_ENTRIES))
    names = (path for path in found if path.name.startswith(start))
    return sorted(path for path in names if start.startswith(".") or not path.name.startswith("."))
