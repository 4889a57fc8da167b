"""Find the smallest changes that make a recipe fit, and check a recipe before it trains."""

from __future__ import annotations

import json
import shlex
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from popo_lite.errors import ModelError, UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.tools.plan.shapes import ModelShape, load_shape
from popo_lite.tools.plan.terms import engine_of, sequence_tokens, vllm_can_serve
from popo_lite.tools.plan.vram import (
    CUDA_CONTEXT_BYTES,
    SHORTFALL,
    MemoryPlan,
    excess,
    needs,
    overrun_bytes,
    plan_memory,
)

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
SMALLEST_HEAD_WIDTH = 1024
SMALLEST_RANK = 4
SMALLEST_ANSWER_TOKENS = 256
SMALLEST_LOGITS_MIB = 32
UTILIZATIONS = tuple(percent / 100 for percent in range(10, 91, 5))

Values = Mapping[str, Any]
"""Recipe keys with new values, to be changed together."""

Choice = list[tuple[str, int]]
"""Kinds of `reductions`, each with the index of the chosen setting."""


@dataclass(frozen=True)
class Change:
    """Keys to set together, and their effect once all earlier changes are made.

    `eases` is the phase that shrinks most among those that are too large, or `SHORTFALL`, with its bytes before and
    after. `peak_bytes` is the run's peak after the change, which may be another phase's.
    """

    values: Values
    eases: str
    before_bytes: int
    after_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes that make a run fit; none if it fits already.

    If nothing helps, `changes` is empty and `smallest_vram_bytes` is the GPU that the run takes with every reduction.
    """

    changes: tuple[Change, ...]
    smallest_vram_bytes: int | None = None

    @property
    def values(self) -> Values:
        """Return all changes together."""
        return {key: value for change in self.changes for key, value in change.values.items()}

    @property
    def next_step(self) -> str:
        """Return options to add to a command, or how much memory the run takes at least."""
        if self.smallest_vram_bytes is None:
            return _options(self.values)
        return f"no setting makes it fit; with all that save memory it takes a GPU of {_gib(self.smallest_vram_bytes)}"


def advice_for(recipe: Recipe, shape: ModelShape, vram_bytes: int, others_bytes: int = 0) -> Advice:
    """Return the smallest changes after which `recipe` fits `vram_bytes`, from `reductions` in their order.

    Each reduction is applied as little as is enough, or else as far as it helps, until the run fits. Reductions that
    the others can do without are left out again.
    """

    def overrun(candidate: Recipe) -> int:
        return overrun_bytes(candidate, shape, vram_bytes, others_bytes)

    chosen = _choose(recipe, reductions(recipe), overrun)
    smallest = _apply(recipe, chosen)
    if overrun(smallest):
        return Advice(changes=(), smallest_vram_bytes=_smallest_vram(smallest, shape, others_bytes))
    for kind, _ in tuple(chosen):
        without = _choose(recipe, [other for other, _ in chosen if other != kind], overrun)
        if not overrun(_apply(recipe, without)):
            chosen = without
    # Weaken each reduction as far as the others allow, which may have become stronger since it was chosen.
    for position, (kind, index) in enumerate(chosen):
        for milder in range(index):
            tried = [*chosen[:position], (kind, milder), *chosen[position + 1 :]]
            if not overrun(_apply(recipe, tried)):
                chosen = tried
                break
    return Advice(changes=_changes(recipe, chosen, shape, vram_bytes, others_bytes))


def refuse_without_room(recipe: Recipe, notify: Callable[[str], None]) -> None:
    """Raise UserInputError, with what to change, if the plan says that a run does not fit this machine's GPU.

    A run on the CPU is not checked. For an architecture that cannot be planned, `notify` gets a message.
    """
    import torch  # not above: `popo-lite plan` must not wait for it

    if recipe.train.device == "cpu" or not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    # The query has created this process's CUDA context, which the plan counts itself.
    others = max(0, total - free - CUDA_CONTEXT_BYTES)
    try:
        shape = load_shape(recipe.model)
        plan = plan_memory(recipe, shape, vram_bytes=total, others_bytes=others)
    except ModelError as error:
        notify(f"no memory plan: {error.what}")
        return
    if not plan.fits:
        advice = advice_for(recipe, shape, total, others)
        raise UserInputError(why_not(recipe, plan), where=f"phase {plan.peak.name}", next_step=advice.next_step)


def why_not(recipe: Recipe, plan: MemoryPlan) -> str:
    """Return in one sentence why a run does not fit."""
    if plan.peak.total_bytes > plan.vram_bytes:
        beside = f" beside {_gib(plan.others_bytes)} of other processes" if plan.others_bytes else ""
        return (
            f"the run is planned to need {_gib(plan.peak.total_bytes - plan.others_bytes)}{beside} in the phase "
            f"{plan.peak.name} ({plan.peak.moment}), and there are {_gib(plan.vram_bytes)}"
        )
    return (
        f"the engine's share of {_gib(plan.vram_bytes)}, rollout.vllm.gpu_memory_utilization = "
        f"{recipe.rollout.vllm.gpu_memory_utilization}, lacks {_gib(plan.shortfall_bytes)} to hold one sequence of "
        f"{plan.sequence_tokens:,} tokens"
    )


def memory_advice(recipe: Recipe) -> str:
    """Return what to change if even one sequence does not fit while the policy trains.

    Each alternative is a line of options to add to a command.
    """
    lines = []
    for kinds, intro in (
        (("checkpointing", "offload", "logits"), "resume with"),
        (
            ("optimizer", "rank", "answers"),
            "in a new run, which may start from this one's adapter (lora.init_from), use",
        ),
    ):
        found = [f"  {_options(_new(recipe, values))}" for kind in kinds for values in _settings(recipe, kind)[:1]]
        lines += [f"{intro} one of:" if len(found) > 1 else f"{intro}:", *found] if found else []
    return "\n".join(lines) or "train on a GPU with more memory"


# ---------------------------------------------------------------------- the reductions


def reductions(recipe: Recipe) -> dict[str, list[Values]]:
    """Return smaller settings than the recipe's own, the mildest first, by kind and in the order to try them."""
    rollout, train, lora, name = recipe.rollout, recipe.train, recipe.lora, recipe.optimizer.name
    uses_vllm, now, longest = engine_of(recipe) == "vllm", rollout.vllm.gpu_memory_utilization, sequence_tokens(recipe)
    batches: list[Values] = [{"rollout.max_num_seqs": batch} for batch in _halves(rollout.max_num_seqs, 1)]
    key, near = "rollout.vllm.gpu_memory_utilization", sorted(UTILIZATIONS, key=lambda value: (abs(value - now), value))
    utilizations: list[Values] = [{key: value} for value in near]
    microbatches = [tokens for tokens in _halves(train.tokens_per_microbatch, 1) if tokens > longest]
    microbatches += [longest] if train.tokens_per_microbatch > longest else []
    optimizers = OPTIMIZERS[OPTIMIZERS.index(name) + 1 :] if recipe.model.dtype != "float64" else ()
    dtype: dict[str, str] = {} if recipe.model.dtype == "bfloat16" else {"model.dtype": "bfloat16"}
    nf4: list[Values] = [dtype | {"model.quantization": "nf4"}] if recipe.model.quantization == "none" else []
    ranks = _halves(lora.rank, SMALLEST_RANK) if lora.init_from is None else []
    # Alpha keeps the adapters' scale, which is alpha / rank, or alpha / sqrt(rank) with rslora.
    alphas = [lora.alpha * (rank / lora.rank) ** (0.5 if lora.rslora else 1) for rank in ranks]
    answers: list[Values] = [
        {"rollout.max_completion_length": answer}
        | ({"train.tokens_per_microbatch": tokens} if tokens < train.tokens_per_microbatch else {})
        for answer in _halves(rollout.max_completion_length, SMALLEST_ANSWER_TOKENS)
        for tokens in [rollout.max_prompt_length + answer]
    ]
    return {
        # The update and the answers stay the same, and little time is lost.
        "utilization": utilizations if uses_vllm else [],
        "microbatch": [{"train.tokens_per_microbatch": tokens} for tokens in microbatches],
        "logits": [{"train.logits_mib": mib} for mib in _halves(train.logits_mib, SMALLEST_LOGITS_MIB)],
        "batch": batches if engine_of(recipe) != "server" else [],
        "sleep": [] if rollout.vllm.enable_sleep_mode else [{"rollout.vllm.enable_sleep_mode": True}],
        # These cost more time; a 4-bit base in vLLM also needs its plugin.
        "checkpointing": [] if train.gradient_checkpointing else [{"train.gradient_checkpointing": True}],
        "optimizer": [{"optimizer.name": optimizer} for optimizer in optimizers],
        "offload": []
        if train.offload_activations
        else [{"train.offload_activations": True, "train.gradient_checkpointing": True}],
        "packed engine": [{"rollout.vllm.base": "nf4", **values} for values in ({}, *utilizations)]
        if uses_vllm and rollout.vllm.base != "nf4"
        else [],
        "own engine": [{"rollout.engine": "hf", **values} for values in ({}, *batches)] if uses_vllm else [],
        # These change what is learned.
        "base": ([dtype] if dtype else []) + nf4,
        "predictor": [
            {"siamese.head_width": width} for width in _halves(recipe.siamese.head_width, SMALLEST_HEAD_WIDTH)
        ],
        "rank": [{"lora.rank": rank, "lora.alpha": alpha} for rank, alpha in zip(ranks, alphas, strict=True)],
        "answers": answers,
    }


def _halves(value: int, least: int) -> list[int]:
    """Return half of the value, a quarter and so on, down to `least`."""
    return [value >> times for times in range(1, value.bit_length()) if value >> times >= least]


def _settings(recipe: Recipe, kind: str) -> list[Values]:
    """Return the settings of one kind that make a valid recipe."""

    def is_valid(changed: Recipe) -> bool:
        served = changed.rollout.engine != "vllm" or vllm_can_serve(changed)
        return served and next(impossible_combinations(changed), None) is None

    return [values for values in reductions(recipe)[kind] if is_valid(recipe.with_values(values))]


# ---------------------------------------------------------------------- the search


def _new(recipe: Recipe, values: Values) -> Values:
    """Return the values that differ from the recipe's."""
    return {name: value for name, value in values.items() if value != attrgetter(name)(recipe)}


def _apply(recipe: Recipe, chosen: Choice) -> Recipe:
    for kind, index in chosen:
        # A reduction's settings depend on those before it.
        recipe = recipe.with_values(_settings(recipe, kind)[index])
    return recipe


def _choose(recipe: Recipe, kinds: Iterable[str], overrun: Callable[[Recipe], int]) -> Choice:
    """Apply reductions in turn until the run fits, each only as far as it helps."""
    chosen: Choice = []
    least = overrun(recipe)
    for kind in kinds:
        best = None
        for index, values in enumerate(_settings(recipe, kind) if least else ()):
            changed = recipe.with_values(values)
            if (size := overrun(changed)) < least:
                best, least = (index, changed), size
            if not size:
                break
        if best is not None:
            chosen.append((kind, best[0]))
            recipe = best[1]
    return chosen


def _changes(
    recipe: Recipe, chosen: Choice, shape: ModelShape, vram_bytes: int, others_bytes: int
) -> tuple[Change, ...]:
    """Return what was chosen as keys, with the effect of each."""
    found = []
    before = needs(recipe, shape, vram_bytes, others_bytes)
    for kind, index in chosen:
        values = _new(recipe, _settings(recipe, kind)[index])
        recipe = recipe.with_values(values)
        after = needs(recipe, shape, vram_bytes, others_bytes)
        too_large, still = excess(before, vram_bytes), excess(after, vram_bytes)
        gains = {name: (too_large[name] - still[name], before[name] - after[name]) for name in before}
        eases = max(gains, key=gains.__getitem__)
        peak = max(size for name, size in after.items() if name != SHORTFALL)
        found.append(Change(values, eases, before[eases], after[eases], peak))
        before = after
    return tuple(found)


def _smallest_vram(recipe: Recipe, shape: ModelShape, others_bytes: int) -> int:
    """Return the least memory, in steps of a quarter GiB, that a recipe with every reduction fits."""
    quarters = bisect_left(
        range(2**12), True, key=lambda quarters: not overrun_bytes(recipe, shape, quarters * 2**28, others_bytes)
    )
    return quarters * 2**28


def _options(values: Values) -> str:
    """Return values as options; text needs no quotes of TOML's there."""
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return " ".join(f"--set {shlex.quote(word)}" for word in words)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
