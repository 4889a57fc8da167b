"""LoRA layers on a CPU: one product with the merged weight W + s B A, where PEFT makes three products and adds them.

The weight is merged again in every pass, which is cheap beside the product of a batch, so nothing can become stale.
Merging only rounds differently in float32; in 16 bit it would lose most of B A, so 16-bit models keep PEFT's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from popo_lite import host_memory

ADAPTER = "default"
"""PEFT's name of the only adapter."""

KEPT_SHARE = 0.25
"""Merged weights are kept during a rollout if they take at most this share of the machine's (or container's) memory."""


class MergedForward:
    """Takes the place of the `forward` of a PEFT layer. `kept` is its merged weight during a rollout, else None."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._original = layer, layer.forward
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return the layer's output for `x` [..., in]."""
        layer = self._layer
        if arguments or options or layer.disable_adapters or layer.merged:
            return cast("Tensor", self._original(x, *arguments, **options))
        if not torch.is_grad_enabled():
            return functional.linear(x, self.weight(), self.bias)
        return cast("Tensor", _MergedLinear.apply(x, *self.factors, self))  # type: ignore[no-untyped-call]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r]."""
        return self._layer.lora_A[ADAPTER].weight, self._layer.lora_B[ADAPTER].weight

    @property
    def scaling(self) -> float:
        """The factor s of B A."""
        return float(self._layer.scaling[ADAPTER])

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", self._layer.get_base_layer().bias)

    def weight(self) -> Tensor:
        """Return W + s B A [out, in], dequantised."""
        import bitsandbytes as bnb

        if self.kept is not None:
            return self.kept
        base: Any = self._layer.get_base_layer()
        a, b = (factor.detach() for factor in self.factors)
        if isinstance(base, bnb.nn.Linear4bit):
            weight: Tensor = bnb.functional.dequantize_4bit(base.weight.data, base.quant_state).to(a.dtype)
            return weight.addmm_(b, a, alpha=self.scaling)
        return torch.addmm(base.weight, b, a, alpha=self.scaling)


class _MergedLinear(torch.autograd.Function):
    """The product with the merged weight, and the gradients of x, A and B. The weight is not saved but merged again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, merged: MergedForward) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.merged = merged
        return functional.linear(x, merged.weight(), merged.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        # Scale the small factors, not the [tokens, width] gradient.
        through_b = rows @ (b * ctx.merged.scaling)
        grad_b = rows.T @ (inputs @ (a.T * ctx.merged.scaling))
        grad_x = grad @ ctx.merged.weight() if ctx.needs_input_grad[0] else None
        return grad_x, through_b.T @ inputs, grad_b, None


def merge_adapters(model: nn.Module) -> None:
    """Let `model`'s LoRA layers multiply with merged weights, except those with DoRA, dropout or 16 bit."""
    for layer in model.modules():
        if _can_merge(layer):
            layer.forward = MergedForward(layer)


def _can_merge(layer: Any) -> bool:
    import bitsandbytes as bnb
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
        return False
    base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    dtypes = {base.compute_dtype if type(base) is bnb.nn.Linear4bit else base.weight.dtype, a.weight.dtype}
    return (
        type(base) in (nn.Linear, bnb.nn.Linear4bit)
        and (dtypes == {torch.float32} or dtypes == {torch.float64})
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and b.bias is None
    )


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Keep the merged weights for the block, in which no weight may change, if memory allows. For many small passes."""
    layers = [module.forward for module in model.modules() if isinstance(module.forward, MergedForward)]
    needed = sum(b.element_size() * len(b) * a.shape[1] for a, b in (layer.factors for layer in layers))
    # Of all memory, not of what is free: rounding must not depend on what else runs.
    if needed > KEPT_SHARE * host_memory.total_bytes():
        layers = []
    try:
        for layer in layers:
            layer.kept = layer.weight()
        yield
    finally:
        for layer in layers:
            layer.kept = None
