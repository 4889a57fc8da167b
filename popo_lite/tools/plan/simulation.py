"""Hold the memory plan against a simulated step of the trainer, without the rollout engine."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from popo_lite.recipe import Recipe
from popo_lite.tools.console.output import safe, table
from popo_lite.tools.console.words import memory
from popo_lite.tools.plan.shapes import ModelShape
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES, Machine, plan_memory
from popo_lite.tools.simulate import Simulator

SHOWN = 8  # places that the report lists


def simulate_step(recipe: Recipe, shape: ModelShape | None, machine: Machine) -> dict[str, Any]:
    """Return what `simulate` finds of a step of the trainer, and whether it fits.

    Each phase has its planned tensors, None for an unknown architecture. `smallest_bytes` are those of the smallest
    card that holds the trainer, with torch's default segments and with expandable ones, which a run has on Linux.
    """
    with Simulator() as simulator:
        found = simulator.run(recipe, vram_bytes=machine.vram_bytes, capability=machine.capability, extrapolate=True)
    planned = {} if shape is None else trainer_bytes(recipe, shape)
    phases = {name: phase | {"planned_bytes": planned.get(name)} for name, phase in found["phases"].items()}
    beside = CUDA_CONTEXT_BYTES + machine.others_bytes
    smallest = {name: size + beside for name, size in found["smallest_bytes"].items()}
    fits = smallest["expandable"] <= machine.vram_bytes
    return found | {"phases": phases, "smallest_bytes": smallest, "fits": fits}


def trainer_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the planned bytes of tensors by phase on a GPU, without a rollout engine."""
    alone = recipe.with_values({"rollout.engine": "hf", "train.device": "cuda"})
    return {phase.name: phase.tensor_bytes for phase in plan_memory(alone, shape, vram_bytes=2**40).phases}


def simulation_report(found: dict[str, Any], console: Console) -> None:
    """Print a simulated step: peaks by phase, what holds the highest, and the smallest card."""
    phases, sizes = found["phases"], ("requested", "allocated", "planned", "reserved")
    rows = [[name, *(memory(phase[f"{size}_bytes"]) for size in sizes)] for name, phase in phases.items()]
    console.print()
    table("The trainer alone, simulated on a GPU: peaks of tensors", ["", *sizes], rows, console)
    fullest = fullest_phase(found)
    holders = [[memory(size), place] for place, size in phases[fullest]["holders"][:SHOWN]]
    table(f"Allocated at the peak of {fullest}", ["memory", "function, operator"], holders, console)
    default, expandable = (memory(found["smallest_bytes"][name]) for name in ("default", "expandable"))
    text = f"Smallest GPU for the trainer alone: about {expandable}; {default} without expandable segments, which "
    text += "popo-lite turns on on Linux."
    console.print(Text(safe(text, console)))


def fullest_phase(found: dict[str, Any]) -> str:
    """Return the phase of a simulated step with the highest peak of tensors."""
    phases: dict[str, Any] = found["phases"]
    return max(phases, key=lambda name: phases[name]["allocated_bytes"])
