"""popo-lite: reinforcement learning with verifiable rewards for 4-bit LoRA models, by POPO (arXiv 2605.06650).

    import popo_lite

    recipe = popo_lite.load_recipe("tiny_cpu", ["train.steps=20"])
    result = popo_lite.train(recipe, output="runs/mine")
    popo_lite.resume("runs/mine", ["train.steps=40"])
    popo_lite.evaluate("runs/mine")
    popo_lite.export("runs/mine", output="merged")

Names load on first use: importing the package does not import torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popo_lite.api import evaluate, export, resume, train
    from popo_lite.callbacks import Callback
    from popo_lite.errors import PopoError
    from popo_lite.recipe import Recipe
    from popo_lite.recipe_file import load_recipe
    from popo_lite.trainer import RunResult
    from popo_lite.types import EvalResult

__all__ = ["Callback", "EvalResult", "PopoError", "Recipe", "RunResult", "evaluate", "export", "load_recipe", "resume",
           "train"]  # fmt: skip
_MODULES = {
    "Callback": "callbacks", "EvalResult": "types", "PopoError": "errors", "Recipe": "recipe", "RunResult": "trainer",
    "evaluate": "api", "export": "api", "load_recipe": "recipe_file", "resume": "api",
    "train": "api",
}  # fmt: skip


# CUDA counts the fastest GPU first, and nvidia-smi, which the plan and the doctor ask, by slots. Of several GPUs both
# must mean the same one. torch reads this when it first uses CUDA.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'popo_lite' has no attribute {name!r}")
    return getattr(import_module(f"popo_lite.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
