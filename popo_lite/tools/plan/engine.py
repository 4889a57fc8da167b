"""Bytes of the rollout engine: vLLM's share of the GPU, and the trainer's own model while it samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from popo_lite.recipe import Recipe
from popo_lite.tools.plan.activations import kv_token_bytes, layer_bytes
from popo_lite.tools.plan.shapes import ModelShape
from popo_lite.tools.plan.sizes import adapter_elements, base_bytes, compute_bytes

ENGINE_BATCHED_TOKENS = 2048
"""Assumed: tokens of vLLM's largest forward pass, its SchedulerConfig's default."""

ENGINE_LOGIT_COPIES = 4
"""Assumed: float32 tensors [sequences, V] alive while vLLM samples with log-probs under the temperature."""

ENGINE_GRAPHS_BYTES = 512 * 2**20
"""Assumed: vLLM's captured CUDA graphs. They stay while the engine sleeps (vLLM's tests/.../test_cumem.py)."""

ENGINE_CPU_CACHE_BYTES = 2**30
"""VLLM_CPU_KVCACHE_SPACE as samplers/vllm.py sets it."""

ENGINE_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM builds its adapter slot for."""

MASK_BYTES = 17
"""Per sequence and token while samplers/hf.py decodes: its mask in int64, twice while it grows, and as booleans."""

DRAW_BYTES = 20
"""Per sequence and token of the vocabulary while samplers/hf.py draws: float32 log-probs, two float64 temporaries."""


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """vLLM in the trainer's process. `cache` is what its share leaves for keys and values; it may be negative."""

    weights: int
    adapter_slot: int
    working: int
    graphs: int
    asleep: int
    cache: int
    sequence: int

    @property
    def shortfall(self) -> int:
        """Bytes that the share lacks to hold one sequence of full length; vLLM refuses to start then."""
        return max(0, self.sequence - self.cache)

    @property
    def sequences(self) -> int:
        """Sequences of full length that the cache holds at once."""
        return max(0, self.cache) // self.sequence


def engine_of(recipe: Recipe) -> str:
    """`hf`, `vllm` or `server`; `auto` as the run would choose on this machine."""
    if recipe.rollout.engine != "auto":
        return recipe.rollout.engine
    found = importlib.util.find_spec("vllm")
    installed = found is not None and found.origin is not None
    return "vllm" if installed and vllm_can_serve(recipe) else "hf"


def vllm_can_serve(recipe: Recipe) -> bool:
    """Whether vLLM serves adapters and precision of the recipe at all."""
    return not recipe.lora.dora and recipe.model.dtype != "float64" and recipe.lora.rank <= ENGINE_LORA_RANKS[-1]


def sequence_tokens(recipe: Recipe) -> int:
    """The longest prompt with the longest answer."""
    return recipe.rollout.max_prompt_length + recipe.rollout.max_completion_length


def vllm_bytes(recipe: Recipe, shape: ModelShape, *, vram_bytes: int, on_gpu: bool) -> EngineBytes:
    """The engine that samplers/vllm.py starts on a GPU of `vram_bytes`."""
    rollout, size = recipe.rollout, compute_bytes(recipe.model)
    weights = base_bytes(shape, recipe.model, nf4=rollout.vllm.base == "nf4").total
    rank = next(rank for rank in ENGINE_LORA_RANKS if rank >= recipe.lora.rank)
    slot = size * sum(adapter_elements(shape, recipe.lora)) * rank // recipe.lora.rank
    tokens = max(ENGINE_BATCHED_TOKENS, rollout.max_num_seqs)
    logits = 4 * rollout.max_num_seqs * shape.vocabulary
    working = tokens * size * (3 * shape.mlp_width + 4 * shape.width) + ENGINE_LOGIT_COPIES * logits
    share = round(rollout.vllm.gpu_memory_utilization * vram_bytes)
    return EngineBytes(
        weights=weights,
        adapter_slot=slot,
        working=working,
        graphs=0 if rollout.vllm.enforce_eager or not on_gpu else ENGINE_GRAPHS_BYTES,
        asleep=logits,
        cache=share - weights - slot - working if on_gpu else ENGINE_CPU_CACHE_BYTES,
        sequence=sequence_tokens(recipe) * kv_token_bytes(recipe, shape, fp8=rollout.vllm.kv_cache_dtype == "fp8"),
    )


def hf_moments(recipe: Recipe, shape: ModelShape) -> Iterator[tuple[str, dict[str, int]]]:
    """What sampling from the trainer's own model holds, by class, at each moment that may be its fullest."""
    size, batch = compute_bytes(recipe.model), recipe.rollout.max_num_seqs
    layer, kv = layer_bytes(recipe, shape), kv_token_bytes(recipe, shape)
    draw = DRAW_BYTES * batch * shape.vocabulary
    answers = [
        recipe.rollout.adaptive.round_size if recipe.rollout.adaptive.enabled else recipe.rollout.num_generations
    ]
    if recipe.eval.problems:
        answers.append(recipe.eval.samples_per_problem)
    # A prompt is read once for all its answers of a batch; its answers may be spread over two.
    prompts = min(batch, max(ceil(batch / count) + (batch % count > 0) for count in answers))
    width = recipe.rollout.max_prompt_length
    tokens = prompts * width
    rotations_and_mask = (2 * size * shape.head_width + width) * tokens
    read = 2 * layer.boundary * tokens + layer.inference_bytes(tokens, width) + rotations_and_mask
    # Autocast keeps its copies of the adapters of all layers until the trunk has run; a layer's own are in its count.
    copies = (shape.layers - 1) * layer.casts_bytes
    yield "reading the prompts", {"KV cache": kv * tokens, "layer working set": read, "adapter copies": copies}
    full = batch * sequence_tokens(recipe)
    beside = MASK_BYTES * full + 2 * layer.boundary * batch
    # The cache grows layer by layer into a new tensor. Behind a mask, as prompts of unequal length need, attention
    # repeats keys and values for every head.
    growth = size * full * shape.kv_width
    repeated = 2 * size * full * shape.query_width if shape.heads != shape.kv_heads else 0
    yield (
        "the full cache grows",
        {
            "KV cache": kv * full + max(growth, repeated),
            "layer working set": beside,
            "adapter copies": copies + layer.attention_casts_bytes,
        },
    )
    decode = beside + layer.inference_bytes(batch, sequence_tokens(recipe))
    yield (
        "a token of every answer in a layer",
        {"KV cache": kv * full, "layer working set": decode, "adapter copies": copies},
    )
    yield "tokens are drawn", {"KV cache": kv * full, "logits": draw}
