"""Select and weigh the rollouts that a step trains on, and compute the loss of their tokens (docs/method.md).

    popo    L = L_nll + entropy_coef * L_ent + similarity_coef * L_sim
    mixed   the same, with graded negatives of weight below 0 in L_nll
    raft    L = L_nll
    grpo    L = clipped surrogate + kl_coef * KL + entropy_coef * L_ent

    L_nll = -sum_i w_i sum_t log pi(y_t) / divisor_i    over positives i of all prompts, w_i summing to 1 in a prompt
    L_ent = -(mean entropy over tokens)
    L_sim = sum_i w_i (1 - cos(p_i, q_i)) / |P+|        p_i by the predictor head, q_i by the siamese, detached

|P+| is the number of prompts with a positive; `_sequences` holds the divisors, by `objective.normalizer`.
First `plan_step` looks at whole groups and fixes everything that couples sequences: weights or advantages, and
divisors. Then `LOSSES[algorithm]` turns the log-probs and entropies of any tokens into their share of the loss, and
`similarity_loss` the features of any sequences into theirs (`Learner` adds them up). The loss of a step is the plain
sum of these shares, so no split into micro-batches changes it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from popo_lite.recipe import AnyObjective, EntropyObjective, GrpoObjective, MixedObjective, PopoObjective, RaftObjective
from popo_lite.types import Group, Rollout

STD_EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards, as in TRL."""

# --------------------------------------------------------------------------- the loss of tokens


class Tokens(NamedTuple):
    """What the loss knows about N completion tokens besides the policy: constants, [N] each.

    `weights` holds w_i or the advantage A_i of a token's sequence, `divisors` what its policy term is divided by.
    `entropy_weights` is 1 / (all tokens of the step whose entropy counts), or 0. `reference_logps` is None without a
    KL term.
    """

    sampler_logps: Tensor
    reference_logps: Tensor | None
    weights: Tensor
    divisors: Tensor
    entropy_weights: Tensor

    def at(self, part: slice) -> Tokens:
        """Return the constants of some of the tokens."""
        return Tokens(*(None if values is None else values[part] for values in self))  # type: ignore[arg-type]


def popo(
    policy_logps: Tensor, entropies: Tensor, tokens: Tokens, objective: PopoObjective, entropy_coef: float
) -> Tensor:
    """Return L_nll + entropy_coef * L_ent: the terms of POPO and `mixed` that are sums over tokens."""
    return nll(policy_logps, tokens, objective) - entropy_coef * (tokens.entropy_weights * entropies).sum()


def nll(policy_logps: Tensor, tokens: Tokens, objective: RaftObjective) -> Tensor:
    """Return L_nll = -sum_t w_i * log pi(y_t) / divisor_i, the whole loss of RAFT (Dong et al. 2023).

    With rewards 0 and 1, RAFT weighs all positives of a prompt the same. `importance_sampling_clip_max` multiplies each
    token by min(pi / sampler probability, cap), a constant: it corrects for a sampler that is not quite the policy,
    such as one in lower precision (truncated importance sampling).
    """
    losses = -tokens.weights * policy_logps / tokens.divisors
    if objective.importance_sampling_clip_max is not None:
        ratios = (policy_logps.detach() - tokens.sampler_logps).exp()
        losses = losses * ratios.clamp(max=objective.importance_sampling_clip_max)
    return losses.sum()


def grpo(
    policy_logps: Tensor, entropies: Tensor, tokens: Tokens, objective: GrpoObjective, entropy_coef: float
) -> Tensor:
    """Return the clipped surrogate + kl_coef * KL(policy || reference) + entropy_coef * L_ent (Shao et al. 2024).

    With r = pi / sampler probability and d = log reference - log pi, a token's KL is exp(d) - d - 1, times r if
    `use_bias_correction_kl`.
    """
    # Clamped far beyond any clip: where exp overflows, the gradient of a clipped token would be 0 * inf.
    ratios = (policy_logps - tokens.sampler_logps).clamp(max=80).exp()
    clipped = ratios.clamp(1 - objective.epsilon, 1 + objective.epsilon_high)
    losses = -torch.minimum(ratios * tokens.weights, clipped * tokens.weights)
    if tokens.reference_logps is not None:
        difference = tokens.reference_logps - policy_logps
        divergence = difference.exp() - difference - 1
        losses = losses + objective.kl_coef * (ratios if objective.use_bias_correction_kl else 1) * divergence
    return (losses / tokens.divisors).sum() - entropy_coef * (tokens.entropy_weights * entropies).sum()


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tokens, Any, float], Tensor]] = {
    "popo": popo,
    "raft": lambda policy_logps, _entropies, tokens, objective, _entropy_coef: nll(policy_logps, tokens, objective),
    "mixed": popo,  # the plan gives graded negatives weights below 0, so their likelihood is lowered
    "grpo": grpo,
}
"""Loss by algorithm: (log-probs [N] and entropies [N] under the policy, both in nats, constants, settings, current
entropy_coef) -> the tokens' share of the step's loss, a scalar that autograd differentiates."""

# --------------------------------------------------------------------------- the similarity term of sequences


def similarity_loss(predictions: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_sim = sum_i w_i (1 - cos(p_i, q_i)) and sum_i w_i cos(p_i, q_i), the second detached.

    Predictions p and targets q are [B, D]; `weights` [B] are w_i already divided by |P+|, the step's number of prompts
    with a positive.
    """
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    cosines = functional.cosine_similarity(predictions.to(dtype), targets.to(dtype), dim=-1).to(weights.dtype)
    return (weights * (1 - cosines)).sum(), (weights * cosines).sum().detach()


def noisy_target(features: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return q + sigma * rms(q) * noise by row, detached; all [B, D], `noise` standard normal."""
    rms = features.square().mean(dim=-1, keepdim=True).sqrt()
    return (features + sigma * rms * noise).detach()


def steered_entropy_coef(coef: float, entropy: float, objective: AnyObjective) -> float:
    """Return the next step's entropy coefficient: `coef`, or moved in log space towards `target_entropy`.

    An integral controller. It stays within a factor of 100 of the recipe's coefficient: without a bound it would run
    away while the target is out of reach.
    """
    if not isinstance(objective, EntropyObjective) or objective.target_entropy is None:
        return coef
    error = (objective.target_entropy - entropy) / objective.target_entropy
    moved = coef * math.exp(objective.entropy_coef_gain * max(-1.0, min(1.0, error)))
    return max(objective.entropy_coef / 100, min(objective.entropy_coef * 100, moved))


# --------------------------------------------------------------------------- the plan of a step


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """A rollout to train on.

    `weight` is w_i (the weights of a prompt's positives sum to 1; below 0 for negatives of `mixed`; 0 if only the
    entropy counts), or the advantage for `grpo`. `divisor` divides the policy term of each of its tokens.
    """

    rollout: Rollout
    weight: float
    divisor: float
    counts_in_entropy: bool = True


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """All that a step trains on.

    `prompts` counts prompts with a positive, |P+| (all prompts for `grpo`, which has no term that needs it);
    `entropy_tokens` counts the tokens over which the entropy is averaged.
    `sample_sizes` holds (effective sample size, number of positives) of each prompt with a positive.
    """

    sequences: tuple[TrainSequence, ...]
    prompts: int
    entropy_tokens: int
    sample_sizes: tuple[tuple[float, int], ...] = ()

    def part(self, members: Sequence[int]) -> StepPlan:
        """Return the plan of some of the sequences; its share of the loss and its gradient add up with the others'."""
        return replace(self, sequences=tuple(self.sequences[member] for member in members))

    @property
    def positives(self) -> list[int]:
        """Indices of the sequences with a weight above 0: those of the similarity term of `popo` and `mixed`."""
        return [index for index, sequence in enumerate(self.sequences) if sequence.weight > 0]

    @property
    def sequence_tokens(self) -> int:
        """Prompt and completion tokens of all sequences, before prompts are shared."""
        return sum(sequence.rollout.tokens for sequence in self.sequences)


def plan_step(
    groups: Sequence[Group],
    objective: AnyObjective,
    *,
    max_completion_length: int,
    mean_logps: Callable[[Sequence[Rollout]], Sequence[float]] | None = None,
) -> StepPlan | None:
    """Return what a step trains on, or None if it can learn nothing (`nothing_to_learn` says why).

    POPO, RAFT and `mixed`: positives by weight; negatives for their entropy, or to be lowered. GRPO: answers by
    advantage. `mean_logps` returns each positive's mean log-prob, nats per token; by default the sampler's count.
    """
    if isinstance(objective, GrpoObjective):
        return _plan_by_advantage(groups, objective, max_completion_length)
    if objective.skip_all_right:
        groups = [group for group in groups if len(group.positives) < len(group.rollouts)]
    positives = [group.positives for group in groups if group.positives]
    if not positives:
        return None
    flat = [rollout for rollouts in positives for rollout in rollouts]
    means = iter([r.completion.mean_logp for r in flat] if mean_logps is None else mean_logps(flat))
    weights = [
        positive_weights(
            [next(means) for _ in rollouts],
            [_length(rollout) for rollout in rollouts],
            [rollout.reward.value for rollout in rollouts],
            objective,
        )
        for rollouts in positives
    ]
    weighted = list(zip(flat, torch.cat(weights).tolist(), strict=True))
    sequences = _sequences(weighted, len(positives), objective, max_completion_length)
    if isinstance(objective, PopoObjective):
        sequences += _negatives(groups, objective, max_completion_length)
    return StepPlan(
        sequences=tuple(sequences),
        prompts=len(positives),
        entropy_tokens=sum(_length(sequence.rollout) for sequence in sequences if sequence.counts_in_entropy),
        sample_sizes=tuple((effective_sample_size(w), len(w)) for w in weights),
    )


def nothing_to_learn(objective: AnyObjective) -> str:
    """Return why a step has no plan."""
    if isinstance(objective, GrpoObjective):
        return "no prompt had answers of different rewards"
    return "no prompt had both right and wrong answers" if objective.skip_all_right else "no prompt had a positive"


def positive_weights(
    mean_logps: Sequence[float], lengths: Sequence[int], rewards: Sequence[float], objective: RaftObjective
) -> Tensor:
    """Return w_i of a prompt's positives: float64 [n], summing to 1.

    A weight is proportional to r_i * exp(l_i / weight_temperature) with reward r_i in (0, 1] and l_i the mean
    ("mean_logprob") or summed ("sequence_logprob") log-prob; to r_i alone with "uniform" weights and for RAFT.
    `mean_logps` are in nats per token, `lengths` in tokens.
    """
    scores = torch.tensor(rewards, dtype=torch.float64).log()
    if isinstance(objective, PopoObjective) and objective.weights != "uniform":
        logps = torch.tensor(mean_logps, dtype=torch.float64)
        if objective.weights == "sequence_logprob":
            logps = logps * torch.tensor(lengths, dtype=torch.float64)
        scores = scores + logps / objective.weight_temperature
    return torch.softmax(scores, dim=0)


def effective_sample_size(weights: Tensor) -> float:
    """Return 1 / sum w_i^2 of weights that sum to 1: how many positives the update in effect averages."""
    return float(1.0 / weights.square().sum())


def _sequences(
    weighted: Sequence[tuple[Rollout, float]],
    prompts: int,
    objective: RaftObjective,
    max_length: int,
    counts_in_entropy: bool = True,
) -> list[TrainSequence]:
    """Return the rollouts of `prompts` prompts with divisors by `objective.normalizer`, counted over them alone."""
    tokens = sum(_length(rollout) for rollout, _ in weighted)
    divisor_of: Mapping[str, Callable[[Rollout], float]] = {
        "token_mean": lambda _: prompts * tokens / len(weighted),
        "reference": lambda _: tokens,
        "sequence_sum": lambda _: prompts * max_length,
        "sequence_mean": lambda rollout: prompts * _length(rollout),
    }
    divisor = divisor_of[objective.normalizer]
    return [
        TrainSequence(rollout=rollout, weight=weight, divisor=divisor(rollout), counts_in_entropy=counts_in_entropy)
        for rollout, weight in weighted
    ]


def _negatives(groups: Sequence[Group], objective: PopoObjective, max_length: int) -> list[TrainSequence]:
    """Return the negatives that are forwarded: by `mixed` to lower them, by `popo` too if their entropy counts."""
    lowers, counted = isinstance(objective, MixedObjective), objective.entropy_over == "all"
    if not (lowers or counted):
        return []

    def is_negative(rollout: Rollout) -> bool:
        # An answer that could not be graded may be right, so it must not be lowered.
        return not rollout.reward.positive and (rollout.reward.outcome.is_graded or not lowers)

    weight = -objective.negative_weight if isinstance(objective, MixedObjective) else 0.0
    candidates = [[rollout for rollout in group.rollouts if is_negative(rollout)] for group in groups]
    negatives = [rollouts for rollouts in candidates if rollouts]
    weighted = [(rollout, weight / len(rollouts)) for rollouts in negatives for rollout in rollouts]
    return _sequences(weighted, len(negatives), objective, max_length, counts_in_entropy=counted)


def _plan_by_advantage(groups: Sequence[Group], objective: GrpoObjective, max_length: int) -> StepPlan | None:
    """Plan GRPO: every graded answer counts in the divisors; without a KL term those of advantage 0 are not forwarded.

    The entropy is that of the forwarded ones.
    """
    graded = [rollout for group in groups for rollout in group.rollouts if rollout.reward.outcome.is_graded]
    tokens = sum(map(_length, graded))
    divisor_of: Mapping[str, Callable[[Rollout], float]] = {
        "grpo": lambda rollout: len(graded) * _length(rollout),
        "dapo": lambda _: tokens,
        "dr_grpo": lambda _: len(graded) * max_length,
    }
    divisor = divisor_of[objective.loss_type]
    sequences = []
    for group in groups:
        rewards = [r.reward.value if r.reward.outcome.is_graded else None for r in group.rollouts]
        advantages = group_advantages(rewards, objective.scale_rewards)
        sequences += [
            TrainSequence(rollout=rollout, weight=advantage, divisor=divisor(rollout))
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
            if advantage or (objective.kl_coef and rollout.reward.outcome.is_graded)
        ]
    if not sequences:
        return None
    entropy_tokens = sum(_length(sequence.rollout) for sequence in sequences)
    return StepPlan(sequences=tuple(sequences), prompts=len(groups), entropy_tokens=entropy_tokens)


def group_advantages(rewards: Sequence[float | None], scale_rewards: str) -> list[float]:
    """Return A_i = r_i - mean(r) of a prompt's answers, divided by their standard deviation (n - 1) with "group".

    None stands for an answer that could not be graded: its advantage is 0, and mean and deviation leave it out (GRPO,
    Shao et al. 2024; without scaling Dr. GRPO, Liu et al. 2025).
    """
    graded = [reward for reward in rewards if reward is not None]
    if len(graded) < 2 or max(graded) == min(graded):
        return [0.0] * len(rewards)
    mean = statistics.fmean(graded)
    scale = statistics.stdev(graded) + STD_EPSILON if scale_rewards == "group" else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def _length(rollout: Rollout) -> int:
    return len(rollout.completion.sampler_logps)
