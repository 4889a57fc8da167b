"""The MLP of a checkpointed layer over tiles of its tokens: the memory of one tile, whatever the sequence's length.

An MLP computes each token for itself, and its activations are the widest of a layer. The idea is that of ALST (arXiv
2506.13996). Here no product is computed more often than by plain checkpointing: see `_Input`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TILE_TOKENS = 2048
"""Tokens that an MLP computes at once. At fewer, dequantising NF4 weights for each tile would take noticeable time."""

PARTS = re.compile(r"mlp|feed_forward|.*norm")
"""Names of modules in transformers' decoders that compute each token for itself."""


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only the layers' inputs for the backward pass, and compute MLPs and norms in tiles of TILE_TOKENS.

    Left out are modules with dropout, which would draw again in the backward pass, and those that do not compute each
    token for itself.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hidden = cast("Tensor", model.get_input_embeddings().weight)[None, 1:9]
    for name, module in model.named_modules():
        drops = any(isinstance(part, nn.Dropout) and part.p for part in module.modules())
        if PARTS.fullmatch(name.rpartition(".")[2]) and not drops and _computes_tokens_apart(module, hidden):
            module.forward = _tiled(module, module.forward)


@torch.no_grad()
def _computes_tokens_apart(module: nn.Module, hidden: Tensor) -> bool:
    try:
        whole = module(hidden)
    except RuntimeError:  # the module has another width: a norm of each head's queries
        return False
    if not isinstance(whole, Tensor):
        return False
    gap = torch.cat([module(part) for part in hidden.split(3, dim=-2)], dim=-2) - whole
    return float(gap.float().norm()) <= 0.05 * float(whole.float().norm())


def _tiled(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(hidden: Tensor) -> Tensor:
        """Return `forward(hidden)` for `hidden` [..., T, D]."""
        if hidden.shape[-2] <= TILE_TOKENS:
            return forward(hidden)
        if not torch.is_grad_enabled():
            return _in_tiles(forward, hidden)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        saved = _Input.apply(hidden, hidden.new_empty(0, requires_grad=True))
        return _Tiles.apply(forward, saved.grad_fn, hidden, *trained)

    return run


def _in_tiles(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    output: Tensor | None = None
    start = 0
    for tile in hidden.split(TILE_TOKENS, dim=-2):
        part = forward(tile)
        if output is None:
            output = part.new_empty((*hidden.shape[:-1], part.shape[-1]))
        output.narrow(-2, start, part.shape[-2]).copy_(part)
        start += part.shape[-2]
    assert output is not None  # noqa: S101  # a split has at least one part
    return output


class _Input(torch.autograd.Function):
    """Save an MLP's input, and return nothing of use.

    It is the last tensor that a checkpointed layer saves. A layer that is computed again for its backward pass stops
    once it has saved that, before the MLP: its tiles alone compute the MLP again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return anchor.view_as(anchor)


class _Tiles(torch.autograd.Function):
    """The MLP in tiles: forward without a graph, backward tile by tile."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], saved: Any, hidden: Tensor, *trained: Tensor) -> Tensor:
        kind = hidden.device.type
        ctx.mlp, ctx.saved, ctx.trained = forward, saved, trained
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return _in_tiles(forward, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,) = ctx.saved.saved_tensors
        ctx.saved = None  # no engine frees it
        wants_input = ctx.needs_input_grad[2]
        of_input = torch.empty_like(hidden) if wants_input else None
        of_trained: list[Tensor | None] = [None] * len(ctx.trained)
        for start in range(0, hidden.shape[-2], TILE_TOKENS):
            part = -2, start, min(TILE_TOKENS, hidden.shape[-2] - start)
            tile = hidden.narrow(*part).detach().requires_grad_(wants_input)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                output = ctx.mlp(tile)
            inputs = [tile, *ctx.trained] if wants_input else ctx.trained
            found = torch.autograd.grad(output, inputs, gradient.narrow(*part), allow_unused=True)
            if of_input is not None:
                of_input.narrow(*part).copy_(found[0])
            for index, new in enumerate(found[wants_input:]):
                before = of_trained[index]
                of_trained[index] = new if before is None else before if new is None else before.add_(new)
        return None, None, of_input, *of_trained
