"""What to change where a recipe does not fit: the smallest changes that make it fit, as recipe keys."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from popo_lite.errors import UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.tools.plan.engine import engine_of, sequence_tokens, vllm_can_serve
from popo_lite.tools.plan.shapes import ModelShape, load_shape
from popo_lite.tools.plan.vram import SHORTFALL, MemoryPlan, excess, needs, overrun_bytes, plan_memory

SMALLEST_HEAD_WIDTH = 1024
SMALLEST_RANK = 4
SMALLEST_ANSWER_TOKENS = 256
SMALLEST_LOGITS_MIB = 32
SHARES = tuple(share / 100 for share in range(10, 91, 5))

Values = Mapping[str, Any]
"""Recipe keys with new values, to be changed together."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Keys to set together, and what comes of it once all changes before this one are made.

    `eases` is the phase that profits most among those that are too large, or `SHORTFALL`, with its bytes before and
    after; `peak_bytes` is the run's peak then, which may be another phase's.
    """

    values: Values
    eases: str
    before_bytes: int
    after_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes that make a run fit; none where it fits already.

    Where nothing helps, `changes` is empty and `smallest_vram_bytes` is the GPU that it takes with every lever pulled.
    """

    changes: tuple[Change, ...]
    smallest_vram_bytes: int | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """`section.key=value` for `--set`."""
        return _overrides(self._values)

    @property
    def options(self) -> str:
        """The options to copy behind a command."""
        return _options(self._values)

    @property
    def _values(self) -> Values:
        merged: dict[str, Any] = {}
        for change in self.changes:
            merged |= change.values
        return merged


def advice_for(recipe: Recipe, shape: ModelShape, vram_bytes: int, others_bytes: int = 0) -> Advice:
    """The smallest changes after which `recipe` fits `vram_bytes`, from `LEVERS` in their order.

    The levers are pulled one after the other, each as little as is enough or else as far as it helps, until the run
    fits; levers that the others can do without are left out again. What is advised has been built and planned anew.
    """
    search = _Search(recipe=recipe, shape=shape, vram_bytes=vram_bytes, others_bytes=others_bytes)
    pulled = search.pull(LEVERS)
    if search.overrun(pulled):
        return Advice(changes=(), smallest_vram_bytes=_smallest_vram(search.after(pulled), shape, others_bytes))
    for lever, _ in tuple(pulled):
        found = search.pull([other for other, _ in pulled if other is not lever])
        if not search.overrun(found):
            pulled = found
    return Advice(changes=search.changes(search.relaxed(pulled)))


def refuse_unless_fits(recipe: Recipe, vram_bytes: int, others_bytes: int = 0) -> None:
    """Raise UserInputError, with the advice, where a run of `recipe` does not fit a GPU of `vram_bytes`.

    Other processes hold `others_bytes` of it. Raises ModelError where the model's config cannot be had, or its
    architecture is not one that can be planned.
    """
    shape = load_shape(recipe.model)
    plan = plan_memory(recipe, shape, vram_bytes=vram_bytes, others_bytes=others_bytes)
    if not plan.fits:
        advice = advice_for(recipe, shape, vram_bytes, others_bytes)
        raise UserInputError(why_not(recipe, plan), where=f"phase {plan.peak.name}", next_step=next_step(advice))


def why_not(recipe: Recipe, plan: MemoryPlan) -> str:
    """Why a run does not fit, in one sentence."""
    if plan.peak.total_bytes > plan.vram_bytes:
        beside = f" beside {_gib(plan.others_bytes)} of other processes" if plan.others_bytes else ""
        return (
            f"the run is planned to need {_gib(plan.peak.total_bytes - plan.others_bytes)}{beside} in the phase "
            f"{plan.peak.name} ({plan.peak.moment}), and there are {_gib(plan.vram_bytes)}"
        )
    return (
        f"the engine's share of {_gib(plan.vram_bytes)}, rollout.vllm.gpu_memory_utilization = {recipe.rollout.vllm.gpu_memory_utilization}, "
        f"lacks {_gib(plan.shortfall_bytes)} to hold one sequence of {plan.sequence_tokens:,} tokens"
    )


def next_step(advice: Advice) -> str:
    """What to do about it: options to copy, or how much memory it takes."""
    if advice.smallest_vram_bytes is not None:
        return (
            f"no setting makes it fit; with all that save memory it takes a GPU of {_gib(advice.smallest_vram_bytes)}"
        )
    return advice.options


def relief(recipe: Recipe) -> str:
    """What to change when one sequence alone does not fit while the policy is trained.

    Each alternative is a line of its own: options to copy behind a command.
    """

    def lines(levers: Sequence[Lever], intro: str) -> list[str]:
        notches = [_notches(recipe, lever) for lever in levers]
        found = [f"  {_options(_new(recipe, values[0]))}" for values in notches if values]
        return [f"{intro} one of:" if len(found) > 1 else f"{intro}:", *found] if found else []

    said = lines(RESUMED_LEVERS, "resume with")
    said += lines(NEW_RUN_LEVERS, "in a new run, which may start from this one's adapter (lora.init_from), use")
    return "\n".join(said) or "train on a GPU with more memory"


# ---------------------------------------------------------------------- the levers, what costs least first


def _chunk(recipe: Recipe) -> Iterator[Values]:
    """Smaller chunks of logits: the same update, a little slower."""
    mib = recipe.train.logits_mib // 2
    while mib >= SMALLEST_LOGITS_MIB:
        yield {"train.logits_mib": mib}
        mib //= 2


def _ratio(recipe: Recipe) -> Iterator[Values]:
    """Another share of the GPU for vLLM, the nearest first: the same answers, slower where it is smaller."""
    if engine_of(recipe) == "vllm":
        now = recipe.rollout.vllm.gpu_memory_utilization
        yield from (
            {"rollout.vllm.gpu_memory_utilization": share} for share in sorted(SHARES, key=lambda s: (abs(s - now), s))
        )


def _batch(recipe: Recipe) -> Iterator[Values]:
    """Fewer sequences decoded at once: the same answers, slower."""
    batch = recipe.rollout.max_num_seqs // 2
    while batch >= 1 and engine_of(recipe) != "server":
        yield {"rollout.max_num_seqs": batch}
        batch //= 2


def _microbatch(recipe: Recipe) -> Iterator[Values]:
    """Fewer tokens in a pass, down to one longest sequence: the same update, a little slower."""
    longest, tokens = sequence_tokens(recipe), recipe.train.tokens_per_microbatch
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield {"train.tokens_per_microbatch": tokens}


def _checkpointing(recipe: Recipe) -> Iterator[Values]:
    """Recomputed activations: the same update, about a third more time."""
    if not recipe.train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": True}


def _sleep(recipe: Recipe) -> Iterator[Values]:
    """The GPU shared in turns: the same update, some seconds a step."""
    if not recipe.rollout.vllm.enable_sleep_mode:
        yield {"rollout.vllm.enable_sleep_mode": True}


def _optimizer(recipe: Recipe) -> Iterator[Values]:
    """8-bit optimizer state, then paged: nearly the same update."""
    names = ("adamw", "adamw8bit", "paged_adamw8bit")
    if recipe.model.dtype != "float64":
        yield from ({"optimizer.name": name} for name in names[names.index(recipe.optimizer.name) + 1 :])


def _offload(recipe: Recipe) -> Iterator[Values]:
    """Layer inputs in host memory: the same update, slower by the transfers."""
    if not recipe.train.offload_activations:
        yield {"train.offload_activations": True, "train.gradient_checkpointing": True}


def _packed_engine(recipe: Recipe) -> Iterator[Values]:
    """A 4-bit base in vLLM as well: needs its plugin, and samples slower."""
    if engine_of(recipe) == "vllm" and recipe.rollout.vllm.base != "nf4":
        shares = [
            recipe.rollout.vllm.gpu_memory_utilization,
            *(values["rollout.vllm.gpu_memory_utilization"] for values in _ratio(recipe)),
        ]
        yield from ({"rollout.vllm.base": "nf4", "rollout.vllm.gpu_memory_utilization": share} for share in shares)


def _own_engine(recipe: Recipe) -> Iterator[Values]:
    """Sampling from the trainer's own model: no second copy of it, and much slower."""
    if engine_of(recipe) != "vllm":
        return
    batch = recipe.rollout.max_num_seqs
    while batch >= 1:
        yield {"rollout.engine": "hf", "rollout.max_num_seqs": batch}
        batch //= 2


def _base(recipe: Recipe) -> Iterator[Values]:
    """A base in 16, then in 4 bit: another policy."""
    dtype = {} if recipe.model.dtype == "bfloat16" else {"model.dtype": "bfloat16"}
    if dtype:
        yield dtype
    if recipe.model.quantization == "none":
        yield dtype | {"model.quantization": "nf4"}


def _predictor(recipe: Recipe) -> Iterator[Values]:
    """A narrower predictor head, down to the width that serves 1.5B models: another similarity term."""
    width = recipe.siamese.head_width // 2
    while width >= SMALLEST_HEAD_WIDTH:
        yield {"siamese.head_width": width}
        width //= 2


def _rank(recipe: Recipe) -> Iterator[Values]:
    """Smaller adapters at the same scale: less that can be learned."""
    rank = recipe.lora.rank // 2
    while rank >= SMALLEST_RANK and recipe.lora.init_from is None:
        scale = recipe.lora.alpha / (recipe.lora.rank**0.5 if recipe.lora.rslora else recipe.lora.rank)
        yield {"lora.rank": rank, "lora.alpha": scale * (rank**0.5 if recipe.lora.rslora else rank)}
        rank //= 2


def _answers(recipe: Recipe) -> Iterator[Values]:
    """Shorter answers: another task."""
    answer = recipe.rollout.max_completion_length // 2
    while answer >= SMALLEST_ANSWER_TOKENS:
        tokens = recipe.rollout.max_prompt_length + answer
        yield {"rollout.max_completion_length": answer} | (
            {"train.tokens_per_microbatch": tokens} if tokens < recipe.train.tokens_per_microbatch else {}
        )
        answer //= 2


Lever = Callable[[Recipe], Iterator[Values]]
"""Settings beyond a recipe's own, the mildest first."""

LEVERS: tuple[Lever, ...] = (
    _ratio,
    _microbatch,
    _chunk,
    _batch,
    _sleep,
    _checkpointing,
    _optimizer,
    _offload,
    _packed_engine,
    _own_engine,
    _base,
    _predictor,
    _rank,
    _answers,
)
"""In the order in which they are tried: what leaves update and answers as they are, then what costs more time, then
what changes what is learned."""

RESUMED_LEVERS: tuple[Lever, ...] = (_checkpointing, _offload, _chunk)
"""What eases training and may change while a run goes on."""
NEW_RUN_LEVERS: tuple[Lever, ...] = (_optimizer, _rank, _answers)
"""What eases training and makes another run of it."""


# ---------------------------------------------------------------------- the search


def _with(recipe: Recipe, values: Values) -> Recipe:
    """The recipe with other values, unchecked."""
    for name, value in values.items():
        section, _, key = name.partition(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
    return recipe


def _is_valid(recipe: Recipe) -> bool:
    return next(impossible_combinations(recipe), None) is None and (
        recipe.rollout.engine != "vllm" or vllm_can_serve(recipe)
    )


def _new(recipe: Recipe, values: Values) -> Values:
    """Without what is so already."""
    return {name: value for name, value in values.items() if value != _value(recipe, name)}


Pulled = Sequence[tuple[Lever, int]]
"""Levers with the notch that each is pulled to."""


@dataclass(frozen=True, kw_only=True)
class _Search:
    recipe: Recipe
    shape: ModelShape
    vram_bytes: int
    others_bytes: int

    def after(self, pulled: Pulled) -> Recipe:
        """The recipe with levers pulled."""
        recipe = self.recipe
        for lever, notch in pulled:
            recipe = _with(recipe, _notches(recipe, lever)[notch])
        return recipe

    def overrun(self, pulled: Pulled) -> int:
        """Bytes by which it is too large then."""
        return self._overrun(self.after(pulled))

    def _overrun(self, recipe: Recipe) -> int:
        return overrun_bytes(recipe, self.shape, self.vram_bytes, self.others_bytes)

    def pull(self, levers: Sequence[Lever]) -> list[tuple[Lever, int]]:
        """Pull levers in turn until the run fits, or as far as they help."""
        pulled: list[tuple[Lever, int]] = []
        recipe, least = self.recipe, self.overrun(())
        for lever in levers:
            if not least:
                break
            best = None
            for notch, values in enumerate(_notches(recipe, lever)):
                overrun = self._overrun(_with(recipe, values))
                if overrun < least:
                    best, least = notch, overrun
                if not overrun:
                    break
            if best is not None:
                pulled.append((lever, best))
                recipe = self.after(pulled)
        return pulled

    def relaxed(self, pulled: list[tuple[Lever, int]]) -> list[tuple[Lever, int]]:
        """No lever pulled further than it must be."""
        for index, (lever, notch) in enumerate(pulled):
            for milder in range(notch):
                tried = [*pulled[:index], (lever, milder), *pulled[index + 1 :]]
                # Another lever's notches may depend on this one.
                if not self.overrun(tried):
                    pulled = tried
                    break
        return pulled

    def changes(self, pulled: Pulled) -> tuple[Change, ...]:
        """What was pulled, as keys, and what came of each."""
        found, recipe = [], self.recipe
        before = needs(recipe, self.shape, self.vram_bytes, self.others_bytes)
        for lever, notch in pulled:
            values = _new(recipe, _notches(recipe, lever)[notch])
            recipe = _with(recipe, values)
            after = needs(recipe, self.shape, self.vram_bytes, self.others_bytes)
            eases = self._eased(before, after)
            found.append(
                Change(
                    values=values,
                    eases=eases,
                    before_bytes=before[eases],
                    after_bytes=after[eases],
                    peak_bytes=max(size for name, size in after.items() if name != SHORTFALL),
                )
            )
            before = after
        return tuple(found)

    def _eased(self, before: Mapping[str, int], after: Mapping[str, int]) -> str:
        too_large, still = excess(before, self.vram_bytes), excess(after, self.vram_bytes)
        return max(before, key=lambda name: (too_large[name] - still[name], before[name] - after[name]))


def _notches(recipe: Recipe, lever: Lever) -> list[Values]:
    """The lever's settings that make a valid recipe."""
    return [values for values in lever(recipe) if _is_valid(_with(recipe, values))]


def _value(recipe: Recipe, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(recipe, section), key)


def _smallest_vram(recipe: Recipe, shape: ModelShape, others_bytes: int) -> int:
    """The least memory, to a quarter GiB, that a recipe with every lever pulled fits."""
    step = 2**28
    low, high = 0, 2**12
    while low < high:
        middle = (low + high) // 2
        fits = overrun_bytes(recipe, shape, middle * step, others_bytes) == 0
        low, high = (low, middle) if fits else (middle + 1, high)
    return low * step


def _overrides(values: Values) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


def _options(values: Values) -> str:
    return " ".join(f"--set {shlex.quote(_unquoted(override))}" for override in _overrides(values))


def _unquoted(override: str) -> str:
    """Text without TOML's quotes, which `--set` does not need."""
    key, _, value = override.partition("=")
    return f"{key}={json.loads(value)}" if value.startswith('"') else override


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
