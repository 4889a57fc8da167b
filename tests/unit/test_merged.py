"""Compare LoRA layers that multiply with merged weights with PEFT's own, on the tiny model."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer

from popo_lite import host_memory
from popo_lite.policy import merged
from popo_lite.policy.merged import MergedForward, kept_weights
from popo_lite.policy.policy import load_policy
from popo_lite.samplers import SamplingParams, open_sampler
from popo_lite.types import Problem, Prompt

ROW = [(7, 9, 5), (6, 8)]


def policy_of(recipe):
    policy = load_policy(recipe)
    torch.manual_seed(9)
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return policy


def merged_layers(policy):
    return [module.forward for module in policy.model.modules() if isinstance(module.forward, MergedForward)]


def states_and_gradients(policy):
    policy.model.train()
    torch.manual_seed(5)
    states = policy.hidden_states(torch.randint(5, 300, (sum(map(sum, ROW)),)), ROW)
    (states * torch.randn_like(states)).mean().backward()
    gradients = {name: parameter.grad for name, parameter in policy.adapter_parameters()}
    policy.model.zero_grad(set_to_none=True)
    return {"states": states.detach(), **gradients}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_states_and_gradients_are_those_of_separate_products(tiny_recipe, quantization, checkpointing):
    policy = policy_of(
        tiny_recipe(
            f"model.quantization={quantization}", f"train.gradient_checkpointing={checkpointing}", "lora.rslora=true"
        )
    )
    assert len(merged_layers(policy)) == 14
    found = states_and_gradients(policy)
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            del module.forward
    assert not merged_layers(policy)
    for name, expected in states_and_gradients(policy).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_an_update_keeps_no_more_than_a_layers_input(tiny_recipe):
    policy = policy_of(tiny_recipe())
    layer = policy.trunk.layers[0].mlp.gate_proj
    known = {parameter.data_ptr() for parameter in policy.model.parameters()}
    x = torch.randn(1, 50, 128, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda tensor: tensor):
        layer(x)
    assert set(kept) - known == {x.data_ptr()}


@pytest.mark.parametrize("option", ["model.dtype=bfloat16", "lora.dora=true", "lora.dropout=0.1"])
def test_what_merging_would_change_is_not_merged(tiny_recipe, option):
    assert not merged_layers(load_policy(tiny_recipe(option)))


def test_without_the_adapter_the_base_answers(tiny_recipe):
    policy, ids = policy_of(tiny_recipe()), torch.arange(5, 20)
    with torch.no_grad():
        adapted = policy.hidden_states(ids, [(15,)])
        with policy.model.disable_adapter(), kept_weights(policy.model):
            base = policy.hidden_states(ids, [(15,)])
        for name, parameter in policy.adapter_parameters():
            if "lora_B" in name:
                parameter.zero_()
        assert torch.equal(base, policy.hidden_states(ids, [(15,)]))
    assert not torch.allclose(adapted, base, atol=1e-2)


def answers(sampler):
    problem = Problem(id="0", messages=({"role": "user", "content": "?"},), answer="")
    prompt = Prompt(problem=problem, token_ids=tuple(range(5, 19)))
    params = SamplingParams(temperature=1.0, max_completion_length=12)
    return sampler.sample([prompt], count=4, params=params, policy_version=0, stream=("x",))


def test_a_rollout_merges_once_if_memory_allows(tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    policy, calls, dequantize = policy_of(recipe), [], bnb.functional.dequantize_4bit

    def counting(*arguments, **options):
        calls.append(1)
        return dequantize(*arguments, **options)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counting)
    with open_sampler(recipe, policy, text=str, notify=pytest.fail) as sampler:
        expected = answers(sampler)
        assert len(calls) == 14
        monkeypatch.setattr(merged, "KEPT_SHARE", 0)
        assert answers(sampler) == expected
        assert len(calls) > 14 * 3


def test_kept_weights_go_after_an_exception_too(tiny_recipe):
    policy = policy_of(tiny_recipe())
    with pytest.raises(KeyboardInterrupt), kept_weights(policy.model):
        assert all(layer.kept is not None for layer in merged_layers(policy))
        raise KeyboardInterrupt
    assert all(layer.kept is None for layer in merged_layers(policy))


def test_a_containers_memory_counts_and_not_the_machines(tiny_recipe, monkeypatch):
    policy = policy_of(tiny_recipe())
    monkeypatch.setattr(host_memory, "total_bytes", lambda: 2**20)
    with kept_weights(policy.model):
        assert all(layer.kept is None for layer in merged_layers(policy))
