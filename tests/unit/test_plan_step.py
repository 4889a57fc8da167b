"""Which rollouts each algorithm trains on, with what weights and divisors."""

from __future__ import annotations

import math

import pytest

from popo_lite.objective import nothing_to_learn, plan_step
from popo_lite.recipe import OBJECTIVES, PopoObjective
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout

LONGEST = 10


def group(name, *answers):
    """`answers` are (reward, tokens) or (reward, tokens, outcome)."""
    prompt = Prompt(problem=Problem(id=name, messages=({"role": "user", "content": "?"},), answer="1"), token_ids=(5,))
    rollouts = []
    for index, (value, tokens, *outcome) in enumerate(answers):
        found = outcome[0] if outcome else Outcome.CORRECT if value > 0.5 else Outcome.INCORRECT
        rollouts.append(
            Rollout(
                prompt=prompt,
                completion=Completion(
                    token_ids=(7,) * tokens,
                    sampler_logps=(-0.5,) * tokens,
                    finish_reason=FinishReason.STOP,
                    text="",
                ),
                reward=Reward(value=value, outcome=found, positive=value > 0.5),
                policy_version=0,
                index=index,
            )
        )
    return Group(rollouts=tuple(rollouts))


GROUPS = [
    group("some", (1.0, 4), (0.0, 2), (0.0, 6, Outcome.TIMEOUT)),
    group("all", (1.0, 3), (1.0, 5)),
    group("none", (0.0, 8), (0.0, 2)),
]


def planned(algorithm, groups=GROUPS, **settings):
    return plan_step(groups, OBJECTIVES[algorithm](**settings), max_completion_length=LONGEST)


def weights(plan):
    return [sequence.weight for sequence in plan.sequences]


def divisors(plan):
    return [sequence.divisor for sequence in plan.sequences]


def names(plan):
    return [(s.rollout.prompt.problem.id, s.rollout.index) for s in plan.sequences]


@pytest.mark.parametrize("algorithm", ["popo", "raft"])
def test_positives_alone_are_trained_on(algorithm):
    plan = planned(algorithm)
    assert names(plan) == [("some", 0), ("all", 0), ("all", 1)]
    assert weights(plan) == pytest.approx([1.0, 0.5, 0.5])
    mean_length, prompts = (4 + 3 + 5) / 3, 2
    assert divisors(plan) == pytest.approx([prompts * mean_length] * 3)
    assert (plan.prompts, plan.entropy_tokens) == (2, 12)
    assert plan.sample_sizes == ((1.0, 1), (pytest.approx(2.0), 2))
    assert planned(algorithm, [GROUPS[2]]) is None
    assert nothing_to_learn(PopoObjective()) == "no prompt had a positive"


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("token_mean", [8, 8, 8]),  # 2 prompts x mean length 4
        ("reference", [12, 12, 12]),
        ("sequence_sum", [20, 20, 20]),  # 2 prompts x 10
        ("sequence_mean", [2 * 4, 2 * 3, 2 * 5]),
    ],
)
def test_divisors(normalizer, expected):
    assert divisors(planned("popo", normalizer=normalizer)) == pytest.approx(expected)


def test_groups_without_a_wrong_answer_can_be_skipped():
    assert names(planned("popo", skip_all_right=True)) == [("some", 0)]
    # An answer that could not be graded may be wrong.
    doubtful = group("doubtful", (1.0, 3), (0.0, 5, Outcome.TIMEOUT))
    assert names(planned("popo", [doubtful], skip_all_right=True)) == [("doubtful", 0)]
    assert planned("popo", GROUPS[1:], skip_all_right=True) is None
    assert "both right and wrong" in nothing_to_learn(PopoObjective(skip_all_right=True))


def test_mixed_lowers_graded_negatives_by_normalisers_of_their_own():
    plan = planned("mixed", negative_weight=0.3)
    # The answer that timed out may be right.
    assert names(plan) == [("some", 0), ("all", 0), ("all", 1), ("some", 1), ("none", 0), ("none", 1)]
    mean_length, prompts = (2 + 8 + 2) / 3, 2
    assert weights(plan)[3:] == pytest.approx([-0.3, -0.15, -0.15])
    assert divisors(plan)[3:] == pytest.approx([prompts * mean_length] * 3)
    assert plan.positives == [0, 1, 2]  # the similarity term's
    assert [s.counts_in_entropy for s in plan.sequences] == [True] * 3 + [False] * 3
    assert plan.entropy_tokens == 12
    assert planned("mixed", entropy_over="all").entropy_tokens == 12 + 2 + 8 + 2
    assert planned("mixed", [GROUPS[2]]) is None


def test_the_entropy_of_negatives_if_asked():
    plan = planned("popo", entropy_over="all")
    assert names(plan)[3:] == [("some", 1), ("some", 2), ("none", 0), ("none", 1)]
    assert weights(plan)[3:] == [0.0] * 4
    assert plan.entropy_tokens == 12 + 2 + 6 + 8 + 2


def test_grpo_trains_where_rewards_differ_and_counts_all_that_is_graded():
    plan = planned("grpo")
    assert names(plan) == [("some", 0), ("some", 1)]
    std = math.sqrt(0.5)  # of (1, 0), n - 1
    assert weights(plan) == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4)])
    assert divisors(plan) == [6 * 4, 6 * 2]
    assert plan.sample_sizes == ()
    with_kl = planned("grpo", kl_coef=0.1, scale_rewards="none", loss_type="dapo")
    assert len(with_kl.sequences) == 6
    assert weights(with_kl) == [0.5, -0.5, 0, 0, 0, 0]
    assert set(divisors(with_kl)) == {4 + 2 + 3 + 5 + 8 + 2}
    constant = planned("grpo", loss_type="dr_grpo")
    assert set(divisors(constant)) == {6 * LONGEST}
    assert planned("grpo", GROUPS[1:]) is None
    only_kl = planned("grpo", GROUPS[1:], kl_coef=0.1)
    assert weights(only_kl) == [0.0] * 4
    lost = group("lost", (0.0, 8, Outcome.TIMEOUT), (0.0, 2, Outcome.ERROR))
    assert planned("grpo", [lost], kl_coef=0.1) is None
    assert "different rewards" in nothing_to_learn(OBJECTIVES["grpo"]())


def test_graded_rewards_are_grpos_advantages():
    plan = planned("grpo", [group("graded", (0.2, 3), (0.6, 3), (1.0, 3))], scale_rewards="none")
    assert weights(plan) == pytest.approx([-0.4, 0.4])
