"""Measure a recipe's step here, on its architecture with random weights: no download, no data."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from popo_lite.errors import ModelError, UserInputError
from popo_lite.policy.device import pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.parts import context_of
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import check_context
from popo_lite.run_folder import environment
from popo_lite.samplers import pick_engine
from popo_lite.tools.bench import synthetic
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.terms import base_bytes
from popo_lite.tools.plan.vram import MemoryPlan, plan_memory
from popo_lite.update import Learner

STAGES = ("rollout", "weights", "siamese", "update", "optimizer", "sync")
"""The stages of a step that are reported: all but choosing and grading problems."""


def bench(
    recipe: Recipe, *, steps: int, positives: int | None, memory_cap_bytes: int | None, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Measure `steps` steps of `recipe` after a warm-up; running out of memory is a result, too.

    Raises UserInputError for too many positives, a sampler that would not serve random weights, a cap that cannot be
    enforced, or a sequence longer than the model's context.
    """
    rollout, prompts = recipe.rollout, recipe.data.prompts_per_step
    answers = prompts * rollout.num_generations
    size = {
        "prompts": prompts,
        "num_generations": rollout.num_generations,
        "prompt_tokens": rollout.max_prompt_length,
        "completion_tokens": rollout.max_completion_length,
        "positives": positives or (answers + 1) // 2,
    }
    if size["positives"] > answers:
        what = f"{positives} positives, and a step has {prompts} x {rollout.num_generations} = {answers} rollouts"
        raise UserInputError(what, where="--positives", next_step=f"--positives {answers}")
    engine, _ = pick_engine(recipe)
    _refuse(recipe, engine, memory_cap_bytes)
    device, plan, result = _start(recipe, memory_cap_bytes)
    result |= {"engine": engine, "size": size, "measured_steps": steps, "stages": [], "tensors": []}
    result |= dict.fromkeys(("load_seconds", "step_seconds", "run", "out_of_memory"))
    meter, rewards = synthetic.Meter(device, notify, engine=engine), synthetic.spread(size["positives"], answers)
    start = time.perf_counter()
    try:
        with meter, synthetic.BenchTrainer(recipe, synthetic.random_policy(recipe), meter, rewards=rewards) as trainer:
            result["load_seconds"] = time.perf_counter() - start
            trainer.measure(steps)
            result["tensors"] = tensors_beside_plan(trainer.learner, plan)
            stages = result["stages"] = _stages(meter)
            result["step_seconds"] = sum(stage["seconds"] for stage in stages)
            result["run"] = _estimate(recipe, result["step_seconds"], meter.seconds("rollout"))
    except synthetic.OutOfMemoryError as error:
        result["out_of_memory"] = error.what
    return result | {"memory": peaks_beside_plan(meter, plan), "notices": meter.notices}


def _start(recipe: Recipe, cap_bytes: int | None) -> tuple[torch.device, MemoryPlan | None, dict[str, Any]]:
    """Apply the cap; return the device, the plan, and what every result says of model and machine."""
    device = pick_device(recipe.train.device)
    plan = plan_here(recipe, device, cap_bytes)
    if cap_bytes is not None:
        cap_memory(device, cap_bytes)
    about = {"model": recipe.model.id, "device": str(device), "memory_cap_bytes": cap_bytes}
    return device, plan, about | {"environment": environment(device)}


def _refuse(recipe: Recipe, engine: str, memory_cap_bytes: int | None) -> None:
    """Raise UserInputError for what cannot be measured, before a model is built."""
    instead, base = "--set rollout.engine=hf", recipe.rollout.vllm.base
    dequantized = base == "dequantized" and recipe.model.quantization == "nf4"
    if engine == "server" or (engine == "vllm" and not dequantized):
        # Such an engine would download the model's own weights, and sample another policy than is trained.
        what = 'random weights reach the engines "hf", and "vllm" over a dequantised NF4 base; others serve true ones'
        where = f'rollout.engine = "{engine}", rollout.vllm.base = "{base}"'
        # The schema refuses servers with another engine.
        no_servers = " --set rollout.server.base_urls=[] --set rollout.server.urls_file=" if engine == "server" else ""
        raise UserInputError(what, where=where, next_step=instead + no_servers)
    check_context(recipe, context_of(synthetic.architecture(recipe.model)))
    if memory_cap_bytes is not None and engine == "vllm":
        # torch's limit counts the memory pool of a sleeping engine, which vLLM has given back unknown to torch.
        what = "a sleeping vLLM would use up the cap, and memory would run out although a smaller card's would not"
        raise UserInputError(what, where='--memory-cap, rollout.engine = "vllm"', next_step=instead)


def _stages(meter: synthetic.Meter) -> list[dict[str, Any]]:
    stages, last = [], meter.records[-1]
    for stage in STAGES:
        seconds, speed = meter.seconds(stage), last["tokens_per_second"].get(stage)
        tokens = None if speed is None else round(speed * last["seconds"][stage])
        if tokens is not None or stage != "siamese":
            speed = None if tokens is None else tokens / seconds
            row = {"stage": stage, "seconds": seconds, "processor_seconds": meter.processor_seconds(stage)}
            stages.append(row | {"tokens": tokens, "tokens_per_second": speed})
    return stages


def _estimate(recipe: Recipe, step_seconds: float, rollout_seconds: float) -> dict[str, Any]:
    steps, every = recipe.train.steps, recipe.eval.every
    evaluations = 2 + (len(range(every, steps, every)) if every else 0) if recipe.eval.problems else 0
    answers = evaluations * recipe.eval.problems * recipe.eval.samples_per_problem
    evaluating = answers * rollout_seconds / (recipe.data.prompts_per_step * recipe.rollout.num_generations)
    left_out = ["downloading and loading the model", "starting the rollout engine", "grading", "checkpoints"]
    return {
        "steps": steps,
        "steps_seconds": steps * step_seconds,
        "evaluations": evaluations,
        "evaluations_seconds": evaluating,
        "seconds": steps * step_seconds + evaluating,
        "left_out": [*left_out, "answers that end early"],
    }


def bench_longest(
    recipe: Recipe, *, memory_cap_bytes: int | None, notify: Callable[[str], None], resolution: int = 512
) -> dict[str, Any]:
    """Find the longest sequence whose update fits, a multiple of `resolution`, by trying; on a CPU it would swap.

    A step trains on two sequences: beyond the token budget they pass one at a time, so more of them hardly take more
    memory. The result's `longest_tokens` is None if not even `resolution` tokens fit.
    """
    device, plan, about = _start(recipe, memory_cap_bytes)
    policy = synthetic.random_policy(recipe)

    def fits(tokens: int) -> bool:
        prompt = min(recipe.rollout.max_prompt_length, tokens // 2)
        size = {"data.prompts_per_step": 1, "rollout.num_generations": 2, "rollout.max_prompt_length": prompt}
        size |= {"rollout.max_completion_length": tokens - prompt}
        size |= {"train.tokens_per_microbatch": max(tokens, recipe.train.tokens_per_microbatch)}
        resized, fitted = recipe.with_values(size), True
        try:
            with synthetic.Meter(device) as meter:
                synthetic.BenchTrainer(resized, policy, meter, rewards=[1.0, 1.0], sample=False).measure(0)
        except synthetic.OutOfMemoryError:
            fitted = False
        # Out of the except block, nothing keeps the attempt's trainer, whose state would count in the next one.
        policy.model.zero_grad(set_to_none=True)
        release_memory()
        notify(f"{tokens:,} tokens: {'fits' if fitted else 'out of memory'}")
        return fitted

    context = context_of(policy.model.config)
    return about | {
        "longest_tokens": longest(fits, last=context, step=resolution),
        "planned_tokens": plan and plan.longest_sequence_tokens,
        "context_tokens": context,
        "resolution_tokens": resolution,
    }


def longest(fits: Callable[[int], bool], *, last: int, step: int) -> int | None:
    """Return the longest multiple of `step` up to `last` that `fits` (monotone), or None: double, then bisect."""
    low, high = 0, step
    while high <= last and fits(high):
        low, high = high, 2 * high
    between = range(low + step, min(high, last + 1), step)
    low += step * bisect_left(between, True, key=lambda tokens: not fits(tokens))
    return low or None


def plan_here(recipe: Recipe, device: torch.device, cap_bytes: int | None) -> MemoryPlan | None:
    """Return the plan on a card of `cap_bytes`, by default this one; None for an architecture that it does not know."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    try:
        return plan_memory(recipe, load_shape(recipe.model), vram_bytes=cap_bytes or total)
    except ModelError:
        return None


def peaks_beside_plan(meter: synthetic.Meter, plan: MemoryPlan | None) -> list[dict[str, Any]]:
    """Return the peaks of every phase that was reached, beside the plan's (None for an unknown architecture)."""
    planned = {phase.name: phase for phase in plan.phases} if plan else {}
    counted = meter.engine != "vllm"  # torch keeps counting what a sleeping engine has given back
    return [
        {
            "phase": name,
            "tensor_bytes": meter.peaks[name][0] if counted else None,
            "planned_tensor_bytes": planned[name].tensor_bytes if planned and counted else None,
            "card_bytes": meter.peaks[name][1],
            "planned_card_bytes": planned[name].total_bytes if planned else None,
        }
        for name in dict.fromkeys(synthetic.PHASES.values())
        if name in meter.peaks
    ]


def cap_memory(device: torch.device, cap_bytes: int) -> None:
    """Limit torch to what a card of `cap_bytes` would leave it. Raises UserInputError if the GPU is smaller.

    All that is in use outside torch's allocator counts against the cap, so call it before anything is loaded.
    """
    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device))  # make the context and load cuBLAS
    torch.cuda.synchronize(device)
    total, elsewhere = torch.cuda.mem_get_info(device)[1], synthetic.outside_bytes(device)
    if not elsewhere < cap_bytes <= total:
        what = f"the GPU has {total / 2**30:.1f} GiB, of which {elsewhere / 2**30:.1f} GiB are in use outside torch"
        raise UserInputError(what, where="--memory-cap", next_step="give a size between the two")
    torch.cuda.set_per_process_memory_fraction((cap_bytes - elsewhere) / total, torch.cuda.current_device())


def tensors_beside_plan(learner: Learner, plan: MemoryPlan | None) -> list[dict[str, Any]]:
    """Return the bytes of tensors that stay in memory, by kind, beside the plan's: the same on every machine."""
    policy, planned = learner.policy, dict[str, int]()
    if plan is not None:
        planned = plan.policy | plan.optimizer | {"siamese average": plan.trained}
        planned["base"] = sum(base_bytes(plan.shape, plan.recipe.model).values())
    state = [part for parts in learner.optimizer.state.values() for part in parts.values() if isinstance(part, Tensor)]
    # As in the plan, paged state does not count: the driver keeps its pages in host memory.
    counted = {
        "base": frozen_bytes(policy.model),
        "adapters": sum(parameter.nbytes for _, parameter in policy.adapter_parameters()),
        "predictor head": sum(parameter.nbytes for parameter in policy.predictor.parameters()),
        "siamese average": learner.siamese.extra_bytes,
        "optimizer state": sum(part.nbytes for part in state if not getattr(part, "is_paged", False)),
    }
    return [{"kind": key, "counted_bytes": size, "planned_bytes": planned.get(key)} for key, size in counted.items()]


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of frozen parameters and their quantisation statistics; what they share counts once."""
    parts: list[Any] = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = [getattr(parameter, "quant_state", None) for parameter in parts]
    for state in states + [getattr(state, "state2", None) for state in states]:
        parts += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return sum({part.data_ptr(): part.nbytes for part in parts if isinstance(part, Tensor)}.values())
