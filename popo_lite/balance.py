"""Divide what a step trains on over the ranks, so that they forward like numbers of tokens. Free of torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from popo_lite.types import Rollout

WHOLE = 0.05
"""A prompt with answers of at most this fraction of a rank's fair share is never divided."""


def idle_ranks(prompts: int, ranks: int) -> str | None:
    """Return a notice if a step has fewer prompts than ranks, so that some ranks sample nothing."""
    if (idle := ranks - prompts) <= 0:
        return None
    return f"{idle} of {ranks} ranks {'has' if idle == 1 else 'have'} no prompts: data.prompts_per_step = {prompts}"


def divide(rollouts: Sequence[Rollout], ranks: int, *, shared_prefix: bool) -> list[list[int]]:
    """Return for each rank the positions in `rollouts` of those that it trains on, in order.

    A prompt goes with all its answers to the rank that has the fewest tokens, the largest first. One that would make
    that rank the fullest is divided by answers: each rank that gets some of them forwards the prompt. With
    `shared_prefix` equal answers are forwarded once, so they stay together.
    """
    prompts: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, rollout in enumerate(rollouts):
        answers = prompts.setdefault(rollout.prompt.token_ids if shared_prefix else index, {})
        answers.setdefault(rollout.completion.token_ids if shared_prefix else index, []).append(index)

    def tokens(members: Sequence[int]) -> int:
        return len(rollouts[members[0]].completion.token_ids)

    pieces = []
    for distinct in prompts.values():
        members = sorted(distinct.values(), key=tokens, reverse=True)
        prompt = len(rollouts[members[0][0]].prompt.token_ids)
        pieces.append((prompt + sum(map(tokens, members)), prompt, members))
    share, loads = sum(total for total, _, _ in pieces) / ranks, [0] * ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for total, prompt, members in sorted(pieces, key=lambda piece: -piece[0]):
        least = min(range(ranks), key=loads.__getitem__)
        if total <= WHOLE * share or loads[least] + total <= max(share, *loads):
            loads[least] += total
            parts[least] += [index for same in members for index in same]
            continue
        added = [prompt] * ranks  # what the next answer costs a rank besides its own tokens
        for same in members:
            rank = min(range(ranks), key=lambda rank: loads[rank] + added[rank])
            loads[rank] += tokens(same) + added[rank]
            added[rank] = 0
            parts[rank] += same
    return [sorted(part) for part in parts]
