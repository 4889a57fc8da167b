"""Runs that are killed inside their writes; `make chaos` kills a hundred, at every stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAGES = (
    "checkpoint: before rename", "checkpoint: between rename and pruning", "record: samples", "evaluate: record",
)  # fmt: skip


@pytest.fixture(scope="module")
def chaos():
    """The module benchmarks/chaos.py."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import chaos

    yield chaos
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_a_run_killed_inside_a_write_ends_like_one_that_was_not(tmp_path):
    stages = [word for stage in STAGES for word in ("--stage", stage)]
    # A new process, because it forks and must have no threads.
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "chaos.py", "--runs", "4", "--recipe", "fixed", *stages, "--output",
         tmp_path / "chaos.json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "chaos.json").read_text())
    assert [case["hit"] for case in result["cases"]] == [[stage] for stage in STAGES]
    assert result["equal"] == 4


def test_the_comparison_finds_what_differs(tmp_path, chaos):
    import torch
    from safetensors.torch import save_file

    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, run / "adapter" / "weights.safetensors")
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5, "seconds": {"rollout": 0.1}}\n')
    (run / "recipe.toml").write_text("a = 1\n")
    for number, (name, text, found) in enumerate(
        (
            ("metrics.jsonl", '{"step": 0, "loss": 1.5, "seconds": {"rollout": 9}}\n', None),
            ("log.txt", "12:00 resumed\n", None),
            ("metrics.jsonl", '{"step": 0, "loss": 1.25, "seconds": {}}\n', "metrics.jsonl: [0]['loss'] is 1.25"),
            ("metrics.jsonl", '{"step": 0, "loss": 1.5}\n' * 2, "has 2 entries instead of 1"),
            (".recipe.toml.partial", "", "too many ['.recipe.toml.partial']"),
            ("recipe.toml", "a = 2\n", "recipe.toml:"),
        )
    ):
        other = tmp_path / str(number)
        shutil.copytree(run, other)
        (other / name).write_text(text)
        difference = chaos.first_difference(other, run)
        assert (difference is None) if found is None else found in difference, (name, difference)
    other = tmp_path / "weights"
    shutil.copytree(run, other)
    save_file({"a": torch.zeros(3), "b": torch.tensor([1.0, 1.5])}, other / "adapter" / "weights.safetensors")
    assert "1 of 2 tensors differ, by 0.5 at most" in chaos.first_difference(other, run)
