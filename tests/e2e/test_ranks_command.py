"""The real command on several ranks, started by torchrun and by accelerate, stopped and resumed on another number."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import json_lines
from popo_lite.metrics import METRICS
from small_models import save_phi

STEPS = 12
OPTIONS = {
    "model.quantization": "none", "model.dtype": "float64", "objective.entropy_coef": 0.05,
    "reward.functions": '[{name="regex", pattern="[0-3]"}]', "rollout.num_generations": 4,
    "rollout.max_completion_length": 20, "data.prompts_per_step": 5, "train.steps": STEPS, "train.save_steps": 4,
    "eval.problems": 3, "eval.every": 5, "output.samples_per_step": 99,
}  # fmt: skip
SMALL = ("--set", "train.steps=2", "--set", "data.prompts_per_step=3", "--set", "eval.problems=2")


@pytest.fixture
def start(tmp_path):
    """`start(size, *arguments)`: the command on `size` ranks in an empty folder."""
    (tmp_path / "tmp").mkdir()

    def run(size: int, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        by = launcher or ("torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
        return subprocess.Popen(
            [sys.executable, "-m", *(by if size > 1 else ()), *(("-m",) if size > 1 else ()), "popo_lite", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def stop_at(process: subprocess.Popen[str], run: Path, steps: int) -> str:
    """Stop the run, by Ctrl-C to rank 0 alone, once it has recorded so many steps; return what was printed."""
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").is_file() or len(json_lines(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(json.loads((run / ".lock").read_text())["pid"], signal.SIGINT)
    output, errors = process.communicate(timeout=400)
    assert process.returncode != 0
    assert re.search("popo.lite resume run", output), errors
    return output


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_ranks(start, tmp_path):
    """Two ranks, then one, then four; in float64, so that it is the run of one process to rounding."""
    model = save_phi(tmp_path / "phi")
    options = [part for name, value in OPTIONS.items() for part in ("--set", f"{name}={value}")]
    options += ["--set", f'model.id="{model}"']
    whole = start(1, "train", "tiny_cpu", *options, "--output", "whole", "--json")
    assert whole.wait(timeout=400) == 0, whole.communicate()
    run = tmp_path / "run"
    stop_at(start(2, "train", "tiny_cpu", *options, "--output", "run", "--view", "plain"), run, 2)
    first = len(json_lines(run / "metrics.jsonl"))
    stop_at(start(1, "resume", "run", "--view", "plain"), run, first + 1)
    second = len(json_lines(run / "metrics.jsonl"))
    assert 2 <= first < second < STEPS
    last = start(4, "resume", "run", "--json")
    output, errors = last.communicate(timeout=400)
    assert last.returncode == 0, errors
    assert json.loads(output)["steps"] == STEPS

    whole = tmp_path / "whole"
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    ours, theirs = (json_lines(folder / "metrics.jsonl") for folder in (run, whole))
    assert [line["step"] for line in ours] == list(range(STEPS))
    assert [line["reduced_bytes"] is None for line in ours] == [first <= step < second for step in range(STEPS)]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() == {"format", *METRICS}
        for name in ("loss", "loss_policy", "loss_similarity", "entropy", "grad_norm", "update_norm", "siamese_drift"):
            assert math.isclose(one[name], other[name], rel_tol=1e-11), name
        for name in ("positives", "rollout_tokens", "outcomes", "top_shape", "pass_rate", "policy_version"):
            assert one[name] == other[name], name
    for name in ("samples.jsonl", "evaluations.jsonl"):
        kept = [[{k: v for k, v in line.items() if k != "seconds"} for line in json_lines(folder / name)]
                for folder in (run, whole)]  # fmt: skip
        assert kept[0] == kept[1], name
    for name in ("adapter/adapter_model.safetensors", "siamese/adapter_model.safetensors",
                 f"checkpoints/step-{STEPS:06d}/predictor.safetensors",
                 f"checkpoints/step-{STEPS:06d}/optimizer.safetensors"):  # fmt: skip
        ours, theirs = (load_file(folder / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).norm() <= 1e-11 * tensor.norm(), (name, key)
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_accelerate_starts_the_ranks(start, tmp_path):
    # Of its launchers that for several GPUs is torchrun, also without a GPU; with --cpu it would start one process.
    launcher = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
    process = start(2, "train", "tiny_cpu", *SMALL, "--output", "run", "--json", launcher=launcher)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert json.loads(output)["steps"] == 2
    assert all(line["reduced_bytes"] for line in json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert left_behind(tmp_path) == []


def left_behind(folder: Path) -> list[str]:
    """What other ranks and the workers left in the temporary folder."""
    return sorted(path.name for path in (folder / "tmp").iterdir() if path.name.startswith("popo"))
