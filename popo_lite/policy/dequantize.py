"""Write the trained base in 16 or 32 bit, for a rollout engine to serve the same policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from popo_lite.policy.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


@torch.no_grad()
def write_dequantized_base(policy: Policy, folder: Path) -> None:
    """Write the base without adapters to `folder` as safetensors and config, 4-bit weights dequantised.

    In the policy's compute dtype: what the trainer's 4-bit layers multiply with. One layer is dequantised at a time
    on its device, all of them are held in host memory until they are written.
    """
    import bitsandbytes as bnb
    from huggingface_hub import save_torch_state_dict

    base: Any = policy.model.get_base_model()
    dtype = policy.head.weight.dtype
    tensors: dict[str, Tensor] = {}
    packed: set[str] = set()
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed_weight: Any = module.weight
            weight = bnb.functional.dequantize_4bit(packed_weight.data, packed_weight.quant_state)
            tensors[f"{_plain(name)}.weight"] = weight.to("cpu", dtype, copy=True)
            packed.add(f"{name}.weight")
    for name, parameter in base.named_parameters():
        if name not in packed and "lora_" not in name:
            tensors[_plain(name)] = parameter.detach().to("cpu", copy=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, str(folder))
    config = type(base.config).from_dict(base.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.save_pretrained(str(folder))


def _plain(name: str) -> str:
    """Return a weight's name in the base, without PEFT's wrapper around a layer."""
    return name.replace(".base_layer", "")
