"""Find the parts of a model that matter here, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def context_of(config: PreTrainedConfig) -> int:
    """Return the model's context in tokens. Recurrent models have no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31


def decoder_of(base: PreTrainedModel) -> nn.Module:
    """Return the part that computes the hidden states of text: no LM head, and nothing that sees or hears."""
    if base.config.get_text_config() is base.config:
        return base.base_model  # `get_decoder` may leave out what follows the layers
    decoder: nn.Module = base.get_decoder()
    return decoder


def expert_weights(base: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Yield module and name of each weight [experts, ., .] in which transformers fuses the experts of a layer."""
    for module in decoder_of(base).modules():
        if not isinstance(module, nn.Conv1d):
            yield from ((module, name) for name, p in module.named_parameters(recurse=False) if p.ndim == 3)


def is_mamba(module: nn.Module) -> bool:
    """Return True for the state-space layer of Mamba and of hybrids with it."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def hold_in_eval_mode(base: nn.Module) -> None:
    """Keep modules in eval mode, whatever the model's mode, that compute something else in training mode.

    Some routers add noise there, so that other experts are trained than sampled from. Mamba's fused kernel takes the
    weight of the last projection as it is stored, which may be in 4 bit.
    """
    for module in base.modules():
        if is_mamba(module) or any("jitter" in name for name in vars(module)):
            module.eval()
            module.train = _ignored(module)  # type: ignore[method-assign]


def _ignored(module: nn.Module) -> Callable[..., nn.Module]:
    def train(_mode: bool = True) -> nn.Module:
        return module

    return train
