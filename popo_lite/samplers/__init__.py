"""Rollout engines behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from popo_lite.errors import EngineError
from popo_lite.policy.policy import Policy
from popo_lite.recipe import RolloutRecipe
from popo_lite.samplers.base import Sampler, SamplingParams

__all__ = ["Sampler", "SamplingParams", "open_sampler", "pick_engine"]


def pick_engine(recipe: RolloutRecipe) -> tuple[str, str]:
    """(engine, one line that says which it is and why). Raises EngineError where the wanted one is not here."""
    if recipe.engine == "vllm":
        raise EngineError(
            "the vLLM engine is not part of this release",
            where='rollout.engine = "vllm"',
            next_step='--set rollout.engine="hf" samples from the trainer\'s own model',
        )
    reason = "chosen by the recipe" if recipe.engine == "hf" else "the only engine of this release"
    return "hf", f"hf ({reason})"


def open_sampler(recipe: RolloutRecipe, policy: Policy, *, text: Callable[[Sequence[int]], str]) -> Sampler:
    """The sampler that `rollout.engine` names, for `policy`; `text` decodes token ids."""
    from popo_lite.samplers.hf import HFSampler

    pick_engine(recipe)
    return HFSampler(policy, text=text, batch_size=recipe.batch_size)
