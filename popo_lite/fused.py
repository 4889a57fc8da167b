"""The fused LM head and loss: the gradient of any loss that is a sum over tokens, without the logits of a batch.

For raw logits u = W h + bias, z = f(u) / T with the model's logit scaling or soft-capping f, m = max z,
S = sum exp(z - m), E = sum exp(z - m) (z - m):

    log p_y = (z_y - m) - log S        H = log S - E / S

A loss that is a sum over tokens reaches the logits only through a = dL/d log p_y and b = dL/dH of each token:

    dL/du_v = f'(u_v) / T * [a (1[v=y] - p_v) - b p_v (log p_v + H)]

So `fused_loss` walks over chunks of tokens. It makes a chunk's logits, takes log p and H from them, lets autograd
differentiate the loss function with respect to these two numbers per token, overwrites the logits with the gradient
rows, and multiplies them with the head. Each chunk costs two products of [n, D] with the head, and one buffer
[chunk, V] serves all chunks. The head is frozen, so it gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from popo_lite.chunks import row_block, tile_rows
from popo_lite.errors import ModelError

FORWARD_TERMS, BACKWARD_TERMS = 128, 256
"""Terms that a float32 product on a CPU sums in one call: oneDNN rounds after each term, so longer sums lose digits."""

Rule = tuple[float, float | None, float]
"""`scale`, `softcap` and `temperature` of a `Head`: z as a function of the raw logits u."""

TokenLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(log-probs [n], entropies [n], which tokens they are) -> their share of the loss, a differentiable scalar."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The frozen LM head: `weight` [V, D], `bias` [V] or None, and the model's changes to its logits.

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
            what = "the LM head is trainable, and the fused loss gives it no gradient"
            raise ModelError(what, where="lora.target_modules", next_step="remove the LM head from lora.target_modules")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of logits and everything after them: float32, or float64 if the head is float64."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def rule(self) -> Rule:
        """Settings that turn raw logits u into z."""
        return self.scale, self.softcap, self.temperature

    @property
    def row_block(self) -> int:
        """Rows of a chunk that the row-wise math takes at a time."""
        return row_block(len(self.weight), on_gpu=self.weight.is_cuda, logits_bytes=self.compute_dtype.itemsize)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return z [n, V] of `hidden` [n, D] in `compute_dtype`; 16-bit operands are accumulated in float32."""
        raw = hidden.new_empty(len(hidden), len(self.weight), dtype=self.compute_dtype)
        return _scores(self.write_raw(hidden, raw), self.rule)

    def write_raw(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write the raw logits u of `hidden` [n, D] to `out` [n, V], accumulated in its dtype, and return it."""
        weight, hidden = self.weight, hidden.to(self.weight.dtype)
        if weight.is_cuda and weight.dtype != out.dtype:
            torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        elif weight.is_cuda or out.dtype == torch.float64:
            torch.mm(hidden, weight.T, out=out)
        else:
            # The CPU has no product with 16-bit operands and float32 results. Products of 16-bit numbers are exact in
            # float32, so widening the operands loses nothing; tile by tile it needs no second head.
            vocabulary, width = weight.shape
            terms = FORWARD_TERMS if weight.dtype == torch.float32 else width
            for tile in _slices(vocabulary, tile_rows(width)):
                sums = (_float32_linear(hidden[:, k], weight[tile, k].contiguous()) for k in _slices(width, terms))
                out[:, tile] = reduce(Tensor.add_, sums)
        return out if self.bias is None else out.add_(self.bias)

    def multiply_back(self, rows: Tensor, out: Tensor) -> None:
        """Write `rows` [n, V] times the weight to `out` [n, D], all of one dtype; accumulated in at least float32."""
        if rows.is_cuda and rows.element_size() == 2:
            # Ask for float32: cuBLAS may otherwise add the parts of so long a sum in 16 bit.
            out.copy_(torch.mm(rows, self.weight, out_dtype=torch.float32))
        elif rows.is_cuda or rows.dtype != torch.float32:
            torch.mm(rows, self.weight, out=out)
        else:
            out.zero_()
            for part in _slices(len(self.weight), BACKWARD_TERMS):
                out += _float32_linear(rows[:, part], self.weight[part].T)


class LossOutput(NamedTuple):
    """`loss`, a scalar on the graph; `logps` and `entropies` [N] in nats, detached."""

    loss: Tensor
    logps: Tensor
    entropies: Tensor


def fused_loss(
    hidden: Tensor, targets: Tensor, head: Head, token_loss: TokenLoss, *, chunk: int = 256, compile_rows: bool = False
) -> LossOutput:
    """Sum `token_loss` over all tokens, with its gradient to `hidden`.

    Args:
        hidden: [N, D], cast to the head's dtype.
        targets: [N] token ids.
        head: The frozen LM head.
        token_loss: Called once per chunk with log-probs and entropies in nats, float32 (float64 for a float64 head).
            It may use anything else of its tokens as constants.
        chunk: Tokens whose logits exist at a time.
        compile_rows: Run the row-wise math through torch.compile.

    With N = 0 the loss is 0 and still on the graph. Without grad mode no gradient is made, and each chunk costs one
    product.
    """
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    outputs = _FusedLoss.apply(hidden, targets, head, token_loss, chunk, compile_rows, differentiate)  # type: ignore[no-untyped-call]
    return LossOutput(*outputs)


@torch.no_grad()
def score(
    hidden: Tensor, targets: Tensor, head: Head, *, chunk: int = 256, compile_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of `targets` and the entropies, [N] each, without a gradient; see `fused_loss`."""
    output = fused_loss(hidden, targets, head, lambda logps, _, __: logps.sum(), chunk=chunk, compile_rows=compile_rows)
    return output.logps, output.entropies


class _FusedLoss(torch.autograd.Function):
    """Makes the gradient of the loss in the forward pass and keeps it, [N, D]; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        token_loss: TokenLoss,
        chunk: int,
        compile_rows: bool,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_statistics, row_gradients = _row_functions(compile_rows)
        # Holds a chunk's logits, then its gradient rows in their place.
        buffer = head.weight.new_empty(min(chunk, len(hidden)), len(head.weight), dtype=head.compute_dtype)
        logps, entropies = (hidden.new_empty(len(hidden), dtype=head.compute_dtype) for _ in range(2))
        grad_hidden = torch.empty(hidden.shape if differentiate else 0, dtype=head.weight.dtype, device=hidden.device)
        total = logps.new_zeros(())
        for part in _slices(len(hidden), chunk):
            raw = head.write_raw(hidden[part], buffer[: part.stop - part.start])
            # Block by block into one tensor: small ones that outlive a block would keep a CPU's allocator from reusing
            # the memory of its temporaries.
            maxima, sums, means = statistics = raw.new_empty(3, len(raw))
            for block in _slices(len(raw), head.row_block):
                for whole, piece in zip(statistics, row_statistics(raw[block], head.rule), strict=True):
                    whole[block] = piece
            target_scores = _scores(raw.gather(-1, targets[part, None]), head.rule).squeeze(-1)
            logps[part] = (target_scores - maxima) - sums.log()
            entropies[part] = sums.log() - means
            with torch.enable_grad():
                leaves = logps[part].detach().requires_grad_(), entropies[part].detach().requires_grad_()
                loss = token_loss(*leaves, part)
            total += loss.detach()
            if differentiate:
                # None for a number that the loss does not use: its term is left out of the rows.
                a, b = torch.autograd.grad(loss, leaves, allow_unused=True)
                rows = _write_gradient_rows(raw, targets[part], statistics, a, b, head, row_gradients)
                head.multiply_back(rows, grad_hidden[part])
        ctx.save_for_backward(grad_hidden.to(hidden.dtype))
        ctx.mark_non_differentiable(logps, entropies)
        return total, logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_loss.to(grad_hidden.dtype), *[None] * 6)


def _write_gradient_rows(
    raw: Tensor,
    targets: Tensor,
    statistics: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    head: Head,
    row_gradients: Callable[..., Tensor],
) -> Tensor:
    """Overwrite `raw` [n, V] with dL/du in the head's dtype, for a = dL/d log p_y and b = dL/dH; return the rows.

    `statistics` [3, n] holds m, S and E / S.
    """
    maxima, sums, means = statistics
    dtype, factor = head.weight.dtype, head.scale / head.temperature
    slope = None if b is None else -factor * b / sums
    constant = torch.zeros_like(sums) if slope is None else -slope * means
    one_hot = None if a is None else factor * a
    if one_hot is not None:
        constant -= one_hot / sums
    # Add the one-hot before the cast to 16 bit: separate, a confident token's row would lose all digits.
    picked = raw.gather(-1, targets[:, None])
    entries = _row_gradients(picked, maxima, constant, slope, one_hot, dtype, head.rule)
    # In 16 bit, row r is written where row r / 2 was. That row has been read already, or belongs to the same block,
    # which is read as a whole before any of it is written.
    rows = raw.view(dtype).view(-1)[: raw.numel()].view(raw.shape)
    for block in _slices(len(raw), head.row_block):
        slopes = None if slope is None else slope[block]
        rows[block] = row_gradients(raw[block], maxima[block], constant[block], slopes, None, dtype, head.rule)
    rows[torch.arange(len(targets), device=targets.device), targets] = entries.squeeze(-1)
    return rows


def _scores(raw: Tensor, rule: Rule) -> Tensor:
    """Return z = f(u) / T; `raw` itself if f / T is the identity."""
    scale, softcap, temperature = rule
    if softcap is not None:
        return (raw * (scale / softcap)).tanh_().mul_(softcap / temperature)
    return raw if scale == temperature else raw * (scale / temperature)


def _row_statistics(raw: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Return m, S, E / S, [r] each, of [r, V] raw logits."""
    z = _scores(raw, rule)
    maxima = z.amax(dim=-1)
    # m and log S stay separate: one combined logsumexp doubles the gradient's error in float32.
    shifted = z - maxima[:, None]
    exp = shifted.exp()
    sums = exp.sum(dim=-1)
    return maxima, sums, exp.mul_(shifted).sum(dim=-1) / sums


def _row_gradients(
    raw: Tensor,
    maxima: Tensor,
    constant: Tensor,
    slope: Tensor | None,
    one_hot: Tensor | None,
    dtype: torch.dtype,
    rule: Rule,
) -> Tensor:
    """Return f'(u) / f'(0) * (one_hot + exp(z - m) * (constant + slope * (z - m))) of [r, k] raw logits.

    The tensors beside `raw` are [r]. This is the module's formula with p = exp(z - m) / S and
    log p + H = (z - m) - E / S.
    """
    z = _scores(raw, rule)
    shifted = z - maxima[:, None]
    row = shifted.exp()
    row.mul_(constant[:, None] if slope is None else shifted.mul_(slope[:, None]).add_(constant[:, None]))
    if one_hot is not None:
        row.add_(one_hot[:, None])
    _, softcap, temperature = rule
    if softcap is not None:
        row.mul_((z * (temperature / softcap)).square_().neg_().add_(1))
    return row.to(dtype)


@cache
def _row_functions(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `_row_statistics` and `_row_gradients`; compiled, they read the logits twice instead of 11 times."""
    if not compiled:
        return _row_statistics, _row_gradients
    return torch.compile(_row_statistics), torch.compile(_row_gradients)


def _float32_linear(left: Tensor, weight: Tensor) -> Tensor:
    """Return left [n, k] times weight [m, k] transposed, on a CPU; the weight contiguous, or its transpose."""
    left, weight = left.float(), weight.float()
    if not torch.backends.mkldnn.is_available():
        return functional.linear(left, weight)
    # MKL, torch's choice, has half of oneDNN's speed on some CPUs. The public way to oneDNN, `to_mkldnn`, copies both
    # operands and the result.
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], ""))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def refuse_without_compiler(head: Head) -> None:
    """Compile the row-wise math once. Raises ModelError if torch.compile does not work on this machine."""
    hidden = head.weight.new_zeros(8, head.weight.shape[1]).requires_grad_()
    targets = torch.zeros(8, dtype=torch.long, device=hidden.device)
    try:
        fused_loss(hidden, targets, head, lambda logps, entropies, _: (logps + entropies).sum(), compile_rows=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing or broken compiler raises many types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"torch.compile does not work here: {reason}",
            where="train.compile_loss = true",
            next_step="install a C compiler (gcc), or --set train.compile_loss=false",
        ) from error


def naive_logprobs(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies by autograd over all logits [N, V]: the reference for `fused_loss` in tests."""
    raw = hidden.to(head.compute_dtype) @ head.weight.T.to(head.compute_dtype)
    if head.bias is not None:
        raw = raw + head.bias.to(head.compute_dtype)
    raw = raw * head.scale
    if head.softcap is not None:
        raw = head.softcap * torch.tanh(raw / head.softcap)
    logp_all = torch.log_softmax(raw / head.temperature, dim=-1)
    return logp_all.gather(-1, targets[:, None]).squeeze(-1), -(logp_all.exp() * logp_all).sum(dim=-1)
