"""The keys of the live view, pressed in a real terminal, which is as before when the run is over."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

OPTIONS = ("train.steps=500", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=4")


class Terminal:
    """A process in a terminal of its own; `output` is all that it has written."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.leader, self._follower = pty.openpty()
        fcntl.ioctl(self._follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        self.mode = termios.tcgetattr(self._follower)
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "popo_lite", *arguments], cwd=folder, stdin=self._follower, stdout=self._follower,
            stderr=self._follower, env={**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
            preexec_fn=self._own,
        )  # fmt: skip

    def _own(self) -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read(self, seconds: float = 0.1) -> None:
        if select.select([self.leader], [], [], seconds)[0]:
            try:
                self.output += os.read(self.leader, 65536).decode(errors="replace")
            except OSError:
                time.sleep(seconds)

    def press(self, key: str, expected: str, seconds: float = 60) -> None:
        """Press a key, and wait until `expected` is written after it."""
        before = len(self.output)
        os.write(self.leader, key.encode())
        deadline = time.monotonic() + seconds
        while not re.search(expected, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.output[before:])):
            assert self.process.poll() is None, self.output[-2000:]
            assert time.monotonic() < deadline, self.output[before:][-3000:]
            self.read()

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


@pytest.fixture
def terminal(tmp_path):
    options = [word for option in OPTIONS for word in ("--set", option)]
    opened = Terminal(tmp_path, "train", "tiny_cpu", *options, "--output", "run")
    yield opened
    opened.close()


def test_every_key_does_what_it_says(terminal, tmp_path):
    terminal.press("", r"p pause")
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
    # Ctrl-Z gives the terminal back. Without a shell above it the process is not stopped, and takes it again.
    before = len(terminal.output)
    terminal.press("\x1a", "learning")
    given, taken = (terminal.output.find(code, before) for code in ("\x1b[?1049l", "\x1b[?1049h"))
    assert 0 < given < taken
    terminal.press("q", "finishing this step, then saving")
    assert terminal.end() == 130
    assert terminal.is_as_before()
    assert "popo-lite resume run" in terminal.output
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["when"] for line in lines] == ["before", "asked"]


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_the_terminal_is_given_back_after_signals(terminal, signals):
    terminal.press("p", "paused: p continues")
    for number in signals:
        terminal.process.send_signal(number)
    assert terminal.end() == 130
    assert terminal.is_as_before()
