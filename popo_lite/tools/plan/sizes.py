"""Bytes of what stays: the base by class, adapters, predictor head, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from popo_lite.recipe import LoraRecipe, ModelRecipe, Recipe
from popo_lite.tools.plan.shapes import ModelShape, adapted_linears, parameter_counts

DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}

NF4_BLOCK = 64
NF4_SCALE_BLOCK = 256
NF4_LEVELS = 16
"""bitsandbytes' quantize_4bit: weights by scale, scales by scale of scales, and the table of levels."""

EIGHT_BIT_BLOCK = 256
EIGHT_BIT_FROM_ELEMENTS = 4096
PAGED_FROM_ELEMENTS = 100_000
"""bitsandbytes' 8-bit optimizers: elements by scale, and from which size on state is 8-bit and paged."""


@dataclass(frozen=True, kw_only=True)
class BaseBytes:
    """The frozen base by class. A tied LM head takes nothing of its own."""

    linears: int
    embeddings: int
    head: int
    norms_and_biases: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.linears + self.embeddings + self.head + self.norms_and_biases


def compute_bytes(recipe: ModelRecipe) -> int:
    """Bytes of an element in `model.dtype`."""
    return DTYPE_BYTES[recipe.dtype]


def trained_bytes(recipe: ModelRecipe) -> int:
    """Bytes of an element of what is trained: float32, or float64 with a float64 model."""
    return max(4, compute_bytes(recipe))


def nf4_bytes(elements: int, *, double: bool) -> int:
    """A weight in NF4: packed values, table of levels, and one scale for 64 values.

    With `double` quantisation a scale is 8 bits, with a float32 scale for 256 of them, one float32 offset and the
    weight's own table of the 256 values that a scale may have; without, a float32.
    """
    blocks = ceil(elements / NF4_BLOCK)
    scales = blocks + 4 * ceil(blocks / NF4_SCALE_BLOCK) + 4 + 4 * 256 if double else 4 * blocks
    return ceil(elements / 2) + 4 * NF4_LEVELS + scales


def base_bytes(shape: ModelShape, recipe: ModelRecipe, *, nf4: bool | None = None) -> BaseBytes:
    """The base as the recipe loads it, or with its linear layers in NF4 or not as `nf4` says.

    The LM head stays in `model.dtype` always: the loss reads it.
    """
    size = compute_bytes(recipe)
    counts = parameter_counts(shape)
    packed = recipe.quantization == "nf4" if nf4 is None else nf4
    linears = size * counts.linears
    if packed:
        by_layer = sum(nf4_bytes(linear.weights, double=recipe.double_quantization) for linear in shape.linears())
        linears = shape.layers * by_layer
    return BaseBytes(
        linears=linears,
        embeddings=size * counts.embeddings,
        head=size * counts.head,
        norms_and_biases=size * counts.norms_and_biases,
    )


def adapter_elements(shape: ModelShape, recipe: LoraRecipe) -> list[int]:
    """Elements of every adapter tensor: A [r, inputs], B [outputs, r], and with DoRA a magnitude [outputs]."""
    found: list[int] = []
    for linear in adapted_linears(shape, recipe.target_modules):
        found += [recipe.rank * linear.inputs, recipe.rank * linear.outputs]
        if recipe.dora:
            found.append(linear.outputs)
    return found


def predictor_elements(shape: ModelShape, head_width: int) -> list[int]:
    """Elements of every tensor of Linear(D, H) - LayerNorm - ReLU - Linear(H, D)."""
    matrix = shape.width * head_width
    return [matrix, head_width, head_width, head_width, matrix, shape.width]


def optimizer_bytes(elements: Iterable[int], recipe: Recipe) -> int:
    """GPU bytes of the optimizer's two moments over trained tensors of these sizes, once the first step is done.

    8-bit state keeps tensors under 4,096 elements in 32 bit. The driver keeps paged state in host memory, all but
    small tensors and the scales.
    """
    name = recipe.optimizer.name
    if name == "adamw":
        return 2 * trained_bytes(recipe.model) * sum(elements)
    total = 0
    for count in elements:
        if count < EIGHT_BIT_FROM_ELEMENTS:
            total += 8 * count
            continue
        total += 2 * 4 * ceil(count / EIGHT_BIT_BLOCK)
        if name == "adamw8bit" or count < PAGED_FROM_ELEMENTS:
            total += 2 * count
    return total
