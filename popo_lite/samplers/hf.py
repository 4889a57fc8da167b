"""Sampling from the trainer's own model: slow and simple, without a second copy of anything, on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy
from popo_lite.samplers.base import Progress, Request, Sampler, SamplingParams, make_completion
from popo_lite.seeding import stream_seed
from popo_lite.types import Completion, Prompt

COMPACT_BELOW = 0.5
"""Finished sequences leave the batch when at most this fraction of it is still running."""


@dataclass(kw_only=True)
class _Sequence:
    """A completion while it is decoded. `uniforms` [max tokens] is its whole random stream."""

    prompt: Prompt
    uniforms: Any
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    stopped: bool = False


class HFSampler(Sampler):
    """Decodes batches of left-padded sequences with a KV cache over the policy's own weights."""

    engine = "hf"

    def __init__(
        self,
        policy: Policy,
        *,
        text: Callable[[Sequence[int]], str],
        batch_size: int,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._policy, self._text, self._batch_size, self._notify = policy, text, batch_size, notify
        self.policy_version = policy.version

    def sync(self, policy_version: int) -> None:
        """Note the version: the weights are shared, so nothing has to move."""
        self.policy_version = policy_version

    @torch.no_grad()
    def _complete(self, requests: Sequence[Request], params: SamplingParams, finished: Progress) -> list[Completion]:
        was_training = self._policy.model.training
        self._policy.model.eval()
        sequences = [
            _Sequence(prompt=request.prompt, uniforms=_uniforms(params.max_completion_length, request.key))
            for request in requests
        ]
        # Prompts of like length share a batch, which saves padding; the draws do not depend on it.
        waiting = sorted(sequences, key=lambda sequence: len(sequence.prompt.token_ids))
        try:
            while waiting:
                batch, rest = waiting[: self._batch_size], waiting[self._batch_size :]
                if self._decoded(batch, params, finished):
                    waiting = rest
        finally:
            self._policy.model.train(was_training)
        stop_ids = self._policy.stop_ids
        return [make_completion(one.token_ids, one.logps, stop_ids, self._text) for one in sequences]

    def _decoded(self, batch: list[_Sequence], params: SamplingParams, finished: Progress) -> bool:
        """Decode `batch`; return False if memory ran out, and decode half as many sequences at once from then on.

        Draws do not depend on what else is in the batch, so the answers are the same.
        """
        try:
            self._decode(batch, params, finished)
            return True
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
        finished(-sum(sequence.stopped for sequence in batch))
        for sequence in batch:
            sequence.token_ids, sequence.logps, sequence.stopped = [], [], False
        release_memory()
        self._batch_size = (len(batch) + 1) // 2
        self._notify(
            f"memory ran out while {len(batch)} sequences were sampled at once; {self._batch_size} at once from now on"
        )
        return False

    def _decode(self, sequences: list[_Sequence], params: SamplingParams, finished: Progress) -> None:
        """Fill in `sequences` token by token."""
        device = self._policy.device
        hidden, cache, mask = self._prefill(sequences)
        running = list(sequences)
        uniforms = torch.from_numpy(np.stack([sequence.uniforms for sequence in sequences])).to(device)
        alive = [True] * len(running)
        for position in range(params.max_completion_length):
            tokens, logps = _draw(self._next_logp(hidden, params.temperature), uniforms[:, position], params.top_p)
            # One transfer a token; float64 holds every token id exactly.
            drawn = torch.stack([tokens.double(), logps.double()]).tolist()
            ended = 0
            for row, (sequence, token, logp) in enumerate(zip(running, *drawn, strict=True)):
                if not alive[row]:
                    continue
                if not math.isfinite(logp):
                    raise EngineError(
                        "the model's log-probs are not finite, so its weights or activations are not either",
                        where=f"problem {sequence.prompt.problem.id}",
                        next_step="go back to an earlier checkpoint with a lower optimizer.learning_rate",
                    )
                sequence.token_ids.append(int(token))
                sequence.logps.append(logp)
                sequence.stopped = int(token) in self._policy.stop_ids
                alive[row] = not sequence.stopped
                ended += sequence.stopped
            finished(ended)
            if not any(alive) or position + 1 == params.max_completion_length:
                break
            if sum(alive) <= COMPACT_BELOW * len(running):
                keep = [row for row, is_alive in enumerate(alive) if is_alive]
                running, alive = [running[row] for row in keep], [True] * len(keep)
                rows = torch.tensor(keep, device=device)
                cache = _rows_of(cache, rows)
                tokens, mask, uniforms = tokens[rows], mask[rows], uniforms[rows]
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            output = self._policy.run_trunk(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            hidden, cache = output.last_hidden_state[:, -1], output.past_key_values
        if any(alive):
            finished(sum(alive))

    def _prefill(self, sequences: Sequence[_Sequence]) -> tuple[Tensor, Any, Tensor]:
        """Run each distinct prompt once, repeat its cache for its samples: (hidden [B, D], cache, mask [B, T])."""
        device = self._policy.device
        distinct = list(dict.fromkeys(sequence.prompt.token_ids for sequence in sequences))
        width = max(map(len, distinct))
        ids = torch.full((len(distinct), width), self._policy.pad_id)
        mask = torch.zeros((len(distinct), width), dtype=torch.long)
        for row, prompt in enumerate(distinct):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        output = self._policy.run_trunk(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), use_cache=True
        )
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[sequence.prompt.token_ids] for sequence in sequences], device=device)
        return output.last_hidden_state[:, -1][rows], _rows_of(output.past_key_values, rows), mask[rows]

    def _next_logp(self, hidden: Tensor, temperature: float) -> Tensor:
        """Return log-probs [B, V] of the next token after `hidden` [B, D] under the sampling temperature."""
        head = self._policy.head
        return torch.log_softmax(head.logits(hidden) * (head.temperature / temperature), dim=-1)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Return the cache of the sequences `rows`: transformers' caches, or the nested tuples of patched models."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return cache
    return tuple(tuple(part[rows] for part in layer) for layer in cache)


def _uniforms(count: int, key: tuple[int | str, ...]) -> Any:
    """Return `count` float64 uniforms in [0, 1), a pure function of `key`."""
    return np.random.Generator(np.random.Philox(key=stream_seed(*key))).random(count)


def _draw(logp: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample by inverse CDF from the nucleus: `logp` [B, V], `uniforms` [B] -> (token ids [B], their log-probs [B]).

    The log-probs are those of the whole distribution, whatever `top_p` cuts off.
    """
    # Summed in float64: in float32 the tail of a large vocabulary would be lost in the sum's rounding.
    probabilities = logp.double().exp()
    cumulative = (probabilities if top_p == 1 else _nucleus(probabilities, top_p)).cumsum(dim=-1)
    # Scaled by the total, 1 up to rounding where nothing is cut off, so that the last uniforms cannot fall off the end.
    threshold = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logp.shape[-1] - 1)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return `probabilities` [B, V] with 0 for all but the fewest likeliest tokens that sum to at least `top_p`."""
    sorted_probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    return torch.zeros_like(probabilities).scatter(-1, order, sorted_probabilities.where(before < top_p, 0.0))
