"""Credit on whole groups: the self-normalised weights of a prompt's positives (docs/method.md, "Weights")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popo_lite.recipe import ObjectiveRecipe


def positive_weights(
    mean_logps: Sequence[float], lengths: Sequence[int], rewards: Sequence[float], recipe: ObjectiveRecipe
) -> Tensor:
    """w_i of the positives of one prompt: float64 [n], summing to 1, detached by construction.

    `mean_logps` are nats per token, `lengths` in tokens, `rewards` in (0, 1]. The weight is proportional to
    r_i * exp(l_i / weight_temperature) with l_i the mean ("mean_logprob") or summed ("sequence_logprob") log-prob;
    "uniform" keeps only r_i.
    """
    mean = torch.tensor(mean_logps, dtype=torch.float64)
    scores = torch.tensor(rewards, dtype=torch.float64).log()
    if recipe.weights == "mean_logprob":
        scores = scores + mean / recipe.weight_temperature
    elif recipe.weights == "sequence_logprob":
        scores = scores + mean * torch.tensor(lengths, dtype=torch.float64) / recipe.weight_temperature
    return torch.softmax(scores, dim=0)


def effective_sample_size(weights: Tensor) -> float:
    """1 / sum w_i^2 for weights that sum to 1: how many positives the update in effect averages."""
    return float(1.0 / weights.square().sum())
