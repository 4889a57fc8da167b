"""Check that a sampler uses the adapter it was given: other trainers sampled their base model unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from popo_lite.errors import EngineError
from popo_lite.fused import score
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Sampler, SamplingParams
from popo_lite.types import Completion, Prompt

PROBE_VERSION = -1
PROBE_PROMPTS = 4
PROBE_TOKENS = 32
CLEAR_CHANGE_NATS = 0.3
"""The probe's adapter is enlarged until it moves the mean log-prob of the base's own answers by this much."""
LARGEST_RATIO = 0.2
"""Largest gap with the adapter, which is rounding, relative to the gap without it, which is its whole effect."""

ROUNDING_NATS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
"""Mean gap between two correct computations of a token's log-prob, by dtype."""
LARGEST_START = 10
"""Largest gap before the first step, in multiples of the rounding."""
LARGEST_LIMIT_NATS = 0.2
"""Largest limit, or twice the usual gap if the recipe chooses a sampler that is not quite the policy."""


class SamplerGuard:
    """Checks that the sampler uses the adapter it is given, at the start and by the log-probs of every step."""

    def __init__(self, recipe: Recipe, policy: Policy, sampler: Sampler) -> None:
        self._recipe, self._policy, self._sampler = recipe, policy, sampler
        self._usual_gap = self._rounding = ROUNDING_NATS[policy.head.weight.dtype]

    def prove(self, prompts: Sequence[Prompt], notify: Callable[[str], None]) -> None:
        """Raise EngineError if the engine does not sample from the adapter it is given, or from another base."""
        engine, where = self._sampler.engine, f'rollout.engine = "{self._sampler.engine}"'
        if engine == "hf":
            return  # it has no weights of its own
        policy_gap, probe_gap, ignored = self.measure(list({p.problem.id: p for p in prompts}.values()))
        if not probe_gap < LARGEST_RATIO * ignored:
            what = f"the {engine} sampler does not sample from the adapter it is given: log-probs of its own answers "
            what += f"differ from the trainer's by {probe_gap:.3g} nats on average, and would by {ignored:.3g} "
            what += "if the adapter were ignored"
            next_step = '--set rollout.engine="hf" samples from the trainer\'s own model; please report this'
            raise EngineError(what, where=where, next_step=next_step)
        # With the original base beside a quantised one the recipe asks for a sampler that is not quite the policy.
        another_base = self._recipe.rollout.vllm.base == "bf16" and self._policy.quantized_modules > 0
        if policy_gap > LARGEST_START * self._rounding and not another_base:
            what = f"log-probs of the {engine} sampler differ from the trainer's by {policy_gap:.3g} nats on average, "
            what += f"and {self._rounding:.3g} is what rounding explains: it samples from another base"
            next_step = '--set rollout.vllm.base="dequantized" serves the base that is trained; servers must too'
            raise EngineError(what, where=where, next_step=next_step)
        self._usual_gap = max(self._usual_gap, policy_gap)
        notify(
            f"sampler proven: log-probs differ from the trainer's by {probe_gap:.2g} nats, and would by {ignored:.2g} "
            "if the adapter were ignored"
        )

    def check(self, step: int, gap_mean: float) -> None:
        """Raise EngineError if sampler and trainer disagree: then the rollouts come from another policy.

        `gap_mean` is the mean |sampler - policy| log-prob of the step's rollouts that were scored, nats.
        """
        usual = self._usual_gap
        limit = min(self._recipe.rollout.max_gap_multiple * usual, max(LARGEST_LIMIT_NATS, 2 * usual))
        if not gap_mean <= limit:  # NaN must fail, too
            raise EngineError(
                f"log-probs of the {self._sampler.engine} sampler and of the trainer differ by {gap_mean:.3g} nats on "
                f"average; {usual:.3g} is usual, and more than {limit:.3g} (rollout.max_gap_multiple) stops the run",
                where=f"step {step}",
                next_step="the sampler's adapter, cache or base is not the trainer's; resume, and if it happens again, "
                'set rollout.engine="hf" and please report it',
            )

    @torch.no_grad()
    def measure(self, prompts: Sequence[Prompt]) -> tuple[float, float, float]:
        """Sample with the policy's adapter and with a disturbed one, and score both with the trainer.

        Return the mean |sampler - trainer| log-prob, nats: with the policy's adapter, with the disturbed one, and with
        the disturbed one if the sampler ignored it. Leaves policy and sampler as they were.
        """
        policy, sampler, seed = self._policy, self._sampler, self._recipe.train.seed
        temperature = self._recipe.rollout.temperature
        params = SamplingParams(temperature=temperature, max_completion_length=PROBE_TOKENS)

        def sample(version: int) -> list[Completion]:
            sampler.sync(version)
            groups = sampler.sample(prompts, count=1, params=params, policy_version=version, stream=("probe", seed))
            return [answer for [answer] in groups]

        def gap(answers: Sequence[Completion]) -> float:
            sampled = torch.tensor([logp for answer in answers for logp in answer.sampler_logps])
            return float((sampled - self._score(prompts, answers)).abs().mean())

        answers = sample(policy.version)
        policy_gap, before = gap(answers), self._score(prompts, answers)
        source = torch.Generator().manual_seed(seed)
        parameters = [parameter for _, parameter in policy.adapter_parameters()]
        # On the host: the engine is awake, so that the GPU is as full as it gets.
        kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        try:
            noise = [torch.randn(parameter.shape, generator=source) for parameter in parameters]
            for doubling in range(16):  # until the trainer's log-probs of these answers change clearly
                for parameter, direction in zip(parameters, noise, strict=True):
                    parameter.add_(direction.to(parameter), alpha=1e-3 * 2**doubling)
                if float((self._score(prompts, answers) - before).abs().mean()) > CLEAR_CHANGE_NATS:
                    break
            answers = sample(PROBE_VERSION)
            probe_gap = gap(answers)
            with policy.model.disable_adapter():
                ignored = gap(answers)
        finally:
            for parameter, weights in zip(parameters, kept, strict=True):
                parameter.copy_(weights)
            sampler.sync(policy.version)
        return policy_gap, probe_gap, ignored

    def _score(self, prompts: Sequence[Prompt], answers: Sequence[Completion]) -> Tensor:
        """Return the trainer's log-probs of all answers' tokens, one answer after another [N], on the host."""
        policy, parts = self._policy, []
        policy.model.eval()
        for prompt, answer in zip(prompts, answers, strict=True):
            ids, start = torch.tensor(prompt.token_ids + answer.token_ids, device=policy.device), len(prompt.token_ids)
            logps, _ = score(policy.hidden_states(ids, [[len(ids)]])[start - 1 : -1], ids[start:], policy.head)
            parts.append(logps.float().cpu())
        return torch.cat(parts)
