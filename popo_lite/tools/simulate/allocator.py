"""A model of torch's CUDA caching allocator: how much it hands out and reserves, and when memory runs out.

It follows c10/cuda/CUDACachingAllocator.cpp: sizes rounded to 512 bytes, one pool up to 1 MiB and one above, best fit,
splitting and merging, segments of 2 MiB, 20 MiB or multiples of 2 MiB, and cached segments returned before memory runs
out. There is one stream, so freed memory can be used again at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK, SMALL = 512, 2**20
SMALL_SEGMENT, LARGE_SEGMENT, HUGE_FROM, HUGE_MULTIPLE = 2 * 2**20, 20 * 2**20, 10 * 2**20, 2 * 2**20

Event = tuple[int, int]
"""(key, bytes) for an allocation, (key, -1) when it is freed, (EMPTY_CACHE, 0) when the cache is emptied."""

EMPTY_CACHE = -1


class CapacityError(Exception):
    """Raised if an allocation does not fit."""


@dataclass(eq=False, slots=True)
class Block:
    """A part of a segment; `previous` and `next` are its neighbours there."""

    address: int
    size: int
    small: bool
    used: bool = False
    previous: Block | None = None
    next: Block | None = None

    @property
    def entry(self) -> tuple[int, int, Block]:
        """Return the block's entry in its pool's list, which is sorted by size, then address."""
        return self.size, self.address, self


class CachingAllocator:
    """Allocate blocks of a card that has `capacity` bytes for tensors; None: as many as are asked for.

    With `expandable` each pool is one segment that grows at its end (`expandable_segments:True`).
    """

    def __init__(self, capacity: int | None = None, *, expandable: bool = False) -> None:
        self.capacity, self._expandable = capacity, expandable
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._last: dict[bool, Block | None] = {True: None, False: None}  # of each pool's expandable segment
        self._next_address = 1 << 30
        self.allocated = self.reserved = 0
        self.reset_peaks()

    def reset_peaks(self) -> None:
        """Start the peaks again from what is in use."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def allocate(self, size_bytes: int) -> Block:
        """Return a block of at least `size_bytes`. Raises CapacityError if it does not fit."""
        size = max(1, -(-size_bytes // BLOCK)) * BLOCK
        small = size <= SMALL
        block = self._best_fit(small, size) or self._grow(small, size)
        left = block.size - size
        if left >= BLOCK if small or self._expandable else left > SMALL:
            rest = Block(block.address + size, left, small, previous=block, next=block.next)
            if rest.next is not None:
                rest.next.previous = rest
            block.next, block.size = rest, size
            insort(self._free[small], rest.entry)
            if self._last[small] is block:
                self._last[small] = rest
        block.used = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Return `block` to its pool and merge it with free neighbours."""
        self.allocated -= block.size
        block.used = False
        for other in (block.previous, block.next):
            if other is None or other.used:
                continue
            self._take(other)
            first, second = (other, block) if other is block.previous else (block, other)
            first.size += second.size
            first.next = second.next
            if second.next is not None:
                second.next.previous = first
            if self._last[block.small] is second:
                self._last[block.small] = first
            block = first
        insort(self._free[block.small], block.entry)

    def empty_cache(self) -> None:
        """Return to the driver what no tensor uses: free segments, or free pages at the end of an expandable one."""
        for small, blocks in self._free.items():
            if self._expandable:
                last = self._last[small]
                if last is not None and not last.used:
                    self._take(last)
                    page = SMALL_SEGMENT if small else LARGE_SEGMENT
                    returned = last.size // page * page
                    last.size -= returned
                    self.reserved -= returned
                    if last.size:
                        insort(blocks, last.entry)
                    else:
                        self._last[small] = last.previous
                        if last.previous is not None:
                            last.previous.next = None
            else:
                self.reserved -= sum(size for size, _, block in blocks if block.previous is block.next is None)
                blocks[:] = [entry for entry in blocks if not entry[2].previous is entry[2].next is None]

    def _take(self, block: Block) -> None:
        del self._free[block.small][bisect_left(self._free[block.small], block.entry)]

    def _best_fit(self, small: bool, size: int) -> Block | None:
        blocks = self._free[small]
        index = bisect_left(blocks, (size,))
        return blocks.pop(index)[2] if index < len(blocks) else None

    def _grow(self, small: bool, size: int) -> Block:
        if not self._expandable:
            segment = SMALL_SEGMENT if small else LARGE_SEGMENT
            if size >= HUGE_FROM:
                segment = -(-size // HUGE_MULTIPLE) * HUGE_MULTIPLE
            self._reserve(segment)
            address = self._next_address
            self._next_address += segment + BLOCK  # segments never touch
            return Block(address, segment, small)
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        last = self._last[small]
        free = last.size if last is not None and not last.used else 0
        added = -(-(size - free) // page) * page
        self._reserve(added)
        if last is not None and not last.used:
            self._take(last)
            last.size += added
            return last
        address = last.address + last.size if last is not None else 1 << (40 + small)
        block = Block(address, added, small, previous=last)
        if last is not None:
            last.next = block
        self._last[small] = block
        return block

    def _reserve(self, size: int) -> None:
        if self.capacity is not None and self.reserved + size > self.capacity:
            # torch also tries to use what other blocks of the pool could be merged into; one stream has none.
            self.empty_cache()
            if self.reserved + size > self.capacity:
                raise CapacityError
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def smallest_capacity(events: Sequence[Event], *, expandable: bool, step: int = 2**24) -> int:
    """Return the least bytes, a multiple of `step`, that a card needs for tensors so that no allocation fails."""
    unlimited = CachingAllocator(expandable=expandable)
    _replay(events, unlimited)
    low, high = unlimited.peak_allocated // step, -(-unlimited.peak_reserved // step)
    while high - low > 1:
        middle = (low + high) // 2
        fits = _replay(events, CachingAllocator(middle * step, expandable=expandable))
        low, high = (low, middle) if fits else (middle, high)
    return high * step


def _replay(events: Sequence[Event], allocator: CachingAllocator) -> bool:
    blocks: dict[int, Block] = {}
    try:
        for key, size in events:
            if key == EMPTY_CACHE:
                allocator.empty_cache()
            elif size < 0:
                allocator.free(blocks.pop(key))
            else:
                blocks[key] = allocator.allocate(size)
    except CapacityError:
        return False
    return True
