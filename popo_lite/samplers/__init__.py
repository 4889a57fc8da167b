"""Rollout engines behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from popo_lite.errors import EngineError
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import CanSleep, Sampler, SamplingParams

__all__ = ["CanSleep", "Sampler", "SamplingParams", "open_sampler", "pick_engine"]

Engine = Literal["hf", "vllm", "server"]


def pick_engine(recipe: Recipe) -> tuple[Engine, str]:
    """(engine, one line that says which it is and why). Raises EngineError where the wanted one cannot serve.

    Loads nothing, so that a run finds out before its model is read.
    """
    from popo_lite.samplers.vllm import why_not

    wanted = recipe.rollout.engine
    if wanted in ("hf", "server"):
        return wanted, f"{wanted} (chosen by the recipe)"
    reason = why_not(recipe)
    if reason is None:
        return "vllm", "vllm (chosen by the recipe)" if wanted == "vllm" else "vllm (the fastest here)"
    if wanted == "vllm":
        raise EngineError(
            reason,
            where='rollout.engine = "vllm"',
            next_step='--set rollout.engine="hf" samples from the trainer\'s own model',
        )
    return "hf", f"hf ({reason.partition(':')[0]})"


def open_sampler(
    recipe: Recipe, policy: Policy, *, text: Callable[[Sequence[int]], str], notify: Callable[[str], None]
) -> Sampler:
    """The sampler that `rollout.engine` names, for `policy`, holding its current version.

    `text` decodes token ids; `notify` takes notices that must not be lost: a server that died, memory that ran out.
    """
    engine, _ = pick_engine(recipe)
    if engine == "server":
        from popo_lite.samplers.server import ServerSampler

        return ServerSampler(policy, recipe, text=text, notify=notify)
    if engine == "vllm":
        from popo_lite.samplers.vllm import VLLMSampler

        return VLLMSampler(policy, recipe, text=text)
    from popo_lite.samplers.hf import HFSampler

    return HFSampler(policy, text=text, batch_size=recipe.rollout.max_num_seqs, notify=notify)
