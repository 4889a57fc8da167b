"""`popo-lite recipe`: show and check recipes without loading a model or data."""

from __future__ import annotations

import json

import click

from popo_lite.errors import RecipeError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SHOW_KEYS, dump_recipe, load_recipe, shipped_recipes
from popo_lite.tools.recipe_docs import template_toml


@click.group()
def recipe() -> None:
    """Show and check recipes."""


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
@click.option("as_json", "--json", is_flag=True, help="Print a JSON list with the errors of each recipe.")
def check(sources: tuple[str, ...], as_json: bool) -> None:
    """Check recipes, given as paths or shipped names, and print all of their errors.

    Nothing is loaded or downloaded. The exit code is 2 if a recipe has an error.
    """
    errors: dict[str, list[str]] = {}
    for source in sources:
        try:
            load_recipe(source)
            errors[source] = []
        except RecipeError as error:
            errors[source] = error.what.split("\n")
    if as_json:
        results = [{"recipe": source, "ok": not lines, "errors": lines} for source, lines in errors.items()]
        click.echo(json.dumps(results, indent=2))
    else:
        for source, lines in errors.items():
            count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
            click.echo(f"{source}: {count if lines else 'ok'}")
    if any(errors.values()):
        raise RecipeError("\n".join(line for lines in errors.values() for line in lines), next_step=SHOW_KEYS)
