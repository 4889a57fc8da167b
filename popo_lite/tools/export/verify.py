"""Whether a merged model is the trained policy: its greedy answers, and its log-probs of the policy's answers.

Rounding alone makes greedy answers part where two tokens are nearly tied, and the longer the answers the oftener.
So a merge is judged by log-probs, and by how far apart the two tokens are where answers do part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from popo_lite.errors import ExportError
from popo_lite.fused import Head, score
from popo_lite.policy.policy import Policy, head_of

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""(description, total) -> a context that yields what is to be told each amount done, as `console.output.progress`."""

BATCH = 16
ROUNDING = {"float64": 1e-6, "float32": 1e-4, "float16": 4e-3, "bfloat16": 2e-2}
"""Mean difference of log-probs in nats that rounding may make: ten times or more what was measured on small models."""
WORST_OVER_MEAN = 50
"""A single token may differ by so many times more."""


@contextmanager
def silent(description: str, total: int | None) -> Iterator[Callable[[int], None]]:  # noqa: ARG001 - a Progress
    """No progress is shown."""
    yield lambda _: None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer, its end-of-sequence token included, and the log-prob of each token in nats."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A causal language model as its decoder and its LM head, and the tokens at which its answers end."""

    trunk: nn.Module
    head: Head
    stop_ids: frozenset[int]
    pad_id: int
    device: torch.device

    @classmethod
    def of_policy(cls, policy: Policy) -> Self:
        """The policy at temperature 1."""
        return cls(
            trunk=policy.trunk,
            head=replace(policy.head, temperature=1.0),
            stop_ids=policy.stop_ids,
            pad_id=policy.pad_id,
            device=policy.device,
        )

    @classmethod
    def of_model(cls, model: Any, *, pad_id: int) -> Self:
        """A transformers model as it stands: its answers end where its generation config says."""
        model.requires_grad_(False).eval()
        stop_ids = model.generation_config.eos_token_id
        return cls(
            trunk=getattr(model, model.base_model_prefix),
            head=head_of(model, temperature=1.0),
            stop_ids=frozenset([stop_ids] if isinstance(stop_ids, int) else stop_ids or ()),
            pad_id=pad_id,
            device=model.device,
        )

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, done: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """The most likely token after the other, at most `max_tokens` for each of the prompts."""
        answers = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            answers += self._greedy(batch, max_tokens)
            done(len(batch))
        return answers

    @torch.no_grad()
    def _greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Answer]:
        from transformers import DynamicCache

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        stop_ids = torch.tensor(sorted(self.stop_ids), device=self.device, dtype=ids.dtype)
        running = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        config: Any = self.trunk.config
        cache = DynamicCache(config=config)
        found: list[list[tuple[int, float]]] = [[] for _ in prompts]
        for _ in range(max_tokens):
            output = self.trunk(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits = self.head.logits(output.last_hidden_state[:, -1])
            logps, tokens = logits.log_softmax(dim=-1).max(dim=-1)
            for answer, token, logp, runs in zip(found, tokens.tolist(), logps.tolist(), running.tolist(), strict=True):
                if runs:
                    answer.append((token, logp))
            running &= ~torch.isin(tokens, stop_ids)
            if not running.any():
                break
            ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
        return [
            Answer(token_ids=tuple(token for token, _ in answer), logps=tuple(logp for _, logp in answer))
            for answer in found
        ]

    def logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Tensor]:
        """Log-prob of every token of the answers in nats, [tokens of the answer] each, on the CPU in float64."""
        return [
            logps
            for start in range(0, len(prompts), BATCH)
            for logps in self._logps(prompts[start : start + BATCH], answers[start : start + BATCH])
        ]

    @torch.no_grad()
    def _logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Tensor]:
        rows = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        output = self.trunk(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False)
        # The hidden state before a token is the one that predicts it.
        hidden = torch.cat(
            [
                states[len(prompt) - 1 : len(row) - 1]
                for states, prompt, row in zip(output.last_hidden_state, prompts, rows, strict=True)
            ]
        )
        targets = torch.tensor([token for answer in answers for token in answer.token_ids], device=self.device)
        logps, _ = score(hidden, targets, self.head)
        return list(logps.double().cpu().split([len(answer.token_ids) for answer in answers]))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the trained policy did: kept so that it can be freed before the merged model is loaded.

    `base` is "nf4" or the dtype of the base that it stands on, `bare_difference` the mean |difference| of log-prob
    per token that switching the adapter off makes.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[Answer, ...]
    logps: tuple[Tensor, ...]
    base: str
    bare_difference: float
    stop_ids: frozenset[int]
    pad_id: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The merged model against the trained policy. Differences of log-prob are per token, in nats.

    `greedy_agreement` is the share of prompts with the same greedy answer, token for token. `widest_parting` is how
    much more likely the merged model finds its own token than the policy's where the two answers part, at most.
    `adapter_difference` is what the adapter itself changes: the scale for the other differences. Where the two bases
    are not the same, the differences are mostly the bases' own.
    """

    trained_base: str
    merged_base: str
    prompts: int
    tokens: int
    greedy_agreement: float
    widest_parting: float
    mean_difference: float
    worst_difference: float
    adapter_difference: float

    def rows(self) -> list[tuple[str, str]]:
        """(measure, figure) for people to read."""
        return [
            ("base, when trained and when merged", f"{self.trained_base}, {self.merged_base}"),
            ("prompts, answer tokens", f"{self.prompts:,}, {self.tokens:,}"),
            ("same greedy answer", f"{self.greedy_agreement:.1%}"),
            ("log-prob per token, mean difference", f"{self.mean_difference:.2g}"),
            ("log-prob per token, worst difference", f"{self.worst_difference:.2g}"),
            ("for scale: mean difference that the adapter makes", f"{self.adapter_difference:.2g}"),
        ]


def ask_trained(policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int, progress: Progress) -> Trained:
    """The policy's greedy answers and log-probs. Raises ExportError where they are not finite."""
    answerer = Answerer.of_policy(policy)
    with progress("answers of the trained policy", len(prompts)) as done:
        answers = answerer.greedy(prompts, max_tokens, done)
        logps = answerer.logps(prompts, answers)
        with policy.model.disable_adapter():
            bare = answerer.logps(prompts, answers)
    if not all(bool(part.isfinite().all()) for part in logps):
        raise ExportError(
            "the trained policy's log-probs are not finite, so there is nothing worth exporting",
            next_step="train again with a lower optimizer.learning_rate",
        )
    return Trained(
        prompts=tuple(map(tuple, prompts)),
        answers=tuple(answers),
        logps=tuple(logps),
        base="nf4" if policy.quantized_modules else str(policy.head.weight.dtype).removeprefix("torch."),
        bare_difference=differences(logps, bare)[0],
        stop_ids=policy.stop_ids,
        pad_id=policy.pad_id,
        max_tokens=max_tokens,
    )


def compare(model: Any, trained: Trained, progress: Progress) -> tuple[Verification, list[Tensor]]:
    """How `model` does beside the trained policy, and its log-probs of the policy's answers.

    Raises ExportError where its answers end at other tokens than the policy's.
    """
    merged = Answerer.of_model(model, pad_id=trained.pad_id)
    if merged.stop_ids != trained.stop_ids:
        raise ExportError(
            f"the merged model stops at the tokens {sorted(merged.stop_ids)}, the trained policy at "
            f"{sorted(trained.stop_ids)}",
            next_step="this is a bug: please report it with the model's name",
        )
    with progress("answers of the merged model", len(trained.prompts)) as done:
        answers = merged.greedy(trained.prompts, trained.max_tokens, done)
        logps = merged.logps(trained.prompts, trained.answers)
    partings = [
        _parting(theirs, ours, theirs_by_merged)
        for theirs, ours, theirs_by_merged in zip(trained.answers, answers, logps, strict=True)
    ]
    mean, worst = differences(trained.logps, logps)
    return Verification(
        trained_base=trained.base,
        merged_base=str(model.dtype).removeprefix("torch."),
        prompts=len(answers),
        tokens=sum(map(len, trained.logps)),
        greedy_agreement=sum(parting is None for parting in partings) / len(partings),
        widest_parting=max((parting for parting in partings if parting is not None), default=0.0),
        mean_difference=mean,
        worst_difference=worst,
        adapter_difference=trained.bare_difference,
    ), logps


def _parting(theirs: Answer, ours: Answer, theirs_by_merged: Tensor) -> float | None:
    """Log-prob of our token minus that of theirs at the first place where they differ, both by the merged model."""
    for place, (token, own) in enumerate(zip(theirs.token_ids, ours.token_ids, strict=False)):
        if token != own:
            return ours.logps[place] - float(theirs_by_merged[place])
    return None


def differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """Mean and worst |difference| over all tokens."""
    gaps = (torch.cat(list(first)) - torch.cat(list(second))).abs()
    return float(gaps.mean()), float(gaps.max())


def refuse_beyond_rounding(dtype: str, *, mean: float, worst: float, parting: float = 0.0) -> None:
    """Raise ExportError where the figures cannot come from rounding to `dtype`. NaN is refused too."""
    allowed = ROUNDING[dtype]
    at_worst = WORST_OVER_MEAN * allowed
    if mean <= allowed and worst <= at_worst and parting <= at_worst:
        return
    raise ExportError(
        f"the merged model is not the trained policy: its log-probs differ by {mean:.2g} a token in the mean and "
        f"{worst:.2g} at worst, its greedy answers part at tokens {parting:.2g} apart; rounding to {dtype} explains "
        f"{allowed:g} in the mean and {at_worst:g} at worst. Nothing was kept",
        next_step="export the adapter instead (--what adapter), and please report the model's name",
    )
