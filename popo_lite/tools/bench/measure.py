"""What a recipe's step takes here, measured on its architecture with random weights: no download, no data, no grading.

Every stage is the trainer's own code, called in the trainer's order; only weights, prompts and rewards are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from popo_lite.errors import ModelError, UserInputError
from popo_lite.policy.load import pick_device
from popo_lite.recipe import Recipe
from popo_lite.run_folder import environment
from popo_lite.samplers import Sampler, SamplingParams, open_sampler, pick_engine
from popo_lite.tools.bench.meter import Meter, OutOfMemoryError, cap_memory
from popo_lite.tools.bench.synthetic import StepSize, context_tokens, random_policy, random_prompts, rewarded, step_size
from popo_lite.tools.bench.updates import UPDATE_STAGES, longest_update, tensor_bytes, train_once
from popo_lite.tools.plan import Phase, load_shape, plan_memory
from popo_lite.training.learner import Learner

STAGES = ("rollout", *UPDATE_STAGES, "swap")
"""What is measured of a step; choosing and grading problems are not."""
ONCE = ("load", "engine")
"""What comes before the first step."""
PHASES: Mapping[str, Sequence[str]] = {
    "load": ("load", "engine"),
    "rollout": ("rollout",),
    "siamese": ("weights", "siamese"),
    "update": ("update",),
    "step": ("step",),
    "swap": ("swap",),
}
"""The plan's phases, and the stages that make them up."""

BASE_CLASSES = {"base": ("base linears", "embeddings", "LM head", "norms, biases")}
"""Classes of the plan that are counted as one kind."""

RESOLUTION = 512
"""Tokens to which the longest sequence is found."""

HF_INSTEAD = "--set rollout.engine=hf"
"""Rollouts from the trainer's own model."""

LEFT_OUT = (
    "downloading and loading the model",
    "starting the rollout engine",
    "grading",
    "checkpoints",
    "answers that end early",
)
"""What the estimate of a whole run does not count."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage of a step: median seconds, and the tokens that it sampled or forwarded, where there are any."""

    stage: str
    seconds: float
    tokens: int | None
    tokens_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Peak bytes of a phase on a GPU: in tensors and on the card as a whole, each beside what was planned.

    The plan's figures are None for an architecture that it does not know. Those of tensors are None with vLLM: torch
    goes on counting what the engine gives back in its sleep.
    """

    phase: str
    tensor_bytes: int | None
    planned_tensor_bytes: int | None
    card_bytes: int
    planned_card_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class TensorCount:
    """Bytes of one kind of tensor that stays in memory, the same on every machine; None as in `PhaseMemory`."""

    kind: str
    counted_bytes: int
    planned_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Seconds of the whole run at this size, and what they leave out."""

    steps: int
    steps_seconds: float
    evaluations: int
    evaluations_seconds: float
    seconds: float
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All that a bench found. `out_of_memory` says where memory ran out; stages and estimate are missing then."""

    model: str
    engine: str
    device: str
    memory_cap_bytes: int | None
    size: StepSize
    measured_steps: int
    load_seconds: float | None
    tensors: tuple[TensorCount, ...]
    stages: tuple[StageResult, ...]
    memory: tuple[PhaseMemory, ...]
    step_seconds: float | None
    run: RunEstimate | None
    out_of_memory: str | None
    notices: tuple[str, ...]
    environment: Mapping[str, object]


def bench(
    recipe: Recipe,
    *,
    steps: int,
    positives: int | None,
    memory_cap_bytes: int | None,
    notify: Callable[[str], None],
) -> BenchResult:
    """Measure `steps` steps of `recipe` after one that warms up; running out of memory is a result as well.

    A cap is for a GPU. Raises UserInputError where the recipe's sampler would not serve random weights, the cap cannot
    be enforced, or a sequence is beyond the model's context.
    """
    size = step_size(recipe, positives)
    engine, _ = pick_engine(recipe)
    _refuse_true_weights(recipe, engine)
    _refuse_beyond_context(size, context_tokens(recipe))
    device = pick_device(recipe.train.device)
    planned = planned_phases(recipe, device, memory_cap_bytes)
    if memory_cap_bytes is not None:
        _refuse_cap_with_vllm(engine)
        cap_memory(device, memory_cap_bytes)
    notices: list[str] = []

    def note(text: str) -> None:
        notices.append(text)
        notify(text)

    meter = Meter(device=device)
    tensors: tuple[TensorCount, ...] = ()
    failure: str | None = None
    tokens: Mapping[str, int] = {}
    try:
        with meter("load"):
            policy = random_policy(recipe)
            learner = Learner(recipe, policy, notify=note, relief=meter.exhausted)
        with meter("engine"):
            sampler = open_sampler(recipe, policy, text=lambda _: "", notify=note)
        with sampler:
            for step in range(steps + 1):
                notify(f"step {step} of {steps}" if step else "warm-up step")
                tokens = _step(recipe, size, step, learner, sampler, meter)
                if step == 0:
                    meter.forget(except_for=ONCE)
        tensors = _counts(learner, planned)
    except OutOfMemoryError as error:
        load = f" at {error.sequences:,} x {size.sequence_tokens:,} tokens" if error.sequences else ""
        failure = error.what + load
    ran = () if failure else tuple(stage for stage in STAGES if stage in meter.costs)
    stages = tuple(_stage(meter, stage, tokens.get(stage)) for stage in ran)
    step_seconds = None if failure else sum(stage.seconds for stage in stages)
    return BenchResult(
        model=recipe.model.id,
        engine=engine,
        device=str(device),
        memory_cap_bytes=memory_cap_bytes,
        size=size,
        measured_steps=steps,
        load_seconds=meter.seconds("load") if "load" in meter.costs else None,
        tensors=tensors,
        stages=stages,
        memory=peaks_beside_plan(meter, planned, engine=engine),
        step_seconds=step_seconds,
        run=None if failure else _estimate(recipe, size, stages),
        out_of_memory=failure,
        notices=tuple(notices),
        environment=environment(device),
    )


@dataclass(frozen=True, kw_only=True)
class LongestResult:
    """The longest prompt with answer whose update fits, in tokens, beside the plan's; None where none does."""

    model: str
    device: str
    memory_cap_bytes: int | None
    longest_tokens: int | None
    planned_tokens: int | None
    context_tokens: int
    resolution_tokens: int
    environment: Mapping[str, object]


def bench_longest(recipe: Recipe, *, memory_cap_bytes: int | None, notify: Callable[[str], None]) -> LongestResult:
    """Find the longest sequence that can be trained on, by trying, on a GPU: a CPU swaps instead."""
    device = pick_device(recipe.train.device)
    if memory_cap_bytes is not None:
        cap_memory(device, memory_cap_bytes)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=memory_cap_bytes or total)
    except ModelError:
        plan = None
    policy = random_policy(recipe)
    found = longest_update(policy, lambda tokens: at_length(recipe, tokens), resolution=RESOLUTION, notify=notify)
    return LongestResult(
        model=recipe.model.id,
        device=str(device),
        memory_cap_bytes=memory_cap_bytes,
        longest_tokens=found,
        planned_tokens=None if plan is None else plan.longest_tokens,
        context_tokens=policy.context_tokens,
        resolution_tokens=RESOLUTION,
        environment=environment(device),
    )


def at_length(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with prompt and answer of `tokens` in all, and a token budget that allows one of them."""
    prompt = min(recipe.rollout.max_prompt_length, tokens // 2)
    rollout = {"max_prompt_length": prompt, "max_completion_length": tokens - prompt}
    train = {"tokens_per_microbatch": max(tokens, recipe.train.tokens_per_microbatch)}
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=rollout),
            "train": recipe.train.model_copy(update=train),
        }
    )


# ---------------------------------------------------------------------- one step


def _step(
    recipe: Recipe, size: StepSize, step: int, learner: Learner, sampler: Sampler, meter: Meter
) -> Mapping[str, int]:
    """One step, metered by stage; how many tokens were sampled and forwarded, by stage."""
    policy = learner.policy
    prompts = random_prompts(size, policy.head.weight.shape[0], seed=step)
    with meter("rollout", sequences=size.prompts * size.num_generations):
        completions = sampler.sample(
            prompts,
            count=size.num_generations,
            params=SamplingParams(temperature=recipe.rollout.temperature, max_completion_length=size.completion_tokens),
            policy_version=policy.version,
            stream=("bench", step),
        )
    sampler.sleep()
    groups = rewarded(prompts, completions, size.positives, policy_version=policy.version)
    update = train_once(learner, meter, step, groups)
    with meter("swap", first=_hand_cache_back if sampler.engine == "vllm" else lambda: None):
        sampler.sync(policy.version)
    sampled = sum(len(one.token_ids) for group in completions for one in group)
    return {"rollout": sampled, "siamese": update.siamese_tokens, "update": update.update_tokens}


def _hand_cache_back() -> None:
    # Waking, the engine starts with this; its peak would count the update's cache and the woken engine together.
    torch.cuda.empty_cache()


def _stage(meter: Meter, stage: str, tokens: int | None) -> StageResult:
    seconds = meter.seconds(stage)
    return StageResult(
        stage=stage, seconds=seconds, tokens=tokens, tokens_per_second=None if tokens is None else tokens / seconds
    )


# ---------------------------------------------------------------------- memory and estimate


def planned_phases(recipe: Recipe, device: torch.device, cap_bytes: int | None) -> Mapping[str, Phase]:
    """The plan's phases by name; none for an architecture that the plan does not know."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    try:
        shape = load_shape(recipe.model)
    except ModelError:
        return {}
    return {phase.name: phase for phase in plan_memory(recipe, shape, vram_bytes=cap_bytes or total).phases}


def peaks_beside_plan(meter: Meter, planned: Mapping[str, Phase], *, engine: str) -> tuple[PhaseMemory, ...]:
    """Peaks of every phase that was reached with rollouts from `engine`, beside the plan's; none on a CPU."""
    countable = engine != "vllm"
    return tuple(
        PhaseMemory(
            phase=name,
            tensor_bytes=peak[0] if countable else None,
            planned_tensor_bytes=planned[name].tensor_bytes if planned and countable else None,
            card_bytes=peak[1],
            planned_card_bytes=planned[name].total_bytes if planned else None,
        )
        for name, stages in PHASES.items()
        if (peak := meter.peak(stages)) is not None
    )


def _counts(learner: Learner, planned: Mapping[str, Phase]) -> tuple[TensorCount, ...]:
    """What stays in memory, counted tensor by tensor, beside the plan's."""
    return tuple(
        TensorCount(
            kind=kind,
            counted_bytes=counted,
            planned_bytes=sum(planned["step"].bytes_by_class.get(name, 0) for name in BASE_CLASSES.get(kind, (kind,)))
            if planned
            else None,
        )
        for kind, counted in tensor_bytes(learner).items()
    )


def _estimate(recipe: Recipe, size: StepSize, stages: Sequence[StageResult]) -> RunEstimate:
    steps, every = recipe.train.steps, recipe.eval.every
    evaluations = 2 + (len(range(every, steps, every)) if every else 0) if recipe.eval.problems else 0
    answers = recipe.eval.problems * recipe.eval.samples_per_problem
    rollout = next(stage for stage in stages if stage.stage == "rollout")
    per_answer = rollout.seconds / (size.prompts * size.num_generations)
    steps_seconds = steps * sum(stage.seconds for stage in stages)
    evaluations_seconds = evaluations * answers * per_answer
    return RunEstimate(
        steps=steps,
        steps_seconds=steps_seconds,
        evaluations=evaluations,
        evaluations_seconds=evaluations_seconds,
        seconds=steps_seconds + evaluations_seconds,
        left_out=LEFT_OUT,
    )


# ---------------------------------------------------------------------- refusals


def _refuse_true_weights(recipe: Recipe, engine: str) -> None:
    """An engine that reads the model's own weights would download them, and sample another policy than is trained."""
    dequantized = recipe.rollout.vllm.base == "dequantized" and recipe.model.quantization == "nf4"
    if engine == "server" or (engine == "vllm" and not dequantized):
        raise UserInputError(
            'random weights reach the engines "hf", and "vllm" over a dequantised NF4 base; others serve true ones',
            where=f'rollout.engine = "{engine}", rollout.vllm.base = "{recipe.rollout.vllm.base}"',
            # The schema refuses servers with another engine.
            next_step=HF_INSTEAD + (" --set rollout.server.base_urls=[]" if engine == "server" else ""),
        )


def _refuse_cap_with_vllm(engine: str) -> None:
    """Torch's limit counts the memory pool of a sleeping engine, which vLLM has given back without torch's knowing."""
    if engine == "vllm":
        raise UserInputError(
            "a sleeping vLLM would use up the cap all the same, and memory run out where a smaller card's would not",
            where='--memory-cap, rollout.engine = "vllm"',
            next_step=HF_INSTEAD,
        )


def _refuse_beyond_context(size: StepSize, context: int | None) -> None:
    if context is not None and size.sequence_tokens > context:
        prompt = min(size.prompt_tokens, context // 2)
        raise UserInputError(
            f"prompt and answer take {size.prompt_tokens} + {size.completion_tokens} tokens, and the context is "
            f"{context}",
            where="rollout.max_prompt_length, rollout.max_completion_length",
            next_step=f"--prompt-tokens {prompt} --completion-tokens {context - prompt}",
        )
