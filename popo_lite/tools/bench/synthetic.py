"""A random base of a model's architecture and a trainer over it with a made-up task: for the bench, never for a run.

`load_policy` does not know this module; a run can only load true weights.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from popo_lite.callbacks import Callback
from popo_lite.errors import PopoError
from popo_lite.grading import GradeRequest
from popo_lite.metrics import StepRecord
from popo_lite.policy import load
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy, load_policy, wrap_policy
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.samplers import SamplingParams
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PHASES = {
    "load": ("load", "engine"),
    "rollout": ("rollout",),
    "siamese": ("weights", "siamese"),
    "update": ("update",),
    "step": ("optimizer",),
    "swap": ("sync",),
}
"""The plan's phases, and the stages that each consists of."""
Verdict = Callable[[int, int], float]
"""(number of the answer, answers of the step) -> its reward."""


def spread(positives: int) -> Verdict:
    """Return a verdict with `positives` rewards of 1, spread evenly over the answers of a step."""
    return lambda number, total: float((number + 1) * positives // total > number * positives // total)


class OutOfMemoryError(PopoError):
    """The GPU ran out of memory in a stage: a result of the bench."""


class Meter(Callback):
    """Records of all steps, and the most memory by stage on a GPU: (in tensors, on the card), bytes.

    The card holds what torch reserved at its peak and all that is in use outside its allocator, such as the CUDA
    context. Resident memory of a CPU says little, so nothing is measured there.
    """

    def __init__(
        self, device: torch.device, notify: Callable[[str], None] = lambda _: None, *, engine: str = "hf"
    ) -> None:
        self.device, self.engine, self._notify = device, engine, notify
        self.records: list[StepRecord] = []
        self.peaks: dict[str, tuple[int, int]] = {}
        self.notices: list[str] = []
        self._stage: tuple[str, int | None] = ("load", None)

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Note the peaks of the stage before, and measure anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            tensors = torch.cuda.max_memory_allocated(self.device)
            card = torch.cuda.max_memory_reserved(self.device) + outside_bytes(self.device)
            before = self.peaks.get(self._stage[0], (0, 0))
            self.peaks[self._stage[0]] = (max(tensors, before[0]), max(card, before[1]))
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

    @contextmanager
    def naming_memory(self) -> Iterator[None]:
        """Raise OutOfMemoryError for the current stage where torch says that memory ran out."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.exhausted()

    def seconds(self, stage: str) -> float:
        """Return the median seconds of a stage; not of `sync`, which comes after a step's record."""
        return float(statistics.median(record["seconds"][stage] for record in self.records))


def outside_bytes(device: torch.device) -> int:
    """Return the bytes of the GPU in use outside torch's allocator: the CUDA context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


class BenchTrainer(Trainer):
    """The trainer with random weights, prompts of random tokens, and a fixed verdict.

    All prompts and answers are as long as the recipe allows. `policy` reuses one that is loaded; with
    `random_answers` nothing is sampled.
    """

    def __init__(
        self,
        recipe: Recipe,
        meter: Meter,
        *,
        verdict: Verdict,
        policy: Policy | None = None,
        random_answers: bool = False,
    ) -> None:
        self._verdict, self._given_policy, self._random_answers = verdict, policy, random_answers
        # Off: every setting by which a step's size depends on the answers.
        fixed = {"rollout.skip_known": False, "rollout.adaptive.enabled": False, "reward.truncated": "grade"}
        recipe = recipe.with_values({**fixed, "output.samples_per_step": 0})
        super().__init__(recipe, meter, memory_advice=meter.exhausted)
        self.guard = SimpleNamespace(check=lambda *_: None)  # type: ignore[assignment]  # made-up answers have any gap

    def _open_task(self, _stack: ExitStack) -> None:
        self.policy = self._given_policy or random_policy(self.recipe)
        vocabulary, length = self.policy.head.weight.shape[0], self.recipe.rollout.max_prompt_length
        self.grader: Any = SimpleNamespace(grade=self._grade)
        self.train_task: Any = SimpleNamespace(train_problem=_problem, figures=lambda _: {}, name="random tokens")
        self.renderer: Any = SimpleNamespace(
            render=lambda problem: random_prompt(problem.meta["index"], vocabulary, length), text=lambda _: ""
        )
        self.held_out = []

    def _open_sampler(self, stack: ExitStack) -> None:
        self.callback.stage("engine")
        if self._random_answers:
            self.sampler: Any = RandomSampler(self.policy.head.weight.shape[0])
        else:
            super()._open_sampler(stack)

    def _grade(self, requests: Sequence[GradeRequest]) -> list[Reward]:
        values = [self._verdict(number, len(requests)) for number in range(len(requests))]
        return [Reward(value=value, outcome=Outcome.CORRECT if value else Outcome.INCORRECT) for value in values]


class RandomSampler:
    """Answers of random tokens at full length, with log-probs as of a nearly uniform policy."""

    engine, swap_seconds = "hf", ()

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def sample(
        self, prompts: Sequence[Prompt], *, count: int, params: SamplingParams, **_: Any
    ) -> list[list[Completion]]:
        """Make up `count` answers for each prompt."""

        def answer(prompt: Prompt, index: int) -> Completion:
            source = torch.Generator().manual_seed(prompt.problem.meta["index"] * 10_007 + index)
            length = params.max_completion_length
            return Completion(
                token_ids=tuple(torch.randint(self._vocabulary, (length,), generator=source).tolist()),
                sampler_logps=tuple((-torch.rand(length, generator=source) - 5.0).tolist()),
                finish_reason=FinishReason.LENGTH,
                text="",
            )

        return [[answer(prompt, index) for index in range(count)] for prompt in prompts]

    def sync(self, _: int) -> None:
        """Hold no weights, so there is nothing to swap."""


def random_base(recipe: ModelRecipe, device: torch.device, *, seed: int = 0) -> PreTrainedModel:
    """The base that `load_base` would give, with random weights: same modules, dtypes and bytes, all frozen.

    Built on the meta device and filled tensor by tensor on `device`, each linear layer quantised as soon as it is
    filled, so that no more than one layer exists in 16 bit. Every row of a matrix has unit norm on average, so
    activations stay of order one through the layers, logits as well: the output distribution is neither uniform nor
    certain. `tiny` is built from its config like any other and is untaught here.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    load.quiet_libraries()
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    with init_empty_weights(include_buffers=False):
        settings = {"attn_implementation": recipe.attn_implementation, "trust_remote_code": recipe.trust_remote_code}
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture(recipe), dtype=dtype, **settings)
    quantizer: Any = None
    if recipe.quantization == "nf4":
        quantizer = AutoHfQuantizer.from_config(load.nf4_config(recipe, dtype), pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": device})
    model.tie_weights()
    _fill(model, dtype, torch.Generator(device).manual_seed(seed))
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
        load.close_cpu_repacking(model)
    model.requires_grad_(False).eval()
    return model


def architecture(recipe: ModelRecipe) -> PreTrainedConfig:
    """The model's config: of a shape known by name without asking anyone, else as `load_config` finds it."""
    from transformers import AutoConfig

    known = KNOWN_CONFIGS.get(recipe.id) if recipe.revision is None else None
    return load.load_config(recipe) if known is None else AutoConfig.for_model(**known)


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """The tiny model's tokenizer, for the PAD id that a policy needs: random weights have no words of their own.

    Ids beyond its vocabulary decode to nothing.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(load.TINY_FOLDER)
    return tokenizer


def write_random_base(recipe: ModelRecipe, device: torch.device, folder: Path, *, seed: int = 0) -> None:
    """Write `random_base` and the stand-in tokenizer to `folder`, for backends that load from files alone."""
    random_base(recipe, device, seed=seed).save_pretrained(folder)
    stand_in_tokenizer().save_pretrained(folder)


def _fill(model: PreTrainedModel, dtype: torch.dtype, source: torch.Generator) -> None:
    """Put values on the source's device in place of every meta parameter; buffers move there."""
    filled: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters are one tensor
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(source.device), name not in module._non_persistent_buffers_set)
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in filled:
                filled[empty] = _parameter(name, empty, dtype, source)
            module.register_parameter(name, filled[empty])


def _parameter(name: str, empty: nn.Parameter, dtype: torch.dtype, source: torch.Generator) -> nn.Parameter:
    import bitsandbytes as bnb

    values = torch.full(empty.shape, 0.0 if name == "bias" else 1.0, dtype=dtype, device=source.device)
    if empty.ndim > 1:
        values.normal_(std=1 / math.sqrt(empty.shape[-1]), generator=source)
    if not isinstance(empty, bnb.nn.Params4bit):
        return nn.Parameter(values, requires_grad=False)
    # What is attached to the parameter says how to quantise it; moving it to its device does so.
    packed: Any = bnb.nn.Params4bit(values, requires_grad=False, **empty.__dict__)
    quantized: nn.Parameter = packed.to(source.device)
    return quantized


def random_policy(recipe: Recipe) -> Policy:
    """Return the policy that `load_policy` would, but over a random base and without stop ids.

    The unsloth backend only builds models from files, so it reads the base from a temporary folder.
    """
    device = load.pick_device(recipe.train.device)
    recipe = recipe.with_values({"lora.init_from": None})
    if recipe.model.backend == "unsloth":
        load.import_unsloth()
        with tempfile.TemporaryDirectory(prefix="popo-lite-bench-") as folder:
            write_random_base(recipe.model, device, Path(folder))
            release_memory()
            policy = load_policy(recipe.with_values({"model.id": folder, "model.revision": None}))
    else:
        base = random_base(recipe.model, device)
        adapted = add_adapters(base, recipe.lora, recipe.train.seed)
        if recipe.train.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        policy = wrap_policy(adapted, stand_in_tokenizer(), recipe, device)
    policy.stop_ids = frozenset()
    return policy


def random_prompt(index: int, vocabulary: int, tokens: int) -> Prompt:
    """Return problem `index` as a prompt of random tokens."""
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(index))
    return Prompt(problem=_problem(0, index), token_ids=tuple(ids.tolist()))


def _problem(_seed: int, index: int) -> Problem:
    return Problem(id=f"bench/{index}", messages=({"role": "user", "content": ""},), answer="", meta={"index": index})
