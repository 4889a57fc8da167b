"""Log-probs and entropies from hidden states, chunk by chunk, without ever holding the logits of a batch.

With raw logits u = W h + bias, z = f(u) / T, f the model's logit scaling or soft-capping, m = max z,
S = sum exp(z - m), E = sum exp(z - m) (z - m):

    log p_y = (z_y - m) - log S        H = log S - E / S
    d(a log p_y + b H) / du_v = f'(u_v) / T * [a (1[v=y] - p_v) - b p_v (log p_v + H)]

The head is frozen, so no gradient is formed for it. The backward pass recomputes a chunk's logits from the
hidden states: three matrix products in all, and [N, D] and [N] bytes kept instead of [N, V].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from popo_lite.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Head:
    """The frozen LM head: `weight` [V, D], `bias` [V] or None, and what the model does to its logits.

    `scale` multiplies the raw logits, then `softcap` bounds them by softcap * tanh(u / softcap), then they are
    divided by the sampling `temperature`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise ModelError(
                "the LM head is trainable, and the chunked loss gives it no gradient",
                where="lora.targets",
                next_step="take the LM head out of lora.targets",
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Logits and everything after them: float32, or float64 where the head is float64."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] in `compute_dtype`; 16-bit operands are accumulated and returned in float32."""
        hidden = hidden.to(self.weight.dtype)
        if self.weight.dtype == self.compute_dtype:
            logits = hidden @ self.weight.T
        elif self.weight.is_cuda:
            logits = torch.mm(hidden, self.weight.T, out_dtype=self.compute_dtype)
        else:
            # The CPU has no product with 16-bit operands and float32 results; products of 16-bit numbers are
            # exact in float32, so widening the operands loses nothing.
            logits = hidden.to(self.compute_dtype) @ self.weight.T.to(self.compute_dtype)
        return logits if self.bias is None else logits + self.bias.to(self.compute_dtype)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """(z [n, V], tanh(scale * u / softcap) [n, V] or None); the second is what f' needs."""
        raw = self.raw_logits(hidden)
        if self.scale != 1.0:
            raw *= self.scale
        bent = None
        if self.softcap is not None:
            bent = raw.div_(self.softcap).tanh_()
            raw = bent * self.softcap
        return (raw / self.temperature if self.temperature != 1.0 else raw), bent


class _ChunkedLogprobs(torch.autograd.Function):
    """Keeps hidden states, targets and three numbers a token; see the module's docstring for the mathematics."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int) -> tuple[Tensor, Tensor]:
        tokens = hidden.shape[0]
        logps, entropies, maxima, log_sums = (hidden.new_empty(tokens, dtype=head.compute_dtype) for _ in range(4))
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            z, _ = head.logits(hidden[part])
            maximum = z.amax(dim=-1, keepdim=True)
            # m and log S stay apart: one combined logsumexp doubles the gradient's error in float32.
            z -= maximum
            picked = z.gather(-1, targets[part, None]).squeeze(-1)
            exp = z.exp()
            total = exp.sum(dim=-1)
            log_sum = total.log()
            logps[part] = picked - log_sum
            entropies[part] = log_sum - (exp * z).sum(dim=-1) / total
            maxima[part], log_sums[part] = maximum.squeeze(-1), log_sum
        ctx.save_for_backward(hidden, targets, maxima, log_sums, entropies)
        ctx.head, ctx.chunk = head, chunk
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, targets, maxima, log_sums, entropies = ctx.saved_tensors
        grad_logps, grad_entropies = grads
        head: Head = ctx.head
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            z, bent = head.logits(hidden[part])
            logp_all = z - maxima[part, None] - log_sums[part, None]
            p = logp_all.exp()
            # The one-hot is folded in before the cast to 16 bit: apart, a confident token's row loses all digits.
            row = (logp_all + entropies[part, None]).mul_(p).mul_(-grad_entropies[part, None])
            row.addcmul_(p, grad_logps[part, None], value=-1)
            row.scatter_add_(-1, targets[part, None], grad_logps[part, None])
            factor = head.scale / head.temperature
            if bent is not None:
                row.mul_(1 - bent.square())
            if factor != 1.0:
                row.mul_(factor)
            grad_hidden[part] = row.to(head.weight.dtype) @ head.weight
        return grad_hidden, None, None, None


def token_logprobs(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, both differentiable in `hidden`.

    `hidden` [N, D], cast to the head's dtype, `targets` [N] token ids; returns two [N] tensors in nats, float32
    (float64 for a float64 head). At most `chunk` x V logits exist at a time. With N = 0 both are empty and
    still on the graph.
    """
    return cast("tuple[Tensor, Tensor]", _ChunkedLogprobs.apply(hidden, targets, head, chunk))  # type: ignore[no-untyped-call]


def naive_token_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The same by autograd over all logits [N, V]: the twin that the chunked function is held against."""
    raw = hidden.to(head.compute_dtype) @ head.weight.T.to(head.compute_dtype)
    if head.bias is not None:
        raw = raw + head.bias.to(head.compute_dtype)
    raw = raw * head.scale
    if head.softcap is not None:
        raw = head.softcap * torch.tanh(raw / head.softcap)
    logp_all = torch.log_softmax(raw / head.temperature, dim=-1)
    return logp_all.gather(-1, targets[:, None]).squeeze(-1), -(logp_all.exp() * logp_all).sum(dim=-1)
