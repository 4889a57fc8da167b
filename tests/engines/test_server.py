"""The server engine against real `vllm serve` processes: the contract of every sampler, and servers that die."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx
import pytest
import torch

from contract import test_samplers as contract
from contract.test_samplers import (  # noqa: F401  # the suite, run here with this module's `setup`
    LOGP_TOLERANCE,
    draw,
    prompts_of,
    scored,
    test_a_conversation_goes_on_from_its_own_tokens_within_its_own_limit,
    test_a_later_round_goes_on_where_the_one_before_ended,
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
from popo_lite.samplers.server import ServerSampler
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Prompt
from vllm_servers import TOKEN, Server, free_urls

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def recipe(shared_dir):
    return load_recipe("tiny_cpu", [
        'rollout.engine="server"', f"rollout.server.base_urls={free_urls(2)}",
        f'rollout.server.shared_dir="{shared_dir}"',
        "rollout.max_prompt_length=400", "rollout.max_num_seqs=16",
    ])  # fmt: skip


@pytest.fixture(scope="module")
def policy(recipe):
    policy = load_policy(recipe)
    with torch.no_grad():
        torch.manual_seed(0)
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return policy


@pytest.fixture(scope="module")
def servers(recipe, policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_dequantized_base(policy, folder)
    policy.tokenizer.save_pretrained(folder)
    logs = tmp_path_factory.mktemp("logs")
    both = [Server(recipe, url, folder, logs / f"{n}.log") for n, url in enumerate(recipe.rollout.server.base_urls)]
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait()
        yield both
    finally:
        for server in both:
            server.kill()


@pytest.fixture(scope="module")
def notices():
    return []


@pytest.fixture(scope="module")
def setup(recipe, policy, servers, shared_dir, notices):
    renderer = Renderer(recipe, policy.tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POPO_SERVER_TOKEN", TOKEN)
        sampler = ServerSampler(policy, recipe, text=renderer.text, notify=notices.append)
    with sampler:
        yield policy, renderer, sampler
    assert not list(shared_dir.iterdir())
    assert [server.adapters() for server in servers] == [[], []]


def close_to_the_trainer(policy, prompts, groups):
    return all(
        (torch.tensor(one.sampler_logps) - scored(policy, prompt, one, 1.0)).abs().max() < LOGP_TOLERANCE
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group
    )


def test_one_adapter_at_a_time_is_held(setup, servers, shared_dir):
    policy, _, sampler = setup
    for _ in range(3):
        sampler.sync(policy.version)
    (run_folder,) = shared_dir.iterdir()
    (folder,) = run_folder.iterdir()
    assert [server.adapters() for server in servers] == [[folder.name], [folder.name]]
    assert len(sampler.swap_seconds) >= 3


def test_more_prompt_tokens_than_a_batch_holds_are_served(setup):
    """vLLM on a CPU fails if it splits the prompt of a request with a seed."""
    policy, renderer, _ = setup
    longest = max(prompts_of(renderer), key=lambda prompt: len(prompt.token_ids))
    prompts = [
        Prompt(problem=replace(longest.problem, id=f"p{n}"), token_ids=(5 + n, *longest.token_ids[1:]))
        for n in range(32)  # which share no prefix
    ]
    assert 16 * len(longest.token_ids) > 4096
    assert close_to_the_trainer(policy, prompts, draw(setup, prompts, count=1))


def test_an_interrupt_leaves_no_request_behind(setup, servers):
    _, renderer, _ = setup
    prompts = prompts_of(renderer)

    class Stop(Exception):
        pass

    def stop(ended):
        if ended:
            raise Stop

    with pytest.raises(Stop):
        draw(setup, prompts, count=16, finished=stop)
    limit, running = time.monotonic() + 5, None
    while running != 0 and time.monotonic() < limit:
        lines = "".join(httpx.get(f"{server.url}/metrics", trust_env=False).text for server in servers).splitlines()
        counts = [
            line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        ]
        assert len(counts) >= 4
        running = sum(float(line.split()[-1]) for line in counts)
    assert running == 0
    assert draw(setup, prompts) == draw(setup, prompts)


@pytest.mark.parametrize("token", [None, "another"])
def test_a_wrong_token_is_named_and_not_shown(setup, recipe, monkeypatch, token):
    policy, renderer, _ = setup
    if token is None:
        monkeypatch.delenv("POPO_SERVER_TOKEN", raising=False)
    else:
        monkeypatch.setenv("POPO_SERVER_TOKEN", token)
    with pytest.raises(EngineError, match="refuses the token") as caught:
        ServerSampler(policy, recipe, text=renderer.text)
    assert "POPO_SERVER_TOKEN" in caught.value.next_step
    assert "another" not in str(caught.value)


def test_a_folder_that_servers_do_not_see_is_named(setup, recipe, monkeypatch, tmp_path):
    policy, renderer, _ = setup
    monkeypatch.setenv("POPO_SERVER_TOKEN", TOKEN)
    monkeypatch.setattr("popo_lite.samplers.server.save_adapter", lambda *_, **__: None)
    with pytest.raises(EngineError, match="finds no adapter") as caught:
        ServerSampler(policy, recipe, text=renderer.text)
    assert "shared_dir" in caught.value.next_step


def test_ranks_beyond_max_lora_rank_are_named(setup, servers, recipe, monkeypatch):
    _, renderer, _ = setup
    monkeypatch.setenv("POPO_SERVER_TOKEN", TOKEN)
    wider = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"rank": 32, "alpha": 64.0})})
    with pytest.raises(EngineError, match="rank 32 is greater than max_lora_rank 16") as caught:
        ServerSampler(load_policy(wider), wider, text=renderer.text)
    assert "--max-lora-rank 32" in caught.value.next_step


def test_a_server_that_dies_is_set_aside_and_one_that_is_back_is_used(setup, servers, notices):
    policy, renderer, sampler = setup
    prompts = prompts_of(renderer)
    expected = draw(setup, prompts, count=8)
    ended = 0

    def kill_one(count):
        nonlocal ended
        ended += count
        if ended and servers[1].process is not None:
            servers[1].kill()

    found = draw(setup, prompts, count=8, finished=kill_one)
    assert ended == 8 * len(prompts)
    assert [[one.token_ids for one in group] for group in found] == [
        [one.token_ids for one in group] for group in expected
    ]
    assert len(notices) == 1
    assert "set aside" in notices[0]
    assert servers[1].url in notices[0]

    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    policy.version += 1
    sampler.sync(policy.version)
    assert close_to_the_trainer(policy, prompts, draw(setup, prompts))
    assert len(notices) == 1

    servers[1].start("--logprobs-mode", "raw_logprobs")
    servers[1].wait()
    sampler.sync(policy.version)
    assert "without --logprobs-mode processed_logprobs" in notices[-1]
    assert close_to_the_trainer(policy, prompts, draw(setup, prompts))
    servers[1].kill()

    servers[1].start()
    servers[1].wait()
    policy.version += 1
    sampler.sync(policy.version)
    assert "is back" in notices[-1]
    assert servers[0].adapters() == servers[1].adapters()
    ended = 0
    assert close_to_the_trainer(policy, prompts, draw(setup, prompts, count=8))
    assert len(notices) == 3


def test_a_diverged_model_is_refused(setup):
    """Last in this file: what is not finite stays in the servers' KV blocks."""
    contract.test_a_diverged_model_is_an_error(setup)
