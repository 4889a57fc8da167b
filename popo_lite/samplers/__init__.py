"""Rollout engines behind one protocol."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

from popo_lite.errors import EngineError
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import CanSleep, Sampler, SamplingParams

__all__ = ["CanSleep", "Sampler", "SamplingParams", "open_sampler", "pick_engine"]

Engine = Literal["hf", "vllm", "server"]


def pick_engine(recipe: Recipe) -> tuple[Engine, str]:
    """Return the engine and one line that says why. Raises EngineError if the wanted one cannot serve.

    Loads nothing, so a run finds out before its model is read.
    """
    from popo_lite.samplers.vllm import why_not

    wanted = recipe.rollout.engine
    if wanted == "server" and importlib.util.find_spec("openai") is None:
        raise EngineError(
            "rollouts from servers need the openai package",
            where='rollout.engine = "server"',
            next_step="pip install 'popo-lite[server]'",
        )
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
    """Open the sampler that `rollout.engine` names, with the current version of `policy`.

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
