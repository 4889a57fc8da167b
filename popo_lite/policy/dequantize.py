"""Write the trained base in 16 or 32 bit, for a rollout engine to serve the same policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from popo_lite.policy.policy import Policy


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
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in base.named_parameters():
        if "lora_" not in name:
            if isinstance(weight, bnb.nn.Params4bit):
                weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
            # Without PEFT's wrapper around a layer.
            tensors[name.replace(".base_layer", "")] = weight.detach().to("cpu", copy=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, str(folder))
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.save_pretrained(str(folder))
