"""A frozen base of a model's architecture with random weights, from its config alone: for benchmarks, never for a run.

`load_policy` does not know this module; a run can only load true weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from popo_lite.policy.load import TINY_FOLDER, close_cpu_repacking, load_config, nf4_config, quiet_libraries
from popo_lite.recipe import ModelRecipe
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def random_base(recipe: ModelRecipe, device: torch.device, *, seed: int = 0) -> PreTrainedModel:
    """The base that `load_base` would give, with random weights: same modules, dtypes and bytes, all frozen.

    Built on the meta device and filled tensor by tensor on `device`, each linear layer quantised as soon as it is
    filled, so that no more than one layer exists in 16 bit. Every row of a matrix has unit norm on average, so
    activations stay of order one through the layers, logits as well: the output distribution is neither uniform nor
    certain. `tiny` is built from its config like any other and is untaught here.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    quiet_libraries()
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    config = architecture(recipe)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
    quantizer: Any = None
    if recipe.quantization == "nf4":
        quantizer = AutoHfQuantizer.from_config(nf4_config(recipe, dtype), pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": device})
    model.tie_weights()
    _fill(model, dtype, torch.Generator(device).manual_seed(seed))
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        close_cpu_repacking(model)
    model.requires_grad_(False)
    model.eval()
    return model


def architecture(recipe: ModelRecipe) -> PreTrainedConfig:
    """The model's config: of a shape known by name without asking anyone, else as `load_config` finds it."""
    from transformers import AutoConfig

    known = KNOWN_CONFIGS.get(recipe.id) if recipe.revision is None else None
    return load_config(recipe) if known is None else AutoConfig.for_model(**known)


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, for the PAD id that a policy needs: random weights have no words of their own.

    Ids beyond its vocabulary decode to nothing.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY_FOLDER)
    return tokenizer


def write_random_base(recipe: ModelRecipe, device: torch.device, folder: Path, *, seed: int = 0) -> None:
    """Write `random_base` and the stand-in tokenizer to `folder`, for backends that load from files alone."""
    random_base(recipe, device, seed=seed).save_pretrained(folder)
    stand_in_tokenizer().save_pretrained(folder)


def _fill(model: PreTrainedModel, dtype: torch.dtype, source: torch.Generator) -> None:
    """Put values on the source's device in place of every meta parameter; buffers move there."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one tensor
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(source.device), name not in module._non_persistent_buffers_set)
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in filled:
                filled[empty] = _parameter(name, empty, dtype, source)
            module.register_parameter(name, filled[empty])


def _parameter(name: str, empty: nn.Parameter, dtype: torch.dtype, source: torch.Generator) -> nn.Parameter:
    import bitsandbytes as bnb

    values = _values(name, empty, dtype, source)
    if not isinstance(empty, bnb.nn.Params4bit):
        return nn.Parameter(values, requires_grad=False)
    # What is attached to the parameter says how to quantise it; moving it to its device does so.
    packed: Any = bnb.nn.Params4bit(values, requires_grad=False, **empty.__dict__)
    quantized: nn.Parameter = packed.to(source.device)
    return quantized


def _values(name: str, empty: Tensor, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    if empty.ndim > 1:
        values = torch.empty(empty.shape, dtype=dtype, device=source.device)
        return values.normal_(std=1 / math.sqrt(empty.shape[-1]), generator=source)
    return torch.full(empty.shape, 0.0 if name == "bias" else 1.0, dtype=dtype, device=source.device)
