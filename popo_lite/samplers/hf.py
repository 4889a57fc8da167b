"""Sampling from the trainer's own model: slow and simple, on every machine."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.merged import kept_weights
from popo_lite.samplers.base import Answers, Progress, Request, Requests, Sampler, SamplingParams

COMPACT_BELOW = 0.5
"""Finished sequences leave the batch when at most this fraction of it is still running."""

Drawn = tuple[list[int], list[float]]
"""Token ids and log-probs of an answer that is being decoded."""


class HFSampler(Sampler):
    """Decodes batches of left-padded sequences with a KV cache over the policy's own weights."""

    engine = "hf"

    def _open(self) -> None:
        self._batch_size = self._recipe.rollout.max_num_seqs

    def drawing(self) -> AbstractContextManager[None]:  # noqa: D102
        return self._policy.gathered()

    @torch.no_grad()
    def _complete(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        self._policy.model.eval()
        with kept_weights(self._policy.model):
            return self._decode_all(requests, params, finished)

    def _decode_all(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        """Decode all requests, in smaller batches from now on if memory runs out."""
        answers: list[Drawn] = [([], []) for _ in requests]
        # Prompts of like length share a batch, which saves padding; the draws do not depend on it.
        waiting = sorted(range(len(requests)), key=lambda index: len(requests[index].prompt.token_ids))
        while waiting:
            batch = waiting[: self._batch_size]
            try:
                self._decode([requests[i] for i in batch], [answers[i] for i in batch], params, finished)
                del waiting[: len(batch)]
                continue
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            # Decode the same sequences again, half as many at once; their answers do not change.
            finished(-sum(self._has_ended(requests[i], answers[i][0]) for i in batch))
            for i in batch:
                answers[i] = ([], [])
            release_memory()
            self._batch_size = (len(batch) + 1) // 2
            self._notify(f"memory ran out with {len(batch)} sequences at once; {self._batch_size} at once from now on")
        return answers

    def _decode(self, requests: Requests, running: list[Drawn], params: SamplingParams, finished: Progress) -> None:
        """Append token by token to `running`, the answers to `requests`."""
        device, head, limit = self._policy.device, self._policy.head, max(request.max_tokens for request in requests)
        hidden, cache, mask = self._prefill([request.prompt.token_ids for request in requests])
        # An ended sequence may be decoded on with the others: not beyond the positions that the model has.
        last_position = max(len(request.prompt.token_ids) + request.max_tokens for request in requests) - 1
        # A sequence's random stream [limit] depends on its seed alone.
        streams = [np.random.Generator(np.random.Philox(key=seed)).random(limit) for _, seed, _ in requests]
        uniforms = torch.from_numpy(np.stack(streams)).to(device)
        alive = list(range(len(running)))
        for position in range(limit):
            logp = torch.log_softmax(head.logits(hidden) * (head.temperature / params.temperature), dim=-1)
            tokens, logps = _draw(logp, uniforms[:, position], params.top_p)
            # One transfer a token; float64 holds every token id exactly.
            drawn_ids, drawn_logps = torch.stack([tokens.double(), logps.double()]).tolist()
            for row in alive:
                token_ids, token_logps = running[row]
                token_ids.append(int(drawn_ids[row]))
                token_logps.append(drawn_logps[row])
            before = len(alive)
            alive = [row for row in alive if not self._has_ended(requests[row], running[row][0])]
            finished(before - len(alive))
            if not alive:
                break
            if len(alive) <= COMPACT_BELOW * len(running):
                rows = torch.tensor(alive, device=device)
                running, requests = [running[row] for row in alive], [requests[row] for row in alive]
                alive = list(range(len(alive)))
                cache, tokens, mask, uniforms = _rows_of(cache, rows), tokens[rows], mask[rows], uniforms[rows]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = self._policy.run_trunk(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=(mask.sum(dim=1, keepdim=True) - 1).clamp(max=last_position),
                past_key_values=cache,
                use_cache=True,
            )
            hidden, cache = output.last_hidden_state[:, -1], output.past_key_values

    def _has_ended(self, request: Request, token_ids: list[int]) -> bool:
        return bool(token_ids) and (token_ids[-1] in self._policy.stop_ids or len(token_ids) == request.max_tokens)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Tensor, Any, Tensor]:
        """Run each distinct prompt once, repeat its cache for its samples: (hidden [B, D], cache, mask [B, T])."""
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
        ids = pad_left([torch.tensor(prompt) for prompt in row_of])  # with 0, an id of every model: the mask hides it
        mask = pad_left([torch.ones(len(prompt), dtype=torch.long) for prompt in row_of])
        ids, mask = ids.to(self._policy.device), mask.to(self._policy.device)
        output = self._policy.run_trunk(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0), use_cache=True
        )
        rows = torch.tensor([row_of[prompt] for prompt in prompts], device=mask.device)
        return output.last_hidden_state[:, -1][rows], _rows_of(output.past_key_values, rows), mask[rows]


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Return the cache of the sequences `rows`: transformers' caches, or the nested tuples of patched models."""
    if hasattr(cache, "reorder_cache"):  # unlike `batch_select_indices` it also selects recurrent states
        cache.reorder_cache(rows)
        return cache
    return tuple(tuple(part[rows] for part in layer) for layer in cache)


def _draw(logp: Tensor, uniforms: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Sample by inverse CDF from the nucleus: `logp` [B, V], `uniforms` [B] -> (token ids [B], their log-probs [B]).

    The nucleus are the fewest likeliest tokens that sum to at least `top_p`. The log-probs are those of the whole
    distribution, whatever `top_p` cuts off.
    """
    # Summed in float64: in float32 the tail of a large vocabulary would be lost in the sum's rounding.
    probabilities = logp.double().exp()
    if top_p < 1:
        likeliest, order = probabilities.sort(dim=-1, descending=True, stable=True)
        likeliest[likeliest.cumsum(dim=-1) - likeliest >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, likeliest)
    cumulative = probabilities.cumsum(dim=-1)
    # Scaled by the total, 1 up to rounding if nothing is cut off, so that the last uniforms cannot fall off the end.
    threshold = uniforms[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logp.shape[-1] - 1)
    return tokens.squeeze(-1), logp.gather(-1, tokens).squeeze(-1)
