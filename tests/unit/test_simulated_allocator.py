"""The model of torch's caching allocator, against what torch documents and its source says."""

from __future__ import annotations

import pytest

from popo_lite.tools.simulate.allocator import CachingAllocator, CapacityError, smallest_capacity

MIB = 2**20


def test_small_tensors_share_a_segment_and_sizes_are_rounded():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)


@pytest.mark.parametrize(("size", "segment"), [(2 * MIB, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)])
def test_large_tensors_take_segments(size, segment):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == segment


def test_freed_neighbours_are_merged_and_used_again():
    allocator = CachingAllocator()
    parts = [allocator.allocate(4 * MIB) for _ in range(5)]
    for part in parts:
        allocator.free(part)
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 20 * MIB
    assert allocator.peak_allocated == 20 * MIB


def test_a_full_card_returns_cached_segments_before_it_fails():
    allocator = CachingAllocator(64 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved == 50 * MIB
    with pytest.raises(CapacityError):
        allocator.allocate(20 * MIB)


def test_only_expandable_segments_fill_a_hole_with_something_larger():
    # Two tensors of 30 MiB are freed, with a lasting one between them; then one of 60 MiB is needed.
    events = [(0, 30 * MIB), (1, 2 * MIB), (2, 30 * MIB), (0, -1), (2, -1), (3, 60 * MIB)]
    assert smallest_capacity(events, expandable=False, step=2 * MIB) == (20 + 60) * MIB
    assert smallest_capacity(events, expandable=True, step=2 * MIB) < (30 + 20 + 60) * MIB


def test_empty_cache_keeps_what_is_in_use():
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        kept, freed = allocator.allocate(30 * MIB), allocator.allocate(50 * MIB)
        allocator.free(freed)
        allocator.empty_cache()
        assert 30 * MIB <= allocator.reserved <= 40 * MIB
        allocator.free(kept)
        allocator.empty_cache()
        assert allocator.reserved < 20 * MIB
