"""Host memory is the container's if its limit is lower than the machine's."""

from __future__ import annotations

import psutil
import pytest

from popo_lite import host_memory

GIB = 2**30


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """`cgroups(name of the process's group, {folder: (limit, used, cached)})`."""
    monkeypatch.setattr(host_memory, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")

    def make(name, groups):
        (tmp_path / "own").write_text(f"1:cpu:/elsewhere\n0::{name}\n")
        for folder, (limit, used, cached) in groups.items():
            group = tmp_path / "cgroup" / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / "memory.max").write_text(f"{limit}\n")
            (group / "memory.current").write_text(f"{used}\n")
            (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached - 1}\nactive_file 1\n")

    return make


def test_without_control_groups_memory_is_the_machines(cgroups):
    assert host_memory.total_bytes() == psutil.virtual_memory().total  # no such file
    cgroups("/user.slice", {"user.slice": ("max", GIB, 0)})
    assert host_memory.total_bytes() == psutil.virtual_memory().total
    assert 0 < host_memory.available_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("/", "."),
        ("/docker/0123", "."),
        ("/a/b", "a/b"),
        ("/a/b", "a"),
    ],  # the second: the host's name, seen from within
)
def test_a_containers_limit_counts_wherever_it_is_set(cgroups, name, folder):
    cgroups(name, {folder: (GIB, GIB // 2, GIB // 4)})
    assert host_memory.total_bytes() == GIB
    assert host_memory.available_bytes() == GIB * 3 // 4  # the kernel drops cached files


def test_the_lowest_limit_counts_and_none_is_left_below_zero(cgroups):
    cgroups("/a/b", {"a": (2 * GIB, GIB, 0), "a/b": (GIB, 2 * GIB, 0)})
    assert host_memory.total_bytes() == GIB
    assert host_memory.available_bytes() == 0
