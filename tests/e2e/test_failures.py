"""Faults of a night, on the real command: a hangup, a terminal that is closed, a full disk, a reward that breaks."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from helpers import json_lines
from popo_lite.callbacks import Callback
from popo_lite.run_folder import RunFolder, checkpoint_folders
from popo_lite.trainer import Trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hangups, limits and terminals of Linux")

STEPS, DONE = 8, 3
"""The fault comes once three of the steps are on record; a checkpoint is due after each two."""

REWARD = """
from pathlib import Path

def reward(text, problem):
    if Path("broken").exists():
        raise ValueError("the grading service is down")
    return float(f"{{{problem['answer']}}}" in text)
"""


def start(folder: Path, *, view: str = "plain", **options) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "night_rewards.py").write_text(REWARD)
    settings = (
        f"train.steps={STEPS}", "train.save_steps=2", "data.prompts_per_step=8", "rollout.num_generations=4",
        "eval.problems=0", "optimizer.warmup_ratio=0.0", "train.cpu_threads=1", "siamese.head_width=64",
        'reward.functions="night_rewards:reward"', "data.date=2026-01-01",
    )  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "popo_lite", "train", "tiny_cpu", *overrides, "--output", "run", "--view", view],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}, **{**pipes, **options},
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int = DONE) -> None:
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 180
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume the run to its end."""
    monkeypatch.chdir(folder)
    run = RunFolder(Path("run"))
    with Trainer(run.recipe(), Callback()) as trainer:
        assert trainer.run(run, resume=True).summary is not None


def outcome(folder: Path):
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in json_lines(folder / "run/metrics.jsonl")]
    tensors = load_file(folder / "run/adapter/adapter_model.safetensors")
    return lines, {name: tensor.tolist() for name, tensor in tensors.items()}


def saved(folder: Path) -> int:
    """How many steps the newest checkpoint holds."""
    return int(checkpoint_folders(folder / "run" / "checkpoints")[-1].name.removeprefix("step-"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return outcome(folder)


def test_a_hangup_finishes_the_step_and_saves(tmp_path, undisturbed, monkeypatch):
    process = start(tmp_path)
    wait_for_step(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert f"stopped after {saved(tmp_path)} of {STEPS} steps; saved. To continue:" in out
    assert saved(tmp_path) == len(json_lines(tmp_path / "run/metrics.jsonl")) >= DONE
    finish(tmp_path, monkeypatch)
    assert outcome(tmp_path) == undisturbed


def test_under_nohup_a_hangup_is_nothing(tmp_path, undisturbed):
    process = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(process, tmp_path)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize(("view", "hangs_up"), [("plain", False), ("live", True)])
def test_a_closed_terminal_saves_and_ends(tmp_path, undisturbed, monkeypatch, view, hangs_up):
    """`hangs_up`: the terminal is the process's own, so closing it also sends SIGHUP; else only writes fail."""
    ours, theirs = pty.openpty()

    def own_terminal():
        os.setsid()
        if hangs_up:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    options = {"preexec_fn": own_terminal, "stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = start(tmp_path, view=view, **options)
    os.close(theirs)
    closing = threading.Event()

    def read():
        with suppress(OSError):
            while not closing.is_set():
                os.read(ours, 65536)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_for_step(process, tmp_path)
    closing.set()
    reader.join(timeout=60)  # the view writes at least once a step
    os.close(ours)
    process.wait(timeout=120)
    assert process.returncode != 0
    assert saved(tmp_path) == len(json_lines(tmp_path / "run/metrics.jsonl")) >= DONE
    log = (tmp_path / "run/log.txt").read_text()
    assert f"checkpoint: run/checkpoints/step-{saved(tmp_path):06d}" in log
    if not hangs_up:
        assert "the terminal is gone, so nothing is shown any more" in log
    finish(tmp_path, monkeypatch)
    assert outcome(tmp_path) == undisturbed


def test_a_full_disk_is_named_and_the_older_checkpoint_stays(tmp_path, undisturbed, monkeypatch):
    """No file may grow beyond a limit, so the next checkpoint fails while it is written."""
    process = start(tmp_path)
    wait_for_step(process, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "the disk is full" in err
    assert "the newest checkpoint is run/checkpoints/step-" in err
    assert "free some space there, then continue: popo-lite" in err
    assert not list((tmp_path / "run/checkpoints").glob(".*"))
    finish(tmp_path, monkeypatch)
    assert outcome(tmp_path) == undisturbed


def test_a_reward_that_breaks_is_named_and_the_steps_before_are_saved(tmp_path, undisturbed, monkeypatch):
    process = start(tmp_path)
    wait_for_step(process, tmp_path)
    (tmp_path / "broken").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the grading service is down" in err
    done = len(json_lines(tmp_path / "run/metrics.jsonl"))
    assert f"all {done} steps are saved in run/checkpoints/step-{done:06d}" in err
    (tmp_path / "broken").unlink()
    finish(tmp_path, monkeypatch)
    assert outcome(tmp_path) == undisturbed
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == STEPS
