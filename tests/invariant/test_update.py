"""What must not change an update: how it is cut into micro-batches, the order of groups, prompts without a positive,
and whose log-probs made the weights where they agree.

These run in float64 from end to end, on a Phi (its norms keep float64, those of Llama and Qwen pass through float32),
so that only the order of sums may differ.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from popo_lite.callbacks import Callback
from popo_lite.interrupts import StageClock
from popo_lite.trainer import Trainer
from popo_lite.types import Group, Rollout
from updates import assert_same, backward, groups_of, update

VARIANTS = [
    (),
    ('objective.target="features"',),
    ('objective.entropy_over="all"',),
    ('objective.normalizer="sequence_mean"', "objective.similarity_coef=0"),
    ('objective.normalizer="reference"',),
    ('objective.normalizer="sequence_sum"', "rollout.max_completion_length=30"),
    ('objective.weights_from="trainer"', 'objective.weights="sequence_logprob"'),
    ("rollout.temperature=0.7",),
    ("objective.algorithm=mixed", "objective.negative_weight=0.3"),
    ("objective.algorithm=raft",),
    ("objective.algorithm=grpo",),
    ("objective.algorithm=grpo", "objective.kl_coef=0.1", "objective.loss_type=dapo", "objective.entropy_coef=0.02"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_batch_of_all_equals_one_at_a_time(trainer, variant):
    whole = trainer(*variant)
    groups = groups_of(whole)
    expected = update(whole, groups)
    assert int(expected["micro_batches"]) == 1
    for budget, packing in ((70, "true"), (128, "true"), (200, "true"), (70, "false")):
        cut = trainer(*variant, f"train.tokens_per_microbatch={budget}", "rollout.max_prompt_length=30",
                      "rollout.max_completion_length=30", f"train.packing={packing}")  # fmt: skip
        cut.learner._chunk = 7  # tokens of which the logits exist at once
        assert (cut.policy.packing != "off") == (packing == "true")
        found = update(cut, groups)
        assert int(found["micro_batches"]) >= 2
        assert_same(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "more", [(), ("train.gradient_checkpointing=true", "train.offload_activations=true", "train.device=auto")]
)
def test_shared_prompts_and_equal_answers_change_nothing(trainer, variant, more):
    """Against whole sequences in a row, and against one sequence at a time. Each prompt has two answers twice."""
    shared, whole, alone = (
        trainer(*variant, *more, *flag) for flag in ((), ("train.shared_prefix=false",), ("train.packing=false",))
    )
    groups = [
        Group(rollouts=(*group.rollouts, *(answered_again(r, index) for index, r in enumerate(group.rollouts[1:3], 4))))
        for group in groups_of(shared)
    ]
    found, *expected = (update(one, groups) for one in (shared, whole, alone))
    tokens = [one.learner.micro_batches.tokens["update"] for one in (shared, whole, alone)]
    plan = shared.learner.plan(groups)
    distinct = {(s.rollout.prompt.token_ids, s.rollout.completion.token_ids) for s in plan.sequences}
    assert len(distinct) < len(plan.sequences)
    assert tokens[0] == sum(map(len, {prompt for prompt, _ in distinct})) + sum(len(answer) for _, answer in distinct)
    assert tokens[1] == tokens[2] == plan.sequence_tokens
    for other in expected:
        assert_same(found, other)


def answered_again(rollout: Rollout, index: int) -> Rollout:
    """The same answer, drawn again: its noise is another, and a sampler's log-probs are not quite the same."""
    logps = tuple(logp - 0.01 for logp in rollout.completion.sampler_logps)
    return replace(rollout, completion=replace(rollout.completion, sampler_logps=logps), index=index)


@pytest.mark.parametrize("variant", [(), ("objective.algorithm=mixed",), ("objective.algorithm=grpo",)])
def test_no_state_learns_to_predict_an_environments_token(trainer, monkeypatch, variant):
    one = trainer(*variant, "objective.similarity_coef=0" if "grpo" not in str(variant) else "objective.kl_coef=0")
    rollouts = groups_of(one)[0].rollouts[:2]
    conversation = replace(rollouts[1], reward=replace(rollouts[1].reward, value=0.9, positive=True))
    answer = replace(rollouts[0], reward=replace(rollouts[0].reward, value=0.1, positive=False))
    states = []
    hidden_states = one.policy.hidden_states

    def kept(ids, row):
        states.append(hidden_states(ids, row))
        states[-1].retain_grad()
        return states[-1]

    monkeypatch.setattr(one.policy, "hidden_states", kept)
    plan = one.learner.plan([Group(rollouts=(answer, conversation))])
    plan = replace(plan, sequences=tuple(s for s in plan.sequences if s.rollout is conversation))
    backward(one, plan)
    [state] = states
    moved = state.grad.abs().amax(dim=1) > 0
    prompt, mask = len(conversation.prompt.token_ids), conversation.completion.loss_mask
    assert moved.tolist() == [False] * (prompt - 1) + [*mask] + [False]
    assert False in mask


def test_eight_answers_of_one_prompt_in_one_row_equal_one_row_each(trainer):
    """1 x 8 against 8 x 1: what gradient accumulation gets wrong where it averages averages."""
    whole, single = trainer(), trainer("train.tokens_per_microbatch=70", "rollout.max_completion_length=6")
    group = groups_of(whole)[2]
    eight = Group(rollouts=tuple(replace(r, index=index) for index, r in enumerate(group.rollouts * 2)))
    single.learner.micro_batches.budget_tokens = 1  # every sequence is longer, and goes alone
    one_row, eight_rows = update(whole, [eight]), update(single, [eight])
    assert [int(found["micro_batches"]) for found in (one_row, eight_rows)] == [1, 8]
    assert_same(eight_rows, one_row)


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_the_order_of_groups_changes_nothing(trainer, variant):
    one = trainer(*variant, "train.tokens_per_microbatch=200")
    groups = groups_of(one)
    assert_same(update(one, groups[::-1]), update(one, groups))


def test_prompts_without_a_positive_contribute_nothing(trainer):
    one = trainer()
    assert_same(update(one, groups_of(one, hopeless=3)), update(one, groups_of(one, hopeless=0)))


def test_groups_that_are_all_right_contribute_nothing_where_they_are_skipped(trainer):
    one = trainer("objective.skip_all_right=true")
    groups = groups_of(one)
    right = [len(group.positives) for group in groups]
    some = [group for group, count in zip(groups, right, strict=True) if count < 4]
    assert (len(groups), len(some)) == (6, 4)
    assert_same(update(one, groups), update(trainer(), some))


def test_negatives_matter_only_where_asked(trainer):
    """The control of the test above: with the entropy of all rollouts they do contribute."""
    one = trainer('objective.entropy_over="all"')
    some, none = update(one, groups_of(one, hopeless=3)), update(one, groups_of(one, hopeless=0))
    assert abs(some["loss"] - none["loss"]) > 1e-4


def test_weights_from_sampler_and_trainer_agree_where_their_logps_do(trainer):
    by_sampler, by_trainer = trainer(), trainer('objective.weights_from="trainer"')
    groups = groups_of(by_sampler)
    flat = [rollout for group in groups for rollout in group.rollouts]
    exact = dict(
        zip(((r.prompt.problem.id, r.index) for r in flat), by_trainer.learner._policy_mean_logps(flat), strict=True)
    )
    honest = [
        Group(
            rollouts=tuple(
                Rollout(
                    prompt=r.prompt,
                    completion=replace(
                        r.completion,
                        sampler_logps=(exact[r.prompt.problem.id, r.index],) * len(r.completion.sampler_logps),
                    ),
                    reward=r.reward,
                    policy_version=0,
                    index=r.index,
                )
                for r in group.rollouts
            )
        )
        for group in groups
    ]
    assert_same(update(by_sampler, honest), update(by_trainer, honest))


def divisor(normalizer: str, rollouts: list[Rollout], prompts: int, rollout: Rollout) -> float:
    """What docs/method.md divides a log-prob by, of `rollouts` of `prompts` prompts; 40 is the longest answer."""
    lengths = [len(one.completion.sampler_logps) for one in rollouts]
    return {
        "token_mean": prompts * sum(lengths) / len(lengths),
        "reference": sum(lengths),
        "sequence_sum": prompts * 40,
        "sequence_mean": prompts * len(rollout.completion.sampler_logps),
    }[normalizer]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"importance_sampling_clip_max": 2.0},
        {"algorithm": "mixed", "negative_weight": 0.3},
        {
            "algorithm": "mixed",
            "negative_weight": 0.3,
            "importance_sampling_clip_max": 2.0,
            "normalizer": "sequence_mean",
        },
        {"algorithm": "mixed", "negative_weight": 0.3, "entropy_over": "all", "normalizer": "sequence_sum"},
        {"target": "features", "weights": "uniform"},
        {"target": "features", "entropy_over": "all", "normalizer": "sequence_sum", "noise_sigma": 0.3},
        {"normalizer": "reference", "weights": "sequence_logprob", "weight_temperature": 20.0},
        {"normalizer": "sequence_mean", "weight_temperature": 0.2},
    ],
    ids=str,
)
def test_the_update_is_the_gradient_of_the_formula(trainer, settings):
    """One step against docs/method.md written out naively: full logits, one sequence at a time, plain autograd."""
    one = trainer("train.tokens_per_microbatch=200", "rollout.max_completion_length=40",
                  *(f"objective.{key}={value}" for key, value in settings.items()))  # fmt: skip
    groups = groups_of(one)
    found = update(one, groups)
    objective, policy = one.recipe.objective, one.policy
    with_positive = [group.positives for group in groups if group.positives]
    wrong = [[r for r in group.rollouts if r.reward.value <= 0.5] for group in groups]
    wrong = [negatives for negatives in wrong if negatives]
    raised = [rollout for positives in with_positive for rollout in positives]
    lowered = [rollout for negatives in wrong for rollout in negatives]
    counted = raised + (lowered if objective.entropy_over == "all" else [])
    entropy_tokens = sum(len(rollout.completion.sampler_logps) for rollout in counted)
    total = torch.zeros((), dtype=torch.float64)

    def forward(rollout):
        """Log-probs [N] with their truncated weights, the mean entropy's share, and the mean feature [D]."""
        prompt, answer = rollout.prompt.token_ids, rollout.completion.token_ids
        output = policy.model(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        own = torch.tensor(rollout.completion.loss_mask or [True] * len(answer))
        logp = torch.log_softmax(output.logits[0, len(prompt) - 1 : -1], dim=-1)[own]
        picked = logp.gather(1, torch.tensor(answer)[own][:, None])[:, 0]
        ratios = (picked.detach() - torch.tensor(rollout.completion.sampler_logps, dtype=torch.float64)).exp()
        factors = (
            1.0
            if objective.importance_sampling_clip_max is None
            else ratios.clamp(max=objective.importance_sampling_clip_max)
        )
        entropy = -(logp.exp() * logp).sum() / entropy_tokens
        return (factors * picked).sum(), entropy, output.hidden_states[-1][0, len(prompt) :][own].mean(dim=0)

    for positives in with_positive:
        scores = []
        for rollout in positives:
            logps = rollout.completion.sampler_logps
            mean = sum(logps) / len(logps)
            score = {"mean_logprob": mean, "sequence_logprob": sum(logps), "uniform": 0.0}[objective.weights]
            scores.append(math.exp(score / objective.weight_temperature))
        for rollout, score in zip(positives, scores, strict=True):
            weight = score / sum(scores)
            log_pi, entropy, feature = forward(rollout)
            total = total - weight * log_pi / divisor(objective.normalizer, raised, len(with_positive), rollout)
            total = total - objective.entropy_coef * entropy
            with torch.no_grad(), one.learner.siamese.swapped():
                q = forward(rollout)[2]
                if objective.target == "predictor":
                    q = policy.predictor(q[None])[0]
            q = q + objective.noise_sigma * q.square().mean().sqrt() * one.learner._noise(0, rollout, q)
            p = policy.predictor(feature[None])[0]
            # The weights of the step sum to the number of prompts.
            total = total + objective.similarity_coef * weight * (1 - p @ q / (p.norm() * q.norm())) / len(
                with_positive
            )
    for negatives in wrong:
        for rollout in negatives:
            log_pi, entropy, _ = forward(rollout)
            if objective.algorithm == "mixed":
                share = 0.3 / len(negatives)
                total = total + share * log_pi / divisor(objective.normalizer, lowered, len(wrong), rollout)
            if objective.entropy_over == "all":
                total = total - objective.entropy_coef * entropy
    total.backward()
    expected = {name: p.grad for name, p in policy.trainable_parameters()}
    assert_same(found, {**expected, "loss": total.detach()})
    assert int(found["micro_batches"]) > 1


def test_the_update_leaves_no_copy_of_the_weights_behind(trainer):
    """They would meet the rollout engine as it wakes."""
    one = trainer()
    result = backward(one, one.learner.plan(groups_of(one)))
    before = one.learner.prepare()
    assert len(before) == len(one.policy.trainable_parameters())
    one.learner.apply(result, before, 1.0)
    assert before == []
    assert result.update_norm > 0


def test_a_step_without_positives_changes_nothing_and_says_so(tiny_recipe, tmp_path):
    from popo_lite.run_folder import RunFolder

    recipe = tiny_recipe('reward.functions="math"', "eval.problems=0", "data.prompts_per_step=2",
                         "rollout.num_generations=2", "rollout.max_completion_length=1")  # fmt: skip
    with Trainer(recipe, Callback()) as trainer:
        trainer.folder = RunFolder(tmp_path)
        before = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters()}
        trainer.train_step(0)
        assert all(torch.equal(p, before[name]) for name, p in trainer.policy.trainable_parameters())
        assert trainer.policy.version == 0
        assert trainer.cursor.next_step == 1
        assert trainer.learner.siamese.drift() == 0.0
    (line,) = trainer.folder.metrics_path.read_text().splitlines()
    assert '"skipped_reason": "no prompt had a positive"' in line
    assert '"loss": null' in line


def test_the_clock_announces_its_stages():
    stages = []
    callback = Callback()
    callback.stage = lambda name, *, total=None: stages.append((name, total))
    clock = StageClock(callback, torch.device("cpu"))
    with clock("rollout", total=3):
        pass
    assert stages == [("rollout", 3)]
    assert set(clock.seconds) == {"rollout"}
