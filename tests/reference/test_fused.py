"""The fused loss against naive autograd over full logits: values, gradients, products with the head, memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from popo_lite import fused
from popo_lite.errors import ModelError
from popo_lite.fused import Head, fused_loss, naive_logprobs, score
from popo_lite.tools.plan.terms import pass_bytes

VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "bias": {"bias": True},
    "everything": {"temperature": 1.3, "scale": 1.5, "softcap": 5.0, "bias": True},
}
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make(dtype: torch.dtype, tokens: int = 37, width: int = 24, vocabulary: int = 101, **variant):
    torch.manual_seed(1)
    bias = torch.randn(vocabulary).to(dtype) if variant.pop("bias", False) else None
    head = Head(weight=torch.randn(vocabulary, width).to(dtype), bias=bias, **variant)
    hidden = torch.randn(tokens, width).to(dtype)
    targets = torch.randint(vocabulary, (tokens,))
    return hidden, targets, head


def coefficients(tokens: int = 37, dtype: torch.dtype = torch.float64):
    return torch.randn(2, tokens, generator=torch.Generator().manual_seed(2), dtype=dtype)


def naive(hidden, targets, head, a, b):
    """Log-probs, entropies and the gradient of sum a log p + b H."""
    hidden = hidden.clone().requires_grad_()
    logps, entropies = naive_logprobs(hidden, targets, head)
    ((a * logps).sum() + (b * entropies).sum()).backward()
    return logps.detach(), entropies.detach(), hidden.grad


def linear(a, b):
    """The loss sum a log p + b H; None leaves a number out of it."""

    def token_loss(logps, entropies, part):
        terms = [(a, logps), (b, entropies)]
        return sum((factor[part] * values).sum() for factor, values in terms if factor is not None)

    return token_loss


def ours(hidden, targets, head, a, b, **options):
    hidden = hidden.clone().requires_grad_()
    output = fused_loss(hidden, targets, head, linear(a, b), **{"chunk": 8, **options})
    output.loss.backward()
    return output.logps, output.entropies, hidden.grad


def assert_all_close(found, expected, **tolerances):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_equal_to_naive_in_float64(variant, chunk):
    hidden, targets, head = make(torch.float64, **VARIANTS[variant])
    a, b = coefficients()
    expected = naive(hidden, targets, head, a, b)
    assert_all_close(ours(hidden, targets, head, a, b, chunk=chunk), expected, **EXACT)
    hidden.requires_grad_()
    loss = fused_loss(hidden, targets, head, linear(a, b), chunk=chunk).loss
    torch.testing.assert_close(loss.detach(), (a * expected[0]).sum() + (b * expected[1]).sum(), **EXACT)
    assert_all_close(score(hidden, targets, head, chunk=chunk), expected[:2], **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_makes_the_same_numbers_bit_for_bit(variant, dtype):
    hidden, targets, head = make(dtype, **VARIANTS[variant])
    output = ours(hidden, targets, head, *coefficients(dtype=torch.float32))
    assert_all_close(score(hidden, targets, head, chunk=8), output[:2], rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_of_one_number_alone_has_the_right_gradient(which):
    hidden, targets, head = make(torch.float64)
    one, other = torch.ones(37, dtype=torch.float64), None
    a, b = (one, other) if which == 0 else (other, one)
    reference = hidden.clone().requires_grad_()
    naive_logprobs(reference, targets, head)[which].sum().backward()
    torch.testing.assert_close(ours(hidden, targets, head, a, b, chunk=5)[2], reference.grad, **EXACT)


def test_any_differentiable_loss_has_the_right_gradient():
    """One that is linear in neither number, and mixes them."""
    hidden, targets, head = make(torch.float64, temperature=0.9)

    def token_loss(logps, entropies, _):
        return (logps.exp() * entropies.square() + (logps - 0.1 * entropies).tanh()).sum()

    reference, found = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = token_loss(*naive_logprobs(reference, targets, head), None)
    expected.backward()
    loss = fused_loss(found, targets, head, token_loss, chunk=8).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), **EXACT)
    torch.testing.assert_close(found.grad, reference.grad, **EXACT)


def test_zero_coefficients_make_zero_gradients():
    hidden, targets, head = make(torch.bfloat16)
    a, b = coefficients(dtype=torch.float32)
    a[3:20] = b[3:20] = 0.0
    *_, gradient = ours(hidden, targets, head, a, b)
    assert not gradient[3:20].any()
    assert gradient[:3].any(-1).all()
    assert gradient[20:].any(-1).all()


def test_a_loss_may_use_constants_of_its_own_log_probs():
    """Truncated importance weights: detached, from the log-probs of the same pass."""
    hidden, targets, head = make(torch.float64)
    a, b = coefficients()
    exact = naive_logprobs(hidden, targets, head)[0]
    sampler_logps = exact + 0.3 * torch.randn_like(a)
    ratios = (exact - sampler_logps).exp().clamp(max=1.1)
    assert 5 < (ratios == 1.1).sum() < 30

    def token_loss(logps, entropies, part):
        factors = (logps.detach() - sampler_logps[part]).exp().clamp(max=1.1)
        return (a[part] * factors * logps).sum() + (b[part] * entropies).sum()

    expected = naive(hidden, targets, head, a * ratios, b)
    hidden.requires_grad_()
    output = fused_loss(hidden, targets, head, token_loss, chunk=8)
    output.loss.backward()
    assert_all_close((output.logps, output.entropies, hidden.grad), expected, **EXACT)
    value = (a * ratios * expected[0]).sum() + (b * expected[1]).sum()
    torch.testing.assert_close(output.loss.detach(), value, **EXACT)


def test_backward_twice_and_scaled():
    hidden, targets, head = make(torch.float64)
    a, b = coefficients()
    *_, once = ours(hidden, targets, head, a, b)
    hidden.requires_grad_()
    loss = fused_loss(hidden, targets, head, linear(a, b)).loss
    (-2.5 * loss).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, -2.5 * once, **EXACT)
    (0.5 * loss).backward()
    torch.testing.assert_close(hidden.grad, -2.0 * once, **EXACT)


def test_log_probs_and_entropies_are_detached():
    hidden, targets, head = make(torch.float64)
    hidden.requires_grad_()
    output = fused_loss(hidden, targets, head, linear(*coefficients()))
    assert output.loss.requires_grad
    assert not output.logps.requires_grad
    assert not output.entropies.requires_grad


def test_gradcheck():
    hidden, targets, head = make(torch.float64, tokens=5, width=4, vocabulary=7, softcap=4.0, temperature=0.8)
    hidden.requires_grad_()
    token_loss = linear(*coefficients(5))
    assert torch.autograd.gradcheck(lambda h: fused_loss(h, targets, head, token_loss, chunk=2).loss, (hidden,))


def relative_errors(found, exact):
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


def head_dtype_naive(hidden, targets, weight):
    """What a model's own head does: logits in the head's dtype, everything after them in float32."""
    logp_all = torch.log_softmax(functional.linear(hidden, weight).float(), dim=-1)
    return logp_all.gather(-1, targets[:, None]).squeeze(-1), -(logp_all.exp() * logp_all).sum(dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_naive(dtype):
    hidden, targets, head = make(dtype, tokens=512, width=256, vocabulary=2000)
    a, b = coefficients(512)
    exact = naive(hidden.double(), targets, Head(weight=head.weight.double()), a, b)
    a, b = a.float(), b.float()
    found = ours(hidden, targets, head, a, b, chunk=64)
    assert found[0].dtype is found[1].dtype is torch.float32
    hidden.requires_grad_()
    logps, entropies = head_dtype_naive(hidden, targets, head.weight)
    ((a * logps).sum() + (b * entropies).sum()).backward()
    naive_errors = relative_errors((logps.detach(), entropies.detach(), hidden.grad), exact)
    errors = relative_errors(found, exact)
    assert all(error <= limit for error, limit in zip(errors, naive_errors, strict=True)), (errors, naive_errors)
    if dtype is torch.bfloat16:
        # Log-probs and entropies as exact as if nothing were in 16 bit; the gradient is rounded to 16 bit two times.
        assert errors[0] < 1e-6
        assert errors[1] < 1e-5
        assert errors[2] < 2.0**-9 * 1.5


def test_confident_tokens_keep_their_gradient_in_16_bit():
    """With p_y near 1 the row is a difference of nearly equal numbers; it must be formed before the cast."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32).bfloat16()
    targets = torch.arange(64)
    hidden = (weight * 0.35).bfloat16()
    ones, zeros = torch.ones(64), torch.zeros(64)
    exact = naive(hidden.double(), targets, Head(weight=weight.double()), ones, zeros)
    found = ours(hidden, targets, Head(weight=weight), ones, zeros)
    confident = exact[0].exp() > 0.99
    assert confident.sum() > 20
    error = (found[2].double() - exact[2])[confident].norm() / exact[2][confident].norm()
    assert error < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_gradient_rows_take_the_place_of_logits_whatever_the_row_block(monkeypatch, dtype, variant):
    """In 16 bit they are written over logits of the same buffer, which must have been read by then."""
    hidden, targets, head = make(dtype, **VARIANTS[variant])
    a, b = coefficients(dtype=torch.float32)
    found = []
    for rows in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(Head, "row_block", rows)
        found.append(ours(hidden, targets, head, a, b, chunk=16))
    for other in found[1:]:
        assert_all_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_head_and_torch_without_onednn(monkeypatch, dtype):
    hidden, targets, head = make(dtype)
    a, b = coefficients(dtype=torch.float32)
    expected = ours(hidden, targets, head, a, b, chunk=256)
    monkeypatch.setattr(fused, "tile_rows", lambda _: 10)
    monkeypatch.setattr(fused, "FORWARD_TERMS", 5)
    monkeypatch.setattr(fused, "BACKWARD_TERMS", 7)
    tiled = ours(hidden, targets, head, a, b, chunk=256)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = ours(hidden, targets, head, a, b, chunk=256)
    # Another order of summation; in 16 bit it may tip a rounding.
    gradient = {"rtol": 2.0**-7, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for found in (tiled, plain):
        assert_all_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], **gradient)


def test_nothing_to_do_is_still_on_the_graph():
    hidden, targets, head = make(torch.float32)
    hidden.requires_grad_()
    loss = fused_loss(hidden[:0], targets[:0], head, linear(torch.empty(0), torch.empty(0))).loss
    assert loss == 0
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_trainable_head_is_refused():
    weight = torch.randn(10, 4, requires_grad=True)
    with pytest.raises(ModelError, match="LM head is trainable"):
        Head(weight=weight)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("variant", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_rows_make_the_same(monkeypatch, variant, dtype):
    torch.compiler.reset()
    hidden, targets, head = make(dtype, **VARIANTS[variant])
    a, b = coefficients(dtype=head.compute_dtype)
    monkeypatch.setattr(Head, "row_block", 3)  # the last block of a chunk has another size
    tolerances = EXACT if dtype is torch.float64 else {"rtol": 2.0**-7, "atol": 1e-2}
    for entropy in (b, None):
        found = ours(hidden, targets, head, a, entropy, chunk=11, compile_rows=True)
        assert_all_close(found, ours(hidden, targets, head, a, entropy, chunk=11), **tolerances)


class Ledger(TorchDispatchMode):
    """Counts products with the head in units of N x V x D, passes over logits, and live and largest storages."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.multiplied, self.row_operations = 0, 0
        self.largest_bytes, self.peak_bytes = 0, 0
        self.live = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [
            tensor for tensor in (out if isinstance(out, tuple | list) else (out,)) if isinstance(tensor, torch.Tensor)
        ]
        name = func.overloadpacket.__name__
        if name in ("mm", "linear", "_linear_pointwise"):
            left = args[0]
            self.multiplied += left.numel() * out.shape[-1]
        elif any(tensor.shape[-1:] == (self.vocabulary,) for tensor in tensors) and name in ("mul_", "add_", "exp"):
            self.row_operations += 1
        for tensor in tensors:
            if tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self.live[storage] = storage.nbytes()
                self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
        return out


def run(hidden, targets, head, chunk):
    a, b = coefficients(len(hidden), head.compute_dtype)
    fused_loss(hidden, targets, head, linear(a, b), chunk=chunk).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_products_with_the_head_per_chunk(dtype):
    hidden, targets, head = make(dtype, tokens=100, width=16, vocabulary=300)
    hidden.requires_grad_()
    with Ledger(300, 16) as ledger:
        run(hidden, targets, head, chunk=32)
    assert ledger.multiplied == 2 * 100 * 300 * 16


def test_without_grad_mode_there_is_one_product_and_nothing_is_kept():
    hidden, targets, head = make(torch.float32, tokens=100, width=16, vocabulary=300)
    hidden.requires_grad_()
    a, b = coefficients(100, torch.float32)
    with Ledger(300, 16) as ledger, torch.no_grad():
        output = fused_loss(hidden, targets, head, linear(a, b), chunk=32)
    assert ledger.multiplied == 100 * 300 * 16
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, (a * output.logps).sum() + (b * output.entropies).sum())
    with Ledger(300, 16) as ledger:
        score(hidden, targets, head, chunk=32)
    assert ledger.multiplied == 100 * 300 * 16


def test_a_number_that_the_loss_leaves_out_costs_no_pass_over_the_logits():
    hidden, targets, head = make(torch.float32, tokens=8, width=16, vocabulary=300)
    hidden.requires_grad_()
    ones = torch.ones(8)
    operations = {}
    for name, parts in {"both": (ones, ones), "log-probs": (ones, None), "entropies": (None, ones)}.items():
        with Ledger(300, 16) as ledger:
            fused_loss(hidden, targets, head, linear(*parts))
        operations[name] = ledger.row_operations
    # mul_ and add_ for the part that is linear in z - m; the target's entry is written separately in any case.
    assert operations["log-probs"] == operations["both"] - 2
    assert operations["entropies"] == operations["both"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_peak_memory_is_the_chunk_and_what_the_plan_says(dtype, variant):
    tokens, width, vocabulary, chunk = 2048, 8, 10_000, 256
    hidden, targets, head = make(dtype, tokens=tokens, width=width, vocabulary=vocabulary, **VARIANTS[variant])
    hidden.requires_grad_()
    with Ledger(vocabulary, width) as ledger:
        run(hidden, targets, head, chunk)
    assert ledger.largest_bytes == chunk * vocabulary * 4
    planned = pass_bytes(
        tokens=tokens,
        chunk=chunk,
        vocabulary=vocabulary,
        width=width,
        on_gpu=False,
        head_bytes=dtype.itemsize,
        scaled=variant != "plain",
    )
    # The plan counts what is inside a product too, which no tensor shows.
    assert ledger.peak_bytes < planned < 1.8 * ledger.peak_bytes


def test_twice_the_tokens_need_the_same_chunk():
    peaks = []
    for tokens in (512, 1024):
        hidden, targets, head = make(torch.float32, tokens=tokens, width=8, vocabulary=10_000)
        hidden.requires_grad_()
        with Ledger(10_000, 8) as ledger:
            run(hidden, targets, head, chunk=64)
        peaks.append(ledger.peak_bytes)
    assert peaks[1] - peaks[0] <= 512 * (2 * 8 + 12) * 4
