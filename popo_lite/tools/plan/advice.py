"""Find the smallest changes that make a recipe fit, and check a recipe before it trains."""

from __future__ import annotations

import json
import os
import shlex
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from popo_lite.errors import ModelError, PopoError, UserInputError
from popo_lite.host_memory import available_bytes
from popo_lite.launch import count_of, processes_of_run
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.tools.console.words import memory
from popo_lite.tools.plan.shapes import UnknownArchitectureError, load_shape
from popo_lite.tools.plan.simulation import fullest_phase, simulate_step
from popo_lite.tools.plan.terms import engine_of
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES, HOST, Machine, MemoryPlan, plan_memory
from popo_lite.tools.simulate import refuse

LARGE_ENGINE_BYTES = 8 * 2**30
"""Weights of an engine above this are first advised in 4 bits: asleep they take up to twice as much host memory."""
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
Values = Mapping[str, Any]  # recipe keys with new values, to be changed together


class Advice(NamedTuple):
    """Changes that make a run fit; none if it fits already.

    Each change has `values`, keys to set together; `eases`, the phase (or `SHORTFALL`) whose excess then shrinks most;
    its `before_bytes` and `after_bytes`; and `peak_bytes`, the run's peak after the change. If nothing helps, there are
    no changes, and `smallest_vram_bytes` and `smallest_host_bytes` are what the run takes with every reduction.
    """

    changes: tuple[Mapping[str, Any], ...]
    smallest_vram_bytes: int | None = None
    smallest_host_bytes: int | None = None

    @property
    def values(self) -> Values:
        """Return all changes together."""
        return {key: value for change in self.changes for key, value in change["values"].items()}

    @property
    def next_step(self) -> str:
        """Return options to add to a command, or how much memory the run takes at least."""
        if self.smallest_vram_bytes is None:
            return _options(self.values)
        takes = f"a GPU of {memory(self.smallest_vram_bytes)}"
        if self.smallest_host_bytes is not None:
            takes += f" and {memory(self.smallest_host_bytes)} of host memory"
        return f"no setting makes it fit; with every reduction it takes {takes}"


def advice_for(plan: MemoryPlan) -> Advice:
    """Return the smallest changes after which a run fits, from `reductions` in their order.

    Each reduction is applied as little as is enough, or else as far as it helps, until the run fits. Reductions that
    the others can do without are left out again.
    """
    kinds = list(reductions(plan.recipe))
    if plan.sampling.get("engine weights", 0) > LARGE_ENGINE_BYTES:
        kinds.insert(0, kinds.pop(kinds.index("packed engine")))
    chosen, smallest = _choose(plan, kinds)
    if not smallest.fits:
        quarters = range(0, 2**40, 2**28)
        recipe, shape, machine = smallest.recipe, smallest.shape, smallest.machine._replace(host_bytes=None)
        fitting = bisect_left(
            quarters, True, key=lambda size: MemoryPlan(recipe, shape, machine._replace(vram_bytes=size)).fits
        )
        return Advice((), quarters[fitting], smallest.needs[HOST] if smallest.excess[HOST] else None)
    for kind in tuple(chosen):
        without, changed = _choose(plan, [other for other in chosen if other != kind])
        chosen = without if changed.fits else chosen
    # Weaken each reduction as far as the run still fits: those chosen later may have made its full strength needless.
    for kind, index in chosen.items():
        milder = (chosen | {kind: milder} for milder in range(index))
        chosen = next((tried for tried in milder if _apply(plan, tried).fits), chosen)
    changes = []
    for kind, index in chosen.items():
        values = _settings(plan.recipe, kind)[index]
        needs, excess, after = plan.needs, plan.excess, plan.with_values(values)
        eases = max(needs, key=lambda key: (excess[key] - after.excess[key], needs[key] - after.needs[key]))
        changes.append({"values": values, "eases": eases, "before_bytes": needs[eases],
                        "after_bytes": after.needs[eases], "peak_bytes": after.peak.total_bytes})  # fmt: skip
        plan = after
    return Advice(tuple(changes))


def refuse_without_room(recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Raise UserInputError, with what to change, if the plan says that a run does not fit this machine.

    That is its GPU's memory and the host memory that is left, which all ranks on the machine share. For an architecture
    that the plan does not know a step is simulated. If that fails too, or the config cannot be read, `notify` gets a
    message and the run is not checked. A run on the CPU is never refused: `notify` gets a warning if it may not fit.
    """
    import torch  # not above: `popo-lite plan` must not wait for it

    if recipe.train.device == "cpu" or not torch.cuda.is_available():
        _warn_on_cpu(recipe.with_values({"train.device": "cpu"}), notify)
        return
    ranks, here = ranks_by_environment()
    free, total = torch.cuda.mem_get_info()
    # The query has created this process's CUDA context, which the plan counts itself.
    others = max(0, total - free - CUDA_CONTEXT_BYTES)
    machine = Machine(total, others, available_bytes(), torch.cuda.get_device_capability(), ranks, here)
    try:
        plan = plan_memory(recipe, load_shape(recipe.model), **machine._asdict())
    except UnknownArchitectureError as error:
        _refuse_by_simulation(recipe, notify, error.what, machine)
        return
    except ModelError as error:
        notify(f"no memory plan: {error.what}")
        return
    if not plan.fits:
        of_host = plan.excess[HOST] and plan.peak.total_bytes <= plan.vram_bytes
        where = HOST if of_host else f"phase {plan.peak.name}"
        raise UserInputError(why_not(plan), where=where, next_step=advice_for(plan).next_step)


def ranks_by_environment() -> tuple[int, int]:
    """Return the number of ranks, in all and on this machine, that torchrun or `accelerate launch` has started."""
    ranks = processes_of_run()
    return ranks, count_of("LOCAL_WORLD_SIZE", ranks)


def _warn_on_cpu(recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Tell `notify` if a run on the CPU is planned to take more than the host memory that is left."""
    ranks, here = ranks_by_environment()
    machine = Machine(available_bytes() // here, ranks=ranks, ranks_here=here)
    try:
        plan = MemoryPlan(recipe, load_shape(recipe.model), machine)
    except ModelError:
        return
    if plan.peak.total_bytes > plan.vram_bytes:
        notify(f"host memory may run out: {why_not(plan)}; popo-lite plan RECIPE says what takes how much")


def _refuse_by_simulation(recipe: Recipe, notify: Callable[[str], None], why: str, machine: Machine) -> None:
    """Raise UserInputError if a simulated step of the trainer, without rollouts, does not fit the GPU.

    Of several ranks only the first simulates. If that fails, `notify` gets a message.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        refuse(recipe, machine.ranks)
    except UserInputError as error:
        notify(f"no memory plan: {why}, and {error.what}; the run goes on without a check")
        return
    notify(f"{why}; simulating a step instead, which takes some 20 seconds")
    try:
        found = simulate_step(recipe, None, machine)
    except (PopoError, RuntimeError) as error:
        reason = error.what if isinstance(error, PopoError) else str(error).strip().splitlines()[-1]
        notify(f"no memory plan: {why}, and the simulation failed: {reason}; the run goes on without a check")
        return
    others, total = machine.others_bytes, memory(machine.vram_bytes)
    need = memory(found["smallest_bytes"]["expandable"] - others)
    need += f" beside {memory(others)} of other processes" if others else ""
    what = f"the trainer, simulated without rollouts, needs {need}, and there are {total}"
    if found["fits"]:
        notify(what)
        return
    kinds = ("microbatch", "logits", "checkpointing", "optimizer", "offload", "base", "rank", "answers")
    options = [_options(values) for kind in kinds for values in _settings(recipe, kind)[:1]]
    next_step = f"check with popo-lite plan --simulate what is enough of: {', '.join(options)}"
    raise UserInputError(what, where=f"phase {fullest_phase(found)}", next_step=next_step)


def why_not(plan: MemoryPlan) -> str:
    """Return in one sentence why a run does not fit."""
    peak, total, share = plan.peak, memory(plan.vram_bytes), plan.recipe.rollout.vllm.gpu_memory_utilization
    if peak.total_bytes > plan.vram_bytes:
        need = memory(peak.total_bytes - plan.others_bytes)
        need += f" beside {memory(plan.others_bytes)} of other processes" if plan.others_bytes else ""
        return f"the run is planned to need {need} in the phase {peak.name} ({peak.moment}), and there are {total}"
    if plan.excess[HOST]:
        parts = ", ".join(f"{name} {memory(size)}" for name, size in plan.host.items())
        left = f"and {memory(plan.host_bytes)} are left"
        parts += f", for each of {plan.machine.ranks_here} ranks" if plan.machine.ranks_here > 1 else ""
        return f"the run is planned to need {memory(plan.needs[HOST])} of host memory ({parts}), {left}"
    lacks = f"lacks {memory(plan.engine_shortfall_bytes)} to hold one sequence of {plan.sequence_tokens:,} tokens"
    return f"the engine's share of {total}, rollout.vllm.gpu_memory_utilization = {share}, {lacks}"


def memory_advice(recipe: Recipe) -> str:
    """Return lines of alternative options to add if even one sequence does not fit while the policy trains."""
    lines = []
    for intro, *kinds in (
        ("resume with", "checkpointing", "offload", "logits"),
        ("in a new run, which may start from this one's adapter (lora.init_from), use", "optimizer", "rank", "answers"),
    ):
        found = [f"  {_options(values)}" for kind in kinds for values in _settings(recipe, kind)[:1]]
        lines += [f"{intro} one of:" if len(found) > 1 else f"{intro}:", *found] if found else []
    return "\n".join(lines) or "train on a GPU with more memory"


def reductions(recipe: Recipe) -> dict[str, list[Values]]:
    """Return smaller settings than the recipe's own by kind, in the order to try them, the mildest first."""
    rollout, train, lora, engine = recipe.rollout, recipe.train, recipe.lora, engine_of(recipe)
    used, longest = rollout.vllm.gpu_memory_utilization, rollout.sequence_tokens
    shares = [percent / 100 for percent in range(10, 91, 5)] if engine == "vllm" else []
    shares.sort(key=lambda share: (abs(share - used), share))
    utilizations: list[Values] = [{"rollout.vllm.gpu_memory_utilization": share} for share in shares]
    batches: list[Values] = [{"rollout.max_num_seqs": size} for size in _halves(rollout.max_num_seqs, 1)]
    microbatches = [*_halves(train.tokens_per_microbatch, longest + 1), longest]
    optimizers = OPTIMIZERS[OPTIMIZERS.index(recipe.optimizer.name) + 1 :] if recipe.model.dtype != "float64" else ()
    narrow = "float16" if recipe.model.dtype == "float16" else "bfloat16"
    dtype, checkpointing = {"model.dtype": narrow}, {"train.gradient_checkpointing": True}
    packs = engine == "vllm" and rollout.vllm.base != "nf4"
    ranks = _halves(lora.rank, 4) if lora.init_from is None else []
    exponent = 0.5 if lora.rslora else 1  # alpha keeps the adapters' scale, alpha / rank, or alpha / sqrt(rank)
    answers = _halves(rollout.max_completion_length, 256)
    return {
        # The update and the answers stay the same, and little time is lost.
        "utilization": utilizations,
        "microbatch": [{"train.tokens_per_microbatch": tokens} for tokens in microbatches],
        "logits": [{"train.logits_mib": size} for size in _halves(train.logits_mib, 32)],
        "batch": batches if engine != "server" else [],
        "sleep": [{"rollout.vllm.enable_sleep_mode": True}],
        # These cost more time; a 4-bit base in vLLM also needs its plugin.
        "checkpointing": [checkpointing],
        "optimizer": [{"optimizer.name": name} for name in optimizers],
        "offload": [{"train.offload_activations": True} | checkpointing],
        "packed engine": [{"rollout.vllm.base": "nf4", **values} for values in ({}, *utilizations) if packs],
        "awake": [{"rollout.vllm.enable_sleep_mode": False}],  # these two free host memory
        "on the GPU": [{"train.offload_activations": False}],
        "own engine": [{"rollout.engine": "hf", **values} for values in ({}, *batches) if engine == "vllm"],
        # This moves the whole base between ranks in every pass. It frees nothing on one rank, or while `hf` samples.
        "divided base": [{"distributed.strategy": "fsdp2"}] if engine == "server" else [],
        # These change what is learned.
        "base": [dtype, dtype | {"model.quantization": "nf4"}],
        "predictor": [{"siamese.head_width": width} for width in _halves(recipe.siamese.head_width, 1024)],
        "rank": [{"lora.rank": rank, "lora.alpha": lora.alpha * (rank / lora.rank) ** exponent} for rank in ranks],
        "answers": [{"rollout.max_completion_length": answer, "train.tokens_per_microbatch":
                     min(rollout.max_prompt_length + answer, train.tokens_per_microbatch)} for answer in answers],
    }  # fmt: skip


def _halves(value: int, least: int) -> list[int]:
    """Return half of the value, a quarter and so on, down to `least`."""
    return [value >> times for times in range(1, value.bit_length()) if value >> times >= least]


def _settings(recipe: Recipe, kind: str) -> list[Values]:
    """Return the settings of one kind that change the recipe to a valid one, with only the keys that change."""
    settings = [{name: value for name, value in values.items() if value != attrgetter(name)(recipe)}
                for values in reductions(recipe)[kind]]  # fmt: skip
    return [new for new in settings if new and not any(impossible_combinations(recipe.with_values(new)))]


def _apply(plan: MemoryPlan, chosen: Mapping[str, int]) -> MemoryPlan:
    for kind, index in chosen.items():  # a reduction's settings depend on those before it
        plan = plan.with_values(_settings(plan.recipe, kind)[index])
    return plan


def _choose(plan: MemoryPlan, kinds: Iterable[str]) -> tuple[dict[str, int], MemoryPlan]:
    """Apply reductions in turn until the run fits, each only as far as it helps: kind -> index of its setting."""
    chosen, best = dict[str, int](), plan
    for kind in kinds:
        for index, values in enumerate(() if best.fits else _settings(plan.recipe, kind)):
            changed = plan.with_values(values)
            if changed.overrun_bytes < best.overrun_bytes:
                chosen[kind], best = index, changed
            if changed.fits:
                break
        plan = best
    return chosen, best


def _options(values: Values) -> str:
    """Return values as options; text needs no quotes of TOML's there."""
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return " ".join(f"--set {shlex.quote(word)}" for word in words)
