"""Rollout engines: the trainer's own model, vLLM in this process, and vLLM servers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

from popo_lite.distributed import Ranks
from popo_lite.errors import EngineError
from popo_lite.installing import install_extra
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers import vllm
from popo_lite.samplers.base import Sampler, SamplingParams
from popo_lite.samplers.hf import HFSampler
from popo_lite.samplers.server import ServerSampler, listed_urls
from popo_lite.types import Problem, Prompt

__all__ = ["Sampler", "SamplingParams", "open_sampler", "pick_engine"]

Engine = Literal["hf", "vllm", "server"]
SAMPLERS: dict[Engine, type[Sampler]] = {"hf": HFSampler, "vllm": vllm.VLLMSampler, "server": ServerSampler}


def pick_engine(recipe: Recipe, ranks: Ranks | None = None) -> tuple[Engine, str]:
    """Return the engine and one line that says why. Raises EngineError if the wanted one cannot serve.

    Loads nothing, so a run finds out before its model is read; also that `rollout.server.urls_file`, which only the
    first of the `ranks` reads, is wrong: UserInputError. A collective: with `auto` all ranks get the same engine.
    """
    wanted, reason, ranks = recipe.rollout.engine, None, ranks or Ranks()
    engine: Engine = "vllm" if wanted == "auto" else wanted
    if engine == "vllm":
        reason = vllm.why_not(recipe)
    elif engine == "server" and importlib.util.find_spec("openai") is None:
        reason = f"servers need the openai package: {install_extra('server')}"
    elif engine == "server" and ranks.first:
        listed_urls(recipe)
    if wanted == "auto":
        reason = next(filter(None, ranks.gather(reason)), None)
    if reason is None:
        return engine, f"{engine} ({'the fastest here' if wanted == 'auto' else 'chosen by the recipe'})"
    if wanted == "auto":
        return "hf", f"hf ({reason.partition(':')[0]})"
    next_step = '--set rollout.engine="hf" samples from the trainer\'s own model'
    raise EngineError(reason, where=f'rollout.engine = "{engine}"', next_step=next_step)


def open_sampler(
    recipe: Recipe,
    policy: Policy,
    *,
    text: Callable[[Sequence[int]], str],
    notify: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Sampler:
    """Open the sampler that `rollout.engine` names; see `Sampler`.

    With `auto` a model that vLLM does not serve is sampled by `hf`. It remains an error, which says what to change, if
    memory ran out, because `hf` would be many times slower, and with several ranks, which may differ.
    """
    (engine, _), ranks = pick_engine(recipe, ranks), ranks or Ranks()
    try:
        sampler = SAMPLERS[engine](policy, recipe, text=text, notify=notify, ranks=ranks)
        if engine == "vllm":
            _sample_one_token(sampler, policy)
        return sampler
    except EngineError as error:
        auto = recipe.rollout.engine == "auto" and ranks.size == 1
        if not auto or error.where != vllm.WHERE or "memory" in error.what:
            raise
        notify(f"{error.what}; sampling from the trainer's own model (hf) instead")
    release_memory()  # after the block: the error keeps what the engine holds
    return HFSampler(policy, recipe, text=text, notify=notify, ranks=ranks)


def _sample_one_token(sampler: Sampler, policy: Policy) -> None:
    """Close the sampler and raise EngineError if it cannot sample: some kernels fail only when they are first used."""
    prompt = Prompt(problem=Problem(id="first token", messages=(), answer=""), token_ids=(min(policy.stop_ids),))
    params = SamplingParams(temperature=1.0, max_completion_length=1)
    try:
        sampler.sample([prompt], count=1, params=params, policy_version=policy.version, stream=("first token",))
    except BaseException:
        sampler.close()
        raise
