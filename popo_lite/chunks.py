"""Compute the sizes of the fused loss. Free of torch, so that the memory plan uses the same sizes.

The logits of one *chunk* of tokens, [chunk, V], exist at a time. The row-wise math runs over one *row block* of a
chunk at a time. On a CPU one *tile* of the head's rows is widened to float32 at a time.
"""

from __future__ import annotations

ROW_BLOCK_BYTES_CPU = 2 * 2**20
ROW_BLOCK_BYTES_GPU = 32 * 2**20
TILE_BYTES = 4 * 2**20
TILE_TOKENS = 2048  # that an MLP computes at once; with fewer, dequantising NF4 weights for each tile would cost time

GEMM_MULTIPLES = (64, 8)
"""Matrix products are fast at multiples of these numbers of tokens; the first is best."""


def chunk_tokens(vocabulary: int, *, memory_bytes: int, logits_bytes: int = 4) -> int:
    """Return how many tokens' logits [tokens, V] fit into `memory_bytes`, at least 1.

    `logits_bytes` is the size of one logit: 4, or 8 for a float64 head. The gradient overwrites the logits, so it
    needs no memory of its own. Rounded down to a multiple of 64 tokens, or of 8 if fewer than 64 fit.
    """
    tokens = memory_bytes // (vocabulary * logits_bytes)
    for multiple in GEMM_MULTIPLES:
        if tokens >= multiple:
            return tokens // multiple * multiple
    return max(tokens, 1)


def row_block(vocabulary: int, *, on_gpu: bool, logits_bytes: int = 4) -> int:
    """Return the rows of a chunk to process at a time, at least 1.

    Few on a CPU, so that they stay in its cache; many on a GPU, so that launching kernels costs little.
    """
    block_bytes = ROW_BLOCK_BYTES_GPU if on_gpu else ROW_BLOCK_BYTES_CPU
    return max(block_bytes // (vocabulary * logits_bytes), 1)


def tile_rows(width: int) -> int:
    """Return the rows of the head [V, D] to widen to float32 at a time on a CPU, at least 1."""
    return max(TILE_BYTES // (width * 4), 1)
