"""Micro-batches: sequences packed into rows, equal tokens of a prompt once, and smaller rows when memory runs out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy
from popo_lite.types import Rollout


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """B sequences in a row of T tokens without padding, with N completion tokens of the model's own in all.

    A shared prompt is there once, and so are equal answers to it. `members` are the sequences' positions in the list
    that was split. `row` holds (prompt, *answers), in tokens, for each prompt of `input_ids` [T], and `answer_of` which
    of these answers each of the prompt's sequences has. `own` holds for each sequence which tokens of its answer are
    the model's own, not an environment's; None if all are. `targets` [N] are these tokens, `lengths` how many of each
    sequence, `sequence_of_token` [N] indexes the B sequences; `sampler_logps` [N] are float64.
    """

    members: tuple[int, ...]
    input_ids: Tensor
    row: tuple[tuple[int, ...], ...]
    answer_of: tuple[tuple[int, ...], ...]
    own: tuple[Tensor | None, ...]
    targets: Tensor
    lengths: tuple[int, ...]
    sequence_of_token: Tensor
    sampler_logps: Tensor

    def predicting(self, hidden: Tensor) -> Tensor:
        """Return [N, D]: of `hidden` [T, D] the states that predict the model's own completion tokens.

        By slices: the gradient of an index that repeats a prompt's last state adds in no fixed order.
        """
        states: list[Tensor] = []
        for prompt, answer, own in self._split(hidden):
            predicting = [prompt[-1:], answer[:-1]]
            states += predicting if own is None else [torch.cat(predicting)[own]]
        return torch.cat(states)

    def mean_features(self, hidden: Tensor) -> Tensor:
        """Return [B, D]: the mean of `hidden` [T, D] over the model's own tokens, in at least float32."""
        # `mean` sums in float32 without a float32 copy of the whole row.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        answers = (answer if own is None else answer[own] for _, answer, own in self._split(hidden))
        return torch.stack([answer.mean(dim=0, dtype=dtype) for answer in answers])

    def by_sequence(self, values: Tensor) -> tuple[Tensor, ...]:
        """Split [N] values of the model's own tokens by sequence."""
        return tuple(values.split(self.lengths))

    def _split(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield each sequence's prompt and answer of `hidden` [T, D], and which tokens of the answer are its own."""
        parts, own = iter(hidden.split([length for block in self.row for length in block])), iter(self.own)
        for block, answer_of in zip(self.row, self.answer_of, strict=True):
            prompt, *answers = itertools.islice(parts, len(block))
            for index in answer_of:
                yield prompt, answers[index], next(own)


def by_prompt(rollouts: Sequence[Rollout], members: Sequence[int], *, shared_prefix: bool) -> list[list[int]]:
    """Group `members` of `rollouts` by what is computed together: a prompt's answers, or each alone."""
    groups: dict[object, list[int]] = {}
    for index in members:
        groups.setdefault(rollouts[index].prompt.token_ids if shared_prefix else index, []).append(index)
    return list(groups.values())


def pack(
    rollouts: Sequence[Rollout], members: Sequence[int], *, budget_tokens: int, shared_prefix: bool
) -> list[tuple[int, list[int]]]:
    """Pack `members` of `rollouts` into micro-batches, (tokens, members), of at most `budget_tokens` each.

    Equal answers count each, since the loss takes memory for each, and the plan must hold for distinct ones.
    First fit, longest first. The answers to a prompt stay together if they fit; else each part repeats the prompt. A
    sequence that is longer than the budget goes alone: recipes in which that can happen are refused, but the budget may
    have been lowered since.
    """
    parts: list[tuple[int, list[int]]] = []
    for group in by_prompt(rollouts, members, shared_prefix=shared_prefix):
        prompt = len(rollouts[group[0]].prompt.token_ids)
        answers = [(len(rollouts[index].completion.token_ids), [index]) for index in group]
        parts += [(prompt + tokens, part) for tokens, part in _first_fit(answers, budget_tokens - prompt)]
    return _first_fit(parts, budget_tokens)


def _first_fit(parts: Sequence[tuple[int, list[int]]], budget: int) -> list[tuple[int, list[int]]]:
    """Join parts, each (tokens, members), as long as they have at most `budget` tokens together."""
    joined: list[tuple[int, list[int]]] = []
    for tokens, members in sorted(parts, key=lambda part: (-part[0], part[1])):
        place = next((place for place, (taken, _) in enumerate(joined) if taken + tokens <= budget), len(joined))
        taken, before = joined[place] if place < len(joined) else (0, [])
        joined[place : place + 1] = [(taken + tokens, before + members)]
    return joined


def collate(
    rollouts: Sequence[Rollout], members: Sequence[int], *, device: torch.device, shared_prefix: bool
) -> MicroBatch:
    """Build the tensors of the micro-batch of `members`, which index `rollouts`."""
    ids: list[int] = []
    row: list[tuple[int, ...]] = []
    answer_of: list[tuple[int, ...]] = []
    order: list[int] = []
    for group in by_prompt(rollouts, members, shared_prefix=shared_prefix):
        answers = [rollouts[index].completion.token_ids for index in group]
        place = {answer: index for index, answer in enumerate(dict.fromkeys(answers))}
        parts = [rollouts[group[0]].prompt.token_ids, *place]
        ids += itertools.chain.from_iterable(parts)
        row.append(tuple(map(len, parts)))
        answer_of.append(tuple(place[answer] for answer in answers))
        order += group
    completions = [rollouts[index].completion for index in order]
    lengths = tuple(len(completion.sampler_logps) for completion in completions)
    positions = [completion.own_positions for completion in completions]
    return MicroBatch(
        members=tuple(order),
        input_ids=torch.tensor(ids, device=device),
        row=tuple(row),
        answer_of=tuple(answer_of),
        own=tuple(None if own is None else torch.tensor(own, device=device) for own in positions),
        targets=torch.tensor([token for one in completions for token in one.own_token_ids], device=device),
        lengths=lengths,
        sequence_of_token=torch.arange(len(order), device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        ),
        sampler_logps=torch.tensor(
            [logp for one in completions for logp in one.sampler_logps], dtype=torch.float64, device=device
        ),
    )


class MicroBatches:
    """Splits rollouts into micro-batches of at most `budget_tokens`, which is lowered when GPU memory runs out.

    `tokens` counts, by stage, what was forwarded since it was cleared. With `shared_prefix` a prompt is forwarded once
    for all its answers in a micro-batch, and so are equal answers. `memory_advice` returns what else would let a single
    sequence fit; it ends the error about one that does not.

    The ranks of a sharded base run the same number of passes: those with fewer micro-batches do idle ones.
    """

    def __init__(
        self, budget_tokens: int, policy: Policy, *, notify: Callable[[str], None], memory_advice: Callable[[], str]
    ) -> None:
        self.budget_tokens, self._policy, self._ranks = budget_tokens, policy, policy.sharded_over
        self.tokens: Counter[str] = Counter()
        self._notify, self._memory_advice = notify, memory_advice

    def run(
        self,
        rollouts: Sequence[Rollout],
        work: Callable[[MicroBatch], None],
        *,
        stage: str,
        restart: Callable[[int], None] | None = None,
    ) -> int:
        """Call `work` with micro-batches that hold every rollout once; return how many there were.

        If `work` runs out of memory the budget is lowered, for good, and what is not done is split again. If `work` may
        leave something behind then, `restart` must undo all that was done: it gets the number of sequences that were
        done before, and all are done again. Raises EngineError if a single sequence does not fit, and with a sharded
        base if any micro-batch does not: the other ranks wait in the middle of the same pass.
        """
        self._policy.start_passes()
        left, micro_batches, forwarded = set(range(len(rollouts))), 0, 0
        waiting = self._pack(rollouts, left)
        passes = max(self._ranks.gather(len(waiting)))
        while waiting:
            tokens, members = waiting[0]
            try:
                device, shared_prefix = self._policy.device, self._policy.shared_prefix
                batch = collate(rollouts, members, device=device, shared_prefix=shared_prefix)
                with self._ranks.together():
                    work(batch)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
            else:
                waiting.pop(0)
                left.difference_update(members)
                micro_batches, forwarded = micro_batches + 1, forwarded + len(batch.input_ids)
                continue
            # Outside the except block: the caught error would keep the failed attempt's tensors alive.
            if restart is not None:
                restart(len(rollouts) - len(left))
                left, micro_batches, forwarded = set(range(len(rollouts))), 0, 0
            release_memory()
            if len(members) == 1 or self._ranks.size > 1:
                alone = "a single sequence of " if len(members) == 1 else ""
                raise EngineError(
                    f"the GPU ran out of memory in the {stage} pass of {alone}{tokens} tokens",
                    where=f"problem {rollouts[members[0]].prompt.problem.id}",
                    next_step=self._memory_advice(),
                )
            self.budget_tokens = (tokens + 1) // 2
            self._notify(
                f"memory ran out in the {stage} pass of {tokens:,} tokens; the step goes on, with micro-batches of at "
                f"most {self.budget_tokens:,} from now on"
            )
            waiting = self._pack(rollouts, left)
        for _ in range(micro_batches, passes):
            with self._ranks.together():
                self._policy.idle_pass()
        self.tokens[stage] += forwarded
        return micro_batches

    def _pack(self, rollouts: Sequence[Rollout], members: Iterable[int]) -> list[tuple[int, list[int]]]:
        shared, budget = self._policy.shared_prefix, self.budget_tokens
        if self._ranks.size > 1 and self._policy.packing == "off":
            budget = 1  # one sequence each: the policy would run a pass for every sequence
        return pack(rollouts, sorted(members), budget_tokens=budget, shared_prefix=shared)
