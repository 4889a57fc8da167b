"""The keys of the live view, pressed in a real terminal, which is as before when the run is over."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "popo_lite")
OPTIONS = ("train.steps=5000", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=4")


class Terminal:
    """A process in a terminal of its own; `output` is all that it has written."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.leader, self._follower = pty.openpty()
        fcntl.ioctl(self._follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.mode = termios.tcgetattr(self._follower)
        self.output, self.folder = "", folder
        self.process = subprocess.Popen(
            arguments, cwd=folder, stdin=self._follower, stdout=self._follower, stderr=self._follower,
            env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}, preexec_fn=self._own,
        )  # fmt: skip

    def _own(self) -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read(self, seconds: float = 0.1) -> None:
        if select.select([self.leader], [], [], seconds)[0]:
            try:
                self.output += os.read(self.leader, 65536).decode(errors="replace")
            except OSError:
                time.sleep(seconds)

    def press(self, key: str, expected: str, seconds: float = 60) -> None:
        """Press a key, and wait until `expected` is written after it."""
        before, logged = len(self.output), len(self.log())
        os.write(self.leader, key.encode())
        deadline = time.monotonic() + seconds
        # Also in the log: with quick steps, later messages may push one off the screen before it is drawn.
        while not re.search(
            expected, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output[before:]) + self.log()[logged:]
        ):
            assert self.process.poll() is None, self.output[-2000:]
            assert time.monotonic() < deadline, self.output[before:][-3000:]
            self.read()

    def log(self) -> str:
        file = self.folder / "run" / "log.txt"
        return file.read_text() if file.is_file() else ""

    def end(self) -> int:
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.read()
        self.read()
        return self.process.wait(timeout=1)

    def is_as_before(self) -> bool:
        taken, given = self.output.rfind("\x1b[?1049h"), self.output.rfind("\x1b[?1049l")
        return termios.tcgetattr(self._follower) == self.mode and taken < given

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.leader)
        os.close(self._follower)


TRAIN = (*COMMAND, "train", "tiny_cpu", *(word for option in OPTIONS for word in ("--set", option)), "--output", "run")


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(tmp_path, *TRAIN)
    yield opened
    opened.close()


def test_every_key_does_what_it_says(terminal, tmp_path):
    terminal.press("q\n", r"p pause")  # typed while the model loads: not meant for the run
    assert termios.tcgetattr(terminal.leader)[3] & termios.ICANON == 0
    terminal.press("?", "save a checkpoint after this step")
    terminal.press("?", "learning")
    terminal.press("s", "as asked for")
    terminal.press("c", r"checkpoint: run/checkpoints/step-")
    terminal.press("e", r"asked for after step \d+: pass@1")
    terminal.press("p", "paused: p continues")
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    time.sleep(1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == steps
    terminal.press("p", "continued after step")
    terminal.press("q", "finishing this step, then saving")
    assert terminal.end() == 130
    assert terminal.is_as_before()
    assert "popo-lite resume run" in terminal.output
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["when"] for line in lines] == ["before", "asked"]


@pytest.mark.parametrize(
    ("signals", "code"),
    [((signal.SIGTERM,), 130), ((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGQUIT,), -signal.SIGQUIT)],
)
def test_the_terminal_is_given_back_after_signals(terminal, signals, code):
    terminal.press("", "p pause")
    terminal.press("p", "paused: p continues")
    for number in signals:
        terminal.process.send_signal(number)
    assert terminal.end() == code
    assert terminal.is_as_before()


def test_ctrl_z_stops_the_process_and_fg_takes_the_terminal_again(tmp_path):
    shell = Terminal(tmp_path, "bash", "--norc", "--noprofile", "--noediting", "-i")
    try:
        shell.press(f"{shlex.join(TRAIN)}\n", "p pause")
        before = len(shell.output)
        shell.press("\x1a", "Stopped")
        given = shell.output.find("\x1b[?1049l", before)
        assert 0 < given < shell.output.rfind("Stopped")
        assert "\x1b[?1049h" not in shell.output[given:]
        assert termios.tcgetattr(shell.leader)[3] & termios.ICANON
        shell.press("fg\n", "learning")
        shell.press("q", "popo-lite resume run")
        shell.press("exit\n", "exit")
        shell.end()
        assert shell.is_as_before()
    finally:
        shell.close()


def test_a_terminal_that_nobody_reads_stops_nothing(terminal, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def wait_for_steps(count):
        deadline = time.monotonic() + 60
        while not metrics.exists() or metrics.read_text().count("\n") < count:
            assert terminal.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for_steps(1)
    time.sleep(3)  # its buffer is full after some frames
    done = metrics.read_text().count("\n")
    wait_for_steps(done + 5)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(timeout=30) == 130
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert termios.tcgetattr(terminal.leader) == terminal.mode


def test_watch_gives_the_terminal_back_after_signals(terminal, tmp_path):
    terminal.press("", "p pause")
    for number in (signal.SIGTERM, signal.SIGHUP):
        watching = Terminal(tmp_path, *COMMAND, "watch", "run")
        try:
            watching.press("", "q leave")
            watching.process.send_signal(number)
            assert watching.end() == 0
            assert watching.is_as_before()
        finally:
            watching.close()
