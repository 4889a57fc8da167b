"""A random base of a model's architecture and a trainer over it with a made-up task: for the bench, never for a run.

`load_policy` does not know this module; a run can only load true weights.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from popo_lite.callbacks import Callback
from popo_lite.errors import PopoError, UserInputError
from popo_lite.metrics import StepRecord
from popo_lite.objective import nothing_to_learn
from popo_lite.policy import load
from popo_lite.policy.activations import checkpoint_layers
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.device import pick_device
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.parts import expert_weights
from popo_lite.policy.policy import Policy, load_policy, wrap_policy
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.samplers import SamplingParams
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PHASES = {"load": "load", "engine": "load", "rollout": "rollout", "weights": "siamese", "siamese": "siamese",
          "update": "update", "optimizer": "step", "sync": "swap"}  # fmt: skip
"""The trainer's stages, and the phase of the plan that each is part of."""


class OutOfMemoryError(PopoError):
    """The GPU ran out of memory in a stage: a result of the bench."""


class Meter(Callback):
    """Keep the records of all steps, and by phase the most memory on a GPU: (in tensors, on the card), bytes.

    `processor` has this process's processor seconds of each step by stage, including what follows a stage.

    The card holds what torch reserved at its peak and all that is in use outside its allocator. Resident memory of a
    CPU says little and is not measured. As a context manager it turns running out of memory into OutOfMemoryError.
    """

    def __init__(self, device: torch.device, notify: Callable[[str], Any] = lambda _: None, engine: str = "hf") -> None:
        self.device, self.notify, self.engine = device, notify, engine
        self.records: list[StepRecord] = []
        self.peaks: dict[str, tuple[int, int]] = {}
        self.processor: list[dict[str, float]] = []
        self.notices: list[str] = []
        self._stage: tuple[str, int | None] = ("load", None)
        self._processor_start = 0.0

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Note processor time and peaks of the stage before, and reset torch's peaks."""
        now = time.process_time()
        if self.processor:
            self.processor[-1][self._stage[0]] += now - self._processor_start
        if name == "prompts":  # the first stage of a step
            self.processor.append(defaultdict(float))
        self._processor_start = now
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            tensors = torch.cuda.max_memory_allocated(self.device)
            card = torch.cuda.max_memory_reserved(self.device) + outside_bytes(self.device)
            phase = PHASES.get(self._stage[0], self._stage[0])
            before = self.peaks.get(phase, (0, 0))
            self.peaks[phase] = (max(tensors, before[0]), max(card, before[1]))
            if name == "sync" and self.engine == "vllm":
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
        self.notify(text)

    def forget_step(self) -> None:
        """Drop what the warm-up step measured."""
        self.stage("between steps")
        self.records.clear()
        self.processor.clear()
        self.peaks = {phase: peak for phase, peak in self.peaks.items() if phase == "load"}

    def exhausted(self) -> NoReturn:
        """Raise OutOfMemoryError for the current stage. The trainer asks for advice when nothing else is left."""
        name, total = self._stage
        raise OutOfMemoryError(f"out of memory in {name}" + (f" of {total:,} sequences" if total else ""))

    def __exit__(self, *raised: object) -> None:
        if isinstance(raised[1], BaseException) and is_out_of_memory(raised[1]):
            self.exhausted()

    def seconds(self, stage: str) -> float:
        """Return the median seconds of a stage; a step whose gradient is not finite skips the optimizer."""
        return float(statistics.median(record["seconds"].get(stage, 0.0) for record in self.records))

    def processor_seconds(self, stage: str) -> float:
        """Return the median processor seconds of a stage, which other processes on the machine change less."""
        return float(statistics.median(step[stage] for step in self.processor))


def outside_bytes(device: torch.device) -> int:
    """Return the bytes of the GPU in use outside torch's allocator: the CUDA context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


class BenchTrainer(Trainer):
    """Train random weights on prompts of random tokens, with fixed `rewards` for the answers of a step; write no file.

    All prompts and answers are as long as the recipe allows; unless `sample`, the answers are random tokens too.
    """

    def __init__(self, recipe: Recipe, policy: Policy, meter: Meter, rewards: list[float], sample: bool = True) -> None:
        self.policy, self.meter, self._sample = policy, meter, sample
        outcomes = [Outcome.CORRECT if r else Outcome.INCORRECT for r in rewards]
        self._rewards = [
            Reward(value=r, outcome=outcome, positive=r > 0) for r, outcome in zip(rewards, outcomes, strict=True)
        ]
        self.folder: Any = SimpleNamespace(metrics_path=Path(os.devnull))
        # Off: every setting by which a step's size depends on the answers.
        fixed = {"rollout.skip_known": False, "rollout.adaptive.enabled": False, "reward.truncated": "grade"}
        fixed |= {"rollout.environment.name": None, "data.curriculum.enabled": False}
        recipe = recipe.with_values({**fixed, "output.samples_per_step": 0})
        super().__init__(recipe, meter, memory_advice=meter.exhausted)
        self.guard = SimpleNamespace(check=lambda *_: None)  # type: ignore[assignment]  # made-up answers have any gap

    def _open_task(self, _stack: ExitStack) -> None:
        vocabulary, tokens = self.policy.head.weight.shape[0], self.recipe.rollout.max_prompt_length
        prompt = partial(random_prompt, vocabulary=vocabulary, tokens=tokens)
        self.grader: Any = SimpleNamespace(grade=lambda *_, **__: self._rewards)
        self.train_task: Any = SimpleNamespace(train_problem=lambda _, i, __: prompt(i).problem, figures=lambda _: {})
        self.renderer: Any = SimpleNamespace(render=lambda problem: prompt(int(problem.id)), text=lambda _: "")

    def _open_sampler(self, stack: ExitStack) -> None:
        self.meter.stage("engine")
        if self._sample:
            super()._open_sampler(stack)
        else:
            answers = partial(random_answers, self.policy.head.weight.shape[0])
            self.sampler: Any = SimpleNamespace(
                engine="hf", sample=answers, drawing=nullcontext, sync=lambda _: None, sleep=lambda: None
            )

    def measure(self, steps: int) -> None:
        """Run a warm-up step, which the meter forgets, and `steps` more.

        Raises OutOfMemoryError, or UserInputError if the algorithm learns nothing from so many positives.
        """
        for step in range(steps + 1):
            self.meter.notify(f"step {step} of {steps}" if step else "warm-up step")
            before = self.cursor.seconds.get("sync", 0.0)
            self.train_step(step)
            record = self.meter.records[-1]
            record["seconds"]["sync"] = self.cursor.seconds["sync"] - before  # this stage follows the record
            reason = record["skipped_reason"]
            if reason == nothing_to_learn(self.recipe.objective):  # random weights may also diverge: that is timed
                what = f"nothing to learn from {record['positives']} positives: {reason}"
                raise UserInputError(what, where="--positives", next_step="omit it: half of the answers are right then")
            if step == 0:
                self.meter.forget_step()
        self.meter.stage("end")


def spread(positives: int, answers: int) -> list[float]:
    """Return the rewards of a step's answers: 1 for `positives` of them, spread evenly, and 0 for the others."""
    return [float((i + 1) * positives // answers > i * positives // answers) for i in range(answers)]


def random_prompt(index: int, vocabulary: int, tokens: int) -> Prompt:
    """Return problem `index` as a prompt of random tokens."""
    problem = Problem(id=str(index), messages=({"role": "user", "content": ""},), answer="")
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(index))
    return Prompt(problem=problem, token_ids=tuple(ids.tolist()))


def random_answers(
    vocabulary: int, prompts: Sequence[Prompt], *, count: int, params: SamplingParams, **_: Any
) -> list[list[Completion]]:
    """Return `count` answers to each prompt: random tokens at full length, log-probs as of a nearly uniform policy."""

    def answer(prompt: Prompt, index: int) -> Completion:
        source = torch.Generator().manual_seed(int(prompt.problem.id) * 10_007 + index)
        length = params.max_completion_length
        return Completion(
            token_ids=tuple(torch.randint(vocabulary, (length,), generator=source).tolist()),
            sampler_logps=tuple((-torch.rand(length, generator=source) - 5.0).tolist()),
            finish_reason=FinishReason.LENGTH,
            text="",
        )

    return [[answer(prompt, index) for index in range(count)] for prompt in prompts]


def random_policy(recipe: Recipe, *, layers: int | None = None) -> Policy:
    """Return the policy that `load_policy` would, but over a random base and without stop ids.

    With `layers` the base has only so many, which the unsloth backend does not support.

    The tokenizer is that of `tiny`, which decodes ids beyond its vocabulary to nothing. The unsloth backend only builds
    models from files, so it reads the base from a temporary folder.
    """
    if recipe.model.backend == "unsloth":
        load.import_unsloth()  # before transformers
    device, tokenizer = pick_device(recipe.train.device), load.load_tokenizer(ModelRecipe(id="tiny"))
    recipe = recipe.with_values({"lora.init_from": None})
    if recipe.model.backend == "unsloth":
        with tempfile.TemporaryDirectory(prefix="popo-lite-bench-") as folder:
            random_base(recipe.model, device).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            release_memory()
            policy = load_policy(recipe.with_values({"model.id": folder, "model.revision": None}))
    else:
        base = random_base(recipe.model, device, layers=layers)
        adapted = add_adapters(base, recipe.lora, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            checkpoint_layers(base)
        policy = wrap_policy(adapted, tokenizer, recipe, device)
    policy.stop_ids = frozenset()
    return policy


def random_base(
    recipe: ModelRecipe, device: torch.device, *, seed: int = 0, layers: int | None = None
) -> PreTrainedModel:
    """Return the base that `load_base` would, but with random weights: same modules, dtypes and bytes, all frozen.

    It is built on the meta device, then filled and quantised tensor by tensor on `device`: only one layer at a time is
    in 16 bit. Every row of a matrix has unit norm on average, so activations and logits stay of order one, and the
    output distribution is neither uniform nor certain. `tiny` is untaught here, too.
    """
    import bitsandbytes as bnb
    from transformers.quantizers.auto import AutoHfQuantizer

    dtype: torch.dtype = getattr(torch, recipe.dtype)
    config = architecture(recipe, layers)
    model = load.empty_base(recipe, config, load.attention_of(recipe, config))
    quantizer: Any = None
    if recipe.quantization == "nf4":
        quantizer = AutoHfQuantizer.from_config(load.nf4_config(recipe), pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": device})
    experts = set(expert_weights(model)) if recipe.quantization == "nf4" else set()
    source = torch.Generator(device).manual_seed(seed)
    for name, empty in list(model.named_parameters()):
        values = torch.full(empty.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        if empty.ndim > 1:
            values.normal_(std=1 / math.sqrt(empty.shape[-1]), generator=source)
        filled: Any = nn.Parameter(values)
        if isinstance(empty, bnb.nn.Params4bit):
            # What is attached to the parameter says how to quantise it; moving it to its device does so.
            quantised: Any = bnb.nn.Params4bit(values, **vars(empty))
            filled = quantised.to(device)
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, attribute, filled)
        if (owner, attribute) in experts:
            load.quantize_experts(owner, attribute, recipe, device)
        del values, filled  # before the next layer: two in 16 bit would be the peak
    model.tie_weights()  # the loop saw tied parameters once
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer.to(device))
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        load.close_cpu_repacking(model)
    model.requires_grad_(False).eval()
    return model


def architecture(recipe: ModelRecipe, layers: int | None = None) -> PreTrainedConfig:
    """Return the model's config: of a shape known by name without asking anyone, else as `load_config` finds it.

    With `layers` it is that of a model with only so many of its layers.
    """
    from transformers import AutoConfig

    known = KNOWN_CONFIGS.get(recipe.id) if recipe.revision is None else None
    config = load.load_config(recipe) if known is None else AutoConfig.for_model(**known)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = kinds[:layers]
    return config
