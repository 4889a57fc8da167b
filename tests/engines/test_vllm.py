"""The vLLM sampler: the contract, its adapter swap, and a run that stops when the adapter in use is the wrong one."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from contract import test_samplers as contract
from contract.test_samplers import (  # noqa: F401  # the suite, run here with this module's `setup`
    draw,
    prompts_of,
    scored,
    test_a_conversation_goes_on_from_its_own_tokens_within_its_own_limit,
    test_a_later_round_goes_on_where_the_one_before_ended,
    test_a_nucleus_holds_the_likeliest_tokens_and_nothing_else,
    test_another_version_is_refused,
    test_draws_do_not_depend_on_the_batch,
    test_every_id_of_the_stop_set_ends_an_answer,
    test_frequencies_are_the_policys,
    test_logps_are_the_trainers_under_the_sampling_temperature,
    test_progress_counts_every_sequence_once,
    test_shapes_stops_and_text,
    test_streams_differ_by_seed_step_and_sample,
    test_weights_in_use_are_the_latest,
)
from popo_lite.errors import EngineError
from popo_lite.policy.load import write_dequantized_base
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.samplers import open_sampler, pick_engine
from popo_lite.samplers.probe import SamplerGuard
from popo_lite.samplers.vllm import MEMORY_BACKED, PREFIX
from popo_lite.tasks.rendering import Renderer

LONG_PROMPTS = ("rollout.max_prompt_length=400",)


@pytest.fixture(scope="module")
def setup():
    recipe = load_recipe("tiny_vllm", [*LONG_PROMPTS, "rollout.max_num_seqs=64"])
    policy = load_policy(recipe)
    with torch.no_grad():
        torch.manual_seed(0)
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    renderer = Renderer(recipe, policy.tokenizer)
    with open_sampler(recipe, policy, text=renderer.text, notify=print) as sampler:
        yield policy, renderer, sampler


def move(policy, scale=0.01):
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    policy.version += 1


def left_behind():
    return [path.name for path in MEMORY_BACKED.glob(f"{PREFIX}{os.getpid()}-*")]


def test_twenty_moves_of_the_adapter_are_followed(setup):
    """Short prompts and ones of more than two cache blocks, the same ones every time."""
    policy, renderer, sampler = setup
    prompts = prompts_of(renderer)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) < 300 < max(lengths)
    start = [parameter.detach().clone() for _, parameter in policy.adapter_parameters()]
    worst, changes = 0.0, []
    for step in range(20):
        before = scored(policy, prompts[-1], draw(setup, prompts[-1:], count=1)[0][0], 1.0)
        move(policy)
        sampler.sync(policy.version)
        for prompt, group in zip(prompts, draw(setup, prompts, count=2, stream=("move", step)), strict=True):
            for one in group:
                gaps = torch.tensor(one.sampler_logps) - scored(policy, prompt, one, 1.0)
                worst = max(worst, float(gaps.abs().max()))
        changes.append(float(before.sum()))
    print(f"largest |sampler - policy| log-prob over 20 moving steps: {worst:.2e}")  # noqa: T201
    assert worst < 1e-4
    assert len(set(changes)) == 20  # or nothing had moved
    with torch.no_grad():
        for (_, parameter), weights in zip(policy.adapter_parameters(), start, strict=True):
            parameter.copy_(weights)
    policy.version += 1
    sampler.sync(policy.version)


def test_the_probe_passes_and_leaves_everything_as_it_was(setup):
    policy, renderer, sampler = setup
    before = [parameter.detach().clone() for _, parameter in policy.adapter_parameters()]
    guard = SamplerGuard(sampler._recipe, policy, sampler)
    policy_gap, probe_gap, ignored, _ = guard.measure(prompts_of(renderer)[:3])
    assert policy_gap < 1e-5
    assert probe_gap < 1e-4
    assert ignored > 0.1
    for (_, parameter), weights in zip(policy.adapter_parameters(), before, strict=True):
        assert torch.equal(parameter, weights)
    assert sampler.policy_version == policy.version


def test_the_probe_finds_an_ignored_adapter(setup, monkeypatch):
    policy, renderer, sampler = setup
    add_request = sampler._engine.add_request
    monkeypatch.setattr(
        sampler._engine, "add_request", lambda *args, lora_request, **options: add_request(*args, **options)
    )
    with pytest.raises(EngineError, match="does not sample from the adapter it is given"):
        SamplerGuard(sampler._recipe, policy, sampler).prove(prompts_of(renderer)[:3], print)


@pytest.mark.slow
def test_a_thousand_swaps_leave_nothing_behind(setup):
    policy, _, sampler = setup

    def resident_bytes():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sampler.swap_seconds.clear()
    for _ in range(50):
        policy.version += 1
        sampler.sync(policy.version)
    after_fifty = resident_bytes()
    for _ in range(950):
        policy.version += 1
        sampler.sync(policy.version)
        assert len(sampler._engine.list_loras()) == 1
    growth = resident_bytes() / after_fifty - 1
    print(f"1,000 swaps: memory {growth:+.2%} since 50")  # noqa: T201
    assert len(sampler.swap_seconds) == 1000
    assert growth <= 0.05
    (folder,) = left_behind()
    assert not any((MEMORY_BACKED / folder).iterdir())


def test_the_dequantized_base_is_the_base_that_is_trained(setup, tmp_path):
    import transformers

    policy, _, _ = setup
    write_dequantized_base(policy, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    ids = torch.randint(5, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), policy.model.disable_adapter():
        expected = policy.model(input_ids=ids).logits
        found = plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_engine_is_chosen_and_the_choice_explained(tiny_recipe):
    assert pick_engine(tiny_recipe('rollout.engine="auto"')) == ("vllm", "vllm (the fastest here)")
    assert pick_engine(tiny_recipe('rollout.engine="auto"', "lora.dora=true")) == (
        "hf", "hf (vLLM cannot serve DoRA adapters)",
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal on a CPU")
def test_four_bit_serving_needs_a_gpu(setup, tiny_recipe):
    policy, renderer, _ = setup
    assert pick_engine(tiny_recipe('rollout.vllm.base="nf4"', 'rollout.engine="auto"'))[0] == "hf"
    with pytest.raises(EngineError, match="on a GPU only"):
        open_sampler(load_recipe("tiny_vllm", ["rollout.vllm.base=nf4"]), policy, text=renderer.text, notify=print)


def test_an_interrupt_leaves_no_request_in_the_engine(setup):
    _, renderer, sampler = setup

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(setup, prompts_of(renderer), finished=stop)
    assert not sampler._engine.has_unfinished_requests()
    assert len(draw(setup, prompts_of(renderer)[:2])) == 2


def test_sleep_and_waking_keep_their_order(setup, monkeypatch):
    """On a CPU the engine cannot sleep; what is asked of it, and when, can be seen all the same."""
    policy, renderer, sampler = setup
    asked = []
    monkeypatch.setattr(sampler, "_can_sleep", True)
    monkeypatch.setattr(sampler._engine, "sleep", lambda level: asked.append(f"sleep {level}"))
    monkeypatch.setattr(sampler._engine, "wake_up", lambda tags: asked.append(f"wake {tags[0]}"))
    swap = sampler._swap
    monkeypatch.setattr(sampler, "_swap", lambda version: (asked.append("adapter"), swap(version)))
    sampler.sleep()
    sampler.sleep()
    draw(setup, prompts_of(renderer)[:1], count=1)
    policy.version += 1
    sampler.sleep()
    sampler.sync(policy.version)
    assert asked == ["sleep 1", "wake weights", "adapter", "wake kv_cache"] * 2


def test_a_diverged_model_is_refused(setup):
    """Last in this file: what is not finite stays in the engine's KV blocks."""
    contract.test_a_diverged_model_is_an_error(setup)
