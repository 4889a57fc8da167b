"""Plan how much memory a recipe takes before anything is loaded, and what to change if it does not fit."""

from popo_lite.tools.plan.advice import advice_for, memory_advice, refuse_without_room, why_not
from popo_lite.tools.plan.shapes import known_config, load_shape
from popo_lite.tools.plan.vram import MemoryPlan, Phase, plan_memory

__all__ = [
    "MemoryPlan",
    "Phase",
    "advice_for",
    "known_config",
    "load_shape",
    "memory_advice",
    "plan_memory",
    "refuse_without_room",
    "why_not",
]
