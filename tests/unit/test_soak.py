"""The verdicts of `make soak`."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import soak

MIB = 2**20


def samples(**changed: Any) -> list[dict[str, Any]]:
    """Return what a run of 2,000 steps without faults measures; `changed` are functions of the step."""
    noise, found = random.Random(0), []
    for step in range(20, 2001, 20):
        evaluations = 1 + step // 200
        files = {"metrics.jsonl": 2000 * step, "samples.jsonl": 900 * step, "recipe.toml": 2000, "log.txt": 70 * step,
                 "evaluations.jsonl": 340 * evaluations}  # fmt: skip
        files |= {name: value(step) for name, value in changed.items() if name in files}
        memory = {"malloc": 190 * MIB, "python_blocks": 10**6, "rss": 600 * MIB, "vms": 1400 * MIB}
        memory = {name: size + noise.randrange(size // 1000) for name, size in memory.items()}
        memory |= {name: value(step) for name, value in changed.items() if name in memory}
        counts = {"descriptors": 14, "threads": 5, "children": 2}
        found.append({"step": step, "evaluations": evaluations, "files": files, **memory, **counts})
    return found


def wrong(**changed: Any) -> list[str]:
    return [name for name, line in soak.judge(samples(**changed)).items() if not line["fine"]]


def test_a_run_without_faults_is_fine() -> None:
    assert wrong() == []
    assert wrong(malloc=lambda _: None) == []  # without glibc
    fragments = soak.judge(samples(rss=lambda step: 600 * MIB * (1 + 0.03 * step / 10_000)))["rss"]
    assert (fragments["verdict"], fragments["fine"]) == ("+3.0% in 10,000 steps", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("malloc", lambda step: 190 * MIB + 400 * step),
        ("python_blocks", lambda step: 10**6 + 10 * step),
        ("rss", lambda step: 600 * MIB * (1 + 0.07 * step / 10_000)),
        ("log.txt", lambda step: 1600 * step),
        ("evaluations.jsonl", lambda step: 340 * (1 + step // 200) ** 3),
        ("metrics.jsonl", lambda step: step**3),
        ("recipe.toml", lambda step: 2000 + step),
    ],
)
def test_what_grows_is_found(name: str, value: Any) -> None:
    assert wrong(**{name: value}) == [name]


def test_bytes_that_malloc_handed_out_are_counted() -> None:
    before = soak.malloc_bytes()
    if before is None:
        pytest.skip("needs glibc")
    kept = [bytes(5 * MIB), *(bytes(2000) for _ in range(1000))]
    grown = soak.malloc_bytes() - before
    assert 6.9 * MIB < grown < 8 * MIB
    assert kept
