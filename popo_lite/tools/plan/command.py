"""`popo-lite plan`: the memory a recipe takes, from the model's config alone."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from popo_lite.errors import UserInputError

if TYPE_CHECKING:
    from popo_lite.tools.plan import GpuMemory

DEFAULT_VRAM_BYTES = 24 * 2**30
DOES_NOT_FIT = 1
UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
LARGEST_BYTES = 2**62


@click.command(short_help="Say whether a recipe fits a GPU, and what to change.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--vram", metavar="SIZE", help="Memory of the GPU, such as 24GiB; default what nvidia-smi reports, else 24GiB."
)
@click.option(
    "--others",
    metavar="SIZE",
    help="Memory of it that other processes hold; default what nvidia-smi reports as used, 0 with --vram.",
)
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
@click.option("as_json", "--json", is_flag=True, help="Print the plan as one JSON object, sizes in bytes.")
def plan(recipe: str, vram: str | None, others: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Plan the memory of RECIPE phase by phase: a TOML file, or the name of a shipped recipe.

    Nothing is loaded, and only the config.json of a model that is not known by name is downloaded. Where the run
    does not fit, the smallest changes that make it fit are named. Exit code 0: it fits; 1: it does not; 2: the
    recipe or the command line is at fault. See docs/memory.md.
    """
    from popo_lite.recipe_file import load_recipe
    from popo_lite.tools.plan import advice_for, load_shape, next_step, plan_memory, why_not

    settings = load_recipe(recipe, overrides)
    shape = load_shape(settings.model)
    memory, sources = _memory(vram, others, on_gpu=settings.train.device != "cpu")
    try:
        found = plan_memory(settings, shape, vram_bytes=memory.total_bytes, others_bytes=memory.used_bytes)
    except UserInputError as error:
        raise error.within(recipe) from error
    advice = advice_for(settings, shape, memory.total_bytes, memory.used_bytes)
    data: dict[str, Any] = {"recipe": recipe, "model": settings.model.id} | sources | found.as_json()
    data["advice"] = asdict(advice) | {"overrides": list(advice.overrides)}
    if as_json:
        click.echo(json.dumps(data))
    else:
        from popo_lite.tools.plan.report import plan_report

        command = ["popo-lite", "plan", recipe]
        command += ["--vram", vram] if vram is not None else []
        command += ["--others", others] if others is not None else []
        command += [word for override in overrides for word in ("--set", override)]
        plan_report(
            data,
            batch_size=settings.rollout.max_num_seqs,
            why_not=None if found.fits else why_not(settings, found),
            next_step=f"{shlex.join(command)} {advice.options}" if advice.changes else next_step(advice),
        )
    if not found.fits:
        raise SystemExit(DOES_NOT_FIT)


def _memory(vram: str | None, others: str | None, *, on_gpu: bool) -> tuple[GpuMemory, dict[str, str]]:
    """Memory in all and in use by others, and where either figure comes from."""
    from popo_lite.tools.plan import GpuMemory, installed_gpu

    source, others_source = "--vram", "none counted"
    memory = GpuMemory(total_bytes=DEFAULT_VRAM_BYTES, used_bytes=0)
    if vram is not None:
        memory = replace(memory, total_bytes=parse_size(vram))
    elif not on_gpu:
        source = "assumed: the recipe runs on the CPU"
    elif (installed := installed_gpu()) is not None:
        memory, source, others_source = installed, "nvidia-smi", "nvidia-smi"
    else:
        source = "assumed: nvidia-smi reports no GPU"
    if others is not None:
        memory = replace(memory, used_bytes=parse_size(others, "--others", least_bytes=0))
        others_source = "--others"
    return memory, {"vram_source": source, "others_source": others_source}


def parse_size(text: str, option: str = "--vram", *, least_bytes: int = 1) -> int:
    """`24GiB`, `24 GB` or `512MiB` in bytes. Raises UserInputError for anything else, or for less than the least."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    size = float(found[1]) * units.get(found[2].lower(), math.inf) if found is not None else math.inf
    if not least_bytes <= size < LARGEST_BYTES:
        raise UserInputError(
            f"{text!r} is no amount of memory", where=option, next_step=f"a number and a unit: {', '.join(UNITS)}"
        )
    return round(size)
