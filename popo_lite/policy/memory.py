"""The GPU's memory: whether a run will fit, whether it ran out, and giving back what a failed attempt held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from popo_lite.errors import EngineError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation on the GPU failed: torch's own, the driver's, or that of a library."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        ("CUDA" in text and "out of memory" in text) or "_STATUS_ALLOC_FAILED" in text
    )


@contextmanager
def memory_named(doing: str, next_step: str) -> Iterator[None]:
    """Turn running out of memory within into an EngineError that says what was being done."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError(f"the GPU ran out of memory {doing}", next_step=next_step) from error


def release_memory() -> None:
    """Collect what nothing refers to any more and hand torch's cached blocks back.

    To be called outside the `except` block: a caught error keeps the frames of the failed attempt, and their tensors.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
