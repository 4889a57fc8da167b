"""Real sweeps of the real command: failures, Ctrl-C, kills, going on, and the comparison at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import json_lines
from popo_lite.errors import UserInputError
from popo_lite.tools.sweep.folder import SweepFolder

SMALL = """
recipe = "tiny_cpu"
[set]
train.steps = 4
train.save_steps = 2
data.prompts_per_step = 4
rollout.num_generations = 4
eval.problems = 8
optimizer.warmup_ratio = 0.0
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "popo_lite", "sweep", *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_steps(process: subprocess.Popen[str], run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def child_of(process: subprocess.Popen[str]) -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def is_free(folder: SweepFolder) -> bool:
    try:
        with folder.locked():
            return True
    except UserInputError:
        return False


def learned(run: Path):
    """What metrics.jsonl says apart from times and memory."""
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in json_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_failure_ends_no_other_run_and_is_tried_again(tmp_path, command):
    (tmp_path / "study.toml").write_text(
        SMALL + '[variants.plain]\n[variants.broken]\ndata.dataset = "mine.jsonl"\neval.dataset = "mine.jsonl"\n'
        'reward.functions = "mine:right"\n'
    )
    (tmp_path / "mine.py").write_text("def right(text, problem):\n    return problem['answer'] in text\n")
    done = command("sweep", "study.toml", "--jobs", "2", "--ignore-plan", "--trust")
    assert done.returncode == 1, done.stderr
    go_on = "popo-lite sweep runs/study/sweep.toml --output runs/study --jobs 2 --ignore-plan"
    assert done.stderr.endswith(f"To try again:\n  {go_on}\n")
    folder = tmp_path / "runs" / "study"
    (failure,) = json_lines(folder / "failures.jsonl")
    assert (failure["variant"], failure["seed"], failure["exit_code"]) == ("broken", 0, 2)
    assert "mine.jsonl" in failure["message"]
    assert "1 of 2 runs failed" in done.stderr
    (result,) = json_lines(folder / "results.jsonl")
    summary = json.loads((folder / "plain" / "seed-0" / "summary.json").read_text())
    assert (result["variant"], result["pass_at_1"]) == ("plain", summary["after"]["pass_at_1"])

    rows = [{"prompt": f"What is {a} + 21?", "answer": a + 21} for a in range(20, 60)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (folder / "plain" / "seed-0" / "summary.json").stat().st_mtime_ns
    again = command("sweep", "study.toml", "--seeds", "0-1", "--json")
    assert again.returncode == 0, again.stderr
    assert [(line["variant"], line["seed"]) for line in json.loads(again.stdout)["results"]] == [
        ("plain", 0), ("broken", 0), ("plain", 1), ("broken", 1),
    ]  # fmt: skip
    assert json.loads(again.stdout)["failures"] == json_lines(folder / "failures.jsonl") == []
    assert (folder / "plain" / "seed-0" / "summary.json").stat().st_mtime_ns == before
    assert "Next\n  popo-lite compare runs/study" in again.stderr

    other = command("sweep", "study.toml", "--seeds", "0-1", "--set", "lora.rank=4")
    assert other.returncode == 2
    assert "lora.rank was 16 and is 4" in other.stderr
    listed = command("sweep", "study.toml", "--seeds", "0-2", "--dry-run", "--json")
    states = [run["state"] for run in json.loads(listed.stdout)["runs"]]
    assert states == ["finished"] * 4 + ["new"] * 2

    compared = command("compare", "runs/study", "--json")
    assert compared.returncode == 0, compared.stderr
    plain, broken = json.loads(compared.stdout)["groups"]
    assert (plain["name"], plain["seeds"], broken["seeds"]) == ("plain", [0, 1], [0, 1])
    lines = json_lines(folder / "plain" / "seed-1" / "metrics.jsonl")
    assert plain["values"]["trained_tokens"][1] == sum(line["trained_tokens"] for line in lines)
    assert (folder / "comparison" / "comparison.html").is_file()


@pytest.mark.slow
def test_killed_and_stopped_runs_go_on_as_if_nothing_had_happened(tmp_path, command):
    (tmp_path / "study.toml").write_text(SMALL.replace("steps = 4", "steps = 8"))
    process = start(tmp_path, "study.toml", "--seeds", "0-2")
    folder = tmp_path / "runs" / "study"
    runs = [folder / "base" / f"seed-{seed}" for seed in range(3)]
    wait_for_steps(process, runs[0], 3)
    os.kill(child_of(process), signal.SIGKILL)
    wait_for_steps(process, runs[1], 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "base seed 0: FAILED: killed by SIGKILL" in err
    assert "base seed 1: stopped" in err
    assert "stopped with 0 of 3 runs done" in out
    assert not runs[2].exists()
    assert [line["seed"] for line in json_lines(folder / "failures.jsonl")] == [0]

    go_on = out.strip().split("\n")[-1].split()
    assert go_on[:2] == ["popo-lite", "sweep"]
    saved = [max(int(path.name[-6:]) for path in run.glob("checkpoints/step-*")) for run in runs[:2]]
    done = command(*go_on[1:])
    assert done.returncode == 0, done.stderr
    for seed, steps in enumerate(saved):
        assert f"base seed {seed}: continues after step {steps}, 8 steps" in done.stderr
    assert len(json_lines(folder / "results.jsonl")) == 3
    straight = command("train", folder / "base" / "seed-1" / "recipe.toml", "--output", "straight", "--view", "silent")
    assert straight.returncode == 0, straight.stderr
    assert learned(runs[1]) == learned(tmp_path / "straight")


@pytest.mark.slow
def test_a_run_that_outlives_its_sweep_keeps_others_away(tmp_path, command):
    (tmp_path / "study.toml").write_text(SMALL.replace("steps = 4", "steps = 400"))
    process = start(tmp_path, "study.toml")
    folder = tmp_path / "runs" / "study"
    wait_for_steps(process, folder / "base" / "seed-0", 1)
    run = child_of(process)
    process.kill()
    process.communicate(timeout=30)
    try:
        refused = command("sweep", "study.toml")
    finally:
        os.kill(run, signal.SIGKILL)
    assert refused.returncode == 2
    assert "at work in this folder" in refused.stderr
    deadline = time.monotonic() + 30
    while not is_free(SweepFolder(folder)):  # its grading workers notice that it is gone a little later
        assert time.monotonic() < deadline
        time.sleep(0.05)
