"""Sizes of the fused loss."""

from __future__ import annotations

import pytest

from popo_lite.chunks import chunk_tokens, row_block, tile_rows
from popo_lite.tools.plan.terms import pass_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("vocabulary", "memory_bytes", "tokens"),
    [
        (151_936, 256 * MIB, 384),  # 441 fit
        (151_936, 148 * MIB + 2**19, 256),  # exactly 256 fit: 148.375 MiB
        (151_936, 37 * MIB, 56),  # 63 fit
        (151_936, 4 * MIB, 6),
        (151_936, 1, 1),
        (64, 1 * MIB, 4096),
    ],
)
def test_chunk_tokens(vocabulary, memory_bytes, tokens):
    assert chunk_tokens(vocabulary, memory_bytes=memory_bytes) == tokens


def test_float64_logits_take_twice_the_memory():
    assert chunk_tokens(1000, memory_bytes=8 * 1000 * 128, logits_bytes=8) == 128
    assert chunk_tokens(1000, memory_bytes=8 * 1000 * 128, logits_bytes=4) == 256


def test_row_blocks_are_large_on_a_gpu_and_never_empty():
    assert row_block(151_936, on_gpu=False) == 3
    assert row_block(151_936, on_gpu=True) == 55
    assert row_block(10**9, on_gpu=False) == tile_rows(10**9) == 1


def test_twice_the_tokens_add_only_hidden_gradients_and_numbers_per_token():
    sizes = {"chunk": 256, "vocabulary": 151_936, "width": 1536, "on_gpu": True}
    once, twice = (pass_bytes(tokens=tokens, **sizes) for tokens in (2048, 4096))
    assert twice - once == 2048 * (1536 * 2 + 8 * 4)


def test_the_chunk_dominates():
    peak = pass_bytes(tokens=8192, chunk=384, vocabulary=151_936, width=1536, on_gpu=True)
    assert 384 * 151_936 * 4 < peak < 1.6 * 384 * 151_936 * 4
