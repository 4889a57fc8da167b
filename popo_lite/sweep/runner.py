"""Running a sweep: every run is `popo-lite train` in its own process, so that a crash of one ends no other."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from popo_lite.console.sweep_view import SweepWatcher
from popo_lite.console.words import duration
from popo_lite.errors import UserInputError
from popo_lite.run_folder import append_line
from popo_lite.sweep.file import as_options
from popo_lite.sweep.folder import SweepFolder, SweepRun

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that ended badly; `message` is the end of what it printed."""

    variant: str
    seed: int
    exit_code: int
    message: str
    log: str


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended. `interrupted`: by Ctrl-C, with runs left to do."""

    failures: tuple[Failure, ...]
    interrupted: bool


@contextmanager
def locked(folder: SweepFolder) -> Iterator[int]:
    """Hold the folder alone; yields the lock's file descriptor. Raises UserInputError where another holds it.

    Runs inherit the descriptor, so the lock stays with a run that outlives a killed sweep.
    """
    with folder.lock_path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserInputError(
                "another sweep, or a run that outlived one, is at work in this folder",
                where=str(folder.path),
                next_step="wait for it, or stop it",
            ) from error
        yield file.fileno()


def execute(
    folder: SweepFolder, runs: Sequence[SweepRun], *, jobs: int, lock: int, watcher: SweepWatcher
) -> SweepOutcome:
    """Run all of `runs` that have not finished, `jobs` at a time; one that was begun is resumed.

    A failure is recorded in failures.jsonl and the next run starts. SIGINT and SIGTERM are passed on: once the running
    ones finish their step and save, twice they abandon it; nothing more is started.
    """
    waiting = deque(run for run in runs if not run.finished)
    working: list[_Process] = []
    failures: list[Failure] = []
    with _Signals() as signals:
        try:
            while working or (waiting and not signals.count):
                while waiting and len(working) < jobs and not signals.count:
                    working.append(_start(folder, waiting.popleft(), lock, watcher))
                if any(process.told < signals.count for process in working):
                    watcher.message("stopping: the step is finished and saved; Ctrl-C again abandons it and saves")
                    _tell(working, signals.count)
                for process in [process for process in working if process.popen.poll() is not None]:
                    working.remove(process)
                    folder.write_results(runs)
                    if failure := _ended(folder, process, watcher, stopped=signals.count > 0):
                        failures.append(failure)
                for process in working:
                    _watch(process, watcher)
                time.sleep(POLL_SECONDS if working else 0)
        finally:
            _tell(working, 1)
            for process in working:
                process.popen.wait()
    return SweepOutcome(
        failures=tuple(failures), interrupted=signals.count > 0 and any(not run.finished for run in runs)
    )


@dataclass(kw_only=True)
class _Process:
    """A run at work. `told` is how many stop signals it was sent, `seen_bytes` how much of its metrics was read."""

    run: SweepRun
    popen: subprocess.Popen[bytes]
    started: float
    log_offset: int
    told: int = 0
    seen_bytes: int = 0


@dataclass
class _Signals:
    """Counts SIGINT and SIGTERM while it is entered."""

    count: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def train_command(folder: SweepFolder, run: SweepRun) -> list[str]:
    """The command of one run."""
    overrides = [word for option in as_options(run.settings) for word in ("--set", option)]
    return [
        *(sys.executable, "-m", "popo_lite", "train", str(folder.recipe_path)),
        *("--seed", str(run.seed), *overrides, "--output", str(run.folder.path), "--view", "plain"),
        *(["--resume"] if run.begun else []),
    ]


def _start(folder: SweepFolder, run: SweepRun, lock: int, watcher: SweepWatcher) -> _Process:
    folder.forget_failure(run)
    run.log_path.parent.mkdir(parents=True, exist_ok=True)
    done = _steps(run.folder.metrics_path)[0] if run.begun else 0
    watcher.started(run.name, done=done, total=run.variant.recipe.train.steps)
    with run.log_path.open("ab") as log:
        offset = log.tell()
        # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which passes it on once.
        popen = subprocess.Popen(
            train_command(folder, run),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Process(run=run, popen=popen, started=time.monotonic(), log_offset=offset)


def _tell(working: Sequence[_Process], count: int) -> None:
    """Send every running process the stop signals that it has not had, up to `count`."""
    for process in working:
        if process.told < count:
            process.popen.send_signal(signal.SIGINT)
            process.told += 1


def _watch(process: _Process, watcher: SweepWatcher) -> None:
    path = process.run.folder.metrics_path
    size = path.stat().st_size if path.is_file() else 0
    if size == process.seen_bytes:
        return
    process.seen_bytes = size
    done, last = _steps(path)
    if last is not None:
        watcher.advanced(process.run.name, done=done, pass_rate=last["pass_rate"])


def _steps(path: Path) -> tuple[int, dict[str, Any] | None]:
    """(steps on record, the last one's line); a line that is still being written does not count."""
    if not path.is_file():
        return 0, None
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return len(whole), json.loads(whole[-1]) if whole else None


def _ended(folder: SweepFolder, process: _Process, watcher: SweepWatcher, *, stopped: bool) -> Failure | None:
    """Tell and record how a run ended. One that was asked to stop and did has not failed."""
    run, code = process.run, process.popen.returncode
    if run.finished:
        summary = json.loads(run.folder.summary_path.read_text(encoding="utf-8"))
        after = summary["after"]
        measured = f", pass@1 {after['pass_at_1']:.1%}" if after else ""
        watcher.ended(run.name, "done", f"{duration(time.monotonic() - process.started)}{measured}")
        return None
    if stopped:
        watcher.ended(run.name, "stopped", "")
        return None
    failure = Failure(
        variant=run.variant.name,
        seed=run.seed,
        exit_code=code,
        message=_last_words(run.log_path, process.log_offset, code),
        log=os.fspath(run.log_path),
    )
    append_line(folder.failures_path, vars(failure))
    watcher.ended(run.name, "failed", failure.message)
    return failure


def _last_words(log: Path, offset: int, code: int) -> str:
    """What a run said of its failure: from its last `error` on, else its last line."""
    text = log.read_bytes()[offset:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [index for index, line in enumerate(lines) if line.startswith("error ")]
    if errors:
        return " ".join(" ".join(lines[errors[-1] :]).split()[1:])
    return lines[-1] if lines else f"exit code {code}, and nothing was printed"
