"""Plan a run's memory: what is alive in each phase, by class, and whether it fits.

The plan needs only the recipe and the model's shape. docs/memory.md explains every row and names the assumed constants.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from math import ceil
from operator import attrgetter
from typing import Any, NamedTuple

from popo_lite.chunks import chunk_tokens
from popo_lite.errors import UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import check_context, impossible_combinations, refuse_emulated_bfloat16
from popo_lite.tools.plan import terms
from popo_lite.tools.plan.shapes import ModelShape
from popo_lite.tools.plan.terms import Classes

CUDA_CONTEXT_BYTES = 600 * 2**20  # assumed: with the kernels of torch, bitsandbytes and cuBLAS and their workspaces
NCCL_BYTES = 512 * 2**20  # assumed: buffers of one communicator over PCIe
FRAGMENTATION_RATIO = 0.1  # assumed: memory that the allocator wastes, relative to temporary tensors
SEARCHED = range(1, 2**20 + 1)  # numbers among which the longest sequence and the largest batch are searched
CHECKED_TOKENS = 32  # of each answer on which samplers/probe.py checks an engine
EXPORT_ANSWERS = 16  # answers that `popo-lite export` samples at once to verify a merged model
# Keys in `needs` beside the phases: what vLLM's share lacks for one sequence, and host memory.
SHORTFALL, HOST = "engine shortfall", "host memory"
NOT_TENSORS = ("CUDA context", "NCCL", "fragmentation", "other processes")
PERMANENT = {"base linears", "embeddings", "LM head", "norms, biases", "16-bit model", "merged model", "adapters",
             "predictor head"}  # allocated once, so they fragment nothing  # fmt: skip
BARE = {"lora.target_modules": (), "lora.dora": False}  # a pass of the base without adapters
Moment = tuple[str, Classes]


class Phase(NamedTuple):
    """A phase at its fullest `moment`: `bytes` is what is alive by class, with no 0 among them."""

    name: str
    moment: str
    total_bytes: int
    tensor_bytes: int  # what torch's allocator counts without vLLM: all but NOT_TENSORS
    bytes: Classes


class Machine(NamedTuple):
    """A GPU of `vram_bytes`, `others_bytes` of which other processes hold, and the host memory left (None: unknown).

    It belongs to one of `ranks`, of which `ranks_here` share the machine's host memory.
    """

    vram_bytes: int
    others_bytes: int = 0
    host_bytes: int | None = None
    capability: terms.Capability = terms.ADA
    ranks: int = 1
    ranks_here: int = 1


def plan_memory(recipe: Recipe, shape: ModelShape, **machine: Any) -> MemoryPlan:
    """Return the plan of `recipe` for a model of `shape` on a `Machine`, by the names of its fields.

    vLLM takes its share of all of `vram_bytes`, whoever holds the rest. Raises UserInputError if prompt and answer
    may exceed the model's context, and ModelError if lora.target_modules names no layer of it.
    """
    check_context(recipe, shape.context_tokens)
    if recipe.train.device != "cpu":  # what a run on the GPU refuses does not fit
        for (key, *_), why in impossible_combinations(recipe.with_values({"train.device": "cuda"})):
            raise UserInputError(why, where=f"{key} = {attrgetter(key)(recipe)}")
        refuse_emulated_bfloat16(recipe.model, Machine(**machine).capability)
    return MemoryPlan(recipe, shape, Machine(**machine))


class MemoryPlan:
    """The plan of a recipe on a GPU of `vram_bytes`, or in host memory for a recipe on the CPU.

    With several ranks it is that of the rank with the most prompts. `phases` are those of a run; `export` is a later
    command in a process of its own. `host` is what a rank on a GPU keeps in host memory, by class. `needs` holds the
    bytes of the phases, of `HOST` memory (of all ranks on the machine) and, as `SHORTFALL`, how much vLLM's share
    lacks for one sequence; `excess` is by how much each is too large.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, machine: Machine) -> None:
        self.recipe, self.shape, self.machine = recipe, shape, machine
        self.vram_bytes, self.others_bytes, self.host_bytes, capability, ranks, _ = machine
        self.on_gpu, self.engine = recipe.train.device != "cpu", terms.engine_of(recipe)
        self.layer, self.size = terms.LayerBytes(recipe, shape, capability), terms.DTYPE_BYTES[recipe.model.dtype]
        adapters = terms.adapter_elements(shape, recipe.lora)
        predictor = terms.predictor_elements(shape, recipe.siamese.head_width)
        self.trained_size = max(4, self.size)  # adapters and predictor head have at least float32
        trained = {"adapters": self.trained_size * sum(adapters), "predictor head": self.trained_size * sum(predictor)}
        self.trained = sum(trained.values())
        self.whole = terms.base_bytes(shape, recipe.model) | trained
        sharded = recipe.distributed.strategy == "fsdp2" and ranks > 1
        divisible = terms.divisible_bytes(shape, recipe.model) if sharded else Classes()
        kept = {name: size - size * (ranks - 1) // ranks for name, size in divisible.items()}
        self.policy = self.whole | {name: self.whole[name] - divisible[name] + kept[name] for name in divisible}
        self.gatherable = sum(divisible.values())
        # Without a similarity term the predictor head has no gradient, and the optimizer no state for it.
        similar = recipe.objective.needs_siamese_pass
        self.learned = self.trained if similar else trained["adapters"]
        elements = adapters + predictor if similar else adapters
        self.optimizer = {"optimizer state": terms.optimizer_bytes(elements, recipe)}
        vllm = None
        if self.engine == "vllm":
            vllm = terms.vllm_bytes(recipe, shape, self.vram_bytes, on_gpu=self.on_gpu)
        states, self.engine_shortfall_bytes, self.vllm_sequences = vllm or ([Classes()] * 3, 0, 0)
        self.sampling, self.training, self.swapping = states
        self.sequence_tokens, self.context_tokens = recipe.rollout.sequence_tokens, shape.context_tokens
        # A rank samples the answers to its prompts, and trains on its part of the step's tokens.
        prompts = ceil(recipe.data.prompts_per_step / ranks)
        self.answers = prompts * recipe.rollout.num_generations
        least = max(recipe.train.tokens_per_microbatch, self.sequence_tokens)
        repeated = self.answers - prompts if terms.shares_prefix(recipe) else 0
        all_tokens = self.answers * self.sequence_tokens - repeated * recipe.rollout.max_prompt_length
        self.tokens = min(least, all_tokens)
        # Without packing the sequences of a micro-batch pass one after the other, and each leaves its checkpoints.
        self.pass_tokens = self.tokens if terms.packs(recipe) else self.sequence_tokens
        self.copied_tokens = terms.copied_tokens(recipe, self.tokens)
        row = self.layer.boundary * self.pass_tokens
        self.host = terms.host_bytes(recipe, shape, elements, engine=self.engine, row_bytes=row) if self.on_gpu else {}
        if sharded and self.on_gpu:
            self.host["base"] = sum(self.whole.values()) - self.trained
        self.phases = list(self._phases())
        self.peak = max(self.phases, key=lambda phase: phase.total_bytes)
        self.needs = {SHORTFALL: self.engine_shortfall_bytes, HOST: machine.ranks_here * sum(self.host.values())}
        self.needs |= {phase.name: phase.total_bytes for phase in self.phases}
        limits = {SHORTFALL: 0, HOST: self.needs[HOST] if self.host_bytes is None else self.host_bytes}
        self.excess = {key: max(0, size - limits.get(key, self.vram_bytes)) for key, size in self.needs.items()}
        self.overrun_bytes = sum(self.excess.values())
        self.fits = not self.overrun_bytes

    def with_values(self, values: Mapping[str, Any]) -> MemoryPlan:
        """Return the plan of the recipe with other values by dotted key, which are not checked, on the same GPU."""
        return MemoryPlan(self.recipe.with_values(values), self.shape, self.machine)

    @cached_property
    def export(self) -> Phase:
        """The phase of `popo-lite export`, which compares a merged model with the policy."""
        return self._phase("export", {}, self._export())

    @cached_property
    def longest_sequence_tokens(self) -> int:
        """Return the longest prompt with answer that fits, 0 if none does. It may exceed the model's context."""
        prompt = self.recipe.rollout.max_prompt_length
        return bisect_left(SEARCHED, 1, key=lambda tokens: self.with_values({
            "rollout.max_completion_length": max(1, tokens - prompt), "train.tokens_per_microbatch": tokens,
        }).overrun_bytes)  # fmt: skip

    @cached_property
    def sequences_at_once(self) -> int | None:
        """Return how many answers of full length can be decoded together; None for a server."""
        if self.engine != "hf":
            return self.vllm_sequences if self.engine == "vllm" else None
        return bisect_left(SEARCHED, 1, key=lambda size: self.with_values({
            "rollout.max_num_seqs": size, "data.prompts_per_step": size * self.machine.ranks,
        }).excess["rollout"])  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return plain data with all sizes in bytes; the last phase is the export."""
        keys = ("vram_bytes", "others_bytes", "engine", "fits", "engine_shortfall_bytes", "sequence_tokens",
                "longest_sequence_tokens", "context_tokens", "sequences_at_once")  # fmt: skip
        data = {key: getattr(self, key) for key in keys} | {"device": "cuda" if self.on_gpu else "cpu"}
        data |= {"ranks": self.machine.ranks, "ranks_here": self.machine.ranks_here}
        data |= {"peak_bytes": self.peak.total_bytes, "peak_phase": self.peak.name}
        data["host"] = {"total_bytes": self.needs[HOST], "available_bytes": self.host_bytes, "bytes": self.host}
        return data | {"phases": [phase._asdict() for phase in (*self.phases, self.export)]}

    def _phases(self) -> Iterator[Phase]:
        """Yield a run's phases in their order."""
        trainer = self.policy | {"siamese average": self.trained}
        # If the GPU is shared in turns, the optimizer's state is in host memory between updates.
        idle = trainer if self.on_gpu and self.recipe.rollout.vllm.enable_sleep_mode else trainer | self.optimizer
        load: list[Moment] = [("everything is loaded", {})]
        layer = -(-self.gatherable // self.shape.layers)
        if layer:  # read into host memory, and divided layer by layer
            load = [("the last layer is divided", {"gathered layers": layer})]
        elif self.recipe.model.quantization == "nf4" and not self.shape.stored:
            # transformers quantises one weight after the other
            load = [("the last weight is quantised", {"weight in 16 bit": self.layer.weight_bytes})]
        if self.layer.identity_bytes:
            load += [("DoRA is tried", {"layer working set": self.layer.identity_bytes})]
        load += [("the engine has started", self.sampling)] if self.sampling else []
        yield self._phase("load", trainer, load)
        sampled = ("answers are sampled" if self.sampling else "servers sample elsewhere", self.sampling)
        moments: Iterable[Moment] = [sampled, *self._engine_check()]
        if self.engine == "hf":
            moments = terms.hf_moments(self.recipe, self.shape, self.machine.capability, ranks=self.machine.ranks)
        # Ranks sample at their own pace, so the whole base is gathered; else the layer at work and the next one.
        whole, two = {"gathered layers": self.gatherable}, {"gathered layers": 2 * layer}
        yield self._phase("rollout", idle | (whole if self.engine == "hf" else two), moments)
        yield self._phase("siamese", idle | two | self.training, self._siamese())
        yield self._phase("update", idle | two | self.training, self._update())
        # A copy of the weights from before the step becomes their difference.
        step = {"gradients": self.learned} | self.optimizer | {"weight copies": self.trained}
        yield self._phase("step", trainer | self.training, [("the optimizer's step", step)])
        moved = "the adapter enters the engine" if self.swapping else "nothing is moved"
        yield self._phase("swap", idle, [(moved, self.swapping)])

    def _phase(self, name: str, stays: Classes, moments: Iterable[Moment]) -> Phase:
        """Return the fullest moment of a phase; `stays` is alive in all of them."""
        permanent, phases = PERMANENT | self.sampling.keys(), []
        for moment, comes in moments:
            total = stays | {"other processes": self.others_bytes}
            total |= {key: total.get(key, 0) + size for key, size in comes.items()}
            if self.on_gpu:
                temporary = sum(size for key, size in comes.items() if key not in permanent)
                total |= {"fragmentation": round(FRAGMENTATION_RATIO * temporary), "CUDA context": CUDA_CONTEXT_BYTES}
                summed = self.machine.ranks > 1 and name not in ("load", "export")
                total |= {"NCCL": NCCL_BYTES if summed else 0}
            tensors = sum(size for key, size in total.items() if key not in NOT_TENSORS)
            alive = {key: size for key, size in total.items() if size}
            phases.append(Phase(name, moment, sum(total.values()), tensors, alive))
        return max(phases, key=lambda phase: phase.total_bytes)

    def _export(self) -> Iterator[Moment]:
        """Yield the moments in which the policy, then the merged model, answers and is scored, one answer at a time."""
        batch = min(EXPORT_ANSWERS, self.recipe.rollout.max_num_seqs)
        plain = {"rollout.max_num_seqs": batch, "train.gradient_checkpointing": False, "train.packing": False}
        weights = {"16-bit model" if self.size == 2 else "merged model": sum(
            terms.base_bytes(self.shape, self.recipe.model, nf4=False).values())}  # fmt: skip
        merged = BARE | {"model.quantization": "none"}
        tokens, capability = self.sequence_tokens, self.machine.capability
        for name, model, changes in (("the policy", self.whole, {}), ("the merged model", weights, merged)):
            recipe = self.recipe.with_values(plain | changes)
            for moment, classes in terms.hf_moments(recipe, self.shape, capability):
                yield f"{name}: {moment}", model | classes
            layer = terms.LayerBytes(recipe, self.shape, capability)
            passing = self._pass(layer, tokens, tokens)
            yield f"{name}: an answer is scored, in a layer", model | passing
            hidden = {"hidden states": passing["hidden states"]}
            yield f"{name}: an answer is scored, in the LM head", model | hidden | self._loss(tokens, backward=False)

    def _pass(self, layer: terms.LayerBytes, tokens: int, sequence_tokens: int) -> Classes:
        """Return what a pass without a graph takes in its fullest layer. The embeddings stay beside a layer's input."""
        casts = layer.casts_bytes * (self.shape.layers - 1)
        working = layer.peak_bytes(tokens, sequence_tokens, backward=False) + casts
        hidden = 2 * (layer.boundary + self.size * self.shape.head_width) * tokens
        return {"hidden states": hidden, "layer working set": working}

    def _engine_check(self) -> Iterator[Moment]:
        """Yield the moments in which the trainer scores an answer of the engine, which is awake."""
        tokens = min(self.recipe.rollout.max_prompt_length + CHECKED_TOKENS, self.sequence_tokens)
        passing = self._pass(self.layer, tokens, tokens)
        yield "an answer is checked, in a layer", self.sampling | passing
        hidden = {"hidden states": passing["hidden states"]}
        yield (
            "an answer is checked, in the LM head",
            self.sampling | hidden | self._loss(CHECKED_TOKENS, backward=False),
        )

    def _siamese(self) -> Iterator[Moment]:
        """Yield the moments of passes without a graph: the siamese's features, and log-probs by the trainer."""
        objective = self.recipe.objective
        # The trainer computes log-probs for weights, for those of the base, and to check an engine's.
        weighs = getattr(objective, "weights_from", "") == "trainer" and getattr(objective, "weights", "") != "uniform"
        scores = weighs or objective.needs_reference_pass or self.engine != "hf"
        if not objective.needs_siamese_pass and not scores:
            yield "nothing is passed", {}
            return
        layer, row = self.layer, self.layer.boundary * self.tokens
        if not (objective.needs_siamese_pass or weighs or self.engine != "hf"):  # the base's log-probs alone
            layer = terms.LayerBytes(self.recipe.with_values(BARE), self.shape, self.machine.capability)
        working = layer.peak_bytes(self.pass_tokens, self.sequence_tokens, backward=False)
        working += layer.casts_bytes * (self.shape.layers - 1)
        # The embeddings stay beside the layer's input until the trunk has run.
        yield "in a layer", {"hidden states": self._targets() + 2 * row, "layer working set": working}
        if scores:
            logps = self._loss(self.tokens, backward=False)
            yield "in the LM head", {"hidden states": self._targets() + row} | logps

    def _targets(self) -> int:
        """Return the bytes of what a step's update needs: siamese targets, the base's log-probs, and rotations."""
        objective = self.recipe.objective
        per_answer = self.shape.width if objective.needs_siamese_pass else 0
        per_answer += self.recipe.rollout.max_completion_length if objective.needs_reference_pass else 0
        return self.trained_size * self.answers * per_answer + 2 * self.size * self.shape.head_width * self.tokens

    def _loss(self, tokens: int, *, backward: bool) -> Classes:
        """Return the peak of the loss, or of log-probs alone, without hidden states and head."""
        vocabulary, logits = self.shape.vocabulary, max(4, self.size)
        chunk = chunk_tokens(vocabulary, memory_bytes=self.recipe.train.logits_mib * 2**20, logits_bytes=logits)
        return {"loss chunk": terms.pass_bytes(
            tokens=tokens, chunk=chunk, vocabulary=vocabulary, width=self.shape.width, on_gpu=self.on_gpu,
            head_bytes=self.size, logits_bytes=logits, scaled=self.recipe.rollout.temperature != 1.0, backward=backward,
        )}  # fmt: skip

    def _update(self) -> Iterator[Moment]:
        """Yield the moments of the update."""
        layer, layers, train = self.layer, self.shape.layers, self.recipe.train
        row = layer.boundary * self.tokens
        final_norm = {"final norm": layer.norm_bytes(self.pass_tokens) * self.tokens}
        copies = self.copied_tokens
        working = layer.peak_bytes(self.pass_tokens, self.sequence_tokens, backward=True, copies=copies)
        if train.gradient_checkpointing:
            offloads = train.offload_activations or self.recipe.model.backend == "unsloth"
            kept = {"layer inputs": (2 if offloads else layers) * row}
        else:
            saved = layer.saved + layer.pair * self.sequence_tokens
            working -= saved * self.pass_tokens + layer.kv * copies
            # A float32 model's norms need no wider copy of their input, so that layers keep the input itself.
            inputs = (layers - 1) * row if self.size == 4 else 0
            # The first layer's input has no gradient: its norm keeps nothing of it, nor do the layers that read it.
            first = layer.input_norm - (4 * self.shape.width if self.size == 4 else 0)
            # Each pass under autocast makes its own copies of the adapters, which its graph keeps.
            casts = self.tokens // self.pass_tokens * (layers * layer.casts_bytes - layer.input_casts_bytes)
            kept = {"layer inputs": inputs, "layer activations": (layers * saved - first) * self.tokens + casts}
            kept["layer activations"] += layers * layer.kv * copies
        kept["gradients"] = self.learned  # all have one after the first micro-batch
        yield (
            "in the LM head",
            kept | final_norm | {"hidden states": self._targets() + 2 * row} | self._loss(self.tokens, backward=True),
        )
        kept["hidden states"] = self._targets() + row
        if train.gradient_checkpointing:
            yield "the last layer has run", kept | final_norm | {"adapter copies": layers * layer.casts_bytes}
        yield "the top layer's backward pass", kept | {"layer working set": working}
        # By then the layers above have freed what they kept.
        below = {"gradients": self.learned, "hidden states": self._targets() + row, "layer inputs": row}
        whole = layer.peak_bytes(self.pass_tokens, self.sequence_tokens, backward=True, copies=copies)
        yield "the bottom layer's backward pass", below | {"layer working set": whole}
        if self.machine.ranks > 1:
            kept = {"gradients": self.learned, "hidden states": self._targets()}
            yield "gradients are summed over ranks", kept | {"gradient bucket": self.learned}
