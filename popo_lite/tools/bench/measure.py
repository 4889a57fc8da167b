"""What a recipe's step takes here, measured on its architecture with random weights: no download, no data."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from popo_lite.callbacks import Callback
from popo_lite.errors import ModelError, PopoError, UserInputError
from popo_lite.metrics import StepRecord
from popo_lite.policy.load import pick_device
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, environment
from popo_lite.samplers import pick_engine
from popo_lite.tools.bench.random_base import architecture
from popo_lite.tools.bench.synthetic import BenchTrainer, random_policy, spread
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import Phase, plan_memory
from popo_lite.update import Learner

STAGES = ("rollout", "weights", "siamese", "update", "optimizer", "sync")
"""The stages of a step that are reported: all but choosing and grading problems."""
PHASES: Mapping[str, Sequence[str]] = {
    "load": ("load", "engine"),
    "rollout": ("rollout",),
    "siamese": ("weights", "siamese"),
    "update": ("update",),
    "step": ("optimizer",),
    "swap": ("sync",),
}
"""The plan's phases, and the stages that each consists of."""

BASE_CLASSES = {"base": ("base linears", "embeddings", "LM head", "norms, biases")}
"""Classes of the plan that are counted as one kind of tensor."""

RESOLUTION = 512
"""Tokens to which the longest sequence is found."""

NOT_COUNTED = (
    "downloading and loading the model",
    "starting the rollout engine",
    "grading",
    "checkpoints",
    "answers that end early",
)
"""What the estimate of a whole run leaves out."""


class OutOfMemoryError(PopoError):
    """The GPU ran out of memory in a stage: a result of the bench."""


class Meter(Callback):
    """Records of all steps, and the most memory by stage on a GPU: (in tensors, on the card), bytes.

    The card holds what torch reserved at its peak and all that is in use outside its allocator, such as the CUDA
    context. Resident memory of a CPU says little, so nothing is measured there.
    """

    def __init__(self, device: torch.device, notify: Callable[[str], None] = lambda _: None) -> None:
        self.device = device
        self.records: list[StepRecord] = []
        self.peaks: dict[str, tuple[int, int]] = {}
        self.notices: list[str] = []
        self._notify = notify
        self._stage: tuple[str, int | None] = ("load", None)

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Note the peaks of the stage before, and measure anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = (
                torch.cuda.max_memory_allocated(self.device),
                torch.cuda.max_memory_reserved(self.device) + outside_bytes(self.device),
            )
            before = self.peaks.get(self._stage[0], (0, 0))
            self.peaks[self._stage[0]] = (max(peak[0], before[0]), max(peak[1], before[1]))
            if name == "sync":
                # An engine that wakes up does this first; its peak must not count the update's cache.
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stage = (name, total)

    def step(self, record: StepRecord) -> None:
        """Keep the record of a step."""
        self.records.append(record)

    def message(self, text: str) -> None:
        """Keep a notice and pass it on."""
        self.notices.append(text)
        self._notify(text)

    def forget_step(self) -> None:
        """Drop what the warm-up step measured."""
        self.stage("between steps")
        self.records.clear()
        self.peaks = {stage: peak for stage, peak in self.peaks.items() if stage in PHASES["load"]}

    def exhausted(self) -> NoReturn:
        """Raise OutOfMemoryError for the current stage. The trainer asks for advice when nothing else is left."""
        name, total = self._stage
        raise OutOfMemoryError(f"out of memory in {name}" + (f" of {total:,} sequences" if total else ""))

    def seconds(self, stage: str) -> float:
        """Return the median seconds of a stage; not of `sync`, which comes after a step's record."""
        return float(statistics.median(record["seconds"][stage] for record in self.records))


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
            if reason := meter.records[-1]["skipped_reason"]:
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
    recipe: Recipe,
    *,
    steps: int,
    positives: int | None,
    memory_cap_bytes: int | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Measure `steps` steps of `recipe` after a warm-up; running out of memory is a result, too.

    Raises UserInputError if the recipe's sampler would not serve random weights, a cap cannot be enforced, or a
    sequence is longer than the model's context.
    """
    size = step_size(recipe, positives)
    engine, _ = pick_engine(recipe)
    _refuse(recipe, engine, size, memory_cap_bytes)
    device = pick_device(recipe.train.device)
    planned = planned_phases(recipe, device, memory_cap_bytes)
    if memory_cap_bytes is not None:
        cap_memory(device, memory_cap_bytes)
    meter = Meter(device, notify)
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
        with BenchTrainer(recipe, meter, verdict=spread(size["positives"]), memory_advice=meter.exhausted) as trainer:
            result["load_seconds"] = time.perf_counter() - start
            syncs = run_steps(trainer, meter, steps, notify)
            result["stages"] = _stages(meter, syncs)
            by_class = planned["step"].bytes_by_class if planned else None
            result["tensors"] = [
                {
                    "kind": kind,
                    "counted_bytes": counted,
                    "planned_bytes": by_class
                    and sum(by_class.get(name, 0) for name in BASE_CLASSES.get(kind, (kind,))),
                }
                for kind, counted in tensor_bytes(trainer.learner).items()
            ]
            result["step_seconds"] = sum(stage["seconds"] for stage in result["stages"])
            result["run"] = _estimate(recipe, size, result["stages"])
    except OutOfMemoryError as error:
        result["out_of_memory"] = error.what
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        try:
            meter.exhausted()
        except OutOfMemoryError as named:
            result["out_of_memory"] = named.what
    result |= {
        "memory": peaks_beside_plan(meter, planned, engine=engine),
        "notices": meter.notices,
        "environment": environment(device),
    }
    return result


def bench_longest(recipe: Recipe, *, memory_cap_bytes: int | None, notify: Callable[[str], None]) -> dict[str, Any]:
    """Find the longest sequence whose update fits, by trying, on a GPU (a CPU swaps instead)."""
    device = pick_device(recipe.train.device)
    if memory_cap_bytes is not None:
        cap_memory(device, memory_cap_bytes)
    total = torch.cuda.get_device_properties(device).total_memory
    try:
        plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=memory_cap_bytes or total)
        planned = plan.longest_sequence_tokens
    except ModelError:
        planned = None
    policy = random_policy(recipe)
    longest = longest_update(policy, lambda tokens: at_length(recipe, tokens), resolution=RESOLUTION, notify=notify)
    return {
        "model": recipe.model.id,
        "device": str(device),
        "memory_cap_bytes": memory_cap_bytes,
        "longest_tokens": longest,
        "planned_tokens": planned,
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

    def fits(tokens: int) -> bool:
        recipe = recipe_at(tokens)
        recipe = recipe.with_values({"data.prompts_per_step": 1, "rollout.num_generations": 2})
        meter, fitted = Meter(policy.device), True
        try:
            with BenchTrainer(
                recipe, meter, verdict=spread(2), memory_advice=meter.exhausted, policy=policy, random_answers=True
            ) as trainer:
                run_steps(trainer, meter, 0, lambda _: None)
        except OutOfMemoryError:
            fitted = False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
        policy.model.zero_grad(set_to_none=True)
        release_memory()
        notify(f"{tokens:,} tokens: {'fits' if fitted else 'out of memory'}")
        return fitted

    return longest(fits, first=resolution, last=policy.context_tokens, step=resolution)


def longest(fits: Callable[[int], bool], *, first: int, last: int, step: int) -> int | None:
    """Return the longest multiple of `step` from `first` to `last` that `fits`, or None if `first` does not.

    Doubles until one does not fit, then bisects; `fits` must be monotone.
    """
    low, high = 0, last // step + 1
    probe = -(-first // step)
    while high - low > 1:
        if fits(probe * step):
            low = probe
            probe = min(2 * probe, last // step) if high > last // step else (low + high) // 2
        else:
            high = probe
            if low == 0:
                return None
            probe = (low + high) // 2
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


def step_size(recipe: Recipe, positives: int | None = None) -> dict[str, int]:
    """Return how much a step is: prompts, answers, their tokens, and positives (half of the answers by default)."""
    prompts, generations = recipe.data.prompts_per_step, recipe.rollout.num_generations
    answers = prompts * generations
    if positives is not None and positives > answers:
        raise UserInputError(
            f"{positives} positives are asked for, and a step has {prompts} x {generations} = {answers} rollouts",
            where="--positives",
            next_step=f"--positives {answers}",
        )
    return {
        "prompts": prompts,
        "num_generations": generations,
        "prompt_tokens": recipe.rollout.max_prompt_length,
        "completion_tokens": recipe.rollout.max_completion_length,
        "positives": positives or (answers + 1) // 2,
    }


# --------------------------------------------------------------------------- memory and estimate


def planned_phases(recipe: Recipe, device: torch.device, cap_bytes: int | None) -> Mapping[str, Phase]:
    """Return the plan's phases by name; none for an architecture that the plan does not know."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    try:
        shape = load_shape(recipe.model)
    except ModelError:
        return {}
    return {phase.name: phase for phase in plan_memory(recipe, shape, vram_bytes=cap_bytes or total).phases}


def peaks_beside_plan(meter: Meter, planned: Mapping[str, Phase], *, engine: str) -> list[dict[str, Any]]:
    """Return the peaks of every phase that was reached, beside the plan's (None for an unknown architecture).

    None with vLLM for tensors: torch keeps counting what a sleeping engine has given back.
    """
    countable = engine != "vllm"
    phases = []
    for name, stages in PHASES.items():
        peaks = [meter.peaks[stage] for stage in stages if stage in meter.peaks]
        if peaks:
            phase = planned.get(name)
            phases.append(
                {
                    "phase": name,
                    "tensor_bytes": max(peak[0] for peak in peaks) if countable else None,
                    "planned_tensor_bytes": phase.tensor_bytes if phase and countable else None,
                    "card_bytes": max(peak[1] for peak in peaks),
                    "planned_card_bytes": phase.total_bytes if phase else None,
                }
            )
    return phases


def outside_bytes(device: torch.device) -> int:
    """Return the bytes of the GPU in use outside torch's allocator: the CUDA context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


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
    state = [value for values in learner.optimizer.state.values() for value in values.values()]
    return {
        "base": frozen_bytes(policy.model),
        "adapters": _bytes(parameter for _, parameter in policy.adapter_parameters()),
        "predictor head": _bytes(policy.predictor.parameters()),
        "siamese average": learner.siamese.extra_bytes,
        "optimizer state": _bytes(
            value for value in state if isinstance(value, Tensor) and not getattr(value, "is_paged", False)
        ),
    }


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's frozen parameters with their quantisation statistics."""
    return _bytes(part for p in model.parameters() if not p.requires_grad for part in _parts(p))


def _parts(parameter: Tensor) -> Iterator[Tensor]:
    yield parameter
    state = getattr(parameter, "quant_state", None)
    for level in (state, getattr(state, "state2", None)):
        parts = (getattr(level, name, None) for name in ("absmax", "code", "offset"))
        yield from (part for part in parts if isinstance(part, Tensor))


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
            seconds = statistics.median(syncs) if name == "sync" else meter.seconds(name)
            count = tokens.get(name)
            per_second = None if count is None else count / seconds
            stages.append({"stage": name, "seconds": seconds, "tokens": count, "tokens_per_second": per_second})
    return stages


def _estimate(recipe: Recipe, size: Mapping[str, int], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps, every = recipe.train.steps, recipe.eval.every
    evaluations = 2 + (len(range(every, steps, every)) if every else 0) if recipe.eval.problems else 0
    answers = recipe.eval.problems * recipe.eval.samples_per_problem
    rollout = next(stage["seconds"] for stage in stages if stage["stage"] == "rollout")
    steps_seconds = steps * sum(stage["seconds"] for stage in stages)
    evaluations_seconds = evaluations * answers * rollout / (size["prompts"] * size["num_generations"])
    return {
        "steps": steps,
        "steps_seconds": steps_seconds,
        "evaluations": evaluations,
        "evaluations_seconds": evaluations_seconds,
        "seconds": steps_seconds + evaluations_seconds,
        "left_out": list(NOT_COUNTED),
    }


# --------------------------------------------------------------------------- refusals


def _refuse(recipe: Recipe, engine: str, size: Mapping[str, int], memory_cap_bytes: int | None) -> None:
    """Raise UserInputError for what cannot be measured, before a model is built."""
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
