"""Check the memory plan against the GPU of this machine before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

from popo_lite.errors import ModelError
from popo_lite.recipe import Recipe
from popo_lite.tools.plan.advice import refuse_unless_fits
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES


def refuse_without_room(recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Raise UserInputError, with what to change, if the memory plan says that the run does not fit the GPU.

    A model whose architecture cannot be planned is not refused; `notify` gets the reason.
    """
    import torch

    from popo_lite.policy.load import pick_device

    device = pick_device(recipe.train.device)
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    try:
        # Asking made this process's CUDA context, which the plan counts itself.
        refuse_unless_fits(recipe, total, max(0, total - free - CUDA_CONTEXT_BYTES))
    except ModelError as error:
        notify(f"no memory plan: {error.what}")
