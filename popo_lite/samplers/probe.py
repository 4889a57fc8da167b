"""Checks that a sampler samples from the adapter it was given: other trainers sampled their base model unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.fused import score
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
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
    """Mean |sampler - trainer| log-prob, nats: with the policy's adapter, the probe's, and the probe's if ignored."""

    gap_mean: float
    probe_gap_mean: float
    ignored_gap_mean: float


def prove_adapter_in_use(
    sampler: Sampler, policy: Policy, prompts: Sequence[Prompt], *, temperature: float, seed: int
) -> Probe:
    """Sample with the policy's adapter and with a disturbed one, and score both with the trainer.

    Leaves policy and sampler as they were. Raises EngineError if the disturbed adapter does not change the sampler
    as it changes the trainer.
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
            logps, _ = score(hidden, ids[len(prompt.token_ids) :], policy.head)
            parts.append(logps.float().cpu())
    return torch.cat(parts)


PROBE_PROMPTS = 4
ROUNDING_NATS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
"""Mean gap between two correct computations of a token's log-prob, by dtype."""
LARGEST_START = 10
"""A gap of more than this many times the rounding, before the first step, is not rounding."""
LARGEST_LIMIT_NATS = 0.2
"""Largest limit, or twice the usual gap if the recipe chooses a sampler that is not quite the policy."""


class SamplerGuard:
    """Knows the usual gap between the sampler's and the trainer's log-probs, and stops the run at a larger one."""

    def __init__(self, recipe: Recipe, policy: Policy, sampler: Sampler) -> None:
        self._recipe, self._policy, self._sampler = recipe, policy, sampler
        self._rounding = self._usual_gap = ROUNDING_NATS[policy.head.weight.dtype]
        # The original base beside a quantised one: the recipe asks for a sampler that is not quite the policy.
        self._another_policy = recipe.rollout.vllm.base == "bf16" and policy.quantized_modules > 0

    def prove(self, prompts: Sequence[Prompt], notify: Callable[[str], None]) -> None:
        """Check that the engine samples from the adapter it is given. Raises EngineError if not."""
        if self._sampler.engine == "hf":
            return  # it has no weights of its own
        probe = prove_adapter_in_use(
            self._sampler,
            self._policy,
            list({prompt.problem.id: prompt for prompt in prompts}.values()),
            temperature=self._recipe.rollout.temperature,
            seed=self._recipe.train.seed,
        )
        if probe.gap_mean > LARGEST_START * self._rounding and not self._another_policy:
            raise EngineError(
                f"log-probs of the {self._sampler.engine} sampler differ from the trainer's by {probe.gap_mean:.3g} "
                f"nats on average, and {self._rounding:.3g} is what rounding explains: it samples from another base",
                where=f'rollout.engine = "{self._sampler.engine}"',
                next_step='--set rollout.vllm.base="dequantized" serves the base that is trained; servers must too',
            )
        self._usual_gap = max(self._usual_gap, probe.gap_mean)
        notify(
            f"sampler proven: log-probs differ from the trainer's by {probe.probe_gap_mean:.2g} nats, and would by "
            f"{probe.ignored_gap_mean:.2g} if the adapter were ignored"
        )

    @property
    def limit(self) -> float:
        """Largest mean |sampler - policy| log-prob that passes, nats."""
        multiple = self._recipe.rollout.max_gap_multiple
        return min(multiple * self._usual_gap, max(LARGEST_LIMIT_NATS, 2 * self._usual_gap))

    def check(self, step: int, gap_mean: float) -> None:
        """Raise EngineError if sampler and trainer disagree: then the rollouts come from another policy.

        `gap_mean` is the mean |sampler - policy| log-prob of the step's rollouts that were scored, nats.
        """
        if not gap_mean <= self.limit:  # NaN must fail, too
            raise EngineError(
                f"log-probs of the {self._sampler.engine} sampler and of the trainer differ by {gap_mean:.3g} nats on "
                f"average in this step; {self._usual_gap:.3g} is usual here, and more than {self.limit:.3g} stops the "
                "run (rollout.max_gap_multiple)",
                where=f"step {step}",
                next_step="the sampler's adapter, cache or base is not the trainer's; resume, and if it happens again, "
                'set rollout.engine="hf" and please report it',
            )
