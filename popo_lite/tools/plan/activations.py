"""Bytes of what comes and goes with tokens: a decoder layer's activations, the loss's chunk, a KV cache.

A layer's counts are of what torch keeps for transformers' layers with PEFT's adapters; they are held against counted
tensors in tests/reference/test_plan_counts.py. docs/memory.md has them in plain words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from popo_lite.chunks import chunk_tokens, row_block, tile_rows
from popo_lite.recipe import Recipe
from popo_lite.tools.plan.shapes import Linear, ModelShape, adapted_linears
from popo_lite.tools.plan.sizes import adapter_elements, compute_bytes

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One decoder layer, bytes per token.

    `boundary` is its input; `saved` what it keeps for its backward pass beside that, of which `input_norm` only where
    its input has a gradient; `recompute` the most there is while it runs again and backward, `saved` included;
    `inference` the most there is without a graph; `mlp` one activation of the MLP; `pair` what eager attention keeps
    for a token and one token of its sequence.
    Not per token: `casts_bytes`, autocast's 16-bit copies of its adapters, of which `attention_casts_bytes` are made
    before the attention's scores, and `input_casts_bytes` kept only where its input has a gradient; and
    `weight_bytes`, its largest weight in `model.dtype`, which a 4-bit weight is widened to while something is
    multiplied with it.
    """

    boundary: int
    saved: int
    input_norm: int
    recompute: int
    inference: int
    mlp: int
    pair: int
    casts_bytes: int
    attention_casts_bytes: int
    input_casts_bytes: int
    weight_bytes: int

    def recompute_bytes(self, tokens: int, sequence_tokens: int) -> int:
        """The most there is while the layer runs again and backward over sequences of that length."""
        # Eager attention: three times what it keeps is an upper bound.
        return (self.recompute + 3 * self.pair * sequence_tokens) * tokens + self._fixed_bytes(tokens)

    def inference_bytes(self, tokens: int, sequence_tokens: int) -> int:
        """The most there is without a graph."""
        return (self.inference + 2 * self.pair * sequence_tokens) * tokens + self._fixed_bytes(tokens)

    def _fixed_bytes(self, tokens: int) -> int:
        # The widened weight and the last activation of the MLP that the peak counts exist one after the other.
        return self.casts_bytes + max(0, self.weight_bytes - self.mlp * tokens)


def layer_bytes(recipe: Recipe, shape: ModelShape) -> LayerBytes:
    """The counts for the recipe's precision, attention, adapters and dropout."""
    size, packed = compute_bytes(recipe.model), recipe.model.quantization == "nf4"
    width, mlp = shape.width, size * shape.mlp_width
    heads = shape.query_width + shape.kv_width
    adapted = {linear.name.split(".")[-1]: linear for linear in adapted_linears(shape, recipe.lora.target_modules)}
    # Norms keep a float32 copy of their input and one number a token; a float32 model's input is that copy.
    input_norm = 4 * width + 4
    saved = 2 * input_norm - (4 * width if size == 4 else 0)
    saved += 2 * size * heads + 4 * shape.heads  # queries, keys, values, the attention's output and log-sums
    if shape.qk_norms:
        saved += 4 * heads + 4 * (shape.heads + shape.kv_heads)
    saved += 3 * mlp  # gate, its activation, and up
    saved += sum(_adapter_inputs(recipe, adapted)) + size * recipe.lora.rank * len(adapted)
    recompute, inference = saved + 3 * mlp + size * width, 3 * mlp + 2 * size * width
    if any(name in adapted for name in ("gate_proj", "up_proj")):
        inference += mlp
    if "down_proj" in adapted:
        recompute -= mlp  # its input is freed before the gradients of gate and up exist together
    if recipe.lora.dropout:
        recompute += (4 if size == 2 else 3) * size * width - mlp
    elif not packed and size == 2:
        # PEFT widens the input of a layer that is not 4-bit to float32 before autocast narrows it again.
        recompute += mlp + 8 * width
    if not packed and size == 2:
        inference += 4 * width
    early = [adapted[name] for name in _QKV if name in adapted]
    cast = recipe.lora.rank * size if size == 2 else 0
    return LayerBytes(
        boundary=size * width,
        saved=saved,
        input_norm=input_norm,
        recompute=recompute,
        inference=inference,
        mlp=mlp,
        pair=shape.heads * (6 if size == 2 else size) if recipe.model.attn_implementation == "eager" else 0,
        casts_bytes=size * sum(adapter_elements(shape, recipe.lora)) // shape.layers if size == 2 else 0,
        attention_casts_bytes=cast * sum(linear.inputs + linear.outputs for linear in early),
        input_casts_bytes=cast * sum(linear.inputs for linear in early),
        weight_bytes=size * max(linear.weights for linear in shape.linears()) if packed else 0,
    )


def _adapter_inputs(recipe: Recipe, adapted: Mapping[str, Linear]) -> Iterator[int]:
    """What the A of a layer's adapters keep of their inputs, bytes per token, beside the attention's output."""
    size = compute_bytes(recipe.model)
    if recipe.lora.dropout:
        # Each its own dropped input, and a mask, of bytes on a GPU.
        mask = 1 if recipe.train.device != "cpu" else size
        yield from ((size + mask) * linear.inputs for linear in adapted.values())
    elif recipe.model.quantization != "nf4" and size == 2:
        # Each its own copy, narrowed from PEFT's float32 one.
        yield from (size * linear.inputs for linear in adapted.values())
    else:
        for sharing in (_QKV, ("gate_proj", "up_proj"), ("down_proj",)):
            if users := [name for name in sharing if name in adapted]:
                yield size * adapted[users[0]].inputs


def loss_bytes(recipe: Recipe, shape: ModelShape, *, tokens: int, on_gpu: bool) -> int:
    """The chunked loss over `tokens` tokens, forward and backward, beside hidden states and head."""
    size = compute_bytes(recipe.model)
    logits_bytes = max(4, size)
    budget_bytes = recipe.train.logits_mib * 2**20
    return pass_bytes(
        tokens=tokens,
        chunk=chunk_tokens(shape.vocabulary, memory_bytes=budget_bytes, logits_bytes=logits_bytes),
        vocabulary=shape.vocabulary,
        width=shape.width,
        on_gpu=on_gpu,
        head_bytes=size,
        logits_bytes=logits_bytes,
        bent=recipe.rollout.temperature != 1.0,
    )


def kv_token_bytes(recipe: Recipe, shape: ModelShape, *, fp8: bool = False) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_width * (1 if fp8 else compute_bytes(recipe.model))


def pass_bytes(
    *,
    tokens: int,
    chunk: int,
    vocabulary: int,
    width: int,
    on_gpu: bool,
    head_bytes: int = 2,
    logits_bytes: int = 4,
    bent: bool = False,
) -> int:
    """Peak bytes of the loss over `tokens` tokens, forward and backward, beside hidden states, targets and head.

    An upper bound for either entry, compiled or not, reached by neither exactly: the chunk's logits, the row block's
    temporaries (two more where logits are scaled, capped or divided by a temperature: `bent`), the gradient [N, D]
    once more for its scaling by the incoming one, and eight numbers a token. `head_bytes` is the size of one weight of
    the head, `logits_bytes` of one logit.
    """
    chunk = min(chunk, tokens)
    rows = min(row_block(vocabulary, on_gpu=on_gpu, logits_bytes=logits_bytes), chunk)
    block = rows * vocabulary * logits_bytes
    cast = 0 if head_bytes == logits_bytes else rows * vocabulary * head_bytes
    temporaries = (4 if bent else 2) * block + cast
    tile_columns = min(tile_rows(width), vocabulary)
    # The widened tile, the widened hidden states, and their product twice.
    products = 0 if on_gpu else tile_columns * width * 4 + chunk * (width + 2 * tile_columns) * 4
    held = 2 * tokens * width * head_bytes + 8 * tokens * logits_bytes
    return chunk * vocabulary * logits_bytes + max(temporaries, products) + held
