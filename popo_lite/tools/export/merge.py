"""Merge an adapter into an unquantised base, and write the model."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from popo_lite.errors import ExportError
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.load import load_base
from popo_lite.recipe import ModelRecipe, Recipe

BASES = ("trained", "original")
"""What an adapter can be merged into: the base that it was trained on, or the weights before their quantisation."""


def load_unmerged(recipe: Recipe, model: ModelRecipe, adapter: Path) -> Any:
    """Return the base `model` with an unmerged adapter, on the CPU."""
    if model.attn_implementation == "flash_attention_2":
        model = model.with_values({"attn_implementation": "sdpa"})
    lora = recipe.lora.with_values({"init_from": str(adapter)})
    adapted = add_adapters(load_base(model, torch.device("cpu")), lora, recipe.train.seed)
    return adapted.eval()


def merge(adapted: Any, dtype: str) -> Any:
    """Return the base with its adapter merged, in `dtype`. Raises ExportError if a sum is not finite.

    One layer at a time is merged in float32 (or wider) and rounded once: PEFT would round the adapter's share to the
    base's 16 bit first, and then the sum again.
    """
    from peft.tuners.lora import LoraLayer

    wanted = getattr(torch, dtype)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight: Any = module.get_base_layer().weight
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                next_step = "try --weights siamese if training diverged at its end"
                raise ExportError(f"the adapter cannot be merged: {error}", next_step=next_step) from error
            weight.data = weight.data.to(wanted)
            if not weight.data.isfinite().all():
                next_step = "try --dtype float32, or --weights siamese if training diverged at its end"
                raise ExportError(f"a merged weight is too large for {dtype}", next_step=next_step)
    return adapted.unload().to(wanted)


def write_model(model: Any, folder: Path, generation: Any, stop_ids: frozenset[int]) -> None:
    """Write the model with its base's generation settings `generation` and these stop ids."""
    model.generation_config = generation
    generation.eos_token_id = sorted(stop_ids) if len(stop_ids) > 1 else min(stop_ids)
    try:
        generation.validate(strict=True)
    except ValueError:
        # Some bases name a temperature and not do_sample. transformers reads such a file and refuses to write it.
        generation.do_sample = True
    try:
        model.save_pretrained(str(folder), max_shard_size="5GB")
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error)) from error
