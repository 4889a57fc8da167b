"""Watching that the sampler samples from the policy: a proof before the first step, and a limit at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from popo_lite.errors import EngineError
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers import Sampler
from popo_lite.samplers.probe import prove_adapter_in_use
from popo_lite.training.metrics import UpdateFigures
from popo_lite.types import Prompt

PROBE_PROMPTS = 4
ROUNDING_NATS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-3}
"""Mean gap between two right computations of a token's log-prob, by dtype; a probe can only find more than this."""


class SamplerGuard:
    """Knows the usual gap between the sampler's and the trainer's log-probs, and refuses more."""

    def __init__(self, recipe: Recipe, policy: Policy, sampler: Sampler) -> None:
        self._recipe, self._policy, self._sampler = recipe, policy, sampler
        self._usual_gap = ROUNDING_NATS[policy.head.weight.dtype]

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
        self._usual_gap = max(self._usual_gap, probe.gap_mean)
        notify(
            f"sampler proven: log-probs differ from the trainer's by {probe.probe_gap_mean:.2g} nats, and would by "
            f"{probe.ignored_gap_mean:.2g} if the adapter were ignored"
        )

    def check(self, step: int, figures: UpdateFigures) -> None:
        """Raise EngineError where sampler and trainer have come to disagree: its rollouts are another policy's then."""
        multiple = self._recipe.rollout.max_gap_multiple
        if figures.gap_mean > multiple * self._usual_gap:
            raise EngineError(
                f"log-probs of the {self._sampler.engine} sampler and of the trainer differ by {figures.gap_mean:.3g} "
                f"nats on average over this step's positives; {self._usual_gap:.3g} is usual here, and the limit is "
                f"rollout.max_gap_multiple = {multiple:g} times that",
                where=f"step {step}",
                next_step="the sampler's adapter, cache or base is not the trainer's; resume, and if it comes back, "
                'set rollout.engine="hf" and please report it',
            )
