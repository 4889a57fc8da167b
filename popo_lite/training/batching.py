"""Which rollouts are trained on, with what coefficients, and how they are cut into micro-batches.

Everything that couples the sequences of a step (weights, normalisers, noise) is fixed here, before the first
forward pass, so that the cut cannot change the update.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.objective.credit import effective_sample_size, positive_weights
from popo_lite.objective.losses import StepNormalizers, nll_coefficients
from popo_lite.recipe import ObjectiveRecipe
from popo_lite.types import Group, Rollout


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One trained rollout with its coefficients: `weight` is w_i, 0 for a negative forwarded for its entropy."""

    rollout: Rollout
    weight: float
    nll_coefficient: float


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that a step trains on. `sample_sizes` holds (effective sample size, positives) of each prompt in P+."""

    sequences: tuple[TrainSequence, ...]
    normalizers: StepNormalizers
    sample_sizes: tuple[tuple[float, int], ...]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B sequences one behind another in a row of T tokens, without padding, with N completion tokens in all.

    `input_ids` [T]; `lengths` of the sequences in tokens; `predicting` [N] are the positions whose hidden states
    predict the completion tokens `targets` [N]; `completions` are where each sequence's completion begins and ends;
    `sequence_of_token` [N] indexes the B sequences; `sampler_logps` [N]; `members` are positions in what was cut.
    """

    members: tuple[int, ...]
    input_ids: Tensor
    lengths: tuple[int, ...]
    predicting: Tensor
    targets: Tensor
    completions: tuple[tuple[int, int], ...]
    sequence_of_token: Tensor
    sampler_logps: Tensor

    def mean_features(self, hidden: Tensor) -> Tensor:
        """Mean features f [B, D]: the mean of `hidden` [T, D] over each completion's own tokens, at least float32."""
        # The sums are made in float32 without a copy of the whole row in float32.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sizes: list[int] = []
        for length, (start, end) in zip(self.lengths, self.completions, strict=True):
            sizes += [length - (end - start), end - start]
        return torch.stack([part.mean(dim=0, dtype=dtype) for part in hidden.split(sizes)[1::2]])

    def sequence_means(self, values: Tensor) -> Tensor:
        """[N] values of completion tokens -> their means by sequence [B]."""
        counts = values.new_tensor([end - start for start, end in self.completions])
        return values.new_zeros(len(self.members)).index_add(0, self.sequence_of_token, values) / counts


def plan_step(
    groups: Sequence[Group],
    recipe: ObjectiveRecipe,
    *,
    mean_logps: Mapping[tuple[str, int], float],
    max_completion_tokens: int,
) -> StepPlan | None:
    """What a step trains on; None where no prompt has a positive.

    `mean_logps` gives the mean log-prob (nats per token) of every positive by (problem id, sample index).
    """
    rewarded = [(group, group.positives(recipe.reward_threshold)) for group in groups]
    rewarded = [(group, positives) for group, positives in rewarded if positives]
    if not rewarded:
        return None
    positives = [rollout for _, found in rewarded for rollout in found]
    negatives = (
        [r for group in groups for r in group.rollouts if r.reward.value <= recipe.reward_threshold]
        if recipe.entropy_over == "all"
        else []
    )
    lengths = [len(rollout.completion.token_ids) for rollout in positives]
    normalizers = StepNormalizers(
        prompts=len(rewarded),
        positives=len(positives),
        positive_tokens=sum(lengths),
        entropy_tokens=sum(lengths) + sum(len(rollout.completion.token_ids) for rollout in negatives),
        max_completion_tokens=max_completion_tokens,
    )
    per_prompt = [
        positive_weights(
            [mean_logps[rollout.prompt.problem.id, rollout.index] for rollout in found],
            [len(rollout.completion.token_ids) for rollout in found],
            [rollout.reward.value for rollout in found],
            recipe,
        )
        for _, found in rewarded
    ]
    weights = torch.cat(per_prompt)
    coefficients = nll_coefficients(weights, lengths, normalizers, recipe)
    sequences = [
        TrainSequence(rollout=rollout, weight=weight, nll_coefficient=coefficient)
        for rollout, weight, coefficient in zip(positives, weights.tolist(), coefficients.tolist(), strict=True)
    ]
    sequences += [TrainSequence(rollout=rollout, weight=0.0, nll_coefficient=0.0) for rollout in negatives]
    return StepPlan(
        sequences=tuple(sequences),
        normalizers=normalizers,
        sample_sizes=tuple((effective_sample_size(w), len(w)) for w in per_prompt),
    )


def cut(rollouts: Sequence[Rollout], members: Sequence[int], *, budget_tokens: int) -> list[tuple[int, ...]]:
    """Put `members` of `rollouts` into micro-batches of at most `budget_tokens`, by first fit, longest first.

    A sequence longer than the budget goes alone. Recipes are refused whose longest sequence exceeds theirs, so it
    happens only where the budget had to be lowered since.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(members, key=lambda index: (-rollouts[index].tokens, index)):
        wanted = rollouts[index].tokens
        place = next((place for place, left in enumerate(room) if left >= wanted), None)
        if place is None:
            batches.append([index])
            room.append(budget_tokens - wanted)
        else:
            batches[place].append(index)
            room[place] -= wanted
    return [tuple(batch) for batch in batches]


def collate(rollouts: Sequence[Rollout], members: Sequence[int], *, device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch: `members` index `rollouts`."""
    chosen = [rollouts[index] for index in members]
    lengths = tuple(rollout.tokens for rollout in chosen)
    ends = tuple(itertools.accumulate(lengths))
    counts = [len(rollout.completion.token_ids) for rollout in chosen]
    completions = tuple((end - count, end) for end, count in zip(ends, counts, strict=True))
    ids = torch.tensor([token for r in chosen for token in r.prompt.token_ids + r.completion.token_ids], device=device)
    answering = torch.cat([torch.arange(start, end, device=device) for start, end in completions])
    return MicroBatch(
        members=tuple(members),
        input_ids=ids,
        lengths=lengths,
        predicting=answering - 1,
        targets=ids[answering],
        completions=completions,
        sequence_of_token=torch.arange(len(chosen), device=device).repeat_interleave(
            torch.tensor(counts, device=device)
        ),
        sampler_logps=torch.tensor([logp for r in chosen for logp in r.completion.sampler_logps], device=device),
    )
