"""One suite that every sampler passes. A new engine adds itself to `ENGINES`."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from popo_lite.conversation import RolloutWorker
from popo_lite.errors import EngineError, StalePolicyError
from popo_lite.fused import score
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.samplers import SamplingParams, open_sampler
from popo_lite.tasks import ArithmeticTask
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import FinishReason, Problem, Prompt
from small_models import FAMILIES, write_family

ENGINES = ("hf",)
LOGP_TOLERANCE = 1e-4


@pytest.fixture(params=ENGINES, scope="module")
def setup(request):
    recipe = load_recipe("tiny_cpu", [f"rollout.engine={request.param}", "rollout.max_prompt_length=400",
                                      "rollout.max_num_seqs=16"])  # fmt: skip
    policy = load_policy(recipe)
    with torch.no_grad():
        torch.manual_seed(0)
        for _, parameter in policy.adapter_parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    renderer = Renderer(recipe, policy.tokenizer)
    sampler = open_sampler(recipe, policy, text=renderer.text, notify=print)
    with sampler:
        sampler.sync(policy.version)
        yield policy, renderer, sampler


def prompts_of(renderer, count=6):
    problems = ArithmeticTask(2).held_out(count)
    long = Problem(id="long", messages=({"role": "user", "content": "What is 12 + 34? " * 30},), answer="46")
    return [renderer.render(problem) for problem in [*problems, long]]


def draw(setup, prompts, *, count=4, temperature=1.0, limit=40, stream=("test", 0), first_index=0, finished=None):
    policy, _, sampler = setup
    return sampler.sample(
        prompts,
        count=count,
        params=SamplingParams(temperature=temperature, max_completion_length=limit),
        policy_version=policy.version,
        stream=stream,
        first_index=first_index,
        finished=finished,
    )


@torch.no_grad()
def scored(policy, prompt, completion, temperature):
    """The trainer's log-probs of the completion's tokens."""
    tokens = torch.tensor([prompt.token_ids + completion.token_ids])
    hidden = policy.hidden_states(tokens[0], [[tokens.shape[1]]])[len(prompt.token_ids) - 1 : -1]
    head = dataclasses.replace(policy.head, temperature=temperature)
    return score(hidden, torch.tensor(completion.token_ids), head)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_the_trainers_under_the_sampling_temperature(setup, temperature):
    policy, renderer, _ = setup
    prompts = prompts_of(renderer)
    assert max(len(prompt.token_ids) for prompt in prompts) > 300
    for prompt, group in zip(prompts, draw(setup, prompts, temperature=temperature), strict=True):
        for completion in group:
            expected = scored(policy, prompt, completion, temperature)
            gap = (torch.tensor(completion.sampler_logps) - expected).abs().max()
            assert gap < LOGP_TOLERANCE


def test_shapes_stops_and_text(setup):
    policy, renderer, _ = setup
    prompts = prompts_of(renderer)
    groups = draw(setup, prompts, count=3, limit=9)
    assert [len(group) for group in groups] == [3] * len(prompts)
    reasons = set()
    for completion in (one for group in groups for one in group):
        reasons.add(completion.finish_reason)
        stops = [token in policy.stop_ids for token in completion.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (completion.finish_reason is FinishReason.STOP)
        if completion.finish_reason is FinishReason.LENGTH:
            assert len(completion.token_ids) == 9
        assert completion.text == policy.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}


def test_every_id_of_the_stop_set_ends_an_answer(setup):
    policy, renderer, _ = setup
    box = policy.tokenizer.encode("}")[-1]
    original = policy.stop_ids
    try:
        policy.stop_ids = original | {box}
        endings = {one.token_ids[-1] for group in draw(setup, prompts_of(renderer)) for one in group}
    finally:
        policy.stop_ids = original
    assert box in endings


def test_draws_do_not_depend_on_the_batch(setup):
    _, renderer, _ = setup
    prompts = prompts_of(renderer)
    together = draw(setup, prompts)
    alone = [draw(setup, [prompt])[0] for prompt in prompts]
    fewer = [group[:2] for group in draw(setup, prompts[::-1], count=2)[::-1]]
    for first, second in [*zip(together, alone, strict=True), *zip([g[:2] for g in together], fewer, strict=True)]:
        assert [one.token_ids for one in first] == [one.token_ids for one in second]
        for one, other in zip(first, second, strict=True):
            assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=LOGP_TOLERANCE)


def test_a_later_round_goes_on_where_the_one_before_ended(setup):
    _, renderer, _ = setup
    prompts = prompts_of(renderer)
    at_once = draw(setup, prompts, count=8)
    # The second round is for some of the prompts only, as an adaptive budget has it.
    first, second = draw(setup, prompts), draw(setup, prompts[2:5], first_index=4)
    for group, expected in [
        *zip(first, at_once, strict=True),
        *zip(second, [g[4:] for g in at_once[2:5]], strict=True),
    ]:
        for one, other in zip(group, expected[:4], strict=True):
            assert one.token_ids == other.token_ids
            assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=LOGP_TOLERANCE)
    assert second != first[2:5]


def test_a_conversation_goes_on_from_its_own_tokens_within_its_own_limit(setup):
    policy, renderer, sampler = setup
    recipe = load_recipe("tiny_cpu", ["rollout.environment.name=a_module:Game", "rollout.environment.max_turns=3"])

    class Grader:
        def observe(self, conversations):
            return ["What is 3 + 4?" if len(messages[-1]["content"]) % 3 else None for messages, _ in conversations]

    prompts, ended = prompts_of(renderer), []
    worker = RolloutWorker(recipe=recipe, renderer=renderer, sampler=sampler, grader=Grader())
    groups = worker.sample(
        prompts, count=4,
        params=SamplingParams(temperature=1.0, max_completion_length=60),
        policy_version=policy.version, stream=("conversation",), finished=ended.append,
    )  # fmt: skip
    turns = set()
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            turns.add((len(one.messages) + 1) // 2)
            assert len(one.token_ids) <= 60
            own = torch.tensor(one.loss_mask)
            gap = torch.tensor(one.sampler_logps) - scored(policy, prompt, one, 1.0)[own]
            assert gap.abs().max() < LOGP_TOLERANCE
    assert turns == {1, 2, 3}
    assert sum(ended) == 4 * len(prompts)


def test_requests_of_unequal_lengths_stay_within_the_models_positions(tmp_path):
    """A sequence that has ended may be decoded on beside longer ones, and GPT-2 has a table of positions."""
    write_family(dataclasses.replace(FAMILIES["gpt2"], config={"n_positions": 32}), tmp_path / "gpt2")
    recipe = load_recipe("tiny_cpu", [f"model.id={tmp_path / 'gpt2'}", "model.quantization=none", "lora.rank=4",
                                      "rollout.max_prompt_length=16", "rollout.max_completion_length=16"])  # fmt: skip
    policy = load_policy(recipe)
    policy.stop_ids = frozenset()
    problem = Problem(id="x", messages=(), answer="")
    wanted = [(Prompt(problem=problem, token_ids=tuple(range(5, 5 + n))), n, 32 - n) for n in (28, 6, 7)]
    with open_sampler(recipe, policy, text=str, notify=print) as sampler:
        drawn = sampler.draw(
            wanted, params=SamplingParams(temperature=1.0, max_completion_length=26), policy_version=policy.version,
            stream=("unequal",),
        )  # fmt: skip
    assert [len(one.token_ids) for one in drawn] == [4, 26, 25]


def test_streams_differ_by_seed_step_and_sample(setup):
    _, renderer, _ = setup
    prompts = prompts_of(renderer)[:3]
    first, second = draw(setup, prompts, count=8), draw(setup, prompts, count=8, stream=("test", 1))
    assert [[one.token_ids for one in group] for group in first] != [
        [one.token_ids for one in group] for group in second
    ]
    assert all(len({one.token_ids for one in group}) > 1 for group in first)


def test_frequencies_are_the_policys(setup):
    """1,600 draws of a first token against the policy's own distribution; the limit is five standard errors."""
    policy, renderer, _ = setup
    prompt = prompts_of(renderer)[0]
    draws = [one.token_ids[0] for one in draw(setup, [prompt], count=1600, limit=1)[0]]
    with torch.no_grad():
        tokens = torch.tensor([prompt.token_ids])
        z = policy.head.logits(policy.hidden_states(tokens[0], [[tokens.shape[1]]])[-1:])
    probabilities = torch.softmax(z[0], dim=0)
    for token, probability in enumerate(probabilities.tolist()):
        error = math.sqrt(probability * (1 - probability) / len(draws))
        assert abs(draws.count(token) / len(draws) - probability) <= 5 * error + 1 / len(draws)


def test_a_nucleus_holds_the_likeliest_tokens_and_nothing_else(setup):
    """1,600 first tokens against the cut distribution, five standard errors; log-probs are as `SamplingParams` says."""
    policy, renderer, sampler = setup
    prompt = prompts_of(renderer)[0]
    with torch.no_grad():
        tokens = torch.tensor([prompt.token_ids])
        z = policy.head.logits(policy.hidden_states(tokens[0], [[tokens.shape[1]]])[-1:])
    whole = torch.log_softmax(z[0] / 2, dim=0)  # flat enough to have a tail
    ordered = whole.exp().sort(descending=True)
    inside = int((ordered.values.cumsum(0) < 0.8).sum()) + 1
    nucleus = dict(zip(ordered.indices[:inside].tolist(), ordered.values[:inside].tolist(), strict=True))
    assert 2 <= len(nucleus) < len(whole) / 2
    drawn = [
        sampler.sample(
            [prompt], count=1600, params=SamplingParams(temperature=2.0, max_completion_length=1, top_p=top_p),
            policy_version=policy.version, stream=("nucleus",),
        )[0]
        for top_p in (0.8, 1.0)
    ]  # fmt: skip
    draws = [completion.token_ids[0] for completion in drawn[0]]
    assert set(draws) <= nucleus.keys()
    assert not {completion.token_ids[0] for completion in drawn[1]} <= nucleus.keys()
    for token, probability in nucleus.items():
        share = probability / sum(nucleus.values())
        error = math.sqrt(share * (1 - share) / len(draws))
        assert abs(draws.count(token) / len(draws) - share) <= 5 * error + 1 / len(draws)
    mass = 1.0 if sampler.engine == "hf" else sum(nucleus.values())
    for completion in drawn[0][:50]:
        expected = float(whole[completion.token_ids[0]]) - math.log(mass)
        assert completion.sampler_logps[0] == pytest.approx(expected, abs=LOGP_TOLERANCE)


def test_progress_counts_every_sequence_once(setup):
    _, renderer, _ = setup
    told = []
    groups = draw(setup, prompts_of(renderer), limit=12, finished=told.append)
    assert sum(told) == sum(map(len, groups))


def test_another_version_is_refused(setup):
    policy, renderer, sampler = setup
    with pytest.raises(StalePolicyError, match=f"holds policy version {policy.version}"):
        sampler.sample(
            prompts_of(renderer)[:1],
            count=1,
            params=SamplingParams(temperature=1.0, max_completion_length=4),
            policy_version=policy.version + 1,
            stream=("test",),
        )


def test_weights_in_use_are_the_latest(setup):
    policy, renderer, sampler = setup
    prompt = prompts_of(renderer)[-1]
    name, parameter = policy.adapter_parameters()[-1]
    kept = parameter.detach().clone()
    draw(setup, [prompt])  # so that a cache of the old weights exists
    try:
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn_like(parameter))
        policy.version += 1
        sampler.sync(policy.version)
        for completion in draw(setup, [prompt])[0]:
            gap = (torch.tensor(completion.sampler_logps) - scored(policy, prompt, completion, 1.0)).abs().max()
            assert gap < LOGP_TOLERANCE, name
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
        policy.version += 1
        sampler.sync(policy.version)


def test_a_diverged_model_is_an_error(setup):
    policy, renderer, sampler = setup
    _, parameter = policy.adapter_parameters()[0]
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(math.nan)
        policy.version += 1
        sampler.sync(policy.version)
        with pytest.raises(EngineError, match="not finite"):
            draw(setup, prompts_of(renderer)[:1])
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
        policy.version += 1
        sampler.sync(policy.version)


def test_an_engine_that_is_not_here_names_the_alternative(tiny_recipe, monkeypatch):
    monkeypatch.setattr("popo_lite.samplers.vllm.why_not", lambda _: "vLLM is not installed: install it")
    recipe = tiny_recipe('rollout.engine="vllm"')
    policy = load_policy(recipe)
    with pytest.raises(EngineError, match="rollout.engine"):
        open_sampler(recipe, policy, text=str, notify=print)
