"""What a recipe's step takes here, measured on its architecture with random weights: no download, no data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from popo_lite.errors import ModelError, UserInputError
from popo_lite.objective import nothing_to_learn
from popo_lite.policy.load import pick_device
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, environment
from popo_lite.samplers import pick_engine
from popo_lite.tools.bench.synthetic import (
    PHASES,
    BenchTrainer,
    Meter,
    OutOfMemoryError,
    architecture,
    outside_bytes,
    random_policy,
    spread,
)
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import MemoryPlan, Phase, plan_memory
from popo_lite.update import Learner

STAGES = ("rollout", "weights", "siamese", "update", "optimizer", "sync")
"""The stages of a step that are reported: all but choosing and grading problems."""
RESOLUTION = 512
"""Tokens to which the longest sequence is found."""
NOT_COUNTED = (
    "downloading and loading the model; starting the rollout engine; grading; checkpoints; answers that end early"
)
"""What the estimate of a whole run leaves out."""


def run_steps(trainer: BenchTrainer, meter: Meter, steps: int, notify: Callable[[str], None]) -> list[float]:
    """Run a warm-up step and `steps` more; return the seconds that each took to sync.

    Raises OutOfMemoryError, or UserInputError if the algorithm learns nothing from so many positives.
    """
    syncs = []
    with tempfile.TemporaryDirectory() as folder:
        trainer.folder = RunFolder(Path(folder))
        for step in range(steps + 1):
            notify(f"step {step} of {steps}" if step else "warm-up step")
            before = trainer.cursor.seconds.get("sync", 0.0)
            trainer.train_step(step)
            syncs.append(trainer.cursor.seconds["sync"] - before)
            reason = meter.records[-1]["skipped_reason"]
            if reason == nothing_to_learn(trainer.recipe.objective):  # random weights may also diverge: that is timed
                raise UserInputError(
                    f"nothing to learn from {meter.records[-1]['positives']} positives: {reason}",
                    where="--positives",
                    next_step="omit it: half of the rollouts are positive then",
                )
            if step == 0:
                meter.forget_step()
    meter.stage("end")
    return syncs[1:]


def bench(
    recipe: Recipe, *, steps: int, positives: int | None, memory_cap_bytes: int | None, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Measure `steps` steps of `recipe` after a warm-up; running out of memory is a result, too.

    Raises UserInputError if the recipe's sampler would not serve random weights, a cap cannot be enforced, or a
    sequence is longer than the model's context.
    """
    prompts, generations = recipe.data.prompts_per_step, recipe.rollout.num_generations
    size = {
        "prompts": prompts,
        "num_generations": generations,
        "prompt_tokens": recipe.rollout.max_prompt_length,
        "completion_tokens": recipe.rollout.max_completion_length,
        "positives": positives or (prompts * generations + 1) // 2,
    }
    engine, _ = pick_engine(recipe)
    _refuse(recipe, engine, size, memory_cap_bytes)
    device = pick_device(recipe.train.device)
    planned = planned_phases(recipe, device, memory_cap_bytes)
    if memory_cap_bytes is not None:
        cap_memory(device, memory_cap_bytes)
    meter = Meter(device, notify, engine=engine)
    result: dict[str, Any] = {
        "model": recipe.model.id,
        "engine": engine,
        "device": str(device),
        "memory_cap_bytes": memory_cap_bytes,
        "size": size,
        "measured_steps": steps,
        **dict.fromkeys(("load_seconds", "step_seconds", "run", "out_of_memory")),
        "stages": [],
        "tensors": [],
    }
    start = time.perf_counter()
    try:
        with meter.naming_memory(), BenchTrainer(recipe, meter, verdict=spread(size["positives"])) as trainer:
            result["load_seconds"] = time.perf_counter() - start
            stages = result["stages"] = _stages(meter, run_steps(trainer, meter, steps, notify))
            result["tensors"] = _tensors(trainer.learner, planned)
            result["step_seconds"] = sum(stage["seconds"] for stage in stages)
            result["run"] = _estimate(recipe, size, stages)
    except OutOfMemoryError as error:
        result["out_of_memory"] = error.what
    memory = peaks_beside_plan(meter, planned, engine=engine)
    return result | {"memory": memory, "notices": meter.notices, "environment": environment(device)}


def bench_longest(recipe: Recipe, *, memory_cap_bytes: int | None, notify: Callable[[str], None]) -> dict[str, Any]:
    """Find the longest sequence whose update fits, by trying, on a GPU (a CPU swaps instead)."""
    device = pick_device(recipe.train.device)
    plan = _plan(recipe, device, memory_cap_bytes)
    if memory_cap_bytes is not None:
        cap_memory(device, memory_cap_bytes)
    policy = random_policy(recipe)
    longest = longest_update(policy, lambda tokens: at_length(recipe, tokens), resolution=RESOLUTION, notify=notify)
    return {
        "model": recipe.model.id,
        "device": str(device),
        "memory_cap_bytes": memory_cap_bytes,
        "longest_tokens": longest,
        "planned_tokens": plan and plan.longest_sequence_tokens,
        "context_tokens": policy.context_tokens,
        "resolution_tokens": RESOLUTION,
        "environment": environment(device),
    }


def longest_update(
    policy: Policy, recipe_at: Callable[[int], Recipe], *, resolution: int, notify: Callable[[str], None]
) -> int | None:
    """Return the longest sequence in tokens whose update fits, a multiple of `resolution`; None if none does.

    `recipe_at` returns the recipe for a length. A step trains on two sequences: beyond the token budget they pass one
    at a time, so more of them hardly take more memory.
    """

    def attempt(recipe: Recipe) -> bool:
        meter = Meter(policy.device)
        options: dict[str, Any] = {"verdict": spread(2), "policy": policy, "random_answers": True}
        try:
            with meter.naming_memory(), BenchTrainer(recipe, meter, **options) as trainer:
                run_steps(trainer, meter, 0, lambda _: None)
        except OutOfMemoryError:
            return False
        return True

    def fits(tokens: int) -> bool:
        # The attempt's trainer must be out of scope when memory is released, or its state would count in the next.
        fitted = attempt(recipe_at(tokens).with_values({"data.prompts_per_step": 1, "rollout.num_generations": 2}))
        policy.model.zero_grad(set_to_none=True)
        release_memory()
        notify(f"{tokens:,} tokens: {'fits' if fitted else 'out of memory'}")
        return fitted

    return longest(fits, first=resolution, last=policy.context_tokens, step=resolution)


def longest(fits: Callable[[int], bool], *, first: int, last: int, step: int) -> int | None:
    """Return the longest multiple of `step` from `first` to `last` that `fits`, or None if `first` does not.

    Doubles until one does not fit, then bisects; `fits` must be monotone.
    """
    low, high, probe = 0, last // step + 1, -(-first // step)
    while high - low > 1:
        if fits(probe * step):
            low = probe
        elif low == 0:
            return None
        else:
            high = probe
        probe = min(2 * low, last // step) if high > last // step else (low + high) // 2
    return low * step


def at_length(recipe: Recipe, tokens: int) -> Recipe:
    """Return the recipe with prompt and answer of `tokens` in all, and a token budget that allows one of them."""
    prompt = min(recipe.rollout.max_prompt_length, tokens // 2)
    return recipe.with_values(
        {
            "rollout.max_prompt_length": prompt,
            "rollout.max_completion_length": tokens - prompt,
            "train.tokens_per_microbatch": max(tokens, recipe.train.tokens_per_microbatch),
        }
    )


# --------------------------------------------------------------------------- memory and estimate


def planned_phases(recipe: Recipe, device: torch.device, cap_bytes: int | None) -> Mapping[str, Phase]:
    """Return the plan's phases by name; none for an architecture that the plan does not know."""
    plan = _plan(recipe, device, cap_bytes)
    return {phase.name: phase for phase in plan.phases} if plan else {}


def _plan(recipe: Recipe, device: torch.device, cap_bytes: int | None) -> MemoryPlan | None:
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    try:
        return plan_memory(recipe, load_shape(recipe.model), vram_bytes=cap_bytes or total)
    except ModelError:
        return None


def peaks_beside_plan(meter: Meter, planned: Mapping[str, Phase], *, engine: str) -> list[dict[str, Any]]:
    """Return the peaks of every phase that was reached, beside the plan's (None for an unknown architecture).

    None with vLLM for tensors: torch keeps counting what a sleeping engine has given back.
    """
    phases = []
    for name, stages in PHASES.items():
        if peaks := [meter.peaks[stage] for stage in stages if stage in meter.peaks]:
            tensors, card = (max(figures) for figures in zip(*peaks, strict=True))
            phase, counted = planned.get(name), engine != "vllm"
            phases.append(
                {
                    "phase": name,
                    "tensor_bytes": tensors if counted else None,
                    "planned_tensor_bytes": phase.tensor_bytes if phase and counted else None,
                    "card_bytes": card,
                    "planned_card_bytes": phase.total_bytes if phase else None,
                }
            )
    return phases


def cap_memory(device: torch.device, cap_bytes: int) -> None:
    """Let torch allocate no more on a GPU than a card of `cap_bytes` would have left for it.

    All that is in use outside torch's allocator counts against the cap, so call it before anything is loaded. Raises
    UserInputError if the card is smaller.
    """
    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device))  # make the context and load cuBLAS
    torch.cuda.synchronize(device)
    total, elsewhere = torch.cuda.mem_get_info(device)[1], outside_bytes(device)
    if not elsewhere < cap_bytes <= total:
        raise UserInputError(
            f"the GPU has {total / 2**30:.1f} GiB, of which {elsewhere / 2**30:.1f} GiB are in use outside torch",
            where="--memory-cap",
            next_step="give a size between the two",
        )
    torch.cuda.set_per_process_memory_fraction((cap_bytes - elsewhere) / total, torch.cuda.current_device())


def tensor_bytes(learner: Learner) -> dict[str, int]:
    """Return the bytes of tensors that stay in memory, by kind: the same on every machine.

    As in the plan, paged optimizer state does not count: the driver keeps its pages in host memory.
    """
    policy = learner.policy
    state = [part for parts in learner.optimizer.state.values() for part in parts.values() if isinstance(part, Tensor)]
    return {
        "base": frozen_bytes(policy.model),
        "adapters": _bytes(parameter for _, parameter in policy.adapter_parameters()),
        "predictor head": _bytes(policy.predictor.parameters()),
        "siamese average": learner.siamese.extra_bytes,
        "optimizer state": _bytes(part for part in state if not getattr(part, "is_paged", False)),
    }


def _tensors(learner: Learner, planned: Mapping[str, Phase]) -> list[dict[str, Any]]:
    """Return the counted bytes of tensors beside the plan's."""
    plan = dict(planned["step"].bytes_by_class) if planned else {}
    plan["base"] = sum(plan.get(name, 0) for name in ("base linears", "embeddings", "LM head", "norms, biases"))
    return [
        {"kind": kind, "counted_bytes": counted, "planned_bytes": plan.get(kind, 0) if planned else None}
        for kind, counted in tensor_bytes(learner).items()
    ]


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's frozen parameters with their quantisation statistics."""
    parts: list[Any] = []
    for parameter in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        parts.append(parameter)
        state = getattr(parameter, "quant_state", None)
        for level in (state, getattr(state, "state2", None)):
            parts += [getattr(level, name, None) for name in ("absmax", "code", "offset")]
    return _bytes(part for part in parts if isinstance(part, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct tensors: what is shared, such as NF4's table of values, counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _stages(meter: Meter, syncs: Sequence[float]) -> list[dict[str, Any]]:
    record = meter.records[-1]
    tokens = {"rollout": record["rollout_tokens"], "update": record["trained_tokens"]}
    if "siamese" in record["tokens_per_second"]:
        tokens["siamese"] = round(record["tokens_per_second"]["siamese"] * record["seconds"]["siamese"])
    stages = []
    for name in STAGES:
        if name != "siamese" or name in tokens:
            seconds, count = statistics.median(syncs) if name == "sync" else meter.seconds(name), tokens.get(name)
            speed = None if count is None else count / seconds
            stages.append({"stage": name, "seconds": seconds, "tokens": count, "tokens_per_second": speed})
    return stages


def _estimate(recipe: Recipe, size: Mapping[str, int], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps, every = recipe.train.steps, recipe.eval.every
    evaluations = 2 + (len(range(every, steps, every)) if every else 0) if recipe.eval.problems else 0
    answers = evaluations * recipe.eval.problems * recipe.eval.samples_per_problem
    stepping = steps * sum(stage["seconds"] for stage in stages)
    evaluating = answers * stages[0]["seconds"] / (size["prompts"] * size["num_generations"])  # the first is rollout
    return {
        "steps": steps,
        "steps_seconds": stepping,
        "evaluations": evaluations,
        "evaluations_seconds": evaluating,
        "seconds": stepping + evaluating,
        "left_out": NOT_COUNTED.split("; "),
    }


# --------------------------------------------------------------------------- refusals


def _refuse(recipe: Recipe, engine: str, size: Mapping[str, int], memory_cap_bytes: int | None) -> None:
    """Raise UserInputError for what cannot be measured, before a model is built."""
    answers = size["prompts"] * size["num_generations"]
    if size["positives"] > answers:
        raise UserInputError(
            f"{size['positives']} positives are asked for, and a step has {size['prompts']} x "
            f"{size['num_generations']} = {answers} rollouts",
            where="--positives",
            next_step=f"--positives {answers}",
        )
    hf_instead = "--set rollout.engine=hf"
    dequantized = recipe.rollout.vllm.base == "dequantized" and recipe.model.quantization == "nf4"
    if engine == "server" or (engine == "vllm" and not dequantized):
        # Such an engine would download the model's own weights, and sample another policy than is trained.
        raise UserInputError(
            'random weights reach the engines "hf", and "vllm" over a dequantised NF4 base; others serve true ones',
            where=f'rollout.engine = "{engine}", rollout.vllm.base = "{recipe.rollout.vllm.base}"',
            # The schema refuses servers with another engine.
            next_step=hf_instead + (" --set rollout.server.base_urls=[]" if engine == "server" else ""),
        )
    context = getattr(architecture(recipe.model), "max_position_embeddings", None)
    tokens = size["prompt_tokens"] + size["completion_tokens"]
    if context is not None and tokens > context:
        prompt = min(size["prompt_tokens"], context // 2)
        raise UserInputError(
            f"prompt and answer take {size['prompt_tokens']} + {size['completion_tokens']} tokens, and the context is "
            f"{context}",
            where="rollout.max_prompt_length, rollout.max_completion_length",
            next_step=f"--prompt-tokens {prompt} --completion-tokens {context - prompt}",
        )
    if memory_cap_bytes is not None and engine == "vllm":
        # torch's limit counts the memory pool of a sleeping engine, which vLLM has given back unknown to torch.
        raise UserInputError(
            "a sleeping vLLM would use up the cap, and memory would run out although a smaller card's would not",
            where='--memory-cap, rollout.engine = "vllm"',
            next_step=hf_instead,
        )
