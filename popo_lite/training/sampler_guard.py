"""Watching that the sampler samples from the policy: a proof before the first step, and a limit at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from popo_lite.errors import EngineError
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers import Sampler
from popo_lite.samplers.probe import prove_adapter_in_use
from popo_lite.types import Prompt

PROBE_PROMPTS = 4
ROUNDING_NATS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}
"""Mean gap between two right computations of a token's log-prob, by dtype; less than this is never usual."""
LARGEST_START = 10
"""A gap of more than this many times the rounding, before the first step, is no rounding."""
LARGEST_LIMIT_NATS = 0.2
"""No limit is wider than this, or twice the usual gap where a sampler is another policy by choice."""


class SamplerGuard:
    """Knows the usual gap between the sampler's and the trainer's log-probs, and refuses more."""

    def __init__(self, recipe: Recipe, policy: Policy, sampler: Sampler) -> None:
        self._recipe, self._policy, self._sampler = recipe, policy, sampler
        self._rounding = self._usual_gap = ROUNDING_NATS[policy.head.weight.dtype]
        # The original base beside a quantised one: the recipe asks for a sampler that is not quite the policy.
        self._another_policy = recipe.rollout.vllm.base == "bf16" and policy.quantized_modules > 0

    def prove(self, prompts: Sequence[Prompt], notify: Callable[[str], None]) -> None:
        """Show that the engine samples from the adapter it is given. Raises EngineError where it does not."""
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
        """Raise EngineError where sampler and trainer have come to disagree: its rollouts are another policy's then.

        `gap_mean` is the mean |sampler - policy| log-prob of the step's rollouts that were scored, nats.
        """
        if not gap_mean <= self.limit:  # not a number is no agreement either
            raise EngineError(
                f"log-probs of the {self._sampler.engine} sampler and of the trainer differ by {gap_mean:.3g} nats on "
                f"average in this step; {self._usual_gap:.3g} is usual here, and more than {self.limit:.3g} stops the "
                "run (rollout.max_gap_multiple)",
                where=f"step {step}",
                next_step="the sampler's adapter, cache or base is not the trainer's; resume, and if it comes back, "
                'set rollout.engine="hf" and please report it',
            )
