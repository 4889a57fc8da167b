"""How a step's sequences are divided over ranks: evenly, completely, and always in the same way."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from popo_lite.balance import divide
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward, Rollout

RIGHT = Reward(value=1.0, outcome=Outcome.CORRECT, positive=True)


def prompt_of(name: int, tokens: int) -> Prompt:
    return Prompt(problem=Problem(id=str(name), messages=(), answer=""), token_ids=(name, *range(tokens - 1)))


def rollout_of(prompt: Prompt, index: int, answer: tuple[int, ...]) -> Rollout:
    completion = Completion(
        token_ids=answer, sampler_logps=(-1.0,) * len(answer), finish_reason=FinishReason.STOP, text=""
    )
    return Rollout(prompt=prompt, completion=completion, reward=RIGHT, policy_version=0, index=index)


def skewed(seed: int, *, prompts: int = 64) -> list[Rollout]:
    """Positives of `prompts` prompts: mostly few, sometimes all 8; answers of 20 to 4,000 tokens, some equal."""
    source = random.Random(seed)
    rollouts = []
    for name in range(prompts):
        prompt = prompt_of(name, source.randint(20, 400))
        right = min(8, 1 + int(source.expovariate(0.5)))
        typical = min(3000.0, source.lognormvariate(5.5, 1.0))  # hard problems have long answers
        lengths = [int(typical * source.lognormvariate(0, 0.5)) for _ in range(right)]
        answers = [tuple(range(index, index + max(20, min(4000, length)))) for index, length in enumerate(lengths)]
        if right > 2:
            answers[1] = answers[0]
        rollouts += [rollout_of(prompt, index, answer) for index, answer in enumerate(answers)]
    return rollouts


def tokens_of(rollouts: list[Rollout], part: list[int], *, shared_prefix: bool) -> int:
    """What a rank forwards: with `shared_prefix` each prompt once and each of its distinct answers once."""
    if not shared_prefix:
        return sum(rollouts[index].tokens for index in part)
    prompts = {rollouts[index].prompt.token_ids for index in part}
    answers = {(rollouts[index].prompt.token_ids, rollouts[index].completion.token_ids) for index in part}
    return sum(map(len, prompts)) + sum(len(answer) for _, answer in answers)


def ratio(rollouts: list[Rollout], ranks: int, *, shared_prefix: bool) -> float:
    """The most tokens of a rank over the mean."""
    parts = divide(rollouts, ranks, shared_prefix=shared_prefix)
    loads = [tokens_of(rollouts, part, shared_prefix=shared_prefix) for part in parts]
    return max(loads) * ranks / sum(loads)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_forward_like_numbers_of_tokens(ranks, shared_prefix):
    for seed in range(20):
        assert ratio(skewed(seed), ranks, shared_prefix=shared_prefix) <= 1.1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_division_costs_few_tokens(ranks):
    """Against no division at all, which forwards every prompt once."""
    for seed in range(20):
        rollouts = skewed(seed)
        parts = divide(rollouts, ranks, shared_prefix=True)
        together = tokens_of(rollouts, list(range(len(rollouts))), shared_prefix=True)
        assert sum(tokens_of(rollouts, part, shared_prefix=True) for part in parts) <= 1.05 * together


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 400])
def test_every_sequence_goes_to_one_rank(ranks, shared_prefix):
    rollouts = skewed(1)
    parts = divide(rollouts, ranks, shared_prefix=shared_prefix)
    assert len(parts) == ranks
    assert Counter(index for part in parts for index in part) == Counter(range(len(rollouts)))
    assert all(part == sorted(part) for part in parts)


def test_equal_answers_stay_together_though_they_were_drawn_apart():
    prompts = [prompt_of(name, 30) for name in range(2)]
    answers = [(1,) * 200, (2,) * 300, (3,) * 250]
    rollouts = [rollout_of(prompt, index, answers[index % 3]) for index in range(9) for prompt in prompts]
    for ranks in (2, 3, 4):
        parts = divide(rollouts, ranks, shared_prefix=True)
        places: dict[object, set[int]] = {}
        for rank, part in enumerate(parts):
            for index in part:
                key = rollouts[index].prompt.token_ids, rollouts[index].completion.token_ids
                places.setdefault(key, set()).add(rank)
        assert len(places) == 6
        assert all(len(ranks_of) == 1 for ranks_of in places.values())
        assert all(parts)


def test_the_division_is_a_function_of_lengths_and_order_alone():
    first, again = (divide(skewed(3), 4, shared_prefix=True) for _ in range(2))
    assert first == again
    equal = [rollout_of(prompt_of(name, 10), 0, (name,) * 10) for name in range(8)]
    assert divide(equal, 4, shared_prefix=True) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_sequences_than_ranks_leave_ranks_without_any(count):
    rollouts = [rollout_of(prompt_of(name, 10), 0, (name,) * 10) for name in range(count)]
    parts = divide(rollouts, 4, shared_prefix=True)
    assert sorted(map(len, parts)) == [0] * (4 - count) + [1] * count


def test_one_prompt_is_divided_by_its_answers():
    prompt = prompt_of(0, 20)
    rollouts = [rollout_of(prompt, index, (index,) * 100) for index in range(8)]
    assert sorted(map(len, divide(rollouts, 4, shared_prefix=True))) == [2, 2, 2, 2]
    assert ratio(rollouts, 4, shared_prefix=True) == 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_prompt_with_most_of_the_tokens_is_divided(ranks):
    long = prompt_of(0, 400)
    rollouts = [rollout_of(long, index, (index,) * 4000) for index in range(8)]
    rollouts += [rollout_of(prompt_of(name, 50), 0, (name,) * 50) for name in range(1, 64)]
    assert ratio(rollouts, ranks, shared_prefix=True) <= 1.1
