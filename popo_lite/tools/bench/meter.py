"""Seconds and peak memory by stage, a cap on a larger card's memory, and the longest sequence that fits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch

from popo_lite.errors import PopoError, UserInputError
from popo_lite.policy.memory import is_out_of_memory


class OutOfMemoryError(PopoError):
    """The GPU ran out of memory in `stage`, with `sequences` to do, 0 where it has none. A benchmark's result."""

    def __init__(self, stage: str, sequences: int) -> None:
        super().__init__(f"out of memory in {stage}")
        self.stage, self.sequences = stage, sequences


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One pass through one stage; peaks are None on a CPU, where resident memory says little.

    `allocated_bytes` is the most in tensors at a time; `card_bytes` the most that the card had to hold: what torch
    reserved at its peak and all that is in use outside its allocator, the CUDA context for one.
    """

    seconds: float
    allocated_bytes: int | None = None
    card_bytes: int | None = None


@dataclass(kw_only=True)
class Meter:
    """What every pass through every stage cost on `device`."""

    device: torch.device
    costs: dict[str, list[StageCost]] = field(default_factory=dict)
    _stage: str = ""
    _sequences: int = 0

    @contextmanager
    def __call__(self, stage: str, *, sequences: int = 0, first: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Measure what runs within: a stage that has so many `sequences` to do.

        `first` runs on the clock and ahead of the peaks: what it gives back is not held by the stage.
        Raises OutOfMemoryError where the GPU's memory does not suffice.
        """
        on_gpu = self.device.type == "cuda"
        self._stage, self._sequences = stage, sequences
        if on_gpu:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        first()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        short = False
        try:
            yield
            if on_gpu:
                torch.cuda.synchronize(self.device)  # kernels run on after the call that queued them
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            short = True
        if short:  # not in the handler: its error would keep the frames and tensors of what failed
            self.exhausted()
        cost = StageCost(seconds=time.perf_counter() - start)
        if on_gpu:
            cost = replace(
                cost,
                allocated_bytes=torch.cuda.max_memory_allocated(self.device),
                card_bytes=torch.cuda.max_memory_reserved(self.device) + outside_bytes(self.device),
            )
        self.costs.setdefault(stage, []).append(cost)

    def exhausted(self) -> NoReturn:
        """Raise OutOfMemoryError for the stage at hand: the learner's `relief`, asked for when nothing else is left."""
        raise OutOfMemoryError(self._stage, self._sequences)

    def forget(self, *, except_for: Sequence[str]) -> None:
        """Drop all but these stages' costs: the warm-up is over."""
        self.costs = {stage: passes for stage, passes in self.costs.items() if stage in except_for}

    def seconds(self, stage: str) -> float:
        """Median seconds of `stage`."""
        return statistics.median(cost.seconds for cost in self.costs[stage])

    def peak(self, stages: Sequence[str]) -> tuple[int, int] | None:
        """Most bytes (allocated, card) in any pass of `stages`; None where none was measured on a GPU."""
        passes = [cost for stage in stages for cost in self.costs.get(stage, ())]
        allocated = [cost.allocated_bytes for cost in passes if cost.allocated_bytes is not None]
        card = [cost.card_bytes for cost in passes if cost.card_bytes is not None]
        return (max(allocated), max(card)) if allocated else None


def outside_bytes(device: torch.device) -> int:
    """Bytes of the GPU in use outside torch's allocator: the CUDA context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def cap_memory(device: torch.device, cap_bytes: int) -> None:
    """Let torch allocate no more on `device`, a GPU, than a card of `cap_bytes` would have left for it.

    All that is in use outside torch's allocator, the CUDA context and other processes, counts against the cap, so it
    is to be called before anything is loaded. Raises UserInputError where the card is smaller.
    """
    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device))  # context and cuBLAS are there from now on
    torch.cuda.synchronize(device)
    total, elsewhere = torch.cuda.mem_get_info(device)[1], outside_bytes(device)
    if not elsewhere < cap_bytes <= total:
        raise UserInputError(
            f"the GPU has {total / 2**30:.1f} GiB, of which {elsewhere / 2**30:.1f} GiB are in use outside torch",
            where="--memory-cap",
            next_step="give a size between the two",
        )
    torch.cuda.set_per_process_memory_fraction((cap_bytes - elsewhere) / total, torch.cuda.current_device())


def longest(fits: Callable[[int], bool], *, first: int, last: int, step: int) -> int | None:
    """The longest multiple of `step` between `first` and `last` that `fits`, None where `first` does not.

    Doubles until one does not fit, then bisects; `fits` is taken to be monotone.
    """
    low, high = 0, last // step + 1
    probe = -(-first // step)
    while high - low > 1:
        if fits(probe * step):
            low = probe
            probe = min(2 * probe, last // step) if high > last // step else (low + high) // 2
        else:
            high = probe
            if low == 0:
                return None
            probe = (low + high) // 2
    return low * step
