"""Log-probs and entropies from hidden states, chunk by chunk, without ever holding the logits of a batch.

With raw logits u = W h + bias, z = f(u) / T, f the model's logit scaling or soft-capping, m = max z,
S = sum exp(z - m), E = sum exp(z - m) (z - m):

    log p_y = (z_y - m) - log S        H = log S - E / S
    d(a log p_y + b H) / du_v = f'(u_v) / T * [a (1[v=y] - p_v) - b p_v (log p_v + H)]

The head is frozen, so no gradient is formed for it. Two entries, and what each chunk costs in products of [n, D] with
[D, V] or back:

- `weighted_token_logprobs`, coefficients known: logits, statistics, gradient rows and their product with the head all
  in the forward pass: 2 products.
- `token_logprobs`, coefficients not known: the backward pass computes the logits again: 3 products.

Both keep [N, D] and [N] bytes and one buffer [chunk, V], in which the gradient overwrites the logits.
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

from popo_lite.errors import ModelError
from popo_lite.objective.chunks import row_block, tile_rows

FORWARD_TERMS, BACKWARD_TERMS = 128, 256
"""Terms that a float32 product on a CPU adds up in one go: oneDNN rounds after each, so longer sums lose digits."""


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
                where="lora.target_modules",
                next_step="take the LM head out of lora.target_modules",
            )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Logits and everything after them: float32, or float64 where the head is float64."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] in `compute_dtype`; 16-bit operands are accumulated and returned in float32."""
        logits = hidden.new_empty(len(hidden), len(self.weight), dtype=self.compute_dtype)
        _multiply(hidden, self.weight, out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

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


class Statistics(NamedTuple):
    """Per token, [n] each: m = max z, S, and E / S."""

    maxima: Tensor
    sums: Tensor
    means: Tensor

    @property
    def entropies(self) -> Tensor:
        """H = log S - E / S, in nats."""
        return self.sums.log() - self.means

    def of(self, tokens: slice) -> Statistics:
        """Those of some tokens, sharing memory."""
        return Statistics(*(whole[tokens] for whole in self))


def _scores(raw: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """The scores z = f(u) / T; `raw` itself where f / T is the identity."""
    if softcap is not None:
        return (raw * (scale / softcap)).tanh_().mul_(softcap / temperature)
    return raw if scale == temperature else raw * (scale / temperature)


def _row_statistics(
    raw: Tensor, scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[r, V] raw logits -> m, S, E / S, [r] each."""
    z = _scores(raw, scale, softcap, temperature)
    maxima = z.amax(dim=-1)
    # m and log S stay apart: one combined logsumexp doubles the gradient's error in float32.
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
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Gradient rows f'(u) / f'(0) * (one_hot + exp(z - m) * (constant + slope * (z - m))) of [r, k] raw logits.

    The tensors beside `raw` are [r]. They are what the module's formula comes to with p = exp(z - m) / S and
    log p + H = (z - m) - E / S.
    """
    z = _scores(raw, scale, softcap, temperature)
    shifted = z - maxima[:, None]
    row = shifted.exp()
    row.mul_(constant[:, None] if slope is None else shifted.mul_(slope[:, None]).add_(constant[:, None]))
    if one_hot is not None:
        row.add_(one_hot[:, None])
    if softcap is not None:
        row.mul_((z * (temperature / softcap)).square_().neg_().add_(1))
    return row.to(dtype)


@cache
def _row_functions(compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_row_statistics` and `_row_gradients`; compiled, they go through the logits two times in all, and not eleven."""
    if not compiled:
        return _row_statistics, _row_gradients
    return torch.compile(_row_statistics), torch.compile(_row_gradients)


def _multiply(hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Write hidden [n, D] times weight [V, D] transposed to `out` [n, V], accumulated in the dtype of `out`."""
    hidden = hidden.to(weight.dtype)
    if weight.is_cuda and weight.dtype != out.dtype:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    elif weight.is_cuda or out.dtype == torch.float64:
        torch.mm(hidden, weight.T, out=out)
    else:
        # The CPU has no product with 16-bit operands and float32 results. Those of 16-bit numbers are exact in
        # float32, so widening the operands loses nothing; tile by tile it needs no second head.
        terms = FORWARD_TERMS if weight.dtype == torch.float32 else weight.shape[1]
        for part in _slices(weight.shape[0], tile_rows(weight.shape[1])):
            sums = (
                _wide_linear(hidden[:, some], weight[part, some].contiguous())
                for some in _slices(weight.shape[1], terms)
            )
            out[:, part] = reduce(Tensor.add_, sums)


def _multiply_back(rows: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Write rows [n, V] times weight [V, D] to `out` [n, D], all of one dtype; accumulated in at least float32."""
    if rows.is_cuda and rows.element_size() == 2:
        # Asked for in float32: cuBLAS may add the parts of so long a sum in 16 bit otherwise.
        out.copy_(torch.mm(rows, weight, out_dtype=torch.float32))
        return
    if rows.is_cuda or rows.dtype != torch.float32:
        torch.mm(rows, weight, out=out)
        return
    out.zero_()
    for part in _slices(weight.shape[0], BACKWARD_TERMS):
        out += _wide_linear(rows[:, part], weight[part].T)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _wide_linear(left: Tensor, weight: Tensor) -> Tensor:
    """Left [n, k] times weight [m, k] transposed, on a CPU, in float32; the weight contiguous, or transposed so."""
    left, weight = left.float(), weight.float()
    if not torch.backends.mkldnn.is_available():
        return functional.linear(left, weight)
    # MKL, which torch would take, has half of oneDNN's speed on some CPUs. The public way to oneDNN, `to_mkldnn`,
    # copies both operands and the result.
    return cast("Tensor", torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], ""))


class _Pass:
    """One walk over the chunks with one buffer [chunk, V]: a chunk's logits, then its gradient rows in their place."""

    def __init__(self, head: Head, tokens: int, chunk: int, compile_rows: bool) -> None:
        vocabulary, dtype = head.weight.shape[0], head.compute_dtype
        self.head, self.tokens, self.chunk = head, tokens, chunk
        self.buffer = head.weight.new_empty(min(chunk, tokens), vocabulary, dtype=dtype)
        self.block = row_block(vocabulary, on_gpu=head.weight.is_cuda, logits_bytes=dtype.itemsize)
        self.row_statistics, self.row_gradients = _row_functions(compile_rows)
        self.rule = (head.scale, head.softcap, head.temperature)

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens."""
        return _slices(self.tokens, self.chunk)

    def fill(self, hidden: Tensor) -> Tensor:
        """The raw logits [n, V] of a chunk, in the buffer."""
        raw = self.buffer[: len(hidden)]
        _multiply(hidden, self.head.weight, out=raw)
        return raw if self.head.bias is None else raw.add_(self.head.bias)

    def statistics(self, raw: Tensor) -> Statistics:
        """The statistics of a chunk."""
        # Block by block into one tensor: small ones that outlive a block would keep a CPU's allocator from using the
        # memory of its temporaries again.
        found = Statistics(*raw.new_empty(3, len(raw)))
        for part in _slices(len(raw), self.block):
            for whole, piece in zip(found, self.row_statistics(raw[part], *self.rule), strict=True):
                whole[part] = piece
        return found

    def picked(self, raw: Tensor, targets: Tensor, found: Statistics) -> Tensor:
        """The targets' log-probs [n] of a chunk."""
        z = _scores(raw.gather(-1, targets[:, None]), *self.rule).squeeze(-1)
        return (z - found.maxima) - found.sums.log()

    def gradient(
        self, raw: Tensor, targets: Tensor, found: Statistics, a: Tensor | None, b: Tensor | None, *, out: Tensor
    ) -> None:
        """Write dh [n, D] for the sum of a log p_y + b H to `out`; None is an absent term. Overwrites `raw`."""
        scale, _, temperature = self.rule
        factor = scale / temperature
        slope = None if b is None else -factor * b / found.sums
        constant = torch.zeros_like(found.sums) if slope is None else -slope * found.means
        one_hot = None if a is None else factor * a
        if one_hot is not None:
            constant -= one_hot / found.sums
        # The one-hot is folded in before the cast to 16 bit: apart, a confident token's row loses all digits.
        dtype = self.head.weight.dtype
        picked = raw.gather(-1, targets[:, None])
        entries = _row_gradients(picked, found.maxima, constant, slope, one_hot, dtype, *self.rule)
        # In 16 bit, row r takes the place that row r / 2 had: it has been read already, or belongs to the same block,
        # all of which is read before any of it is written.
        rows = self.buffer.view(dtype).view(-1)[: raw.numel()].view(raw.shape)
        for part in _slices(len(raw), self.block):
            slopes = None if slope is None else slope[part]
            rows[part] = self.row_gradients(
                raw[part], found.maxima[part], constant[part], slopes, None, dtype, *self.rule
            )
        rows[torch.arange(len(targets), device=targets.device), targets] = entries.squeeze(-1)
        _multiply_back(rows, self.head.weight, out=out)


class _Recomputed(torch.autograd.Function):
    """Entry (b). Keeps hidden states, targets and three numbers a token for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, chunk: int, compile_rows: bool
    ) -> tuple[Tensor, Tensor]:
        walk = _Pass(head, len(hidden), chunk, compile_rows)
        logps = hidden.new_empty(len(hidden), dtype=head.compute_dtype)
        found = Statistics(*logps.new_empty(3, len(hidden)))
        for part in walk.chunks():
            raw = walk.fill(hidden[part])
            statistics = walk.statistics(raw)
            logps[part] = walk.picked(raw, targets[part], statistics)
            for whole, piece in zip(found.of(part), statistics, strict=True):
                whole.copy_(piece)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, targets, *found)
        ctx.head, ctx.chunk, ctx.compile_rows = head, chunk, compile_rows
        return logps, found.entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets, *kept = ctx.saved_tensors
        head: Head = ctx.head
        walk = _Pass(head, len(hidden), ctx.chunk, ctx.compile_rows)
        grad_hidden = torch.empty(hidden.shape, dtype=head.weight.dtype, device=hidden.device)
        for part in walk.chunks():
            a, b = (None if grad is None else grad[part] for grad in (grad_logps, grad_entropies))
            raw = walk.fill(hidden[part])
            walk.gradient(raw, targets[part], Statistics(*kept).of(part), a, b, out=grad_hidden[part])
        return grad_hidden.to(hidden.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, targets: Tensor, head: Head, *, chunk: int = 256, compile_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution, both differentiable in `hidden`.

    `hidden` [N, D], cast to the head's dtype, `targets` [N] token ids; returns two [N] tensors in nats, float32
    (float64 for a float64 head). At most `chunk` x V logits exist at a time. With N = 0 both are empty and
    still on the graph. `compile_rows` puts what happens to the logits row by row through torch.compile.
    """
    return cast("tuple[Tensor, Tensor]", _Recomputed.apply(hidden, targets, head, chunk, compile_rows))  # type: ignore[no-untyped-call]


Factor = Callable[[Tensor, slice], Tensor]
"""(log-probs [n] of a chunk's tokens, which tokens they are) -> a multiplier [n] of their coefficients."""


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """`total`, a scalar on the graph; `logps` and `entropies` [N] in nats, detached."""

    total: Tensor
    logps: Tensor
    entropies: Tensor


class _Weighted(torch.autograd.Function):
    """Entry (a). The gradient of the total is made in the forward pass and kept, [N, D]; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        logp_coefficients: Tensor,
        entropy_coefficients: Tensor | None,
        factor: Factor | None,
        chunk: int,
        compile_rows: bool,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        walk = _Pass(head, len(hidden), chunk, compile_rows)
        logps, entropies = (hidden.new_empty(len(hidden), dtype=head.compute_dtype) for _ in range(2))
        grad_hidden = torch.empty(hidden.shape if differentiate else 0, dtype=head.weight.dtype, device=hidden.device)
        coefficients = logp_coefficients.clone()
        for part in walk.chunks():
            raw = walk.fill(hidden[part])
            statistics = walk.statistics(raw)
            logps[part] = walk.picked(raw, targets[part], statistics)
            entropies[part] = statistics.entropies
            if factor is not None:
                coefficients[part] *= factor(logps[part], part)
            if differentiate:
                b = None if entropy_coefficients is None else entropy_coefficients[part]
                walk.gradient(raw, targets[part], statistics, coefficients[part], b, out=grad_hidden[part])
        total = (coefficients * logps).sum()
        if entropy_coefficients is not None:
            total += (entropy_coefficients * entropies).sum()
        ctx.save_for_backward(grad_hidden.to(hidden.dtype))
        ctx.mark_non_differentiable(logps, entropies)
        return total, logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad_total.to(grad_hidden.dtype), *[None] * 8)


def weighted_token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    logp_coefficients: Tensor,
    entropy_coefficients: Tensor | float,
    factor: Factor | None = None,
    chunk: int = 256,
    compile_rows: bool = False,
) -> TokenTerms:
    """The sum of a f log p_y + b H over the tokens, with a [N], b [N] or one number for all, and f the `factor`.

    Takes what `token_logprobs` takes and costs two products in place of three, but the coefficients are constants: no
    gradient reaches them, nor `factor`, which is called once a chunk, when the chunk's log-probs are known. Without
    grad mode there is one product and no gradient is kept.
    """
    a = logp_coefficients.to(head.compute_dtype)
    if isinstance(entropy_coefficients, Tensor):
        b: Tensor | None = entropy_coefficients.to(head.compute_dtype)
    else:
        b = a.new_full(a.shape, entropy_coefficients) if entropy_coefficients else None
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    arguments = (hidden, targets, head, a, b, factor, chunk, compile_rows, differentiate)
    total, logps, entropies = _Weighted.apply(*arguments)  # type: ignore[no-untyped-call]
    return TokenTerms(total=total, logps=logps, entropies=entropies)


def refuse_without_compiler(head: Head) -> None:
    """Compile the row-wise part once. Raises ModelError where torch.compile does not work on this machine."""
    hidden = head.weight.new_zeros(8, head.weight.shape[1]).requires_grad_()
    targets = torch.zeros(8, dtype=torch.long, device=hidden.device)
    try:
        weighted_token_logprobs(
            hidden,
            targets,
            head,
            logp_coefficients=head.weight.new_ones(8),
            entropy_coefficients=1.0,
            compile_rows=True,
        )
    except Exception as error:  # what a missing or broken compiler raises has many types
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"torch.compile does not work here: {reason}",
            where="train.compile_loss = true",
            next_step="install a C compiler (gcc), or --set train.compile_loss=false",
        ) from error


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
