"""Hold the memory plan against a simulated step of the trainer, without the rollout engine."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.text import Text

from popo_lite.recipe import Recipe
from popo_lite.tools.console.output import safe, table
from popo_lite.tools.console.words import memory
from popo_lite.tools.plan.shapes import ModelShape
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES, plan_memory
from popo_lite.tools.simulate import Simulator

SHOWN = 8  # places that the report lists


class Simulation(NamedTuple):
    """A simulated step: what `simulate` returned, and each phase's planned tensors (none for an unknown architecture).

    `smallest_bytes` are those of the smallest card that holds the trainer, with torch's default segments and with
    expandable ones, which a run has on Linux.
    """

    found: dict[str, Any]
    planned_bytes: dict[str, int]
    smallest_bytes: dict[str, int]
    fits: bool

    @classmethod
    def of(
        cls, recipe: Recipe, shape: ModelShape | None, simulator: Simulator, *, vram_bytes: int, others_bytes: int = 0,
        capability: tuple[int, int] = (8, 9),
    ) -> Self:  # fmt: skip
        """Simulate a step of the trainer."""
        found = simulator.run(recipe, vram_bytes=vram_bytes, capability=capability, extrapolate=True)
        planned = {} if shape is None else trainer_bytes(recipe, shape)
        smallest = {name: size + CUDA_CONTEXT_BYTES + others_bytes for name, size in found["smallest_bytes"].items()}
        return cls(found, planned, smallest, smallest["expandable"] <= vram_bytes)

    @property
    def fullest(self) -> str:
        """Return the phase with the highest peak of tensors."""
        phases: dict[str, Any] = self.found["phases"]
        return max(phases, key=lambda name: phases[name]["allocated_bytes"])

    def as_json(self) -> dict[str, Any]:
        """Return plain data with all sizes in bytes."""
        phases = {
            name: phase | {"planned_bytes": self.planned_bytes.get(name)}
            for name, phase in self.found["phases"].items()
        }
        return self.found | {"phases": phases, "smallest_bytes": self.smallest_bytes, "fits": self.fits}


def trainer_bytes(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the planned bytes of tensors by phase on a GPU, without a rollout engine."""
    alone = recipe.with_values({"rollout.engine": "hf", "train.device": "cuda"})
    return {phase.name: phase.tensor_bytes for phase in plan_memory(alone, shape, vram_bytes=2**40).phases}


def simulation_report(simulation: Simulation, console: Console) -> None:
    """Print a simulated step: peaks by phase, what holds the highest, and the smallest card."""
    phases = simulation.found["phases"]
    rows = []
    for name, phase in phases.items():
        planned = simulation.planned_bytes.get(name)
        sizes = (phase["requested_bytes"], phase["allocated_bytes"], planned, phase["reserved_bytes"])
        rows.append([name, *map(memory, sizes)])
    console.print()
    heads = ["", "requested", "allocated", "planned", "reserved"]
    table("The trainer alone, simulated on a GPU: peaks of tensors", heads, rows, console)
    holders = [[memory(size), place] for place, size in phases[simulation.fullest]["holders"][:SHOWN]]
    table(f"Allocated at the peak of {simulation.fullest}", ["memory", "function, operator"], holders, console)
    default, expandable = (memory(simulation.smallest_bytes[name]) for name in ("default", "expandable"))
    text = f"Smallest GPU for the trainer alone: about {expandable}; {default} without expandable segments, which "
    text += "popo-lite turns on on Linux."
    console.print(Text(safe(text, console)))
