"""Recognise that GPU memory ran out, say what was being done, and free what a failed attempt held."""

from __future__ import annotations

import gc
import os
import sys
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


def prefer_expandable_segments() -> None:
    """Let torch's allocator on a GPU grow its segments, which wastes less of them, unless the user has configured it.

    Torch reads the variable at its first allocation. vLLM's sleep mode turns the setting off for its own memory.
    """
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in variables):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def bound_cpu_caches() -> None:
    """Let oneDNN and torch's wrapper of it keep 64 compiled products each, unless the user has configured it.

    By default they keep 1,024, each of up to 2 MB and for one number of rows. Nearly every step has other numbers. Both
    read their variable at the first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def release_memory() -> None:
    """Collect unreachable objects and return torch's cached blocks to the GPU.

    Call it outside the `except` block: a caught error keeps the frames of the failed attempt, and their tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
