"""What `popo-lite train` asks the plan: whether a run fits, and what to change if memory runs out."""

from __future__ import annotations

from collections.abc import Callable

from popo_lite.errors import ModelError
from popo_lite.recipe import Recipe
from popo_lite.tools.plan.advice import refuse_unless_fits
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES


def refuse_without_room(recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Raise UserInputError with what to change if the plan says that the run does not fit the GPU.

    An architecture that cannot be planned goes on, and `notify` says so. Nothing is checked on a CPU.
    """
    import torch

    from popo_lite.policy.load import pick_device

    device = pick_device(recipe.train.device)
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    try:
        # Asking has made this process's CUDA context, which the plan counts.
        refuse_unless_fits(recipe, total, max(0, total - free - CUDA_CONTEXT_BYTES))
    except ModelError as error:
        notify(f"no memory plan: {error.what}")
