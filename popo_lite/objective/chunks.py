"""Sizes of the chunked loss, from a memory budget. Free of torch, so that the memory plan computes with the same sizes.

A *chunk* of tokens has its logits [chunk, V] alive. A *row block* of it goes through the row-wise mathematics at a
time. On a CPU a *tile* of the head's rows is widened to float32 at a time.
"""

from __future__ import annotations

ROW_BLOCK_BYTES_CPU = 2 * 2**20
ROW_BLOCK_BYTES_GPU = 32 * 2**20
TILE_BYTES = 4 * 2**20

GEMM_MULTIPLES = (64, 8)
"""Numbers of tokens that matrix products are fast at are multiples of these; the first is best."""


def chunk_tokens(vocabulary: int, *, memory_bytes: int, logits_bytes: int = 4) -> int:
    """Tokens whose logits [tokens, V] fit into `memory_bytes`, at least 1.

    `logits_bytes` is the size of one logit: 4, or 8 for a float64 head. The gradient overwrites the logits and needs
    no budget of its own. Rounded down to a multiple of 64 tokens, or of 8 where fewer than 64 fit.
    """
    tokens = memory_bytes // (vocabulary * logits_bytes)
    for multiple in GEMM_MULTIPLES:
        if tokens >= multiple:
            return tokens // multiple * multiple
    return max(tokens, 1)


def row_block(vocabulary: int, *, on_gpu: bool, logits_bytes: int = 4) -> int:
    """Rows of a chunk that are worked on at a time, at least 1.

    On a CPU few, so that they stay in its cache; on a GPU many, so that launching kernels costs little.
    """
    block_bytes = ROW_BLOCK_BYTES_GPU if on_gpu else ROW_BLOCK_BYTES_CPU
    return max(block_bytes // (vocabulary * logits_bytes), 1)


def tile_rows(width: int) -> int:
    """Rows of the head [V, D] that are widened to float32 at a time on a CPU, at least 1."""
    return max(TILE_BYTES // (width * 4), 1)


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
