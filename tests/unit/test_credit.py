"""Which rollouts each algorithm trains on, and with what coefficients."""

from __future__ import annotations

import math

import pytest

from popo_lite.recipe import AnyObjective
from popo_lite.training.credit import nothing_to_learn, plan_step, teaching_groups
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
                reward=Reward(value=value, outcome=found),
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
    recipe = AnyObjective.model_validate({"algorithm": algorithm, **settings})
    means = {(g.prompt.problem.id, r.index): -0.5 for g in groups for r in g.rollouts}
    return plan_step(groups, recipe, mean_logps=means, max_completion_length=LONGEST)


def names(plan):
    return [(s.rollout.prompt.problem.id, s.rollout.index) for s in plan.sequences]


@pytest.mark.parametrize("algorithm", ["popo", "raft"])
def test_positives_alone_are_trained_on(algorithm):
    plan = planned(algorithm)
    assert names(plan) == [("some", 0), ("all", 0), ("all", 1)]
    assert [s.weight for s in plan.sequences] == [1.0, 0.5, 0.5]
    mean_length, prompts = (4 + 3 + 5) / 3, 2
    assert [s.coefficient for s in plan.sequences] == pytest.approx(
        [-weight / (prompts * mean_length) for weight in (1.0, 0.5, 0.5)]
    )
    assert plan.normalizers.entropy_tokens == 12
    assert planned(algorithm, [GROUPS[2]]) is None
    assert nothing_to_learn(AnyObjective()) == "no prompt had a positive"


def test_groups_without_a_wrong_answer_can_be_left_out():
    skipping = AnyObjective(skip_all_right=True)
    assert teaching_groups(GROUPS, AnyObjective()) == GROUPS
    assert teaching_groups(GROUPS, skipping) == [GROUPS[0], GROUPS[2]]
    # An answer that could not be graded may be wrong.
    doubtful = group("doubtful", (1.0, 3), (0.0, 5, Outcome.TIMEOUT))
    assert teaching_groups([doubtful], skipping) == [doubtful]
    assert planned("popo", teaching_groups(GROUPS[1:], skipping), skip_all_right=True) is None
    assert "both right and wrong" in nothing_to_learn(skipping)


def test_mixed_lowers_graded_negatives_by_normalisers_of_their_own():
    plan = planned("mixed", negative_weight=0.3)
    # The answer that timed out may be right.
    assert names(plan) == [("some", 0), ("all", 0), ("all", 1), ("some", 1), ("none", 0), ("none", 1)]
    mean_length, prompts = (2 + 8 + 2) / 3, 2
    expected = [0.3 * weight / (prompts * mean_length) for weight in (1.0, 0.5, 0.5)]
    assert [s.coefficient for s in plan.sequences[3:]] == pytest.approx(expected)
    assert [s.weight for s in plan.sequences[3:]] == [0.0] * 3
    assert [s.counts_in_entropy for s in plan.sequences] == [True] * 3 + [False] * 3
    assert plan.normalizers.entropy_tokens == 12
    assert planned("mixed", entropy_over="all").normalizers.entropy_tokens == 12 + 2 + 8 + 2
    assert planned("mixed", [GROUPS[2]]) is None


def test_the_entropy_of_negatives_where_asked():
    plan = planned("popo", entropy_over="all")
    assert names(plan)[3:] == [("some", 1), ("some", 2), ("none", 0), ("none", 1)]
    assert [s.coefficient for s in plan.sequences[3:]] == [0.0] * 4
    assert plan.normalizers.entropy_tokens == 12 + 2 + 6 + 8 + 2


def test_grpo_trains_where_rewards_differ_and_counts_all_that_is_graded():
    plan = planned("grpo")
    assert names(plan) == [("some", 0), ("some", 1)]
    std = math.sqrt(0.5)  # of (1, 0), n - 1
    assert [s.advantage for s in plan.sequences] == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4)])
    assert [s.coefficient for s in plan.sequences] == pytest.approx([1 / (6 * 4), 1 / (6 * 2)])
    assert plan.sample_sizes == ()
    with_kl = planned("grpo", kl=0.1, scale_rewards="none", loss_type="dapo")
    assert len(with_kl.sequences) == 6
    assert [s.advantage for s in with_kl.sequences] == [0.5, -0.5, 0, 0, 0, 0]
    assert {s.coefficient for s in with_kl.sequences} == {1 / (4 + 2 + 3 + 5 + 8 + 2)}
    constant = planned("grpo", loss_type="dr_grpo")
    assert {s.coefficient for s in constant.sequences} == {1 / (6 * LONGEST)}
    assert planned("grpo", GROUPS[1:]) is None
    only_kl = planned("grpo", GROUPS[1:], kl=0.1)
    assert [s.advantage for s in only_kl.sequences] == [0.0] * 4
    lost = group("lost", (0.0, 8, Outcome.TIMEOUT), (0.0, 2, Outcome.ERROR))
    assert planned("grpo", [lost], kl=0.1) is None
    assert "different rewards" in nothing_to_learn(AnyObjective(algorithm="grpo"))


def test_graded_rewards_are_grpos_advantages():
    plan = planned("grpo", [group("graded", (0.2, 3), (0.6, 3), (1.0, 3))], scale_rewards="none")
    assert [s.advantage for s in plan.sequences] == pytest.approx([-0.4, 0.4])
