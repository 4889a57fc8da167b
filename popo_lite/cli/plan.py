"""`popo-lite plan`: the memory a recipe takes, from the model's config alone."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import click

from popo_lite.errors import UserInputError

DEFAULT_VRAM_BYTES = 24 * 2**30
DOES_NOT_FIT = 1
UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@click.command(short_help="Say whether a recipe fits a GPU, and what to change.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--vram", metavar="SIZE", help="Memory of the GPU, such as 24GiB; default what nvidia-smi reports, else 24GiB."
)
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
@click.option("as_json", "--json", is_flag=True, help="Print the plan as one JSON object, sizes in bytes.")
def plan(recipe: str, vram: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Plan the memory of RECIPE phase by phase: a TOML file, or the name of a shipped recipe.

    Nothing is loaded, and only the config.json of a model that is not known by name is downloaded. Where the run
    does not fit, the smallest changes that make it fit are named. Exit code 0: it fits; 1: it does not; 2: the
    recipe or the command line is at fault. See docs/memory.md.
    """
    from popo_lite.planning import advice_for, installed_vram_bytes, load_shape, next_step, plan_memory, why_not
    from popo_lite.recipe_file import load_recipe

    settings = load_recipe(recipe, overrides)
    shape = load_shape(settings.model)
    if vram is not None:
        vram_bytes, source = parse_size(vram), "--vram"
    elif (installed := installed_vram_bytes()) is not None:
        vram_bytes, source = installed, "nvidia-smi"
    else:
        vram_bytes, source = DEFAULT_VRAM_BYTES, "assumed: nvidia-smi reports no GPU"
    found = plan_memory(settings, shape, vram_bytes=vram_bytes)
    advice = advice_for(settings, shape, vram_bytes)
    data: dict[str, Any] = {"recipe": recipe, "model": settings.model.id, "vram_source": source} | found.as_json()
    data["advice"] = {
        "overrides": list(advice.overrides),
        "changes": [{"values": dict(change.values), "peak_bytes": change.peak_bytes} for change in advice.changes],
        "smallest_vram_bytes": advice.smallest_vram_bytes,
    }
    if as_json:
        click.echo(json.dumps(data))
    else:
        from popo_lite.console.plan_report import plan_report

        command = ["popo-lite", "plan", recipe]
        command += ["--vram", vram] if vram is not None else []
        command += [word for override in overrides for word in ("--set", override)]
        plan_report(
            data,
            batch_size=settings.rollout.batch_size,
            why_not=None if found.fits else why_not(settings, found),
            next_step=f"{shlex.join(command)} {advice.options}" if advice.changes else next_step(advice),
        )
    if not found.fits:
        raise SystemExit(DOES_NOT_FIT)


def parse_size(text: str) -> int:
    """`24GiB`, `24 GB` or `512MiB` in bytes. Raises UserInputError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise UserInputError(
            f"{text!r} is no amount of memory", where="--vram", next_step=f"a number and a unit: {', '.join(UNITS)}"
        )
    return round(float(found[1]) * units[found[2].lower()])
