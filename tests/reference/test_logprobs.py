"""Both entries of the chunked loss against naive autograd over full logits: values, gradients, products and memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from popo_lite.errors import ModelError
from popo_lite.objective import logprobs
from popo_lite.objective.chunks import pass_bytes
from popo_lite.objective.logprobs import Head, naive_token_logprobs, token_logprobs, weighted_token_logprobs

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


def outputs_and_gradient(function, hidden, a, b):
    hidden = hidden.clone().requires_grad_()
    logps, entropies = function(hidden)
    ((a * logps).sum() + (b * entropies).sum()).backward()
    return logps.detach(), entropies.detach(), hidden.grad


def weighted(hidden, targets, head, a, b, **options):
    hidden = hidden.clone().requires_grad_()
    terms = weighted_token_logprobs(
        hidden, targets, head, logp_coefficients=a, entropy_coefficients=b, **{"chunk": 8, **options}
    )
    terms.total.backward()
    return terms, hidden.grad


def assert_all_close(found, expected, **tolerances):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerances)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_both_entries_equal_naive_in_float64(variant, chunk):
    hidden, targets, head = make(torch.float64, **VARIANTS[variant])
    a, b = coefficients()
    naive = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, head), hidden, a, b)
    recomputed = outputs_and_gradient(lambda h: token_logprobs(h, targets, head, chunk=chunk), hidden, a, b)
    terms, gradient = weighted(hidden, targets, head, a, b, chunk=chunk)
    assert_all_close(recomputed, naive, **EXACT)
    assert_all_close((terms.logps, terms.entropies, gradient), naive, **EXACT)
    torch.testing.assert_close(terms.total.detach(), (a * naive[0]).sum() + (b * naive[1]).sum(), **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_entries_make_the_same_gradient_bit_for_bit(variant, dtype):
    hidden, targets, head = make(dtype, **VARIANTS[variant])
    a, b = coefficients(dtype=torch.float32)
    recomputed = outputs_and_gradient(lambda h: token_logprobs(h, targets, head, chunk=8), hidden, a, b)
    terms, gradient = weighted(hidden, targets, head, a, b)
    assert_all_close((terms.logps, terms.entropies, gradient), recomputed, rtol=0, atol=0)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_the_right_gradient(which):
    hidden, targets, head = make(torch.float64)
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    token_logprobs(ours, targets, head, chunk=5)[which].sum().backward()
    naive_token_logprobs(naive, targets, head)[which].sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, **EXACT)


@pytest.mark.parametrize("entropy", [0.0, -0.3])
def test_one_entropy_coefficient_for_all_tokens(entropy):
    hidden, targets, head = make(torch.float64, temperature=0.9)
    a, _ = coefficients()
    b = torch.full_like(a, entropy)
    _, _, naive = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, head), hidden, a, b)
    terms, gradient = weighted(hidden, targets, head, a, entropy)
    torch.testing.assert_close(gradient, naive, **EXACT)
    torch.testing.assert_close(terms.total.detach(), (a * terms.logps).sum() + (b * terms.entropies).sum(), **EXACT)


def test_zero_coefficients_make_zero_gradients():
    hidden, targets, head = make(torch.bfloat16)
    a, b = coefficients(dtype=torch.float32)
    a[3:20] = b[3:20] = 0.0
    _, gradient = weighted(hidden, targets, head, a, b)
    assert not gradient[3:20].any()
    assert gradient[:3].any(-1).all()
    assert gradient[20:].any(-1).all()


def test_factor_multiplies_the_coefficients_by_what_it_makes_of_the_log_probs():
    """Truncated importance weights: detached, from the same pass's log-probs."""
    hidden, targets, head = make(torch.float64)
    a, b = coefficients()
    sampler_logps = naive_token_logprobs(hidden, targets, head)[0] + 0.3 * torch.randn_like(a)

    def truncated(logps, tokens):
        return (logps - sampler_logps[tokens]).exp().clamp(max=1.1)

    ratios = truncated(naive_token_logprobs(hidden, targets, head)[0], slice(None))
    assert 5 < (ratios == 1.1).sum() < 30
    naive = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, head), hidden, a * ratios, b)
    terms, gradient = weighted(hidden, targets, head, a, b, factor=truncated)
    assert_all_close((terms.logps, terms.entropies, gradient), naive, **EXACT)
    torch.testing.assert_close(terms.total.detach(), (a * ratios * naive[0]).sum() + (b * naive[1]).sum(), **EXACT)


def test_backward_twice_and_scaled():
    hidden, targets, head = make(torch.float64)
    a, b = coefficients()
    _, once = weighted(hidden, targets, head, a, b)
    hidden.requires_grad_()
    terms = weighted_token_logprobs(hidden, targets, head, logp_coefficients=a, entropy_coefficients=b)
    (-2.5 * terms.total).backward(retain_graph=True)
    torch.testing.assert_close(hidden.grad, -2.5 * once, **EXACT)
    (0.5 * terms.total).backward()
    torch.testing.assert_close(hidden.grad, -2.0 * once, **EXACT)


def test_log_probs_and_entropies_of_the_weighted_entry_are_detached():
    hidden, targets, head = make(torch.float64)
    terms, _ = weighted(hidden, targets, head, *coefficients())
    assert not terms.logps.requires_grad
    assert not terms.entropies.requires_grad


def test_gradcheck():
    hidden, targets, head = make(torch.float64, tokens=5, width=4, vocabulary=7, softcap=4.0, temperature=0.8)
    hidden.requires_grad_()
    a, b = coefficients(5)
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, targets, head, chunk=2), (hidden,))
    assert torch.autograd.gradcheck(
        lambda h: (
            weighted_token_logprobs(h, targets, head, logp_coefficients=a, entropy_coefficients=b, chunk=2).total
        ),
        (hidden,),
    )


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
    wide = Head(weight=head.weight.double())
    exact = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, wide), hidden.double(), a, b)
    a, b = a.float(), b.float()
    ours = outputs_and_gradient(lambda h: token_logprobs(h, targets, head, chunk=64), hidden, a, b)
    naive = outputs_and_gradient(lambda h: head_dtype_naive(h, targets, head.weight), hidden, a, b)
    assert ours[0].dtype is ours[1].dtype is torch.float32
    errors, twin = relative_errors(ours, exact), relative_errors(naive, exact)
    assert all(error <= limit for error, limit in zip(errors, twin, strict=True)), (errors, twin)
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
    exact = outputs_and_gradient(
        lambda h: naive_token_logprobs(h, targets, Head(weight=weight.double())), hidden.double(), 1.0, 0.0
    )
    ours = outputs_and_gradient(lambda h: token_logprobs(h, targets, Head(weight=weight)), hidden, 1.0, 0.0)
    confident = exact[0].exp() > 0.99
    assert confident.sum() > 20
    error = (ours[2].double() - exact[2])[confident].norm() / exact[2][confident].norm()
    assert error < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_gradient_rows_take_the_place_of_logits_whatever_the_row_block(monkeypatch, dtype, variant):
    """In 16 bit they are written over logits of the same buffer, which must have been read by then."""
    hidden, targets, head = make(dtype, **VARIANTS[variant])
    a, b = coefficients(dtype=torch.float32)
    found = []
    for rows in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(logprobs, "row_block", lambda *_, rows=rows, **__: rows)
        terms, gradient = weighted(hidden, targets, head, a, b, chunk=16)
        found.append((terms.logps, terms.entropies, gradient))
    for other in found[1:]:
        assert_all_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_head_and_torch_without_onednn(monkeypatch, dtype):
    hidden, targets, head = make(dtype)
    a, b = coefficients(dtype=torch.float32)
    expected = outputs_and_gradient(lambda h: token_logprobs(h, targets, head), hidden, a, b)
    monkeypatch.setattr(logprobs, "tile_rows", lambda width: 10)
    monkeypatch.setattr(logprobs, "FORWARD_TERMS", 5)
    monkeypatch.setattr(logprobs, "BACKWARD_TERMS", 7)
    tiled = outputs_and_gradient(lambda h: token_logprobs(h, targets, head), hidden, a, b)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = outputs_and_gradient(lambda h: token_logprobs(h, targets, head), hidden, a, b)
    # Another order of summation; in 16 bit it may tip a rounding.
    gradient = {"rtol": 2.0**-7, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for found in (tiled, plain):
        assert_all_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], **gradient)


@pytest.mark.parametrize("entry", ["recomputed", "weighted"])
def test_nothing_to_do_is_still_on_the_graph(entry):
    hidden, targets, head = make(torch.float32)
    hidden.requires_grad_()
    if entry == "weighted":
        empty = torch.empty(0)
        total = weighted_token_logprobs(
            hidden[:0], targets[:0], head, logp_coefficients=empty, entropy_coefficients=empty
        ).total
    else:
        logps, entropies = token_logprobs(hidden[:0], targets[:0], head)
        total = logps.sum() + entropies.sum()
    assert total == 0
    total.backward()
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
    monkeypatch.setattr(logprobs, "row_block", lambda *_, **__: 3)  # the last block of a chunk has another size
    for compute in (
        lambda **options: outputs_and_gradient(
            lambda h: token_logprobs(h, targets, head, chunk=11, **options), hidden, a, b
        ),
        lambda **options: weighted(hidden, targets, head, a, 0.0, chunk=11, **options)[1:],
    ):
        tolerances = EXACT if dtype is torch.float64 else {"rtol": 2.0**-7, "atol": 1e-2}
        assert_all_close(compute(compile_rows=True), compute(), **tolerances)


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


def run(entry, hidden, targets, head, chunk, **options):
    a, b = coefficients(len(hidden), head.compute_dtype)
    if entry == "weighted":
        weighted_token_logprobs(
            hidden, targets, head, logp_coefficients=a, entropy_coefficients=b, chunk=chunk, **options
        ).total.backward()
    else:
        logps, entropies = token_logprobs(hidden, targets, head, chunk=chunk, **options)
        ((a * logps).sum() + (b * entropies).sum()).backward()


@pytest.mark.parametrize(("entry", "products"), [("weighted", 2), ("recomputed", 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_per_chunk(entry, products, dtype):
    hidden, targets, head = make(dtype, tokens=100, width=16, vocabulary=300)
    hidden.requires_grad_()
    with Ledger(300, 16) as ledger:
        run(entry, hidden, targets, head, chunk=32)
    assert ledger.multiplied == products * 100 * 300 * 16


def test_without_grad_mode_there_is_one_product_and_nothing_is_kept():
    hidden, targets, head = make(torch.float32, tokens=100, width=16, vocabulary=300)
    hidden.requires_grad_()
    a, b = coefficients(100, torch.float32)
    with Ledger(300, 16) as ledger, torch.no_grad():
        terms = weighted_token_logprobs(hidden, targets, head, logp_coefficients=a, entropy_coefficients=b, chunk=32)
    assert ledger.multiplied == 100 * 300 * 16
    assert not terms.total.requires_grad
    torch.testing.assert_close(terms.total, (a * terms.logps).sum() + (b * terms.entropies).sum())


def test_an_absent_gradient_costs_no_pass_over_the_logits():
    hidden, targets, head = make(torch.float32, tokens=8, width=16, vocabulary=300)
    hidden.requires_grad_()
    operations = {}
    for name, parts in {"both": (0, 1), "log-probs": (0,), "entropies": (1,)}.items():
        outputs = token_logprobs(hidden, targets, head)
        with Ledger(300, 16) as ledger:
            sum(outputs[part].sum() for part in parts).backward()
        operations[name] = ledger.row_operations
    # mul_ and add_ for the part that is linear in z - m; the target's entry is set apart from the row in any case.
    assert operations["log-probs"] == operations["both"] - 2
    assert operations["entropies"] == operations["both"]


@pytest.mark.parametrize("entry", ["weighted", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_peak_memory_is_the_chunk_and_what_the_plan_says(entry, dtype, variant):
    tokens, width, vocabulary, chunk = 2048, 8, 10_000, 256
    hidden, targets, head = make(dtype, tokens=tokens, width=width, vocabulary=vocabulary, **VARIANTS[variant])
    hidden.requires_grad_()
    with Ledger(vocabulary, width) as ledger:
        run(entry, hidden, targets, head, chunk)
    assert ledger.largest_bytes == chunk * vocabulary * 4
    planned = pass_bytes(
        tokens=tokens,
        chunk=chunk,
        vocabulary=vocabulary,
        width=width,
        on_gpu=False,
        head_bytes=dtype.itemsize,
        bent=variant != "plain",
    )
    # The plan counts what is inside a product too, which no tensor shows.
    assert ledger.peak_bytes < planned < 1.8 * ledger.peak_bytes


@pytest.mark.parametrize("entry", ["weighted", "recomputed"])
def test_twice_the_tokens_need_the_same_chunk(entry):
    peaks = []
    for tokens in (512, 1024):
        hidden, targets, head = make(torch.float32, tokens=tokens, width=8, vocabulary=10_000)
        hidden.requires_grad_()
        with Ledger(10_000, 8) as ledger:
            run(entry, hidden, targets, head, chunk=64)
        peaks.append(ledger.peak_bytes)
    assert peaks[1] - peaks[0] <= 512 * (2 * 8 + 12) * 4
