"""How much memory a recipe takes, before anything is loaded: shapes, the plan, and what to change. Free of torch."""

from popo_lite.tools.plan.advice import Advice, Change, advice_for, next_step, refuse_unless_fits, relief, why_not
from popo_lite.tools.plan.fit import refuse_without_room
from popo_lite.tools.plan.gpu import GpuMemory, installed_gpu
from popo_lite.tools.plan.shapes import ModelShape, known_config, load_shape
from popo_lite.tools.plan.vram import MemoryPlan, Phase, plan_memory

__all__ = [
    "Advice",
    "Change",
    "GpuMemory",
    "MemoryPlan",
    "ModelShape",
    "Phase",
    "advice_for",
    "installed_gpu",
    "known_config",
    "load_shape",
    "next_step",
    "plan_memory",
    "refuse_unless_fits",
    "refuse_without_room",
    "relief",
    "why_not",
]
