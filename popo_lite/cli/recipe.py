"""`popo-lite recipe`: look at recipes and check them, without loading anything."""

from __future__ import annotations

import json

import click

from popo_lite.errors import RecipeError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SHOW_KEYS, dump_recipe, load_recipe, shipped_recipes
from popo_lite.tools.recipe_docs import template_toml


@click.group()
def recipe() -> None:
    """Look at recipes and check them."""


@recipe.command("list")
def list_() -> None:
    """List the recipes that come with popo-lite."""
    shipped = shipped_recipes()
    width = max(map(len, shipped), default=0)
    for name, path in shipped.items():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        click.echo(f"{name:{width}}  {first_line.removeprefix('#').strip()}")


@recipe.command()
@click.argument("source", metavar="[RECIPE]", required=False)
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
@click.option("as_json", "--json", is_flag=True, help="Print JSON; without RECIPE, the JSON Schema of recipes.")
def show(source: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print RECIPE, a path or a shipped name, with defaults and overrides filled in.

    Without RECIPE, print a template: every key with its meaning, allowed values and default.
    """
    if source is None:
        if overrides:
            raise click.UsageError("--set overrides keys of a RECIPE, and none is given")
        click.echo(json.dumps(Recipe.model_json_schema(), indent=2) if as_json else template_toml(), nl=as_json)
        return
    loaded = load_recipe(source, overrides)
    click.echo(json.dumps(loaded.to_dict(), indent=2) if as_json else dump_recipe(loaded), nl=as_json)


@recipe.command()
@click.argument("sources", metavar="RECIPE...", nargs=-1, required=True)
@click.option("as_json", "--json", is_flag=True, help="Print a JSON list with the faults of each recipe.")
def check(sources: tuple[str, ...], as_json: bool) -> None:
    """Validate recipes, paths or shipped names, and report every fault of them.

    Nothing is loaded or downloaded. The exit code is 2 if a recipe is at fault.
    """
    faults = {source: _faults(source) for source in sources}
    if as_json:
        results = [{"recipe": source, "ok": not found, "faults": found} for source, found in faults.items()]
        click.echo(json.dumps(results, indent=2))
    else:
        for source, found in faults.items():
            click.echo(f"{source}: {_count(found)}")
    every_fault = [fault for found in faults.values() for fault in found]
    if every_fault:
        raise RecipeError("\n".join(every_fault), next_step=SHOW_KEYS)


def _faults(source: str) -> list[str]:
    try:
        load_recipe(source)
    except RecipeError as error:
        return error.what.split("\n")
    return []


def _count(faults: list[str]) -> str:
    if not faults:
        return "ok"
    return "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
