"""Proof that a sampler samples from the adapter it was given: trainers have sampled their base model unnoticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.objective.logprobs import token_logprobs
from popo_lite.policy.policy import Policy
from popo_lite.samplers.base import Sampler, SamplingParams
from popo_lite.types import Completion, Prompt

PROBE_VERSION = -1
PROBE_TOKENS = 32
CLEAR_CHANGE_NATS = 0.3
"""The probe's adapter is enlarged until it moves the mean log-prob of the base's own answers by this much."""
LARGEST_RATIO = 0.2
"""With the adapter in use the gap is rounding; without it, it is the adapter's whole effect."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Mean |sampler - trainer| log-prob, nats: with the policy's adapter, with the probe's, and had it been ignored."""

    gap_mean: float
    probe_gap_mean: float
    ignored_gap_mean: float


def prove_adapter_in_use(
    sampler: Sampler, policy: Policy, prompts: Sequence[Prompt], *, temperature: float, seed: int
) -> Probe:
    """Sample with the policy's adapter and with a disturbed one, and score both with the trainer.

    Leaves policy and sampler as they were. Raises EngineError where the disturbed adapter makes no difference to the
    sampler, or another one than to the trainer.
    """
    params = SamplingParams(temperature=temperature, max_completion_length=PROBE_TOKENS)

    def sample(version: int) -> list[list[Completion]]:
        return sampler.sample(prompts, count=1, params=params, policy_version=version, stream=("probe", seed))

    sampler.sync(policy.version)
    answers = sample(policy.version)
    gap_mean = _gap(policy, prompts, answers)
    kept = [(parameter, parameter.detach().clone()) for _, parameter in policy.adapter_parameters()]
    try:
        _disturb(policy, prompts, answers, seed)
        sampler.sync(PROBE_VERSION)
        answers = sample(PROBE_VERSION)
        probe_gap = _gap(policy, prompts, answers)
        with policy.model.disable_adapter():
            ignored = _gap(policy, prompts, answers)
    finally:
        with torch.no_grad():
            for parameter, weights in kept:
                parameter.copy_(weights)
        sampler.sync(policy.version)
    if not probe_gap < LARGEST_RATIO * ignored:
        raise EngineError(
            f"the {sampler.engine} sampler does not sample from the adapter it is given: log-probs of its own answers "
            f"differ from the trainer's by {probe_gap:.3g} nats on average, and would by {ignored:.3g} if the adapter "
            "were ignored",
            where=f'rollout.engine = "{sampler.engine}"',
            next_step='--set rollout.engine="hf" samples from the trainer\'s own model; please report this',
        )
    return Probe(gap_mean=gap_mean, probe_gap_mean=probe_gap, ignored_gap_mean=ignored)


@torch.no_grad()
def _disturb(policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]], seed: int) -> None:
    """Add noise to the adapters, doubling it until the trainer's log-probs of `answers` move clearly."""
    source = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=source).to(p) for _, p in policy.adapter_parameters()]
    before = _score(policy, prompts, answers)
    scale = 1e-3
    for _ in range(16):
        for (_, parameter), direction in zip(policy.adapter_parameters(), noise, strict=True):
            parameter.add_(direction, alpha=scale)
        scale *= 2
        if float((_score(policy, prompts, answers) - before).abs().mean()) > CLEAR_CHANGE_NATS:
            return


def _gap(policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> float:
    sampled = [logp for group in answers for one in group for logp in one.sampler_logps]
    return float((torch.tensor(sampled) - _score(policy, prompts, answers)).abs().mean())


@torch.no_grad()
def _score(policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> Tensor:
    """The trainer's log-probs of all answers' tokens, one after another [N], on the host."""
    policy.model.eval()
    parts = []
    for prompt, group in zip(prompts, answers, strict=True):
        for one in group:
            ids = torch.tensor(prompt.token_ids + one.token_ids, device=policy.device)
            hidden = policy.hidden_states(ids, [len(ids)])[len(prompt.token_ids) - 1 : -1]
            logps, _ = token_logprobs(hidden, ids[len(prompt.token_ids) :], policy.head)
            parts.append(logps.float().cpu())
    return torch.cat(parts)
