"""Compute the bytes of each term of the memory plan, without torch.

A layer's counts are of what torch keeps for transformers' layers with PEFT's adapters. docs/memory.md explains all
terms, and tests/reference/test_plan_counts.py compares them with counted tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from math import ceil, inf

from popo_lite.chunks import TILE_TOKENS, row_block, tile_rows
from popo_lite.recipe import LoraRecipe, ModelRecipe, Recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.tools.plan.shapes import Linear, ModelShape, adapted_linears, parameter_counts

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

# bitsandbytes' quantize_4bit: weights per scale, scales per scale of scales, and levels in the table.
NF4_BLOCK, NF4_SCALE_BLOCK, NF4_LEVELS = 64, 256, 16
# bitsandbytes' 8-bit optimizers: elements per scale, and the sizes from which state is 8-bit and paged.
EIGHT_BIT_BLOCK, EIGHT_BIT_FROM_ELEMENTS, PAGED_FROM_ELEMENTS = 256, 4096, 100_000

# vLLM. The first three are assumed: tokens of its largest forward pass (SchedulerConfig's default), float32 tensors
# [sequences, V] while it samples with log-probs at a temperature, and CUDA graphs, which it takes from its share
# (Worker.determine_available_memory) and keeps while it sleeps (tests/.../test_cumem.py).
ENGINE_BATCHED_TOKENS, ENGINE_LOGIT_COPIES, ENGINE_GRAPHS_BYTES = 2048, 4, 512 * 2**20
ENGINE_CPU_CACHE_BYTES = 2**30  # VLLM_CPU_KVCACHE_SPACE as samplers/vllm.py sets it
ENGINE_CPU_ADAPTERS = 2  # max_cpu_loras as samplers/vllm.py sets it
ENGINE_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM builds its adapter slot for

# samplers/hf.py. Per sequence and token: its int64 mask, twice while it grows, and one of booleans. Per sequence and
# vocabulary entry: float32 log-probs and two float64 temporaries.
MASK_BYTES, DRAW_BYTES = 17, 20

# Assumed: Python, torch, CUDA's libraries, vLLM and the grading processes.
HOST_PROCESS_BYTES = 3 * 2**30

Classes = dict[str, int]
Capability = tuple[int, int]
ADA: Capability = (8, 9)  # an RTX 40xx: planned for if the GPU is not known


def nf4_bytes(elements: int, *, double: bool) -> int:
    """Return the bytes of a weight in NF4: packed values, the table of levels, and a scale for every 64 values.

    A scale is a float32. With `double` quantisation it takes 8 bits; then there are also a float32 scale for every 256
    scales, a float32 offset, and a table of the 256 values that a scale can have.
    """
    blocks = ceil(elements / NF4_BLOCK)
    scales = blocks + 4 * ceil(blocks / NF4_SCALE_BLOCK) + 4 + 4 * 256 if double else 4 * blocks
    return ceil(elements / 2) + 4 * NF4_LEVELS + scales


def base_bytes(shape: ModelShape, recipe: ModelRecipe, *, nf4: bool | None = None) -> Classes:
    """Return the bytes of the frozen base by class, as the recipe loads it or with its linear layers as `nf4` says.

    The LM head always stays in `model.dtype`, because the loss reads it.
    """
    size, stored = DTYPE_BYTES[recipe.dtype], shape.stored
    by_class = {name: size * count for name, count in parameter_counts(shape).items()}
    if in_4_bits(shape, recipe) if nf4 is None else nf4:
        double, by_class["base linears"] = stored.double if stored else recipe.double_quantization, 0
        for name, inputs, outputs in shape.linears():
            whole, elements = stored.whole.get(name, 0) if stored else 0, inputs * outputs
            quantised = (shape.layers - whole) * nf4_bytes(elements, double=double)
            by_class["base linears"] += quantised + whole * size * elements
    return by_class


def divisible_bytes(shape: ModelShape, recipe: ModelRecipe) -> Classes:
    """Return what `distributed.strategy = "fsdp2"` divides over ranks: the layers' weights, packed if in 4 bits.

    Their scales stay whole on every rank, and so do embeddings, LM head and the last norm.
    """
    base, scales = base_bytes(shape, recipe), 0
    if in_4_bits(shape, recipe):
        double = shape.stored.double if shape.stored else recipe.double_quantization
        for name, inputs, outputs in shape.linears():
            count = shape.layers - (shape.stored.whole.get(name, 0) if shape.stored else 0)
            scales += count * (nf4_bytes(inputs * outputs, double=double) - ceil(inputs * outputs / 2))
    last_norm = DTYPE_BYTES[recipe.dtype] * shape.width
    return {"base linears": base["base linears"] - scales, "norms, biases": base["norms, biases"] - last_norm}


def in_4_bits(shape: ModelShape, recipe: ModelRecipe) -> bool:
    """Return True if the base's linear layers are in 4 bits: quantised when they are loaded, or stored so."""
    return recipe.quantization == "nf4" or shape.stored is not None


def adapter_elements(shape: ModelShape, recipe: LoraRecipe) -> list[int]:
    """Return the size of every adapter tensor: A [r, inputs], B [outputs, r], and with DoRA a magnitude [outputs]."""
    sizes: list[int] = []
    for _, inputs, outputs in adapted_linears(shape, recipe.target_modules):
        sizes += [recipe.rank * inputs, recipe.rank * outputs, *([outputs] if recipe.dora else [])]
    return sizes


def predictor_elements(shape: ModelShape, head_width: int) -> list[int]:
    """Return the size of every tensor of Linear(D, H) - LayerNorm - ReLU - Linear(H, D)."""
    return [shape.width * head_width, head_width, head_width, head_width, head_width * shape.width, shape.width]


def optimizer_bytes(elements: list[int], recipe: Recipe) -> int:
    """Return the GPU bytes of the optimizer's two moments, after the first step, for trained tensors of these sizes.

    8-bit optimizers keep the state of tensors under 4,096 elements in 32 bits. The driver keeps paged state in host
    memory, except for small tensors and the scales.
    """
    if recipe.optimizer.name == "adamw":
        return 2 * max(4, DTYPE_BYTES[recipe.model.dtype]) * sum(elements)
    small = sum(count for count in elements if count < EIGHT_BIT_FROM_ELEMENTS)
    large = [count for count in elements if count >= EIGHT_BIT_FROM_ELEMENTS]
    paged_from = PAGED_FROM_ELEMENTS if recipe.optimizer.name == "paged_adamw8bit" else inf
    scales = sum(ceil(count / EIGHT_BIT_BLOCK) for count in large)
    return 8 * (small + scales) + 2 * sum(count for count in large if count < paged_from)


def packs(recipe: Recipe) -> bool:
    """Return True if several sequences share a forward pass.

    The plan does not know that a window shorter than the sequences forbids it.
    """
    model = recipe.model
    return recipe.train.packing and model.backend == "transformers" and model.attn_implementation != "eager"


def uses_varlen(recipe: Recipe, head_width: int, capability: Capability = ADA) -> bool:
    """Return True if packed rows take FlashAttention, as `policy.attention.kernel_of` decides.

    With DoRA queries and keys are float32, for which FlashAttention has no kernel.
    """
    fits = DTYPE_BYTES[recipe.model.dtype] == 2 and head_width in range(8, 257, 8) and capability >= (8, 0)
    return recipe.train.device != "cpu" and fits and not recipe.lora.dora


def squares(recipe: Recipe, head_width: int) -> bool:
    """Return True if SDPA has no kernel on a GPU that does without the square of a sequence."""
    half = DTYPE_BYTES[recipe.model.dtype] == 2 and recipe.model.attn_implementation == "sdpa"
    return recipe.train.device != "cpu" and half and head_width % 8 != 0


def copied_tokens(recipe: Recipe, tokens: int) -> int:
    """Return how many tokens' keys and values attention keeps as copies: an answer that shares a prompt copies its.

    In a micro-batch of `tokens`, answers of full length are followed by a prompt with as many answers as fit what is
    left, however short. More prompts with short answers would make more copies.
    """
    rollout = recipe.rollout
    if not shares_prefix(recipe):
        return 0
    full, rest = divmod(tokens, rollout.max_prompt_length + rollout.num_generations * rollout.max_completion_length)
    left = min(rollout.num_generations, max(0, rest - rollout.max_prompt_length))
    return (full * rollout.num_generations + left) * rollout.max_prompt_length


def shares_prefix(recipe: Recipe) -> bool:
    """Return True if a prompt is computed once for several answers in a micro-batch."""
    return recipe.train.shared_prefix and packs(recipe) and recipe.model.attn_implementation != "flash_attention_2"


class LayerBytes:
    """Memory of one decoder layer for the recipe's precision, attention, adapters and dropout.

    In bytes per token: `boundary` is the layer's input. `saved` is what it keeps besides for the backward pass, of
    which `input_norm` only if its input has a gradient. `mlp` is one activation of the MLP. `pair` is what attention
    without a kernel keeps for each pair of a token and a token of its sequence. `kv` are a token's keys and values as
    attention reads them.

    In bytes: `casts_bytes` are autocast's 16-bit copies of the adapters, of which `attention_casts_bytes` exist before
    the attention scores and `input_casts_bytes` are kept only if the layer's input has a gradient. `weight_bytes` is
    the largest weight in `model.dtype`: a 4-bit weight is dequantised for each product.
    """

    def __init__(self, recipe: Recipe, shape: ModelShape, capability: Capability = ADA) -> None:
        size, packed, rank = DTYPE_BYTES[recipe.model.dtype], in_4_bits(shape, recipe.model), recipe.lora.rank
        width, heads, half = shape.width, shape.heads + shape.kv_heads, size == 2
        queries = size * shape.heads * shape.head_width
        adapted = {linear.name.split(".")[-1]: linear for linear in adapted_linears(shape, recipe.lora.target_modules)}
        # PEFT casts the input of a layer that is not 4-bit to float32 before autocast casts it to 16 bits again.
        widened = half and not packed and bool(adapted)
        # Layers of one group have the same input.
        names = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",), ("o_proj",))
        qkv, gate_up, down, out = ([adapted[name] for name in group if name in adapted] for group in names)
        self.boundary, self.mlp = size * width, size * shape.mlp_width
        self.tiled = recipe.train.gradient_checkpointing and recipe.model.backend == "transformers"
        # A norm keeps a float32 copy of its input and one number per token. In a float32 model the input is that copy.
        self.input_norm = 4 * width + 4
        # Queries, keys, values, the attention's output and its log-sums.
        attention = 2 * size * heads * shape.head_width + 4 * shape.heads
        if shape.model_type == "qwen3":  # each head's queries and keys are normalised
            attention += 4 * heads * shape.head_width + 4 * heads
        # Without FlashAttention keys and values are repeated for every query head on a GPU.
        apart = packs(recipe) and not uses_varlen(recipe, shape.head_width, capability)
        repeated = apart and recipe.train.device != "cpu"
        self.kv = 2 * size * shape.head_width * (shape.heads if repeated else shape.kv_heads)
        attention += self.kv - 2 * size * shape.head_width * shape.kv_heads
        attention += size * rank * len(qkv + out)  # inner products of the adapters
        mlp = 3 * self.mlp + size * rank * len(gate_up + down)  # gate, its activation, and up
        # The inputs that the adapters keep, apart from the attention's output, and what they take in the backward pass.
        copies = 0
        if recipe.lora.dropout or widened:
            # Each adapter keeps a copy of its input: in 16 bits, or after dropout, with a mask, which has one byte per
            # element on a GPU.
            each = size + (0 if not recipe.lora.dropout else 1 if recipe.train.device != "cpu" else size)
            attention += each * sum(linear.inputs for linear in qkv + out)
            mlp += each * sum(linear.inputs for linear in gate_up + down)
            copies = (4 if half else 3) * size * width - self.mlp if recipe.lora.dropout else self.mlp + 8 * width
        else:
            attention += size * width if qkv else 0
            mlp += size * sum(group[0].inputs for group in (gate_up, down) if group)
            # Attention keeps its outputs for the sequences of a row, and the adapter of o_proj what joins them.
            attention += queries if apart and out else 0
        self.saved = 2 * self.input_norm - (4 * width if size == 4 else 0) + attention + mlp
        # An adapter of down_proj frees its input before the gradients of gate and up exist together.
        working = (2 if down else 3) * self.mlp + size * width + copies
        self._recompute, self._mlp_backward, self._attention = self.saved + working, mlp + working, attention
        # The gradients of the attention's output, its operands, and what goes around it; FlashAttention sums those of
        # queries in float32, and writes those of keys and values for every query head.
        grouped = shape.heads != shape.kv_heads
        flash = 4 * shape.heads * shape.head_width + (2 * queries if grouped else 0)
        self._attention_backward = 2 * queries + 2 * size * shape.head_width * shape.kv_heads
        self._attention_backward += flash if not apart else 2 * queries
        self._copies_backward = 2 * queries if grouped and not apart else 0
        extra = 4 * width if widened else 0
        self._inference = (4 if gate_up else 3) * self.mlp + 2 * size * width + extra
        # The norm's output, queries, keys and values, the attention's output, and the products of o_proj's adapter.
        self._attention_inference = size * width * (4 if out else 2) + 2 * queries + self.kv + extra
        # While queries are rotated: what is rotated, its halves swapped, and both products.
        self._attention_inference = max(self._attention_inference, size * width + 4 * queries + self.kv + extra)
        if repeated:  # keys and values before and after they are repeated and joined; queries and outputs twice
            reading = size * (width + 2 * shape.kv_heads * shape.head_width) + 8 * queries
            self._attention_inference = max(self._attention_inference, reading)
        eager = shape.heads if recipe.model.attn_implementation == "eager" else 0
        self.pair = eager * (6 if half else size)  # float32 scores, and their 16-bit copy
        # Gradients of both and of the scores before the softmax; without a graph scores before and after it.
        self._pair_backward, self._pair_inference = (
            eager * (14 if half else 3 * size),
            eager * (10 if half else 2 * size),
        )
        if squares(recipe, shape.head_width):  # float32 scores, the softmax of them, and its gradients
            self.pair, self._pair_backward, self._pair_inference = (of * shape.heads for of in (4, 12, 8))
            self._attention_inference += 8 * shape.heads * shape.head_width  # float32 queries and keys, scaled
        self.casts_bytes = size * sum(adapter_elements(shape, recipe.lora)) // shape.layers if half else 0
        cast = size * rank if half else 0
        self.input_casts_bytes = cast * sum(linear.inputs for linear in qkv)
        self.attention_casts_bytes = cast * sum(linear.inputs + linear.outputs for linear in qkv)
        # While a tile adds its gradients to those of the tiles before.
        self._gradients_bytes = 2 * max(4, size) * rank * sum(one.inputs + one.outputs for one in gate_up + down)
        self.weight_bytes = size * max(linear.inputs * linear.outputs for linear in shape.linears()) if packed else 0
        self.identity = self.identity_bytes = 0
        if recipe.lora.dora and (out or gate_up or down):
            self._widen_for_dora(shape, list(adapted.values()), size, rank)
        elif recipe.lora.dora:  # attention casts queries, keys and values to 16 bit again, so that the rest is narrow
            # Each adapter keeps its own output and the base's. Their sum is float32.
            outputs = sum(linear.outputs for linear in qkv)
            self.saved, self._recompute = self.saved + 2 * size * outputs, self._recompute + 2 * size * outputs
            self._attention += 2 * size * outputs
            self._attention_inference += max(4, size) * outputs

    def _widen_for_dora(self, shape: ModelShape, adapted: list[Linear], size: int, rank: int) -> None:
        """Count DoRA as PEFT computes it: in float32, and with an identity matrix as large as a layer's input squared.

        Its magnitudes are float32, so all activations are. Each adapter keeps a 16-bit copy of its input, its own
        output, and the base's, which is as wide as its input.
        """
        wide, mlp = max(4, size) * shape.width, max(4, size) * shape.mlp_width
        heads = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_width

        def kept(linears: list[Linear]) -> int:
            each = size * sum(linear.inputs + linear.outputs + rank for linear in linears)
            return each + max(4, size) * sum(linear.outputs for linear in linears)

        of_mlp = [linear for linear in adapted if linear.name.startswith("mlp.")]
        self.boundary = wide
        self.input_norm = wide + 4
        attention = size * heads + 4 * shape.heads + kept([linear for linear in adapted if linear not in of_mlp])
        attention += self.kv - 2 * size * shape.head_width * shape.kv_heads
        self.saved = 2 * self.input_norm + attention + 3 * mlp + kept(of_mlp)
        self._recompute, self._mlp_backward = self.saved + 3 * mlp, 6 * mlp + kept(of_mlp)
        self._attention = attention
        self._attention_backward *= max(4, size) // size
        self._inference = 4 * mlp + size * 3 * shape.mlp_width + 2 * wide
        self._attention_inference *= max(4, size) // size
        # The widest layer's weight and the adapters' product, in float32.
        self.weight_bytes = 2 * max(4, size) * max(linear.inputs * linear.outputs for linear in adapted)
        self.identity = mlp  # its input beside it
        self.identity_bytes = (4 + size if size == 2 else size) * max(linear.inputs for linear in adapted) ** 2

    def norm_bytes(self, tokens: int) -> int:
        """Return the bytes per token that a norm of `tokens` tokens keeps."""
        return self.boundary if self.tiled and tokens > TILE_TOKENS else self.input_norm

    def peak_bytes(self, tokens: int, sequence_tokens: int, *, backward: bool, copies: int = 0) -> int:
        """Return the layer's peak over sequences of that length: run again and backward, or without a graph.

        For the backward pass attention keeps keys and values of `copies` more tokens (`copied_tokens`).
        """
        tile = TILE_TOKENS if self.tiled else tokens
        scores = self.pair * sequence_tokens
        if tokens > tile and backward:
            # Around the MLP's tiles: its norm's input and output, and the gradient of that.
            total = (self._attention + scores + 3 * self.boundary) * tokens
            total += (self._mlp_backward + self.boundary) * tile + self._gradients_bytes
            working = (self._attention + self._attention_backward) * tokens + self._copies_backward * copies
        elif backward:
            total = (self._recompute + scores) * tokens
            working = (self.saved - 3 * self.mlp) * tokens  # its backward pass comes after the MLP's
        else:
            # Around tiles: the norm's input and output, and the MLP's.
            total = self._inference * tokens if tokens <= tile else 3 * self.boundary * tokens + self._inference * tile
            working = self._attention_inference * tokens if tokens > tile or self.pair else 0
        working += (self._pair_backward if backward else self._pair_inference) * sequence_tokens * tokens
        total = max(total, working)
        kept = self.kv * copies if backward else 0
        # The dequantised weight and the MLP's last activation, which the peak includes, never exist at the same time.
        total += self.weight_bytes if self.identity_bytes else max(0, self.weight_bytes - self.mlp * min(tokens, tile))
        if self.identity_bytes:
            before = self.saved if tile == tokens else self._attention + 2 * self.boundary
            total = max(total, (before if backward else 0) * tokens + self.identity * tile + self.identity_bytes)
        return total + kept + self.casts_bytes


def pass_bytes(
    *, tokens: int, chunk: int, vocabulary: int, width: int, on_gpu: bool, head_bytes: int = 2, logits_bytes: int = 4,
    scaled: bool = False, backward: bool = True,
) -> int:  # fmt: skip
    """Return an upper bound for the memory of the fused loss, without hidden states, targets and head.

    It adds the chunk's logits, a row block's temporaries (two more if logits are scaled, capped or divided by a
    temperature: `scaled`), the gradient [N, D], and eight numbers per token. In the end the gradient is multiplied by
    the incoming one, which takes another [N, D]. Without `backward` there is no gradient. `head_bytes` is the size of
    one weight of the head, `logits_bytes` that of one logit.
    """
    chunk = min(chunk, tokens)
    rows = min(row_block(vocabulary, on_gpu=on_gpu, logits_bytes=logits_bytes), chunk)
    cast = rows * vocabulary * head_bytes if backward and head_bytes != logits_bytes else 0
    temporaries = (4 if scaled else 2) * rows * vocabulary * logits_bytes + cast
    columns = min(tile_rows(width), vocabulary)
    # On a CPU: the widened tile of the head, the widened hidden states, and their product twice.
    products = 0 if on_gpu else columns * width * 4 + chunk * (width + 2 * columns) * 4
    gradient = tokens * width * head_bytes if backward else 0
    walking = chunk * vocabulary * logits_bytes + max(temporaries, products)
    return max(walking, gradient) + gradient + 8 * tokens * logits_bytes


def engine_of(recipe: Recipe) -> str:
    """Return `hf`, `vllm` or `server`; for `auto` what the run would choose on this machine."""
    if recipe.rollout.engine != "auto":
        return recipe.rollout.engine
    spec = importlib.util.find_spec("vllm")
    device = "cpu" if recipe.train.device == "cpu" else "cuda"
    refused = impossible_combinations(recipe.with_values({"rollout.engine": "vllm", "train.device": device}))
    served = not any("rollout.engine" in keys for keys, _ in refused)
    return "vllm" if spec is not None and spec.origin is not None and served else "hf"


def kv_token_bytes(recipe: Recipe, shape: ModelShape, *, fp8: bool = False) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_width * (1 if fp8 else DTYPE_BYTES[recipe.model.dtype])


def vllm_bytes(recipe: Recipe, shape: ModelShape, vram_bytes: int, *, on_gpu: bool) -> tuple[list[Classes], int, int]:
    """Return the memory of the engine that samplers/vllm.py starts on a GPU of `vram_bytes`.

    These are the bytes by class while it samples, while the policy trains, and during a swap; then how much its share
    is too small for one sequence of full length, which vLLM needs to start, and how many its KV cache holds at once.
    """
    vllm, size, batch = recipe.rollout.vllm, DTYPE_BYTES[recipe.model.dtype], recipe.rollout.max_num_seqs
    weights = sum(base_bytes(shape, recipe.model, nf4=vllm.base == "nf4").values())
    rank = next(rank for rank in ENGINE_LORA_RANKS if rank >= recipe.lora.rank)
    slot = size * sum(adapter_elements(shape, recipe.lora)) * rank // recipe.lora.rank
    logits = 4 * batch * shape.vocabulary
    working = max(ENGINE_BATCHED_TOKENS, batch) * size * (3 * shape.mlp_width + 4 * shape.width)
    working += ENGINE_LOGIT_COPIES * logits
    share = round(vllm.gpu_memory_utilization * vram_bytes)
    graphs = {"CUDA graphs": ENGINE_GRAPHS_BYTES if on_gpu and not vllm.enforce_eager else 0}
    cache = share - weights - slot - working - sum(graphs.values()) if on_gpu else ENGINE_CPU_CACHE_BYTES
    sequence = recipe.rollout.sequence_tokens * kv_token_bytes(recipe, shape, fp8=vllm.kv_cache_dtype == "fp8")
    sampling = {"engine weights": weights, "engine, other": slot + working, "KV cache": max(0, cache)} | graphs
    states = [sampling] * 3
    if on_gpu and vllm.enable_sleep_mode:
        swapping = sampling | {"KV cache": 0, "engine, other": slot + logits}
        states = [sampling, graphs | {"engine, other": logits}, swapping]
    return states, max(0, sequence - cache), max(0, cache) // sequence


def host_bytes(recipe: Recipe, shape: ModelShape, elements: list[int], *, engine: str, row_bytes: int) -> Classes:
    """Return what a run on a GPU keeps in host memory, by class.

    `elements` are the sizes of what the optimizer updates, `row_bytes` one layer's input for the largest micro-batch.
    """
    adapters, size = sum(adapter_elements(shape, recipe.lora)), DTYPE_BYTES[recipe.model.dtype]
    shared, host = recipe.rollout.vllm.enable_sleep_mode, {"process": HOST_PROCESS_BYTES}
    if engine == "vllm" and shared:
        host["engine asleep"] = asleep_bytes(recipe, shape)
    if engine != "hf":  # the check of the engine keeps two copies, while files and vLLM's copies pass a third on
        host["adapters"] = (3 * max(4, size) + ENGINE_CPU_ADAPTERS * size) * adapters
    host["optimizer state"] = optimizer_bytes(elements, recipe) if shared else 0
    if recipe.optimizer.name == "paged_adamw8bit":
        host["optimizer state"] += 2 * sum(count for count in elements if count >= PAGED_FROM_ELEMENTS)
    if recipe.train.offload_activations:
        host["layer inputs"] = shape.layers * pinned_bytes(row_bytes)
    return {name: count for name, count in host.items() if count}


def asleep_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Return the pinned host memory of vLLM's weights while it sleeps (level 1). vLLM joins layers with one input."""
    queries, keys, values, output, gate, up, down = (one.inputs * one.outputs for one in shape.linears())
    size, counts = DTYPE_BYTES[recipe.model.dtype], parameter_counts(shape)
    nf4 = recipe.rollout.vllm.base == "nf4"
    joined = [queries + keys + values, output, gate + up, down]
    layer = sum(pinned_bytes(nf4_bytes(count, double=True) if nf4 else size * count) for count in joined)
    tables = sum(pinned_bytes(size * counts[name]) for name in ("embeddings", "LM head"))
    return shape.layers * layer + tables + size * counts["norms, biases"]


def pinned_bytes(size: int) -> int:
    """Return what torch's allocator of pinned host memory takes for `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def hf_moments(
    recipe: Recipe, shape: ModelShape, capability: Capability = ADA, *, ranks: int = 1
) -> Iterator[tuple[str, Classes]]:
    """Yield each moment that may be the fullest while the trainer's own model samples, with its bytes by class."""
    size, batch = DTYPE_BYTES[recipe.model.dtype], recipe.rollout.max_num_seqs
    if ranks > 1:  # each has its share of the prompts
        step, evaluation = recipe.data.prompts_per_step, recipe.eval.problems
        sampled = ceil(step / ranks) * recipe.rollout.num_generations
        batch = min(batch, max(sampled, ceil(evaluation / ranks) * recipe.eval.samples_per_problem))
    layer, kv = LayerBytes(recipe, shape, capability), kv_token_bytes(recipe, shape)
    adaptive = recipe.rollout.adaptive
    answers = [adaptive.round_size if adaptive.enabled else recipe.rollout.num_generations]
    answers += [recipe.eval.samples_per_problem] if recipe.eval.problems else []
    # A prompt is read once for all its answers in a batch; its answers may be spread over two batches.
    prompts = min(batch, max(ceil(batch / count) + (batch % count > 0) for count in answers))
    width = recipe.rollout.max_prompt_length
    tokens = prompts * width
    rotations_and_mask = (2 * size * shape.head_width + width) * tokens
    read = 2 * layer.boundary * tokens + layer.peak_bytes(tokens, width, backward=False) + rotations_and_mask
    # Autocast keeps its copies of all layers' adapters until the trunk has run; `layer` includes its own.
    copies = (shape.layers - 1) * layer.casts_bytes
    yield "reading the prompts", {"KV cache": kv * tokens, "layer working set": read, "adapter copies": copies}
    full = batch * recipe.rollout.sequence_tokens
    masks = MASK_BYTES * full + 2 * layer.boundary * batch
    # The cache grows layer by layer into a new tensor. Prompts of unequal length need a mask, and with a mask
    # attention repeats keys and values for every head.
    heads = shape.heads if shape.heads == shape.kv_heads else 2 * shape.heads
    grown = {"KV cache": kv * full + size * full * heads * shape.head_width, "layer working set": masks}
    yield "the full cache grows", grown | {"adapter copies": copies + layer.attention_casts_bytes}
    cache = {"KV cache": kv * full}
    decode = masks + layer.peak_bytes(batch, recipe.rollout.sequence_tokens, backward=False)
    yield "a token of every answer in a layer", cache | {"layer working set": decode, "adapter copies": copies}
    yield "tokens are drawn", cache | {"logits": DRAW_BYTES * batch * shape.vocabulary}
