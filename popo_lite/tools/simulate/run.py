"""Run two steps of a recipe on the simulated device, and say what held its memory at each phase's peak."""

from __future__ import annotations

import gc
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from popo_lite.pausing import Pause
from popo_lite.policy.load import empty_base
from popo_lite.policy.memory import release_memory
from popo_lite.policy.parts import context_of
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.recipe_rules import check_context
from popo_lite.tools.bench import synthetic
from popo_lite.tools.plan.terms import shares_prefix
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES
from popo_lite.tools.simulate.allocator import BLOCK, EMPTY_CACHE, Event, smallest_capacity
from popo_lite.tools.simulate.device import WORKSPACE, SimulatedDevice
from popo_lite.types import Completion

PHASES = ("load", "siamese", "update", "step")
DEPTHS = (2, 3)  # a first layer and a last one, without and with one between them
HOLDERS = 12  # the largest places that are reported for each phase
OFF = {"rollout.engine": "hf", "train.compile_loss": False, "train.device": "cuda"}


def simulate(
    device: SimulatedDevice,
    recipe: Recipe,
    *,
    vram_bytes: int = 24 * 2**30,
    capability: Sequence[int] = (8, 9),
    enforce: bool = False,
    extrapolate: bool = False,
    pause: bool = False,
) -> dict[str, Any]:
    """Return the peaks of a step of `recipe`, the second one, by phase, and the smallest card it runs on.

    With `enforce`, memory runs out at `vram_bytes`. With `extrapolate` models of a few layers are run, if all layers of
    the recipe's are alike. With `pause` the run is paused after the step and continued. No rollout engine
    is simulated. Raises UserInputError if a sequence exceeds the context.
    """
    start = time.perf_counter()
    config = synthetic.architecture(recipe.model)
    check_context(recipe, context_of(config))
    recipe, lengths = two_micro_batches(recipe.with_values(OFF))
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    depths = DEPTHS if extrapolate and layers > max(DEPTHS) and _alike(recipe.model) else (layers,)
    traces = []
    for depth in depths:
        device.reset(vram_bytes=vram_bytes, capability=(capability[0], capability[1]), enforce=enforce)
        traces.append(_trace(device, recipe, lengths, layers=depth if len(depths) > 1 else None, pause=pause))
    busy = [name for name in PHASES if traces[0].levels(name)]  # without a similarity term siamese is not
    result: dict[str, Any] = {"phases": {name: _peak(traces, name, depths, layers) for name in busy}}
    # Segments are not linear in the number of layers: what they waste is taken from the deepest model that was run.
    last = traces[-1]
    shown = max(level for name in PHASES for level, _ in last.levels(name).values())
    added = max(phase["allocated_bytes"] for phase in result["phases"].values()) - shown
    for name, phase in result["phases"].items():
        phase["reserved_bytes"] = last.reserved[name] + added
    if not enforce:
        sizes = {"default": False, "expandable": True}
        result["smallest_bytes"] = {
            name: smallest_capacity(last.events, expandable=flag) + added for name, flag in sizes.items()
        }
    about = {"depths": list(depths), "layers": layers, "seconds": time.perf_counter() - start}
    return result | last.facts | about


def two_micro_batches(recipe: Recipe) -> tuple[Recipe, list[int]]:
    """Return the recipe with as few prompts as fill two micro-batches, and the lengths of the answers to them.

    The first answers have full length, the last ones what is left. A step that is smaller is taken as it is.
    """
    rollout, budget = recipe.rollout, recipe.train.tokens_per_microbatch
    shared = shares_prefix(recipe)
    answers = rollout.num_generations if shared else 1
    unit = rollout.max_prompt_length + answers * rollout.max_completion_length
    prompts = recipe.data.prompts_per_step * rollout.num_generations // answers
    if prompts * unit < 2 * budget:
        return recipe, [rollout.max_completion_length] * (prompts * answers)
    each = -(-budget // unit)
    if budget - each * rollout.max_prompt_length < each * answers:  # no tokens would be left for the last answers
        each -= 1
    left, lengths = budget - each * rollout.max_prompt_length, list[int]()
    for others in reversed(range(each * answers)):
        lengths.append(min(rollout.max_completion_length, left - others))
        left -= lengths[-1]
    values = {"data.prompts_per_step": 2 * each}
    if not shared:
        values = {"data.prompts_per_step": 1, "rollout.num_generations": 2 * each}
    return recipe.with_values(values), 2 * lengths


# ---------------------------------------------------------------------- one run


class _Recorder(synthetic.Meter):
    """A meter that also notes at which event each stage began."""

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__(torch.device("cuda"))
        self._simulated = device
        self.starts: list[tuple[str, int]] = [("load", 0)]

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Collect what only cycles keep: when Python does so on its own is not reproducible."""
        gc.collect()
        self.starts.append((synthetic.PHASES.get(name, name), len(self._simulated.events)))
        super().stage(name, total=total)


class _Trainer(synthetic.BenchTrainer):
    """Train on made-up answers of the given lengths. The first step, for the optimizer's state, has short ones."""

    def __init__(self, recipe: Recipe, recorder: _Recorder, lengths: Sequence[int], layers: int | None) -> None:
        self._lengths = lengths
        # Most answers that the update can train on: with equal rewards GRPO would learn nothing.
        right = len(lengths) // 2 if recipe.objective.algorithm == "grpo" else len(lengths)
        if hasattr(recipe.objective, "skip_all_right"):
            recipe = recipe.with_values({"objective.skip_all_right": False})
        rewards = synthetic.spread(right, len(lengths))
        super().__init__(recipe, synthetic.random_policy(recipe, layers=layers), recorder, rewards, sample=False)

    def _open_sampler(self, stack: ExitStack) -> None:
        super()._open_sampler(stack)
        sample = self.sampler.sample
        lengths = iter([[1] * len(self._lengths), self._lengths])

        def shortened(*args: Any, **options: Any) -> list[list[Completion]]:
            sizes = iter(next(lengths))
            return [[_cut(answer, next(sizes)) for answer in group] for group in sample(*args, **options)]

        self.sampler.sample = shortened


def _cut(answer: Completion, tokens: int) -> Completion:
    return replace(answer, token_ids=answer.token_ids[:tokens], sampler_logps=answer.sampler_logps[:tokens])


@dataclass(frozen=True)
class _Trace:
    """The allocations of a run, where each was made, at which of them stages began, and each phase's reserved bytes."""

    events: Sequence[Event]
    places: Sequence[str]
    starts: Sequence[tuple[str, int]]
    reserved: dict[str, int]
    facts: dict[str, Any]

    def levels(self, phase: str) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the most that is allocated at allocations of a place and size in the last step, and at which event.

        As in the plan, cuBLAS' workspaces do not count: they belong to the CUDA context.
        """
        second = [first for name, first in self.starts if name == "rollout"][-1]
        level, live, highest = 0, dict[int, int](), dict[tuple[str, int], tuple[int, int]]()
        for (name, first), (_, last) in itertools.pairwise([*self.starts, ("end", len(self.events))]):
            counted = name == phase and (name == "load" or first >= second)
            for index, (key, size) in enumerate(self.events[first:last], first):
                if size < 0:
                    level -= live.pop(key)
                elif key != EMPTY_CACHE:
                    place = self.places[key]
                    live[key] = 0 if place == WORKSPACE else -(-size // BLOCK) * BLOCK
                    level += live[key]
                    if counted and level > highest.get((place, size), (0, 0))[0]:
                        highest[place, size] = level, index
        return highest

    def held(self, index: int) -> Counter[str]:
        """Return the requested bytes by place of what is alive after an event."""
        live: dict[int, int] = {}
        for key, size in self.events[: index + 1]:
            if size < 0:
                del live[key]
            elif key != EMPTY_CACHE and self.places[key] != WORKSPACE:
                live[key] = size
        by_place = Counter[str]()
        for key, size in live.items():
            by_place[self.places[key]] += size
        return by_place


def _trace(device: SimulatedDevice, recipe: Recipe, lengths: Sequence[int], layers: int | None, pause: bool) -> _Trace:
    gc.collect()
    gc.freeze()  # a run collects often, and would look at all modules each time
    recorder, facts = _Recorder(device), dict[str, Any]()
    try:
        with recorder, _Trainer(recipe, recorder, lengths, layers) as trainer:
            trainer.measure(1)
            facts |= {key: recorder.records[-1][key] for key in ("micro_batches", "microbatch_tokens")}
            facts |= {"packing": trainer.policy.packing, "notices": recorder.notices}
            if pause:
                facts |= _paused(trainer)
            del trainer
    finally:
        release_memory()
    reserved = {name: card - CUDA_CONTEXT_BYTES for name, (_, card) in recorder.peaks.items()}
    return _Trace(device.events, device.places, recorder.starts, reserved, facts)


def _paused(trainer: synthetic.BenchTrainer) -> dict[str, int]:
    """Pause and continue; return the bytes of tensors before, meanwhile and after, cuBLAS' workspaces included."""
    before = torch.cuda.memory_allocated()
    pause = Pause(trainer.learner, trainer.sampler)
    meanwhile = torch.cuda.memory_allocated()
    if problem := pause.end():
        raise RuntimeError(problem)
    return {"before_pause": before, "while_paused": meanwhile, "after_pause": torch.cuda.memory_allocated()}


# ---------------------------------------------------------------------- all layers from a few


def _alike(recipe: ModelRecipe) -> bool:
    """Return True if all layers of the model have the same parameters and the same kind of attention."""
    config = synthetic.architecture(recipe)
    model, config = empty_base(recipe, config), config.get_text_config()
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers: Any = next((found for found in lists if len(found) == config.num_hidden_layers), [])
    parts = {tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layers}
    return len(parts) == 1 and len(set(getattr(config, "layer_types", None) or [""])) == 1


def _peak(traces: Sequence[_Trace], phase: str, depths: Sequence[int], layers: int) -> dict[str, Any]:
    """Return a phase's peak bytes, and the places that held the most of them.

    What is allocated at one place is linear in the number of layers, but the place of the peak may change with it.
    """

    def at_full_depth(values: Sequence[int]) -> int:
        first, last = values[0], values[-1]
        return last + (last - first) * (layers - depths[-1]) // max(1, depths[-1] - depths[0])

    levels = [trace.levels(phase) for trace in traces]
    common = [place for place in levels[0] if all(place in found for found in levels)]
    highest = {place: at_full_depth([found[place][0] for found in levels]) for place in common}
    top = max(highest, key=highest.__getitem__)
    held = [trace.held(found[top][1]) for trace, found in zip(traces, levels, strict=True)]
    by_place = Counter({place: at_full_depth([one[place] for one in held]) for place in held[-1]})
    return {
        "allocated_bytes": highest[top],
        "requested_bytes": by_place.total(),
        "holders": by_place.most_common(HOLDERS),
    }
