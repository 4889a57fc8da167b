"""Recognise that GPU memory ran out, say what was being done, and free what a failed attempt held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from popo_lite.errors import EngineError


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocation on the GPU failed: torch's own, the driver's, or a library's."""
    out_of_memory = ("CUDA" in str(error) and "out of memory" in str(error)) or "_STATUS_ALLOC_FAILED" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and out_of_memory)


@contextmanager
def memory_named(doing: str, next_step: str) -> Iterator[None]:
    """Turn running out of memory in the block into an EngineError that says what was being done."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(f"the GPU ran out of memory {doing}", next_step=next_step) from error


def release_memory() -> None:
    """Collect unreachable objects and return torch's cached blocks to the GPU.

    Call it outside the `except` block: a caught error keeps the frames of the failed attempt, and their tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
