"""Test that tiles and host memory change what a layer keeps, and nothing that it computes."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import suppress

import pytest
import torch
import transformers
from torch import nn

from popo_lite.policy import activations
from popo_lite.policy.activations import _HostCopies, checkpoint_layers, offloaded

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "qwen3, norms of heads": transformers.Qwen3Config(**GROUPED, head_dim=32),
    "phi, one norm": transformers.PhiConfig(**SIZES),
    "phi3, gate and up in one": transformers.Phi3Config(**GROUPED),
    "olmo2, norms behind": transformers.Olmo2Config(**GROUPED),
    "gemma2, norms around": transformers.Gemma2Config(**GROUPED, head_dim=16),
    "cohere": transformers.CohereConfig(**GROUPED),
    "granite": transformers.GraniteConfig(**GROUPED),
    "lfm2, convolutions": transformers.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "mixtral, experts": transformers.MixtralConfig(**GROUPED, num_local_experts=4),
}
COMPUTED_AGAIN_FOR_THE_NORM_BEHIND_IT = ("olmo2", "gemma2")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(activations, "TILE_TOKENS", 7)


def gradients(model, ids, direction):
    model.train()
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    weights = [p for p in model.model.parameters() if p.requires_grad]
    return states.detach(), torch.autograd.grad((states * direction).sum(), weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_change_nothing_and_compute_nothing_more_often(name):
    torch.manual_seed(0)
    dtype = torch.float32 if name == "mixtral, experts" else torch.float64  # torch groups no float64 products
    plain = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype)
    tiled = copy.deepcopy(plain)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    checkpoint_layers(tiled)
    ids, direction = torch.randint(5, 300, (1, 30)), torch.randn(1, 30, 64, dtype=dtype)
    forwarded = []
    for part, module in tiled.named_modules():
        if part.endswith((".mlp", ".feed_forward")):
            for linear in [child for child in module.modules() if isinstance(child, nn.Linear)][:1]:
                linear.register_forward_hook(lambda _, given, __: forwarded.append(given[0].numel() // 64))
    expected, found = gradients(plain, ids, direction), gradients(tiled, ids, direction)
    exact = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=exact, atol=exact)
    for one, other in zip(found[1], expected[1], strict=True):
        # Some norms compute in float32 and sum the gradients of their weights in it.
        torch.testing.assert_close(
            one / other.abs().max(), other / other.abs().max(), rtol=1e3 * exact, atol=1e3 * exact
        )
    if forwarded:  # experts are no linear layers
        again = name.startswith(COMPUTED_AGAIN_FOR_THE_NORM_BEHIND_IT)
        assert max(forwarded) <= 7
        assert sum(forwarded) == SIZES["num_hidden_layers"] * 30 * (3 if again else 2)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(64, 96), nn.Linear(96, 64), nn.Dropout(0.3)

    def forward(self, hidden):
        return self.outer(self.dropout(self.inner(hidden).relu()))


def test_dropout_draws_the_same_in_the_backward_pass():
    torch.manual_seed(0)
    mlp, hidden = Mlp(), torch.randn(1, 30, 64, requires_grad=True)
    tiled = activations._tiled(mlp, mlp.forward)
    inputs = [hidden, *mlp.parameters()]
    torch.manual_seed(5)
    expected = torch.cat([mlp(part) for part in hidden.split(7, dim=1)], dim=1)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    torch.manual_seed(5)
    found = tiled(hidden)
    after = torch.rand(1)
    got = torch.autograd.grad(found.square().sum(), inputs)
    assert torch.equal(found, expected)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.manual_seed(5)
    tiled(hidden.detach())
    assert torch.equal(torch.rand(1), after)  # the backward pass leaves no trace in the random state


def test_a_module_that_looks_at_the_token_before_is_left_whole():
    class Shifted(Mlp):
        def forward(self, hidden):
            return super().forward(hidden) + hidden.roll(1, dims=1)

    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    model.model.layers[0].mlp = Shifted()
    checkpoint_layers(model)
    tiled = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert "model.layers.0.mlp" not in tiled
    assert {"model.layers.1.mlp", "model.layers.0.input_layernorm", "model.norm"} <= set(tiled)


def test_a_module_that_needs_more_than_the_hidden_states_is_left_whole():
    class Gated(nn.Module):
        def forward(self, hidden, gate):
            return hidden * gate

    class Optional(Mlp):
        def forward(self, hidden, residual=None):
            return super().forward(hidden) + (0 if residual is None else residual)

    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["qwen2"])
    model.model.layers[0].mlp, model.model.layers[1].mlp = Gated(), Optional()
    checkpoint_layers(model)
    assert "forward" not in vars(model.model.layers[0].mlp)
    hidden, residual = torch.randn(2, 1, 30, 64)
    whole = Optional.forward(model.model.layers[1].mlp, hidden, residual)
    torch.testing.assert_close(model.model.layers[1].mlp(hidden, residual), whole)


def test_a_router_that_changes_its_input_in_place_trains():
    class Jitter(Mlp):
        def forward(self, hidden):
            if self.training:
                hidden *= torch.empty_like(hidden).uniform_(0.9, 1.1)
            return super().forward(hidden)

    torch.manual_seed(0)
    mlp, hidden = Jitter(), torch.randn(1, 30, 64, requires_grad=True)
    before = hidden.detach().clone()
    activations._tiled(mlp, mlp.forward)(hidden).sum().backward()
    assert torch.equal(hidden, before)
    assert hidden.grad.abs().sum() > 0


def test_tiles_run_in_the_precision_of_the_forward_pass():
    torch.manual_seed(0)
    mlp, hidden = Mlp().eval(), torch.randn(1, 30, 64, requires_grad=True)
    inputs = [hidden, *mlp.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = mlp(hidden), activations._tiled(mlp, mlp.forward)(hidden)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    wanted, got = (torch.autograd.grad(output.float().square().sum(), inputs) for output in (expected, found))
    assert torch.equal(got[0], wanted[0])
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).norm()) <= 0.02 * float(other.norm())


@pytest.mark.parametrize("fails", [False, True])
def test_host_copies_are_waited_for_and_freed_with_the_graph(monkeypatch, fails):
    """Also if the backward pass fails, and without the collector."""
    made, waited = [], []
    monkeypatch.setattr(torch.cpu.Stream, "wait_stream", lambda self, other: waited.append((self, other)))
    start = _HostCopies.__init__

    def starting(self, *arguments):
        start(self, *arguments)
        made.append((weakref.ref(self), self._main, self._side))

    monkeypatch.setattr(_HostCopies, "__init__", starting)
    gc.disable()
    try:
        with offloaded(torch.device("cpu"), 8):
            first = torch.ones(8, requires_grad=True)
            output = (first * 2).square().sum()
        if fails:
            first.register_hook(lambda _: (_ for _ in ()).throw(ValueError))
        with suppress(ValueError):
            output.backward()
        assert (first.grad is None) == fails
        del output, first
        ((copies, main, side),) = made
        assert copies() is None
        assert waited[-1] == (main, side)
    finally:
        gc.enable()


def test_nothing_is_read_before_its_copy_has_ended(monkeypatch):
    """Copies that end as late as they may: when the main stream waits for them."""
    started = []

    def copy_later(self, source, target):
        target.fill_(float("nan"))
        event = [source, target]
        started.append(event)
        return event

    def wait(self, event):
        while started:
            source, target = first = started.pop(0)
            target.copy_(source)
            if first is event:
                break

    monkeypatch.setattr(_HostCopies, "_copy", copy_later)
    monkeypatch.setattr(torch.cpu.Stream, "wait_event", wait)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen2Config(**{**GROUPED, "num_hidden_layers": 5})
    )
    checkpoint_layers(model)
    ids, direction = torch.randint(5, 300, (1, 30)), torch.randn(1, 30, 64)
    expected = gradients(model, ids, direction)
    with offloaded(torch.device("cpu"), 30 * 64):
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state
    found = torch.autograd.grad((states * direction).sum(), list(model.model.parameters()))
    assert len(started) == 0
    for one, other in zip(found, expected[1], strict=True):
        assert torch.equal(one, other)
