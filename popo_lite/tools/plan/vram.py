"""The memory plan: what is alive in each phase of a run, by class, and whether it fits.

Computed from recipe and shape alone. docs/memory.md explains every row and which constants are assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from popo_lite.errors import UserInputError
from popo_lite.recipe import PopoObjective, Recipe
from popo_lite.tools.plan.activations import kv_token_bytes, layer_bytes, loss_bytes
from popo_lite.tools.plan.engine import engine_of, hf_moments, sequence_tokens, vllm_bytes
from popo_lite.tools.plan.shapes import ModelShape
from popo_lite.tools.plan.sizes import (
    adapter_elements,
    base_bytes,
    compute_bytes,
    optimizer_bytes,
    predictor_elements,
    trained_bytes,
)

CUDA_CONTEXT_BYTES = 600 * 2**20
"""Assumed: the CUDA context, the kernels of torch, bitsandbytes and cuBLAS with their workspaces."""

FRAGMENTATION_SHARE = 0.1
"""Assumed: the allocator's waste, as a share of what comes and goes."""

SHORTFALL = "engine shortfall"
"""Beside the phases in `needs`: what vLLM's share lacks to hold one sequence."""

LARGEST = 2**20
"""Where the search for the longest sequence and the largest batch ends."""

EXPORT_ANSWERS = 16
"""Answers that export/verify.py samples at once."""

_WHOLE = ("16-bit model", "merged model", "adapters", "predictor head")
"""Beside the base and the engine, what is loaded once and does not come and go."""

Moment = tuple[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is alive at the fullest `moment` of a phase: class -> bytes, none of them 0.

    `tensor_bytes` is what torch's allocator counts of it where no engine shares the GPU: all but context, margin and
    what other processes hold.
    """

    name: str
    moment: str
    bytes_by_class: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """Everything."""
        return sum(self.bytes_by_class.values())

    @property
    def tensor_bytes(self) -> int:
        """Without CUDA context, fragmentation margin and other processes."""
        outside = ("CUDA context", "fragmentation", "other processes")
        return self.total_bytes - sum(self.bytes_by_class.get(name, 0) for name in outside)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The plan of a recipe on a GPU of `vram_bytes` (host memory for a recipe on the CPU).

    `others_bytes` of it are held by other processes. `phases` are those of a run, `export` is a command of its own.
    `shortfall_bytes` is what vLLM's share lacks for one sequence. `longest_tokens` is the longest prompt with answer
    that memory would hold, everything else as it is and 0 where none does; it may exceed `context_tokens`.
    `sequences_at_once` is how many of full length can be decoded together, None on a server.
    """

    vram_bytes: int
    others_bytes: int
    on_gpu: bool
    engine: str
    phases: tuple[Phase, ...]
    export: Phase
    shortfall_bytes: int
    longest_tokens: int
    context_tokens: int
    sequence_tokens: int
    sequences_at_once: int | None

    @property
    def peak(self) -> Phase:
        """The fullest phase of the run."""
        return max(self.phases, key=lambda phase: phase.total_bytes)

    @property
    def fits(self) -> bool:
        """Whether every phase of the run fits, and the engine starts."""
        return self.peak.total_bytes <= self.vram_bytes and not self.shortfall_bytes

    def as_json(self) -> dict[str, Any]:
        """Plain data; all sizes in bytes."""
        return {
            "vram_bytes": self.vram_bytes,
            "others_bytes": self.others_bytes,
            "device": "cuda" if self.on_gpu else "cpu",
            "engine": self.engine,
            "fits": self.fits,
            "peak_bytes": self.peak.total_bytes,
            "peak_phase": self.peak.name,
            "engine_shortfall_bytes": self.shortfall_bytes,
            "sequence_tokens": self.sequence_tokens,
            "longest_sequence_tokens": self.longest_tokens,
            "context_tokens": self.context_tokens,
            "sequences_at_once": self.sequences_at_once,
            "phases": [
                {
                    "name": phase.name,
                    "moment": phase.moment,
                    "total_bytes": phase.total_bytes,
                    "tensor_bytes": phase.tensor_bytes,
                    "bytes": phase.bytes_by_class,
                }
                for phase in (*self.phases, self.export)
            ],
        }


def plan_memory(recipe: Recipe, shape: ModelShape, *, vram_bytes: int, others_bytes: int = 0) -> MemoryPlan:
    """The plan of `recipe` for a model of `shape`, on a GPU of which other processes hold `others_bytes`.

    vLLM takes its share of all of `vram_bytes`, whoever holds the rest. Raises UserInputError where prompt and answer
    may exceed the model's context, and ModelError where lora.target_modules names no layer of it.
    """
    _refuse_beyond_context(recipe, shape.context_tokens)
    run = _Run(recipe, shape, vram_bytes, others_bytes)

    def holds(tokens: int) -> bool:
        return overrun_bytes(_with_sequence(recipe, tokens), shape, vram_bytes, others_bytes) == 0

    return MemoryPlan(
        vram_bytes=vram_bytes,
        others_bytes=others_bytes,
        on_gpu=run.on_gpu,
        engine=run.engine,
        phases=run.phases(),
        export=run.export(),
        shortfall_bytes=run.shortfall_bytes,
        longest_tokens=_largest(holds),
        context_tokens=shape.context_tokens,
        sequence_tokens=sequence_tokens(recipe),
        sequences_at_once=_sequences_at_once(run),
    )


def needs(recipe: Recipe, shape: ModelShape, vram_bytes: int, others_bytes: int = 0) -> dict[str, int]:
    """Bytes of every phase of a run, and `SHORTFALL`."""
    run = _Run(recipe, shape, vram_bytes, others_bytes)
    return {SHORTFALL: run.shortfall_bytes} | {phase.name: phase.total_bytes for phase in run.phases()}


def excess(needed: Mapping[str, int], vram_bytes: int) -> dict[str, int]:
    """By how many bytes each of `needs` is too large; 0 where it is not."""
    return {name: size if name == SHORTFALL else max(0, size - vram_bytes) for name, size in needed.items()}


def overrun_bytes(recipe: Recipe, shape: ModelShape, vram_bytes: int, others_bytes: int = 0) -> int:
    """By how much a run is too large, summed over its phases; 0 where it fits."""
    return sum(excess(needs(recipe, shape, vram_bytes, others_bytes), vram_bytes).values())


def _refuse_beyond_context(recipe: Recipe, context_tokens: int) -> None:
    prompt, answer = recipe.rollout.max_prompt_length, recipe.rollout.max_completion_length
    if prompt + answer > context_tokens:
        raise UserInputError(
            f"prompt and answer may take {prompt} + {answer} = {prompt + answer} tokens, and the context of "
            f"{recipe.model.id} is {context_tokens}",
            where="rollout.max_prompt_length, rollout.max_completion_length",
            next_step=f"--set rollout.max_completion_length={context_tokens - prompt}"
            if prompt < context_tokens
            else f"set rollout.max_prompt_length below {context_tokens}",
        )


class _Run:
    """A recipe on a GPU: what stays, and the moments of every phase."""

    def __init__(self, recipe: Recipe, shape: ModelShape, vram_bytes: int, others_bytes: int) -> None:
        self.recipe, self.shape, self.vram_bytes, self.others_bytes = recipe, shape, vram_bytes, others_bytes
        self.on_gpu = recipe.train.device != "cpu"
        self.engine = engine_of(recipe)
        self.layer = layer_bytes(recipe, shape)
        self.size = compute_bytes(recipe.model)
        self.base = base_bytes(shape, recipe.model)
        self.adapters = adapter_elements(shape, recipe.lora)
        self.predictor = predictor_elements(shape, recipe.siamese.head_width)
        self.trained_bytes = trained_bytes(recipe.model) * sum(self.adapters + self.predictor)
        self.vllm = (
            vllm_bytes(recipe, shape, vram_bytes=vram_bytes, on_gpu=self.on_gpu) if self.engine == "vllm" else None
        )
        self.shortfall_bytes = self.vllm.shortfall if self.vllm is not None else 0
        self.sequence = sequence_tokens(recipe)
        step = recipe.data.prompts_per_step * recipe.rollout.num_generations * self.sequence
        self.tokens = min(max(recipe.train.tokens_per_microbatch, self.sequence), step)
        packed = (
            recipe.train.packing
            and recipe.model.backend == "transformers"
            and recipe.model.attn_implementation != "eager"
        )
        # Without packing the sequences of a micro-batch pass one after the other, and each leaves its checkpoints.
        self.pass_tokens = self.tokens if packed else self.sequence
        self.passes = self.tokens // self.pass_tokens

    def phases(self) -> tuple[Phase, ...]:
        """The phases of a run in their order."""
        trainer = self._trainer()
        return (
            self._phase("load", trainer, self._load()),
            self._phase("rollout", trainer | self._idle_optimizer(), self._rollout()),
            self._phase("siamese", trainer | self._idle_optimizer() | self._idle_engine(), self._siamese()),
            self._phase("update", trainer | self._idle_optimizer() | self._idle_engine(), self._update()),
            self._phase("step", trainer | self._idle_engine(), self._step()),
            self._phase("swap", trainer | self._idle_optimizer(), self._swap()),
        )

    def rollout_fits(self, sequences: int) -> bool:
        """Whether so many sequences can be decoded at once by the trainer's own model."""
        rollout = self.recipe.rollout.model_copy(update={"batch_size": sequences})
        recipe = self.recipe.model_copy(update={"rollout": rollout})
        tried = _Run(recipe, self.shape, self.vram_bytes, self.others_bytes)
        return tried.phases()[1].total_bytes <= self.vram_bytes

    def export(self) -> Phase:
        """What `popo-lite export` compares a merged model with the policy by, a process of its own."""
        answers = EXPORT_ANSWERS * sequence_tokens(self.recipe) * kv_token_bytes(self.recipe, self.shape)
        logits = EXPORT_ANSWERS * self.shape.vocabulary * 12
        merged = base_bytes(self.shape, self.recipe.model, nf4=False)
        policy = self._base() | {"adapters": self._bytes(self.adapters), "predictor head": self._bytes(self.predictor)}
        whole = {"16-bit model" if self.size == 2 else "merged model": merged.total}
        moments = [
            ("the policy answers", policy | {"KV cache": answers, "logits": logits}),
            ("the merged model answers", whole | {"KV cache": answers, "logits": logits}),
        ]
        return self._phase("export", {}, iter(moments))

    # ------------------------------------------------------------------ what stays

    def _bytes(self, elements: list[int]) -> int:
        return trained_bytes(self.recipe.model) * sum(elements)

    def _base(self) -> dict[str, int]:
        return {
            "base linears": self.base.linears,
            "embeddings": self.base.embeddings,
            "LM head": self.base.head,
            "norms, biases": self.base.norms_and_biases,
        }

    def _trainer(self) -> dict[str, int]:
        return self._base() | {
            "adapters": self._bytes(self.adapters),
            "predictor head": self._bytes(self.predictor),
            "siamese average": self.trained_bytes,
        }

    def _idle_optimizer(self) -> dict[str, int]:
        """Between updates its state waits on the host where the GPU is shared in turns."""
        return {} if self.on_gpu and self.recipe.rollout.vllm.enable_sleep_mode else self._optimizer()

    def _optimizer(self) -> dict[str, int]:
        return {"optimizer state": optimizer_bytes(self.adapters + self.predictor, self.recipe)}

    def _idle_engine(self) -> dict[str, int]:
        """What vLLM holds while the policy is trained."""
        if self.vllm is None:
            return {}
        if self.on_gpu and self.recipe.rollout.vllm.enable_sleep_mode:
            return {"CUDA graphs": self.vllm.graphs, "engine, other": self.vllm.asleep}
        return self._engine()

    def _engine(self) -> dict[str, int]:
        assert self.vllm is not None  # noqa: S101  # asked only with this engine
        return {
            "engine weights": self.vllm.weights,
            "engine, other": self.vllm.adapter_slot + self.vllm.working,
            "KV cache": max(0, self.vllm.cache),
            "CUDA graphs": self.vllm.graphs,
        }

    # ------------------------------------------------------------------ the moments of a phase

    def _load(self) -> Iterator[Moment]:
        largest = self.size * max(linear.weights for linear in self.shape.linears())
        if self.recipe.model.quantization == "nf4":
            # transformers quantises one weight after the other.
            yield "the last weight is quantised", {"weight in 16 bit": largest}
        else:
            yield "everything is loaded", {}
        if self.vllm is not None:
            yield "the engine has started", self._engine()

    def _rollout(self) -> Iterator[Moment]:
        if self.engine == "hf":
            yield from hf_moments(self.recipe, self.shape)
        elif self.vllm is not None:
            yield "answers are sampled", self._engine()
        else:
            yield "servers sample elsewhere", {}

    def _siamese(self) -> Iterator[Moment]:
        """Passes without a graph: the siamese's features, and scoring by the trainer."""
        if not self.recipe.objective.needs_siamese_pass and not self._scores:
            yield "nothing is passed", {}
            return
        casts = self.layer.casts_bytes * (self.shape.layers - 1)
        row = self.layer.boundary * self.tokens
        anchors = self._anchors() + self._rotations()
        layer = self.layer.inference_bytes(self.pass_tokens, self.sequence)
        # The embeddings stay beside the layer's input until the trunk has run.
        yield "in a layer", {"hidden states": anchors + 2 * row, "layer working set": layer + casts}
        if self._scores:
            yield "in the LM head", {"hidden states": anchors + 2 * row, "loss chunk": self._loss()}

    @property
    def _scores(self) -> bool:
        """Whether the trainer passes answers for their log-probs: for weights, for the base's, to check an engine."""
        objective = self.recipe.objective
        weighs = (
            isinstance(objective, PopoObjective)
            and objective.weights_from == "trainer"
            and objective.weights != "uniform"
        )
        return weighs or objective.needs_reference_pass or self.engine != "hf"

    def _anchors(self) -> int:
        """What a step's update is held against: the siamese's target of every answer, the base's log-probs."""
        answers = self.recipe.data.prompts_per_step * self.recipe.rollout.num_generations
        objective = self.recipe.objective
        of_one = self.shape.width if objective.needs_siamese_pass else 0
        of_one += self.recipe.rollout.max_completion_length if objective.needs_reference_pass else 0
        return trained_bytes(self.recipe.model) * answers * of_one

    def _rotations(self) -> int:
        """Sines and cosines of every position."""
        return 2 * self.size * self.shape.head_width * self.tokens

    def _loss(self) -> int:
        return loss_bytes(self.recipe, self.shape, tokens=self.tokens, on_gpu=self.on_gpu)

    def _update(self) -> Iterator[Moment]:
        """Gradients twice: the step's sum, and the running micro-batch's, which may be undone."""
        row = self.layer.boundary * self.tokens
        anchors = self._anchors() + self._rotations()
        kept = {"gradients": 2 * self.trained_bytes, "layer inputs": self._layer_inputs()}
        if not self.recipe.train.gradient_checkpointing:
            kept["layer activations"] = self._activations()
        final_norm = self.layer.input_norm * self.tokens
        head = {"hidden states": anchors + 2 * row, "final norm": final_norm, "loss chunk": self._loss()}
        working = self.layer.recompute_bytes(self.pass_tokens, self.sequence)
        yield "in the LM head", kept | head
        if self.recipe.train.gradient_checkpointing:
            casts = {"adapter copies": self.layer.casts_bytes * self.shape.layers}
            yield "the last layer has run", kept | casts | {"hidden states": anchors + row, "final norm": final_norm}
        else:
            working -= self._saved(self.pass_tokens)
        kept |= {"layer working set": working}
        yield "the top layer's backward pass", kept | {"hidden states": anchors + row}

    def _layer_inputs(self) -> int:
        """What checkpoints keep; without them, the input is a layer's own only where its norm needs no wider copy."""
        if self.recipe.train.gradient_checkpointing:
            kept = 2 if self._offloads else self.shape.layers
            return kept * self.layer.boundary * self.tokens
        return (self.shape.layers - 1) * self.layer.boundary * self.tokens if self.size == 4 else 0

    @property
    def _offloads(self) -> bool:
        return self.recipe.train.offload_activations or self.recipe.model.backend == "unsloth"

    def _activations(self) -> int:
        # The first layer's input has no gradient: its norm keeps nothing of it, and what multiplies it is not needed.
        first = self.layer.input_norm - (4 * self.shape.width if self.size == 4 else 0)
        kept = self.shape.layers * self._saved(self.tokens) - first * self.tokens
        # Each pass under autocast makes copies of the adapters of its own, and its graph keeps them.
        return kept + self.passes * (self.shape.layers * self.layer.casts_bytes - self.layer.input_casts_bytes)

    def _saved(self, tokens: int) -> int:
        return (self.layer.saved + self.layer.pair * self.sequence) * tokens

    def _step(self) -> Iterator[Moment]:
        # A copy from before the step, which becomes the difference; no optimizer has temporaries of that size.
        copies = {"weight copies": self.trained_bytes}
        yield "the optimizer's step", {"gradients": self.trained_bytes} | self._optimizer() | copies

    def _swap(self) -> Iterator[Moment]:
        if self.vllm is None:
            yield "nothing is moved", {}
            return
        engine = self._engine()
        if self.on_gpu and self.recipe.rollout.vllm.enable_sleep_mode:
            engine |= {"KV cache": 0, "engine, other": self.vllm.adapter_slot + self.vllm.asleep}
        yield "the adapter enters the engine", engine

    def _phase(self, name: str, stays: dict[str, int], moments: Iterator[Moment]) -> Phase:
        engine = () if self.vllm is None else tuple(self._engine())
        found = []
        for moment, comes in moments:
            total = stays | {"other processes": self.others_bytes}
            for key, size in comes.items():
                total[key] = total.get(key, 0) + size
            if self.on_gpu:
                loose = sum(size for key, size in comes.items() if key not in (*self._base(), *_WHOLE, *engine))
                total |= {"fragmentation": round(FRAGMENTATION_SHARE * loose), "CUDA context": CUDA_CONTEXT_BYTES}
            found.append(
                Phase(name=name, moment=moment, bytes_by_class={key: size for key, size in total.items() if size})
            )
        return max(found, key=lambda phase: phase.total_bytes)


# ---------------------------------------------------------------------- how far it would go


def _with_sequence(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with prompt and answer of `tokens` in all, and micro-batches of one such sequence."""
    answer = tokens - recipe.rollout.max_prompt_length
    rollout = recipe.rollout.model_copy(update={"max_completion_length": max(1, answer)})
    train = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
    return recipe.model_copy(update={"rollout": rollout, "train": train})


def _sequences_at_once(run: _Run) -> int | None:
    if run.vllm is not None:
        return run.vllm.sequences
    return _largest(run.rollout_fits) if run.engine == "hf" else None


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to 2^20 that fits, 0 if none does; what fits a number fits a smaller one."""
    low, high = 0, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
