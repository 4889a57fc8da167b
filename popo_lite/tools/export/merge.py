"""Merge an adapter into its base in 16 or 32 bit, and write the result so that it loads without PEFT.

Never into the 4-bit base: that would quantise the sum again and lose part of what was learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from popo_lite.errors import ExportError
from popo_lite.policy.adapters import load_adapter_weights
from popo_lite.policy.load import load_base
from popo_lite.recipe import ModelRecipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_SIZE = "5GB"


def load_unmerged(recipe: ModelRecipe, adapter: Path, dtype: str) -> PeftModel:
    """Return the base in `dtype` on the CPU with an unmerged adapter. Raises ExportError if it is stored quantised."""
    from peft import PeftModel

    attention = "sdpa" if recipe.attn_implementation == "flash_attention_2" else recipe.attn_implementation
    plain = recipe.with_values({"quantization": "none", "dtype": dtype, "attn_implementation": attention})
    base = load_base(plain, torch.device("cpu"))
    if getattr(base.config, "quantization_config", None) is not None:
        raise ExportError(
            f"{recipe.id} is stored quantised, so there is no 16-bit base to merge into",
            where="model.id",
            next_step="export the adapter (--what adapter), or train on the base that it was quantised from",
        )
    model = PeftModel.from_pretrained(base, str(adapter))
    load_adapter_weights(model, adapter)  # once more, as PEFT only warns of tensors that fit nowhere
    return model


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge in place and return the base. Raises ExportError if the sum is not finite."""
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(
            f"the adapter cannot be merged: {error}",
            next_step="try --dtype float32, or --weights siamese if training diverged at its end",
        ) from error
    return merged


def write_merged(model: PreTrainedModel, folder: Path, stop_ids: frozenset[int]) -> None:
    """Write weights, config and generation config; `generate` then stops where the policy's answers ended."""
    config: Any = model.generation_config
    stops = sorted(stop_ids)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    try:
        config.validate(strict=True)
    except ValueError:
        # Some bases name a temperature and not do_sample. transformers reads such a file and refuses to write it.
        config.do_sample = True
    try:
        model.save_pretrained(str(folder), max_shard_size=SHARD_SIZE)
    except SafetensorError as error:
        raise ExportError(
            f"the weights could not be written: {error}",
            where=str(folder),
            next_step="name a folder with enough space with --output",
        ) from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str | None) -> None:
    """Write the tokenizer with the chat template that the policy was trained with."""
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))


def load_merged(folder: Path, recipe: ModelRecipe, device: torch.device) -> PreTrainedModel:
    """Load the folder with plain transformers, in the precision that it was written in."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype="auto",
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        use_safetensors=True,
        device_map={"": device},
    )
    return model
