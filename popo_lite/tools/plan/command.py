"""Define `popo-lite plan`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from typing import Any

import click

from popo_lite.errors import UserInputError
from popo_lite.host_memory import available_bytes
from popo_lite.tools.completion import complete_recipe
from popo_lite.tools.simulate import refuse
from popo_lite.trust import MODEL_CODE, refuse_untrusted, trust_option

POSITIVE = click.IntRange(min=1)
UNITS = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}


@click.command()
@click.argument("recipe", metavar="RECIPE", shell_complete=complete_recipe)
@click.option("--vram", metavar="SIZE", help="Memory of the GPU, e.g. 24GiB; default: nvidia-smi's figure, else 24GiB.")
@click.option("--others", metavar="SIZE", help="Part that other processes hold; default: nvidia-smi's, 0 with --vram.")
@click.option(
    "--host", metavar="SIZE", help="Host memory of a machine; default: what is available, if nvidia-smi answers."
)
@click.option("--ranks", type=POSITIVE, default=1, show_default=True, help="GPUs of all machines; the plan is for one.")
@click.option(
    "--machines", type=POSITIVE, default=1, show_default=True, help="Machines that the ranks are spread over."
)
@click.option(
    "overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; no value unsets it."
)
@click.option(
    "--simulate", is_flag=True, help="Also run a step of the trainer on a simulated GPU, and count its memory."
)
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the plan as one JSON object, sizes in bytes.")
def plan(
    recipe: str,
    vram: str | None,
    others: str | None,
    host: str | None,
    ranks: int,
    machines: int,
    overrides: tuple[str, ...],
    simulate: bool,
    trust: bool,
    as_json: bool,
) -> None:
    """Plan the memory of RECIPE phase by phase: a TOML file, or the name of a shipped recipe.

    Nothing is loaded, and only the config.json of a model that is not known by name is downloaded. If the run does not
    fit, the smallest changes that make it fit are printed. Exit code 0: it fits; 1: it does not; 2: the recipe or the
    command line has an error. See docs/memory.md.

    With --simulate, and for an architecture that the plan does not know, the trainer's code runs at real size without a
    GPU and without weights. That takes some 20 seconds.

    \b
    Example:
      popo-lite plan qwen_7b_lora --vram 24GiB
    """
    from popo_lite.recipe_file import load_recipe
    from popo_lite.tools.console.output import notify, open_console
    from popo_lite.tools.plan.advice import advice_for
    from popo_lite.tools.plan.report import plan_report
    from popo_lite.tools.plan.shapes import UnknownArchitectureError, load_shape
    from popo_lite.tools.plan.simulation import simulate_step, simulation_report
    from popo_lite.tools.plan.terms import ADA
    from popo_lite.tools.plan.vram import Machine, plan_memory

    if ranks % machines:
        what = f"{ranks} cannot be split evenly over {machines} machines"
        raise UserInputError(what, where="--ranks", next_step="give the ranks of all machines together")
    settings, ranks_here = load_recipe(recipe, overrides), ranks // machines
    refuse_untrusted(settings, recipe, trust, overrides=overrides, only=MODEL_CODE)
    if simulate:
        refuse(settings, ranks)  # before the model is looked for
    try:
        shape = load_shape(settings.model)
    except UnknownArchitectureError as error:
        shape, unknown = None, error.what
        try:
            refuse(settings, ranks)
        except UserInputError as refused:
            refused.what = f"{unknown}, and {refused.what}"
            raise
        notify(f"{unknown}; simulating a step instead, which takes some 20 seconds")
    host_bytes, host_source = (None, "not judged") if host is None else (parse_size(host, "--host"), "--host")
    vram_bytes, others_bytes, source, others_source = 24 * 2**30, 0, "--vram", "none counted"
    capability = ADA
    if vram is not None:
        vram_bytes = parse_size(vram)
    elif settings.train.device == "cpu":
        vram_bytes, source = available_bytes() // ranks_here, "available here; the recipe runs on the CPU"
        source += f", and {ranks_here} ranks share it" if ranks_here > 1 else ""
    elif (installed := installed_gpu()) is not None:
        (vram_bytes, others_bytes, capability), source, others_source = installed, "nvidia-smi", "nvidia-smi"
        if host_bytes is None:
            host_bytes, host_source = available_bytes(), "available here"
    else:
        source = "assumed: nvidia-smi reports no GPU"
    if others is not None:
        others_bytes, others_source = parse_size(others, "--others", least_bytes=0), "--others"
    data: dict[str, Any] = {"recipe": recipe, "model": settings.model.id, "vram_source": source}
    data |= {"others_source": others_source, "host_source": host_source}
    console, fits = open_console(sys.stdout), True
    try:
        machine = Machine(vram_bytes, others_bytes, host_bytes, capability, ranks, ranks_here)
        if shape is not None:
            planned = plan_memory(settings, shape, **machine._asdict())
            fits, advice = planned.fits, advice_for(planned)
            overridden = [f"{key}={json.dumps(value)}" for key, value in advice.values.items()]
            data |= planned.as_json() | {"advice": advice._asdict() | {"overrides": overridden}}
            if not as_json:
                sizes = [("--vram", vram), ("--others", others), ("--host", host)]
                sizes += [("--ranks", str(ranks))] if ranks > 1 else []
                sizes += [("--machines", str(machines))] if machines > 1 else []
                sized = [word for option, value in sizes if value is not None for word in (option, value)]
                kept = (each for each in overrides if each.partition("=")[0].strip() not in advice.values)
                changed = [word for override in kept for word in ("--set", override)]
                command = shlex.join(["popo-lite", "plan", recipe, *sized, *changed])
                train_command = shlex.join([*starter(ranks_here, machines), "train", recipe, *changed])
                sources = (source, others_source, host_source)
                plan_report(planned, advice, sources, command, train_command, console)
        if simulate or shape is None:
            found = data["simulation"] = simulate_step(settings, shape, machine)
            fits = fits and found["fits"]
            if not as_json:
                simulation_report(found, console)
    except UserInputError as error:
        raise error.within(recipe) from error
    if as_json:
        click.echo(json.dumps(data))
    if not fits:
        raise SystemExit(1)


def starter(ranks_here: int, machines: int) -> list[str]:
    """Return the words of a command before `train`; one for several machines is given on each of them."""
    if ranks_here * machines == 1:
        return ["popo-lite"]
    meet = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST_MACHINE:29400"]
    return ["torchrun", *(meet if machines > 1 else []), "--nproc-per-node", str(ranks_here), "-m", "popo_lite"]


def installed_gpu() -> tuple[int, int, tuple[int, int]] | None:
    """Return total and used bytes and compute capability of the first visible GPU by nvidia-smi, or None.

    torch counts GPUs as nvidia-smi does, because the package sets CUDA_DEVICE_ORDER.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        return None
    query = "--query-gpu=memory.total,memory.used,compute_cap"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={visible}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        if answer.returncode not in (0, 14):  # 14: the infoROM is damaged, and what it prints is right
            return None
        *sizes, capability = answer.stdout.splitlines()[0].split(",")
        total, used = (int(mib) * 2**20 for mib in sizes)
        major, minor = map(int, capability.split("."))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return total, used, (major, minor)


def parse_size(text: str, option: str = "--vram", *, least_bytes: int = 1) -> int:
    """Return `24GiB`, `24 GB` or `512MiB` in bytes. Raises UserInputError for other text or a smaller size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    size = float(match[1]) * UNITS.get(match[2], math.inf) if match is not None else math.inf
    if not least_bytes <= size < 2**62:
        next_step = "give a number and a unit: MiB, GiB, MB or GB"
        raise UserInputError(f"{text!r} is no amount of memory", where=option, next_step=next_step)
    return round(size)
