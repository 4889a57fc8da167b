"""The POPO objective, L = L_nll + alpha * L_sim + beta * L_ent, as pure functions of tensors (docs/method.md).

With other algorithms their policy term stands where L_nll does.

Normalisers are fixed once for an optimizer step and passed in, so a step's loss is the plain sum over its
micro-batches, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.errors import PopoError
from popo_lite.recipe import AnyObjective


@dataclass(frozen=True, kw_only=True)
class StepNormalizers:
    """What a step's terms are divided by.

    `prompts` is |P+|, the prompts with a positive; `positive_tokens` and `positives` count S+ of the whole step;
    `entropy_tokens` counts the completion tokens whose entropy is averaged; `max_completion_length` is the recipe's.
    """

    prompts: int
    positives: int
    positive_tokens: int
    entropy_tokens: int
    max_completion_length: int

    def __post_init__(self) -> None:
        if min(self.prompts, self.positives, self.positive_tokens, self.entropy_tokens) < 1:
            raise PopoError(f"a step without a positive has no loss, so it has no normalisers: {self}")


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """One micro-batch's share of a step's loss, already normalised for the step: scalars, `total` on the graph.

    `similarity_cosine` is the detached sum of w_i * cos_i over the micro-batch, divided by sum w_i of the step.
    """

    total: Tensor
    nll: Tensor
    similarity: Tensor
    entropy: Tensor
    similarity_cosine: Tensor


def nll_coefficients(
    weights: Tensor, lengths: Sequence[int], normalizers: StepNormalizers, recipe: AnyObjective
) -> Tensor:
    """c_i [B] with L_nll = -sum_i c_i * log pi(y_i), log pi summed over the tokens of y_i.

    `weights` [B] (0 for negatives) and `lengths` in completion tokens.
    """
    if recipe.normalizer == "token_mean":
        return weights / (normalizers.prompts * normalizers.positive_tokens / normalizers.positives)
    if recipe.normalizer == "reference":
        return weights / normalizers.positive_tokens
    if recipe.normalizer == "sequence_sum":
        return weights / (normalizers.prompts * normalizers.max_completion_length)
    return weights / (normalizers.prompts * torch.as_tensor(lengths, dtype=weights.dtype, device=weights.device))


def cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """cos(p_i, q_i) [B] in at least float32."""
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    return torch.nn.functional.cosine_similarity(predictions.to(dtype), targets.to(dtype), dim=-1)


def noisy_target(features: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Q + sigma * rms(q) * noise, row by row; all [B, D], `noise` standard normal. Detached."""
    rms = features.square().mean(dim=-1, keepdim=True).sqrt()
    return (features + sigma * rms * noise).detach()


def entropy_coefficient(normalizers: StepNormalizers, beta: float) -> float:
    """B with beta * L_ent = sum of b * H_t over the tokens whose entropy counts."""
    return -beta / normalizers.entropy_tokens


def popo_loss(
    *,
    token_gradient: Tensor,
    policy: Tensor,
    entropy: Tensor,
    weights: Tensor,
    predictions: Tensor | None,
    targets: Tensor | None,
    normalizers: StepNormalizers,
    alpha: float,
    beta: float,
) -> LossTerms:
    """The loss of one micro-batch of B sequences.

    `policy` is the policy term's value (L_nll, or GRPO's surrogate) and `entropy` the micro-batch's share of the mean
    entropy; `token_gradient` is a scalar on the graph whose gradient is that of policy - beta * entropy, and whose
    value need not be. `weights` [B] are 0 for negatives; `predictions` and `targets` [B, D] (the targets with their
    noise), or None where the similarity term is off.
    """
    if predictions is None or targets is None:
        similarity = token_gradient.new_zeros(())
        mean_cosine = similarity
    else:
        # Weights of a prompt sum to 1, so over the step they sum to the number of prompts with positives.
        share = weights / normalizers.prompts
        cosines = cosine(predictions, targets).to(share.dtype)
        similarity = (share * (1 - cosines)).sum()
        mean_cosine = (share * cosines).sum().detach()
    policy, entropy_term = policy.detach(), -entropy.detach()
    tokens = token_gradient - token_gradient.detach() + policy + beta * entropy_term
    return LossTerms(
        total=tokens + alpha * similarity,
        nll=policy,
        similarity=similarity,
        entropy=entropy_term,
        similarity_cosine=mean_cosine,
    )


def truncated_importance(log_ratios: Tensor, cap: float) -> Tensor:
    """min(policy / sampler probability, cap) of each token [N], detached.

    `log_ratios` [N] are policy minus sampler log-probs. Corrects for a sampler that is not quite the policy, such as
    one in lower precision (truncated importance sampling).
    """
    return log_ratios.detach().exp().clamp(max=cap)


def steered_beta(beta: float, entropy: float, recipe: AnyObjective) -> float:
    """The next step's beta: constant, or moved towards `target_entropy` in log space (an integral controller).

    It stays within a factor of 100 of the recipe's beta, or it would wind up while the target is out of reach.
    """
    target = getattr(recipe, "target_entropy", None)
    if target is None:
        return beta
    error = (target - entropy) / target
    moved = beta * math.exp(recipe.entropy_coef_gain * max(-1.0, min(1.0, error)))
    return max(recipe.entropy_coef / 100, min(recipe.entropy_coef * 100, moved))
