"""Which rollouts are trained on, with what coefficients, and how they are cut into micro-batches.

Everything that couples the sequences of a step (weights, normalisers, noise) is fixed here, before the first
forward pass, so that the cut cannot change the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.errors import PopoError
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

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.rollout.prompt.token_ids) + len(self.rollout.completion.token_ids)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that a step trains on. `sample_sizes` holds (effective sample size, positives) of each prompt in P+."""

    sequences: tuple[TrainSequence, ...]
    normalizers: StepNormalizers
    sample_sizes: tuple[tuple[float, int], ...]


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B right-padded sequences, T tokens wide, with N completion tokens in all.

    `input_ids`, `attention_mask` [B, T] (1 = real); `predicting` [N] and `answering` [N] index the flattened [B * T]
    positions whose hidden states predict, respectively follow, each completion token; `targets` [N] are those tokens;
    `sequence_of_token` [N] indexes the B sequences; `lengths` [B] counts completion tokens; `members` are positions
    in the plan's `sequences`.
    """

    members: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    predicting: Tensor
    answering: Tensor
    targets: Tensor
    sequence_of_token: Tensor
    lengths: Tensor
    sampler_logps: Tensor

    def mean_features(self, hidden: Tensor) -> Tensor:
        """Mean features f [B, D]: mean of `hidden` [B, T, D] over each completion's own tokens, in at least float32."""
        flat = hidden.reshape(-1, hidden.shape[-1])[self.answering]
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        sums = flat.new_zeros(len(self.members), flat.shape[-1]).index_add(0, self.sequence_of_token, flat)
        return sums / self.lengths[:, None]


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


def cut(rollouts: Sequence[Rollout], *, budget_tokens: int) -> list[tuple[int, ...]]:
    """Indices of `rollouts` in micro-batches of at most `budget_tokens`, padding included; alike lengths together."""
    lengths = [len(rollout.prompt.token_ids) + len(rollout.completion.token_ids) for rollout in rollouts]
    batches: list[list[int]] = []
    for index in sorted(range(len(rollouts)), key=lambda i: -lengths[i]):
        if lengths[index] > budget_tokens:
            raise PopoError(
                f"a sequence of {lengths[index]} tokens exceeds train.tokens_per_microbatch = {budget_tokens}",
                where=f"problem {rollouts[index].prompt.problem.id}",
                next_step=f"--set train.tokens_per_microbatch={lengths[index]}",
            )
        # Sorted longest first, so the first member is as wide as the batch.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]


def collate(rollouts: Sequence[Rollout], members: Sequence[int], *, pad_id: int, device: torch.device) -> MicroBatch:
    """The tensors of one micro-batch: `members` index `rollouts`."""
    chosen = [rollouts[index] for index in members]
    width = max(len(r.prompt.token_ids) + len(r.completion.token_ids) for r in chosen)
    ids = torch.full((len(chosen), width), pad_id)
    mask = torch.zeros((len(chosen), width), dtype=torch.long)
    answering: list[int] = []
    owner: list[int] = []
    for row, rollout in enumerate(chosen):
        tokens = rollout.prompt.token_ids + rollout.completion.token_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        answering += range(row * width + len(rollout.prompt.token_ids), row * width + len(tokens))
        owner += [row] * len(rollout.completion.token_ids)
    positions = torch.tensor(answering, device=device)
    ids = ids.to(device)
    return MicroBatch(
        members=tuple(members),
        input_ids=ids,
        attention_mask=mask.to(device),
        predicting=positions - 1,
        answering=positions,
        targets=ids.reshape(-1)[positions],
        sequence_of_token=torch.tensor(owner, device=device),
        lengths=torch.tensor([len(r.completion.token_ids) for r in chosen], device=device),
        sampler_logps=torch.tensor([logp for r in chosen for logp in r.completion.sampler_logps], device=device),
    )
