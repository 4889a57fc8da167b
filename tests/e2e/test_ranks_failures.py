"""Several ranks by the real command: what happens when one of them ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import json_lines

SETTINGS = ["--set", "train.steps=500", "--set", "train.save_steps=5", "--set", "eval.problems=0", "--view", "plain"]
STOPPED_WITHIN = 30.0


class Ranks:
    """Processes of a run in `folder`, as a user starts them on several machines: by their environment alone."""

    def __init__(self, folder: Path, size: int, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.metrics = folder / "metrics.jsonl"
        self.outputs = [folder.with_name(f"{folder.name}-rank{rank}.txt") for rank in range(size)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            with output.open("w") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "popo_lite", *arguments],
                    env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in place.items()}},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def wait_for_steps(self, count: int) -> None:
        until = time.monotonic() + 120
        while not self.metrics.is_file() or self.metrics.read_bytes().count(b"\n") < count:
            assert time.monotonic() < until, [output.read_text() for output in self.outputs]
            assert all(process.poll() is None for process in self.processes), self.text(0)
            time.sleep(0.1)

    def codes(self, *ranks: int, within: float = STOPPED_WITHIN) -> list[int]:
        """The exit codes of `ranks`, which must end within so many seconds together."""
        until = time.monotonic() + within
        return [self.processes[rank].wait(max(0.1, until - time.monotonic())) for rank in ranks]

    def text(self, rank: int) -> str:
        return self.outputs[rank].read_text()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(size: int, *arguments: str, folder: Path | None = None) -> Ranks:
        started.append(Ranks(folder or tmp_path / "run", size, *arguments))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


def train(start: Callable[..., Ranks], tmp_path: Path, size: int) -> Ranks:
    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / "run"
    return start(size, "train", "tiny_cpu", "--output", str(folder), *SETTINGS, folder=folder)


def test_when_a_rank_is_killed_the_others_save_and_stop_and_any_number_of_ranks_goes_on(start, tmp_path):
    ranks = train(start, tmp_path, 3)
    ranks.wait_for_steps(7)
    ranks.processes[1].kill()
    assert ranks.codes(0, 2) == [1, 1]
    shown = ranks.text(0)
    assert "rank 1 is gone: it was killed, or its machine or network failed; all " in shown
    assert f"torchrun --nproc-per-node N -m popo_lite resume {tmp_path / 'run'}" in shown
    assert ranks.text(2) == ""  # one of them reports it
    done = len(json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:06d}").is_dir()
    for size in (1, 2, 4):
        folder = tmp_path / f"resumed-{size}"
        shutil.copytree(tmp_path / "run", folder)
        resumed = start(size, "resume", str(folder), "--set", f"train.steps={done + 1}", folder=folder)
        assert resumed.codes(*range(size), within=120) == [0] * size, resumed.text(0)
        assert [line["step"] for line in json_lines(folder / "metrics.jsonl")] == list(range(done + 1))


def test_without_rank_0_the_newest_checkpoint_counts(start, tmp_path):
    ranks = train(start, tmp_path, 3)
    ranks.wait_for_steps(7)
    ranks.processes[0].kill()
    assert ranks.codes(1, 2) == [1, 1]
    assert "rank 0 is gone" in ranks.text(1)
    assert "what it has not saved is lost" in ranks.text(1)
    assert ranks.text(2) == ""
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="there is no such signal here")
def test_a_rank_that_says_nothing_any_more_is_lost(start, tmp_path):
    ranks, others = train(start, tmp_path, 2), train(start, tmp_path / "others", 2)
    ranks.wait_for_steps(2)
    others.wait_for_steps(2)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    others.processes[0].send_signal(signal.SIGSTOP)  # with the store
    assert ranks.codes(0, within=3 * STOPPED_WITHIN) == [1]
    assert "rank 1 is gone" in ranks.text(0)
    assert others.codes(1, within=3 * STOPPED_WITHIN) == [1]
    assert "the machine of rank 0, or of torchrun's rendezvous, is gone" in others.text(1)


def test_two_signals_to_one_rank_abandon_the_step_on_all(start, tmp_path):
    ranks = train(start, tmp_path, 2)
    ranks.wait_for_steps(2)
    for _ in range(2):
        ranks.processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert ranks.codes(0, 1) == [130, 130]
    assert "popo_lite resume" in ranks.text(0)


def test_an_error_before_the_start_is_reported_once(start, tmp_path):
    ranks = start(2, "train", "tiny_cpu", "--set", "lora.rank=0", "--output", str(tmp_path / "run"))
    assert ranks.codes(0, 1) == [2, 1]
    assert "lora.rank" in ranks.text(0)
    assert ranks.text(1) == ""


@pytest.mark.parametrize("ending", ["ctrl-c", "rank 0 is killed"])
def test_torchrun_tells_how_a_run_ends_and_leaves_nothing_behind(tmp_path, ending):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "popo_lite", "train", "tiny_cpu", "--output", str(tmp_path / "run"), *SETTINGS]
    output, temporary = tmp_path / "output.txt", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with output.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        until = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < until, output.read_text()
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        if ending == "ctrl-c":
            process.send_signal(signal.SIGINT)
        else:
            os.kill(json.loads((tmp_path / "run" / ".lock").read_text())["pid"], signal.SIGKILL)
        process.wait(STOPPED_WITHIN)
    finally:
        process.kill()
    shown = output.read_text()
    resume = f"torchrun --nproc-per-node N -m popo_lite resume {tmp_path / 'run'}"
    assert resume in shown
    if ending == "ctrl-c":
        assert "steps; saved" in shown
        newest = sorted((tmp_path / "run" / "checkpoints").glob("*"))[-1]
        assert len(json_lines(metrics)) == int(newest.name.removeprefix("step-"))
    else:
        assert "rank 0 is gone" in shown
    assert list(temporary.glob("popo-lite-*")) == []
