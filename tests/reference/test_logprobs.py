"""The chunked function against naive autograd over full logits, forward and gradient."""

from __future__ import annotations

import pytest
import torch

from popo_lite.errors import ModelError
from popo_lite.objective.logprobs import Head, naive_token_logprobs, token_logprobs

VARIANTS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "everything": {"temperature": 1.3, "scale": 1.5, "softcap": 5.0, "bias": True},
}


def make(dtype: torch.dtype, tokens: int = 37, width: int = 24, vocabulary: int = 101, **variant):
    torch.manual_seed(1)
    bias = torch.randn(vocabulary).to(dtype) if variant.pop("bias", False) else None
    head = Head(weight=torch.randn(vocabulary, width).to(dtype), bias=bias, **variant)
    hidden = torch.randn(tokens, width).to(dtype)
    targets = torch.randint(vocabulary, (tokens,))
    return hidden, targets, head


def outputs_and_gradient(function, hidden, a, b):
    hidden = hidden.clone().requires_grad_()
    logps, entropies = function(hidden)
    ((a * logps).sum() + (b * entropies).sum()).backward()
    return logps.detach(), entropies.detach(), hidden.grad


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_equals_naive_in_float64(variant, chunk):
    hidden, targets, head = make(torch.float64, **VARIANTS[variant])
    a, b = torch.randn(2, 37, dtype=torch.float64)
    ours = outputs_and_gradient(lambda h: token_logprobs(h, targets, head, chunk=chunk), hidden, a, b)
    naive = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, head), hidden, a, b)
    for found, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_the_right_gradient(which):
    hidden, targets, head = make(torch.float64)
    ours, naive = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    token_logprobs(ours, targets, head, chunk=5)[which].sum().backward()
    naive_token_logprobs(naive, targets, head)[which].sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    hidden, targets, head = make(torch.float64, tokens=5, width=4, vocabulary=7, softcap=4.0, temperature=0.8)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: token_logprobs(h, targets, head, chunk=2), (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_naive(dtype):
    """The naive twin widens to float32 as well, so this holds for 16 bit too; a small margin for the sums' order."""
    hidden, targets, head = make(dtype, tokens=256, width=64, vocabulary=500)
    wide = Head(weight=head.weight.double())
    a, b = torch.randn(2, 256)
    exact = outputs_and_gradient(
        lambda h: naive_token_logprobs(h, targets, wide), hidden.double(), a.double(), b.double()
    )
    ours = outputs_and_gradient(lambda h: token_logprobs(h, targets, head, chunk=64), hidden, a, b)
    naive = outputs_and_gradient(lambda h: naive_token_logprobs(h, targets, head), hidden, a, b)
    assert ours[0].dtype is ours[1].dtype is torch.float32
    for found, twin, reference in zip(ours, naive, exact, strict=True):
        error = (found.double() - reference).norm() / reference.norm()
        assert error <= 1.5 * (twin.double() - reference).norm() / reference.norm()


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


def test_nothing_to_do_is_still_on_the_graph():
    hidden, targets, head = make(torch.float32)
    hidden.requires_grad_()
    logps, entropies = token_logprobs(hidden[:0], targets[:0], head)
    (logps.sum() + entropies.sum()).backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_trainable_head_is_refused():
    weight = torch.randn(10, 4, requires_grad=True)
    with pytest.raises(ModelError, match="LM head is trainable"):
        Head(weight=weight)


def test_logits_of_the_batch_never_exist():
    """The largest tensor that is allocated holds a chunk's logits, not the batch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    Largest.numel = max(Largest.numel, tensor.numel())
            return out

    hidden, targets, head = make(torch.float32, tokens=512, width=8, vocabulary=1000)
    hidden.requires_grad_()
    with Largest():
        logps, entropies = token_logprobs(hidden, targets, head, chunk=16)
        (logps.sum() + entropies.sum()).backward()
    assert Largest.numel == 16 * 1000
