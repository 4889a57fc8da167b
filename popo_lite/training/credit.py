"""Which rollouts a step trains on, and with what coefficients, for each algorithm.

Everything that couples the sequences of a step (weights, advantages, normalisers) is fixed here, before the first
forward pass, so that the cut into micro-batches cannot change the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from popo_lite.objective.credit import effective_sample_size, group_advantages, positive_weights
from popo_lite.objective.grpo import length_coefficients
from popo_lite.objective.losses import StepNormalizers, nll_coefficients
from popo_lite.recipe import AnyObjective
from popo_lite.types import Group, Rollout

MeanLogps = Mapping[tuple[str, int], float]
"""Mean log-prob, nats per token, of every positive by (problem id, sample index)."""


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One trained rollout. `coefficient` multiplies what its tokens contribute to the policy term.

    With POPO and its kin that is their log-prob: negative for a positive, positive for a negative of `mixed`, 0 for a
    negative forwarded for its entropy alone; `weight` is w_i, 0 for negatives. With GRPO it is the loss of
    `objective.grpo.surrogate`, which takes `advantage`.
    """

    rollout: Rollout
    coefficient: float
    weight: float = 0.0
    advantage: float = 0.0
    counts_in_entropy: bool = True


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that a step trains on. `sample_sizes` holds (effective sample size, positives) of each prompt in P+."""

    sequences: tuple[TrainSequence, ...]
    normalizers: StepNormalizers
    sample_sizes: tuple[tuple[float, int], ...]

    def anchored(self, recipe: AnyObjective) -> list[int]:
        """Indices of the sequences that the pass before the update forwards.

        For the similarity term those with a weight, by the siamese; for a KL term all, by the base.
        """
        weighted = [index for index, sequence in enumerate(self.sequences) if sequence.weight]
        return (
            weighted
            if getattr(recipe, "similarity_coef", 0.0)
            else list(range(len(self.sequences)))
            if getattr(recipe, "kl_coef", 0.0)
            else []
        )

    def anchored_tokens(self, recipe: AnyObjective) -> int:
        """Tokens of that pass, prompts included."""
        return sum(self.sequences[index].rollout.tokens for index in self.anchored(recipe))


def teaching_groups(groups: Sequence[Group], recipe: AnyObjective) -> list[Group]:
    """The groups that a step may train on: with `skip_all_right` those with an answer that is not positive."""
    return [
        group
        for group in groups
        if not getattr(recipe, "skip_all_right", False)
        or len(group.positives(recipe.reward_threshold)) < len(group.rollouts)
    ]


def plan_step(
    groups: Sequence[Group], recipe: AnyObjective, *, mean_logps: MeanLogps, max_completion_length: int
) -> StepPlan | None:
    """What a step trains on; None where there is nothing to learn: see `nothing_to_learn`."""
    if recipe.algorithm == "grpo":
        return _plan_by_advantage(groups, recipe, max_completion_length)
    return _plan_by_positives(groups, recipe, mean_logps, max_completion_length)


def nothing_to_learn(recipe: AnyObjective) -> str:
    """Why a step has no plan."""
    if recipe.algorithm == "grpo":
        return "no prompt had answers of different rewards"
    return (
        "no prompt had both right and wrong answers"
        if getattr(recipe, "skip_all_right", False)
        else "no prompt had a positive"
    )


def _plan_by_positives(
    groups: Sequence[Group], recipe: AnyObjective, mean_logps: MeanLogps, max_completion_length: int
) -> StepPlan | None:
    """POPO, RAFT and the mixed objective: positives by weight, negatives for their entropy or to be lowered."""
    rewarded = [found for group in groups if (found := list(group.positives(recipe.reward_threshold)))]
    if not rewarded:
        return None
    negatives = [found for group in groups if (found := _negatives(group, recipe))]
    positives = [rollout for found in rewarded for rollout in found]
    normalizers = _normalizers(rewarded, max_completion_length)
    per_prompt = [
        positive_weights(
            [mean_logps[rollout.prompt.problem.id, rollout.index] for rollout in found],
            [_length(rollout) for rollout in found],
            [rollout.reward.value for rollout in found],
            recipe,
        )
        for found in rewarded
    ]
    weights = torch.cat(per_prompt)
    coefficients = -nll_coefficients(weights, [_length(rollout) for rollout in positives], normalizers, recipe)
    sequences = [
        TrainSequence(rollout=rollout, coefficient=coefficient, weight=weight)
        for rollout, coefficient, weight in zip(positives, coefficients.tolist(), weights.tolist(), strict=True)
    ]
    if recipe.algorithm == "mixed" and negatives:
        lowered = _lowered(negatives, recipe, max_completion_length)
    else:
        lowered = [TrainSequence(rollout=rollout, coefficient=0.0) for found in negatives for rollout in found]
    if recipe.algorithm == "mixed" or getattr(recipe, "entropy_over", "positives") == "all":
        sequences += [
            replace(one, counts_in_entropy=getattr(recipe, "entropy_over", "positives") == "all") for one in lowered
        ]
    counted = [sequence.rollout for sequence in sequences if sequence.counts_in_entropy]
    return StepPlan(
        sequences=tuple(sequences),
        normalizers=replace(normalizers, entropy_tokens=sum(map(_length, counted))),
        sample_sizes=tuple((effective_sample_size(w), len(w)) for w in per_prompt),
    )


def _negatives(group: Group, recipe: AnyObjective) -> list[Rollout]:
    """Rollouts at or below the threshold; for the mixed objective only graded ones, as the rest may be right."""
    return [
        rollout
        for rollout in group.rollouts
        if rollout.reward.value <= recipe.reward_threshold
        and (rollout.reward.outcome.is_graded or recipe.algorithm != "mixed")
    ]


def _lowered(
    negatives: Sequence[Sequence[Rollout]], recipe: AnyObjective, max_completion_length: int
) -> list[TrainSequence]:
    """Negatives of the mixed objective: uniform weights by prompt, and normalisers of their own."""
    rollouts = [rollout for found in negatives for rollout in found]
    weights = torch.tensor([1 / len(found) for found in negatives for _ in found], dtype=torch.float64)
    normalizers = _normalizers(negatives, max_completion_length)
    coefficients = nll_coefficients(weights, [_length(rollout) for rollout in rollouts], normalizers, recipe)
    return [
        TrainSequence(rollout=rollout, coefficient=getattr(recipe, "negative_weight", 0.1) * coefficient)
        for rollout, coefficient in zip(rollouts, coefficients.tolist(), strict=True)
    ]


def _plan_by_advantage(groups: Sequence[Group], recipe: AnyObjective, max_completion_length: int) -> StepPlan | None:
    """GRPO: every graded answer counts in the normalisers; those that move nothing are not forwarded."""
    graded = [rollout for group in groups for rollout in group.rollouts if rollout.reward.outcome.is_graded]
    sequences = []
    for group in groups:
        rewards = [r.reward.value if r.reward.outcome.is_graded else None for r in group.rollouts]
        advantages = group_advantages(rewards, getattr(recipe, "scale_rewards", "group"))
        sequences += [
            (rollout, advantage)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
            if advantage or (getattr(recipe, "kl_coef", 0.0) and rollout.reward.outcome.is_graded)
        ]
    if not sequences:
        return None
    lengths = [_length(rollout) for rollout, _ in sequences]
    coefficients = length_coefficients(
        lengths,
        max_completion_length=max_completion_length,
        sequences=len(graded),
        tokens=sum(map(_length, graded)),
        normalization=getattr(recipe, "loss_type", "grpo"),
    )
    return StepPlan(
        sequences=tuple(
            TrainSequence(rollout=rollout, coefficient=coefficient, advantage=advantage)
            for (rollout, advantage), coefficient in zip(sequences, coefficients, strict=True)
        ),
        normalizers=_normalizers([[rollout for rollout, _ in sequences]], max_completion_length),
        sample_sizes=(),
    )


def _normalizers(by_prompt: Sequence[Sequence[Rollout]], max_completion_length: int) -> StepNormalizers:
    rollouts = [rollout for found in by_prompt for rollout in found]
    tokens = sum(map(_length, rollouts))
    return StepNormalizers(
        prompts=len(by_prompt),
        positives=len(rollouts),
        positive_tokens=tokens,
        entropy_tokens=tokens,
        max_completion_length=max_completion_length,
    )


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.token_ids)
