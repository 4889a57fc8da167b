"""Stopping a sweep: what each Ctrl-C does to runs that hear it, that crash of it, and that hear nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from popo_lite.errors import PopoError
from popo_lite.run_folder import read_lines
from popo_lite.tools.sweep import runner
from popo_lite.tools.sweep.folder import SweepFolder, SweepRun, load_sweep
from popo_lite.tools.sweep.runner import STOPPING, execute

READY = "print('ready', flush=True)\n"
DEAF = f"import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{READY}time.sleep(600)\n"
CRASHES = (
    f"import time\ntry:\n    {READY}    time.sleep(600)\n"
    "except KeyboardInterrupt:\n    raise SystemExit('error boom')\n"
)
OBEYS = CRASHES.replace("'error boom'", "130")


class Impatient:
    """Answers every message with one Ctrl-C more."""

    def __init__(self, presses: int) -> None:
        self.messages: list[str] = []
        self.ends: list[tuple[str, str]] = []
        self._presses = presses

    def started(self, run: str, *, done: int, total: int) -> None: ...

    def advanced(self, run: str, *, done: int, pass_rate: float) -> None: ...

    def ended(self, run: str, state: str, details: str) -> None:
        self.ends.append((run, state))

    def message(self, text: str) -> None:
        self.messages.append(text)
        if len(self.messages) < self._presses:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    (tmp_path / "x.toml").write_text('recipe = "tiny_cpu"\n[variants.a]\n[variants.b]\n')
    folder = SweepFolder(tmp_path / "sweep")
    folder.start_files(load_sweep(tmp_path / "x.toml"))
    return folder


@pytest.fixture
def sweep(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], bool]]:
    """Both variants at once as processes of these programs."""

    def run(watcher: Impatient, **programs: str) -> tuple[list[dict[str, Any]], bool]:
        def command(_: SweepFolder, one: SweepRun, **__: bool) -> list[str]:
            return [sys.executable, "-c", programs[one.variant.name]]

        monkeypatch.setattr(runner, "train_command", command)
        runs = folder.runs(load_sweep(folder.sweep_path))
        with folder.locked() as lock:
            return execute(folder, runs, jobs=2, lock=lock, watcher=watcher)

    return run


def press_when_ready(folder: SweepFolder, *variants: str, number: int = signal.SIGINT) -> None:
    """Send the signal, by default Ctrl-C, once what these variants run has said that it is ready."""
    logs = [folder.path / variant / "seed-0.log" for variant in variants]

    def press() -> None:
        deadline = time.monotonic() + 60
        while not all(log.is_file() and "ready" in log.read_text() for log in logs) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=press, daemon=True).start()


def test_one_signal_stops_and_a_crash_is_still_a_failure(folder, sweep):
    press_when_ready(folder, "a", "b")
    watcher = Impatient(presses=1)
    failures, interrupted = sweep(watcher, a=OBEYS, b=CRASHES)
    assert watcher.messages == [STOPPING[0]]
    assert sorted(watcher.ends) == [("a seed 0", "stopped"), ("b seed 0", "failed")]
    (failure,) = failures
    assert (failure["variant"], failure["exit_code"], failure["message"]) == ("b", 1, "boom")
    assert interrupted
    assert [line["variant"] for line in read_lines(folder.failures_path)] == ["b"]


def test_a_closed_terminal_stops_the_runs(folder, sweep):
    class Gone(Impatient):
        def message(self, text: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

    press_when_ready(folder, "a", "b", number=signal.SIGHUP)
    watcher = Gone(presses=1)
    assert sweep(watcher, a=OBEYS, b=OBEYS) == ([], True)
    assert sorted(watcher.ends) == [("a seed 0", "stopped"), ("b seed 0", "stopped")]


def test_the_third_signal_kills_what_does_not_hear(folder, sweep):
    press_when_ready(folder, "a", "b")
    watcher = Impatient(presses=3)
    failures, interrupted = sweep(watcher, a=DEAF, b=DEAF)
    assert watcher.messages == list(STOPPING)
    assert watcher.ends == [("a seed 0", "stopped"), ("b seed 0", "stopped")]
    assert (failures, interrupted) == ([], True)


def test_an_error_of_the_sweep_stops_its_runs_and_signals_still_count(folder, sweep):
    folder.results_path.mkdir()  # so that what the first run came to cannot be written
    ends_when_the_other_is_ready = (
        f"import pathlib, time\nwhile not pathlib.Path({str(folder.path / 'b' / 'seed-0.log')!r}).read_text():\n"
        "    time.sleep(0.01)\n"
    )
    watcher = Impatient(presses=3)
    with pytest.raises(PopoError, match="cannot be written"):
        sweep(watcher, a=ends_when_the_other_is_ready, b=DEAF)
    assert watcher.messages == list(STOPPING)
