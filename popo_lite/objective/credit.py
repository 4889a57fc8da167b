"""Credit on whole groups: self-normalised weights of a prompt's positives, or group-relative advantages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from popo_lite.recipe import AnyObjective

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does."""


def positive_weights(
    mean_logps: Sequence[float], lengths: Sequence[int], rewards: Sequence[float], recipe: AnyObjective
) -> Tensor:
    """w_i of the positives of one prompt: float64 [n], summing to 1, detached by construction.

    `mean_logps` are nats per token, `lengths` in tokens, `rewards` in (0, 1]. The weight is proportional to
    r_i * exp(l_i / weight_temperature) with l_i the mean ("mean_logprob") or summed ("sequence_logprob") log-prob;
    "uniform" keeps only r_i.
    """
    mean = torch.tensor(mean_logps, dtype=torch.float64)
    scores = torch.tensor(rewards, dtype=torch.float64).log()
    if getattr(recipe, "weights", "uniform") == "mean_logprob":
        scores = scores + mean / getattr(recipe, "weight_temperature", 1.0)
    elif getattr(recipe, "weights", "uniform") == "sequence_logprob":
        scores = scores + mean * torch.tensor(lengths, dtype=torch.float64) / getattr(recipe, "weight_temperature", 1.0)
    return torch.softmax(scores, dim=0)


def effective_sample_size(weights: Tensor) -> float:
    """1 / sum w_i^2 for weights that sum to 1: how many positives the update in effect averages."""
    return float(1.0 / weights.square().sum())


def group_advantages(rewards: Sequence[float | None], scaling: str) -> list[float]:
    """A_i = r_i - mean(r) of one prompt's rollouts, divided by their standard deviation (n - 1) with scaling "std".

    None is an answer that could not be graded: it has advantage 0 and the others' mean is without it (GRPO, Shao et al.
    2024; without scaling, Dr. GRPO, Liu et al. 2025).
    """
    graded = [reward for reward in rewards if reward is not None]
    if len(graded) < 2 or max(graded) == min(graded):
        return [0.0] * len(rewards)
    mean = statistics.fmean(graded)
    scale = statistics.stdev(graded) + STD_EPSILON if scaling == "std" else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]
