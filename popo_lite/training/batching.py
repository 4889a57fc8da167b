"""How the rollouts that are trained on are cut into micro-batches, rows of whole sequences without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.types import Rollout


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

    def by_sequence(self, values: Tensor) -> tuple[Tensor, ...]:
        """[N] values of completion tokens, sequence by sequence."""
        sizes = [end - start for start, end in self.completions]
        return tuple(values.split(sizes))

    def sequence_means(self, values: Tensor) -> Tensor:
        """[N] values of completion tokens -> their means by sequence [B]."""
        counts = values.new_tensor([end - start for start, end in self.completions])
        return values.new_zeros(len(self.members)).index_add(0, self.sequence_of_token, values) / counts


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
