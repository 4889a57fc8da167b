"""Measuring a step: seconds by stage, and the StepRecord that becomes its line in metrics.jsonl."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from popo_lite.console.base import RunView
from popo_lite.objective.losses import LossTerms
from popo_lite.tasks.base import Task
from popo_lite.training.credit import StepPlan
from popo_lite.types import FinishReason, Group, SampleView, count_outcomes


class StageClock:
    """Wall-clock seconds by stage, told to the view as they start."""

    def __init__(self, view: RunView, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._view = view
        self._synchronize = synchronize

    @contextmanager
    def __call__(self, stage: str, *, total: int | None = None) -> Iterator[None]:
        """Time what runs within as `stage`; `total` is its amount of work, for the view."""
        self._view.stage(stage, total=total)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()  # kernels run on after the call that queued them
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class MicroBatchFigures:
    """A micro-batch's share of the loss, and its policy minus sampler log-probs [N], all on the host."""

    loss: float
    nll: float
    similarity: float
    entropy_term: float
    cosine: float
    log_ratios: Tensor

    @classmethod
    def of(cls, terms: LossTerms, log_ratios: Tensor) -> Self:
        """Read in one transfer."""
        parts = (terms.total, terms.nll, terms.similarity, terms.entropy, terms.similarity_cosine)
        loss, nll, similarity, entropy_term, cosine = torch.stack([part.detach() for part in parts]).tolist()
        return cls(
            loss=loss,
            nll=nll,
            similarity=similarity,
            entropy_term=entropy_term,
            cosine=cosine,
            log_ratios=log_ratios.cpu().double(),
        )


@dataclass(kw_only=True)
class UpdateFigures:
    """Sums over a step's micro-batches, in nats; `record` turns them into the record's figures."""

    loss: float = 0.0
    nll: float = 0.0
    similarity: float = 0.0
    entropy_term: float = 0.0
    cosine: float = 0.0
    gaps: list[Tensor] = field(default_factory=list)
    micro_batches: int = 0
    grad_norm: float = math.nan
    update_norm: float | None = None

    def add(self, share: MicroBatchFigures) -> None:
        """Add a micro-batch's share."""
        self.loss += share.loss
        self.nll += share.nll
        self.similarity += share.similarity
        self.entropy_term += share.entropy_term
        self.cosine += share.cosine
        self.gaps.append(share.log_ratios)

    @property
    def gap_mean(self) -> float:
        """Mean |sampler - policy| log-prob of the trained tokens, nats."""
        return float(torch.cat(self.gaps).abs().mean())

    def gap_figures(self) -> dict[str, float]:
        """How far the sampler is from the policy: mean, 99th percentile and largest |gap| and the k3 divergence.

        k3 = mean of exp(r) - 1 - r with r = policy - sampler log-prob on the sampler's tokens, an unbiased estimate
        of KL(sampler || policy) that is never negative (Schulman 2020).
        """
        ratios = torch.cat(self.gaps)
        sizes = ratios.abs().sort().values
        return {
            "logp_gap_mean": self.gap_mean,
            "logp_gap_p99": float(sizes[min(len(sizes) - 1, math.ceil(0.99 * len(sizes)) - 1)]),
            "logp_gap_max": float(sizes[-1]),
            "logp_k3": float((ratios.exp() - 1 - ratios).mean()),
        }

    @property
    def entropy(self) -> float:
        """Mean entropy of the trained completion tokens, nats."""
        return -self.entropy_term


def rollout_figures(groups: Sequence[Group], task: Task, threshold: float, *, first_round: int) -> dict[str, Any]:
    """The part of a StepRecord that rollouts and rewards alone decide.

    `first_round` is how many rollouts every prompt got before any positive was counted.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    firsts = [rollout for rollout in rollouts if rollout.index < first_round]
    ungraded = [all(not r.reward.outcome.is_graded for r in group.rollouts) for group in groups]
    graded = [group for group, lost in zip(groups, ungraded, strict=True) if not lost]
    counts = [len(group.positives(threshold)) for group in graded]
    sizes = [len(group.rollouts) for group in graded]
    positives = [rollout for group in groups for rollout in group.positives(threshold)]
    with_positive = sum(count > 0 for count in counts)
    tokens = sum(len(r.completion.token_ids) for r in rollouts)
    figures = task.figures([rollout.completion.text for rollout in firsts])
    logps = [logp for rollout in firsts for logp in rollout.completion.sampler_logps]
    mixed = [
        group for group in graded if len({r.reward.value for r in group.rollouts if r.reward.outcome.is_graded}) > 1
    ]
    return {
        "prompts": len(groups),
        "prompts_with_positive": with_positive,
        "rollouts": len(rollouts),
        "positives": len(positives),
        "groups_none_right": counts.count(0),
        "groups_some_right": sum(0 < count < size for count, size in zip(counts, sizes, strict=True)),
        "groups_all_right": sum(count == size for count, size in zip(counts, sizes, strict=True)),
        "groups_ungraded": sum(ungraded),
        "outcomes": count_outcomes([rollout.reward for rollout in rollouts]),
        "pass_rate": statistics.fmean(rollout.reward.value > threshold for rollout in firsts),
        "prompts_with_positive_ratio": with_positive / len(groups),
        "unique_answers_mean": statistics.fmean(
            len({r.reward.answer for r in group.rollouts[:first_round] if r.reward.answer is not None})
            for group in groups
        ),
        "step_by_step_ratio": figures.get("step_by_step_ratio"),
        "truncated_ratio": statistics.fmean(r.completion.finish_reason is FinishReason.LENGTH for r in firsts),
        "completion_tokens_mean": statistics.fmean(len(r.completion.token_ids) for r in firsts),
        "positive_tokens_mean": statistics.fmean(len(r.completion.token_ids) for r in positives) if positives else None,
        "rollout_tokens": tokens,
        "rollouts_per_positive_prompt": len(rollouts) / with_positive if with_positive else None,
        "rollout_tokens_per_positive_prompt": tokens / with_positive if with_positive else None,
        "sampled_entropy": -statistics.fmean(logps),
        "tokens_of_all": sum(r.tokens for r in rollouts),
        "tokens_of_positives": sum(r.tokens for r in positives),
        "tokens_of_mixed_groups": sum(
            r.tokens for group in mixed for r in group.rollouts if r.reward.outcome.is_graded
        ),
    }


def update_figures(
    figures: UpdateFigures | None, plan: StepPlan | None, start_entropy: float | None, *, similarity_on: bool
) -> dict[str, Any]:
    """The part of a StepRecord that the update decides; None throughout where there was none."""
    if figures is None or plan is None:
        names = (
            "loss",
            "loss_nll",
            "loss_similarity",
            "loss_entropy",
            "entropy",
            "entropy_over_start",
            "effective_sample_size",
            "effective_sample_ratio",
            "siamese_cosine",
            "logp_gap_mean",
            "logp_gap_p99",
            "logp_gap_max",
            "logp_k3",
            "grad_norm",
            "update_norm",
        )
        return {**dict.fromkeys(names), "trained_tokens": 0, "micro_batches": 0}
    return {
        "loss": figures.loss,
        "loss_nll": figures.nll,
        "loss_similarity": figures.similarity,
        "loss_entropy": figures.entropy_term,
        "entropy": figures.entropy,
        "entropy_over_start": figures.entropy / start_entropy if start_entropy else None,
        "effective_sample_size": _mean([size for size, _ in plan.sample_sizes]),
        "effective_sample_ratio": _mean([size / count for size, count in plan.sample_sizes]),
        "siamese_cosine": figures.cosine if similarity_on else None,
        **figures.gap_figures(),
        "grad_norm": figures.grad_norm,
        "update_norm": figures.update_norm,
        "trained_tokens": sum(sequence.rollout.tokens for sequence in plan.sequences),
        "micro_batches": figures.micro_batches,
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def sampler_summary(engine: str, swap_seconds: Sequence[float], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sampler's part of summary.json, over all steps in `lines`; swaps are those of this process.

    `logp_gap` in nats: `mean` and `p99` are means over steps, `max` is over all of them.
    """
    trained = [line for line in lines if line["logp_gap_mean"] is not None]
    with_positive = sum(round(line["prompts_with_positive_ratio"] * line["prompts"]) for line in lines)
    return {
        "engine": engine,
        "tokens_per_second": sum(line["rollout_tokens"] for line in lines)
        / max(1e-9, sum(line["seconds"]["rollout"] for line in lines)),
        "swap_seconds": {"median": statistics.median(swap_seconds), "max": max(swap_seconds)} if swap_seconds else None,
        "logp_gap": {
            "mean": statistics.fmean(line["logp_gap_mean"] for line in trained),
            "p99": statistics.fmean(line["logp_gap_p99"] for line in trained),
            "max": max(line["logp_gap_max"] for line in trained),
        }
        if trained
        else None,
        "rollouts_per_prompt_with_positive": sum(line["rollouts"] for line in lines) / with_positive
        if with_positive
        else None,
    }


def sample_views(step: int, groups: Sequence[Group], threshold: float, count: int) -> list[SampleView]:
    """`count` prompts with a right and a wrong answer each, those that have both first."""
    views = []
    for group in groups:
        right = [r.completion.text for r in group.rollouts if r.reward.value > threshold]
        wrong = [r.completion.text for r in group.rollouts if r.reward.value <= threshold]
        views.append(
            SampleView(
                step=step,
                question=group.prompt.problem.question,
                reference=group.prompt.problem.answer,
                right=right[0] if right else None,
                wrong=wrong[0] if wrong else None,
            )
        )
    views.sort(key=lambda view: (view.right is None) + (view.wrong is None))
    return views[:count]


def sample_line(step: int, group: Group) -> dict[str, Any]:
    """One line of samples.jsonl: a whole group."""
    problem = group.prompt.problem
    return {
        "step": step,
        "problem": problem.id,
        "question": problem.question,
        "reference": problem.answer,
        "answers": [
            {
                "text": rollout.completion.text,
                "tokens": len(rollout.completion.token_ids),
                "finish_reason": rollout.completion.finish_reason.value,
                "reward": rollout.reward.value,
                "outcome": rollout.reward.outcome.value,
                "detail": rollout.reward.detail,
            }
            for rollout in group.rollouts
        ],
    }
