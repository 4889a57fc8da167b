"""Check that a merged model is the trained policy, by greedy answers and by log-probs of the policy's answers.

Rounding alone can change a greedy answer when two tokens are nearly tied, more often in long answers.
A merge is therefore judged by log-probs, and by the gap between the two tokens where answers first differ.
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

Answer = tuple[int, ...]
"""Token ids of a greedy answer, its end-of-sequence token included."""

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
class Answerer:
    """A causal language model, its decoder and LM head, and the tokens at which its answers end."""

    model: Any
    trunk: nn.Module
    head: Head
    stop_ids: frozenset[int]
    pad_id: int
    device: torch.device

    @classmethod
    def of_policy(cls, policy: Policy) -> Self:
        """Wrap the policy at temperature 1."""
        return cls(
            model=policy.model.get_base_model(),
            trunk=policy.trunk,
            head=replace(policy.head, temperature=1.0),
            stop_ids=policy.stop_ids,
            pad_id=policy.pad_id,
            device=policy.device,
        )

    @classmethod
    def of_model(cls, model: Any, *, pad_id: int) -> Self:
        """Wrap a transformers model with the stop tokens of its own generation config."""
        model.requires_grad_(False).eval()
        stop_ids = model.generation_config.eos_token_id
        return cls(
            model=model,
            trunk=getattr(model, model.base_model_prefix),
            head=head_of(model, temperature=1.0),
            stop_ids=frozenset([stop_ids] if isinstance(stop_ids, int) else stop_ids or ()),
            pad_id=pad_id,
            device=model.device,
        )

    @torch.no_grad()
    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, done: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """Return the greedy answer to each prompt, at most `max_tokens` long, with its end-of-sequence token."""
        from transformers import GenerationConfig

        # Assigned, not passed: `generate` fills a passed config from the model's own, and a base's
        # repetition penalty would then change the answers.
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=sorted(self.stop_ids), pad_token_id=self.pad_id
        )
        answers = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            width = max(map(len, batch))
            ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            output = self.model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            answers += [self._until_stop(row) for row in output[:, width:].tolist()]
            done(len(batch))
        return answers

    def _until_stop(self, tokens: list[int]) -> Answer:
        """Return the tokens up to the first stop token: what follows is padding, which may be a stop token too."""
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return tuple(tokens[: end + 1])

    def logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Tensor]:
        """Return the log-probs in nats of each answer's tokens, on the CPU in float64."""
        return [
            logps
            for start in range(0, len(prompts), BATCH)
            for logps in self._logps(prompts[start : start + BATCH], answers[start : start + BATCH])
        ]

    @torch.no_grad()
    def _logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> list[Tensor]:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
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
        targets = torch.tensor([token for answer in answers for token in answer], device=self.device)
        logps, _ = score(hidden, targets, self.head)
        return list(logps.double().cpu().split([len(answer) for answer in answers]))


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
        """Return (measure, figure) for people to read."""
        return [
            ("base, when trained and when merged", f"{self.trained_base}, {self.merged_base}"),
            ("prompts, answer tokens", f"{self.prompts:,}, {self.tokens:,}"),
            ("same greedy answer", f"{self.greedy_agreement:.1%}"),
            ("log-prob per token, mean difference", f"{self.mean_difference:.2g}"),
            ("log-prob per token, worst difference", f"{self.worst_difference:.2g}"),
            ("for scale: mean difference that the adapter makes", f"{self.adapter_difference:.2g}"),
        ]


def ask_trained(policy: Policy, prompts: Sequence[Sequence[int]], max_tokens: int, progress: Progress) -> Trained:
    """Return the policy's greedy answers and log-probs. Raises ExportError if they are not finite."""
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
    """Compare `model` with the trained policy; return the figures and its log-probs of the policy's answers.

    Raises ExportError if its answers end at other tokens than the policy's.
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
        own = merged.logps(trained.prompts, answers)
    partings = list(map(_parting, trained.answers, answers, logps, own))
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


def _parting(theirs: Answer, ours: Answer, theirs_logps: Tensor, our_logps: Tensor) -> float | None:
    """Return our log-prob minus theirs at the first token that differs, both by the merged model; None if none does."""
    for place, (token, own) in enumerate(zip(theirs, ours, strict=False)):
        if token != own:
            return float(our_logps[place] - theirs_logps[place])
    return None


def differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float]:
    """Return the mean and the worst |difference| over all tokens."""
    gaps = (torch.cat(list(first)) - torch.cat(list(second))).abs()
    return float(gaps.mean()), float(gaps.max())


def refuse_beyond_rounding(dtype: str, *, mean: float, worst: float, parting: float = 0.0) -> None:
    """Raise ExportError if the figures cannot come from rounding to `dtype`. NaN is refused too."""
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
