"""Running a sweep: every run is `popo-lite train` in its own process, so that a crash of one ends no other."""

from __future__ import annotations

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

from popo_lite.errors import UserInputError
from popo_lite.run_folder import append_line, take_lock
from popo_lite.tools.console.words import duration
from popo_lite.tools.sweep.file import as_options
from popo_lite.tools.sweep.folder import SweepFolder, SweepRun, writing
from popo_lite.tools.sweep.view import SweepWatcher

POLL_SECONDS = 0.2
STOPPED = (130, -signal.SIGINT)
"""Exit codes of a run that was stopped: once it hears the signal, and while Python itself starts."""
STOPPING = (
    "stopping: the step is finished and saved; Ctrl-C again abandons it and saves",
    "abandoning the step and saving; Ctrl-C again kills what runs",
    "killed; the steps since the last checkpoint will be done again",
)
"""What is told at each stop signal; the last one ends every run at once."""


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
    with writing(folder.lock_path):
        folder.path.mkdir(parents=True, exist_ok=True)
        file = folder.lock_path.open("w")
    with file:
        busy = "another sweep, or a run that outlived one, is at work in this folder"
        take_lock(file, UserInputError(busy, where=str(folder.path), next_step="wait for it, or stop it"))
        yield file.fileno()


def execute(
    folder: SweepFolder,
    runs: Sequence[SweepRun],
    *,
    jobs: int,
    lock: int,
    watcher: SweepWatcher,
    ignore_plan: bool = False,
) -> SweepOutcome:
    """Run all of `runs` that have not finished, `jobs` at a time; one that was begun is resumed.

    A failure is recorded in failures.jsonl and the next run starts. SIGINT and SIGTERM are passed on: once the running
    ones finish their step and save, twice they abandon it, three times they are killed; nothing more is started.

    Raises PopoError where the sweep's own files cannot be written; the running ones are stopped first.
    """
    waiting = deque(run for run in runs if not run.finished)
    working: list[_Process] = []
    failures: list[Failure] = []
    with _Signals(watcher) as signals:
        try:
            while working or (waiting and not signals.count):
                while waiting and len(working) < jobs and not signals.count:
                    run = waiting.popleft()
                    command = train_command(folder, run, ignore_plan=ignore_plan)
                    working.append(_start(folder, run, command, lock, watcher))
                signals.pass_on(working)
                for process in [process for process in working if process.popen.poll() is not None]:
                    working.remove(process)
                    folder.write_results(runs)
                    if failure := _ended(folder, process, watcher):
                        failures.append(failure)
                for process in working:
                    _watch(process, watcher)
                time.sleep(POLL_SECONDS if working else 0)
        finally:
            if working:  # an error struck
                signals.count = max(signals.count, 1)
            while any(process.popen.poll() is None for process in working):
                signals.pass_on(working)
                time.sleep(POLL_SECONDS)
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
    """Counts SIGINT and SIGTERM while it is entered. `told` is how many of them `watcher` was told of."""

    watcher: SweepWatcher
    count: int = 0
    told: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def pass_on(self, working: Sequence[_Process]) -> None:
        """Tell watcher and running processes of the signals that came since the last call."""
        if working and self.told < self.count:
            self.told = min(self.count, len(STOPPING))
            self.watcher.message(STOPPING[self.told - 1])
        for process in working:
            if process.told >= self.told or process.popen.poll() is not None:
                continue
            if self.told == len(STOPPING):
                # Its whole session, which it leads: an engine's processes would keep the GPU.
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.told = self.told
            else:
                process.popen.send_signal(signal.SIGINT)
                process.told += 1

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


def train_command(folder: SweepFolder, run: SweepRun, *, ignore_plan: bool = False) -> list[str]:
    """The command of one run."""
    overrides = [word for option in as_options(run.settings) for word in ("--set", option)]
    return [
        # -P: `-m` would import whatever file of the working folder has the name of a module first.
        *(sys.executable, "-P", "-m", "popo_lite", "train", str(folder.recipe_path)),
        *("--seed", str(run.seed), *overrides, "--output", str(run.folder.path), "--view", "plain"),
        *(["--resume"] if run.begun else []),
        *(["--ignore-plan"] if ignore_plan else []),
    ]


def _start(folder: SweepFolder, run: SweepRun, command: Sequence[str], lock: int, watcher: SweepWatcher) -> _Process:
    folder.forget_failure(run)
    with writing(run.log_path):
        run.log_path.parent.mkdir(parents=True, exist_ok=True)
        log = run.log_path.open("ab")
    watcher.started(run.name, done=run.steps_saved, total=run.variant.recipe.train.steps)
    with log:
        offset = log.tell()
        # A session of its own: Ctrl-C on the terminal reaches the sweep alone, which passes it on once.
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Process(run=run, popen=popen, started=time.monotonic(), log_offset=offset, seen_bytes=_size(run))


def _watch(process: _Process, watcher: SweepWatcher) -> None:
    size = _size(process.run)
    if size == process.seen_bytes:
        return
    process.seen_bytes = size
    done, last = _steps(process.run.folder.metrics_path)
    if last is not None:
        watcher.advanced(process.run.name, done=done, pass_rate=last["pass_rate"])


def _size(run: SweepRun) -> int:
    """Bytes of its metrics."""
    path = run.folder.metrics_path
    return path.stat().st_size if path.is_file() else 0


def _steps(path: Path) -> tuple[int, dict[str, Any] | None]:
    """(steps on record, the last one's line); a line that is still being written does not count."""
    if not path.is_file():
        return 0, None
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return len(whole), json.loads(whole[-1]) if whole else None


def _ended(folder: SweepFolder, process: _Process, watcher: SweepWatcher) -> Failure | None:
    """Tell and record how a run ended. One that was asked to stop and did has not failed; one that crashed has."""
    run, code = process.run, process.popen.returncode
    if run.finished:
        summary = json.loads(run.folder.summary_path.read_text(encoding="utf-8"))
        after = summary["after"]
        measured = f", pass@1 {after['pass_at_1']:.1%}" if after else ""
        watcher.ended(run.name, "done", f"{duration(time.monotonic() - process.started)}{measured}")
        return None
    if process.told == len(STOPPING) or (process.told and code in STOPPED):
        watcher.ended(run.name, "stopped", "")
        return None
    failure = Failure(
        variant=run.variant.name,
        seed=run.seed,
        exit_code=code,
        message=_last_words(run.log_path, process.log_offset, code),
        log=os.fspath(run.log_path),
    )
    with writing(folder.failures_path):
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
