"""GRPO's loss per token: clipped importance ratios times group-relative advantages, and KL to a reference.

    l = -min(r A, clip(r, 1 - low, 1 + high) A) + kl * r * (exp(q - p) - (q - p) - 1)

with p, o and q the policy's, the sampler's and the reference's log-prob of the token and r = exp(p - o); the second r
only with `use_bias_correction_kl`. The loss of a step is the sum of c_t * l_t, with coefficients c_t that `loss_type`
fixes before the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popo_lite.recipe import AnyObjective


def surrogate(
    logps: Tensor, sampler_logps: Tensor, advantages: Tensor, reference_logps: Tensor | None, recipe: AnyObjective
) -> tuple[Tensor, Tensor]:
    """(l, dl/dp) of each token; all [N], detached. `reference_logps` is None where `recipe.kl_coef` is 0.

    The derivative needs no log-prob but the token's own, so the chunked loss can form its gradient in the forward pass.
    """
    logps = logps.detach()
    ratios = (logps - sampler_logps).exp()
    plain = ratios * advantages
    clipped = ratios.clamp(1 - recipe.epsilon, 1 + recipe.epsilon_high) * advantages
    losses = -torch.minimum(plain, clipped)
    # The clipped form is a constant; inside the bounds both are the same and have the same slope.
    slopes = torch.where(plain <= clipped, -plain, 0.0)
    if reference_logps is not None:
        excess = (reference_logps - logps).exp()
        divergence, slope = excess - (reference_logps - logps) - 1, 1 - excess
        if recipe.use_bias_correction_kl:
            divergence, slope = ratios * divergence, ratios * (divergence + slope)
        losses = losses + recipe.kl_coef * divergence
        slopes = slopes + recipe.kl_coef * slope
    return losses, slopes


def length_coefficients(
    lengths: Sequence[int], *, max_completion_length: int, sequences: int, tokens: int, normalization: str
) -> list[float]:
    """C of the tokens of each sequence, `lengths` in completion tokens.

    `sequences` and `tokens` count all graded answers of the step, also those whose advantage is 0.
    """
    if normalization == "sequence":
        return [1 / (sequences * length) for length in lengths]
    whole = tokens if normalization == "token" else sequences * max_completion_length
    return [1 / whole] * len(lengths)
