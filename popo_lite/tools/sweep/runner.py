"""Run a sweep: every run is `popo-lite train` in its own process, so that a crash of one ends no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popo_lite.run_folder import append_line
from popo_lite.tools.console.words import duration
from popo_lite.tools.sweep.file import as_options
from popo_lite.tools.sweep.folder import SweepFolder, SweepRun, writing

if TYPE_CHECKING:
    from popo_lite.tools.sweep.view import SweepView

POLL_SECONDS = 0.2
STOPPED = (130, -signal.SIGINT)
"""Exit codes of a run that was stopped: by its own handler, or while Python itself starts."""
STOPPING = (
    "stopping: the step is finished and saved; Ctrl-C again abandons it and saves",
    "abandoning the step and saving; Ctrl-C again kills the running processes",
    "killed; the steps since the last checkpoint will be done again",
)
"""Message at each stop signal; the last signal ends every run at once."""


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended: the lines added to failures.jsonl, and whether Ctrl-C left runs to do."""

    failures: tuple[dict[str, Any], ...]
    interrupted: bool


def execute(
    folder: SweepFolder,
    runs: Sequence[SweepRun],
    *,
    jobs: int,
    lock: int,
    watcher: SweepView,
    ignore_plan: bool = False,
) -> SweepOutcome:
    """Run all of `runs` that have not finished, `jobs` at a time; one that was begun is resumed.

    A failure is recorded in failures.jsonl and the next run starts. SIGINT and SIGTERM are passed on: at the first the
    running processes finish their step and save, at the second they abandon it, at the third they are killed. Nothing
    more is started after the first.

    Raises PopoError if the sweep's own files cannot be written; running processes are stopped first.
    """
    waiting = deque(run for run in runs if not run.finished)
    working: list[_Process] = []
    failures: list[dict[str, Any]] = []
    signals = _Signals(watcher)
    previous = {number: signal.signal(number, signals.count_up) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while working or (waiting and not signals.count):
            while waiting and len(working) < jobs and not signals.count:
                working.append(_Process(folder, waiting.popleft(), lock, watcher, ignore_plan=ignore_plan))
            signals.pass_on(working)
            for process in [process for process in working if process.popen.poll() is not None]:
                working.remove(process)
                folder.write_results(runs)
                if failure := process.ended(folder, watcher):
                    failures.append(failure)
            for process in working:
                process.report_progress(watcher)
            time.sleep(POLL_SECONDS if working else 0)
    finally:
        if working:  # the sweep itself failed
            signals.count = max(signals.count, 1)
        while any(process.popen.poll() is None for process in working):
            signals.pass_on(working)
            time.sleep(POLL_SECONDS)
        for number, handler in previous.items():
            signal.signal(number, handler)
    interrupted = signals.count > 0 and any(not run.finished for run in runs)
    return SweepOutcome(failures=tuple(failures), interrupted=interrupted)


def train_command(folder: SweepFolder, run: SweepRun, *, ignore_plan: bool = False) -> list[str]:
    """Return the command of one run."""
    overrides = [word for option in as_options(run.settings) for word in ("--set", option)]
    return [
        # -P: `-m` would import files of the working folder that have a module's name first.
        *(sys.executable, "-P", "-m", "popo_lite", "train", str(folder.recipe_path)),
        *("--seed", str(run.seed), *overrides, "--output", str(run.folder.path), "--view", "plain"),
        *(["--resume"] if run.begun else []),
        *(["--ignore-plan"] if ignore_plan else []),
    ]


class _Signals:
    """Count stop signals and pass them on to the running processes."""

    def __init__(self, watcher: SweepView) -> None:
        self.count = self._announced = 0
        self._watcher = watcher

    def count_up(self, *_: object) -> None:
        """Handle a signal."""
        self.count += 1

    def pass_on(self, working: Sequence[_Process]) -> None:
        """Announce the signals that came since the last call and send them to the processes."""
        if working and self._announced < self.count:
            self._announced = min(self.count, len(STOPPING))
            self._watcher.message(STOPPING[self._announced - 1])
        for process in working:
            if process.signals_sent >= self._announced or process.popen.poll() is not None:
                continue
            if self._announced == len(STOPPING):
                # The whole session, which the run leads: an engine's processes would keep the GPU.
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.signals_sent = self._announced
            else:
                process.popen.send_signal(signal.SIGINT)
                process.signals_sent += 1


class _Process:
    """A run at work."""

    def __init__(self, folder: SweepFolder, run: SweepRun, lock: int, watcher: SweepView, *, ignore_plan: bool) -> None:
        command = train_command(folder, run, ignore_plan=ignore_plan)
        folder.forget_failure(run)
        with writing(run.log_path):
            run.log_path.parent.mkdir(parents=True, exist_ok=True)
            log = run.log_path.open("ab")
        watcher.started(run.name, done=run.steps_saved, total=run.variant.recipe.train.steps)
        self.run = run
        self.signals_sent = 0
        self._started = time.monotonic()
        self._metrics_bytes = self._size_of_metrics()
        with log:
            self._log_offset = log.tell()
            # A session of its own: Ctrl-C on the terminal reaches only the sweep, which passes it on once.
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def report_progress(self, watcher: SweepView) -> None:
        """Show the steps done if there are new ones."""
        size = self._size_of_metrics()
        if size == self._metrics_bytes:
            return
        self._metrics_bytes = size
        # The text after the last newline is a line that is still being written.
        lines = self.run.folder.metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
        if lines:
            watcher.advanced(self.run.name, done=len(lines), pass_rate=json.loads(lines[-1])["pass_rate"])

    def ended(self, folder: SweepFolder, watcher: SweepView) -> dict[str, Any] | None:
        """Show how the run ended; record and return a failure.

        A run stopped on request is not a failure; one that crashed while stopping is.
        """
        run, code = self.run, self.popen.returncode
        if run.finished:
            rate = run.result()["pass_at_1"]
            measured = "" if rate is None else f", pass@1 {rate:.1%}"
            watcher.ended(run.name, "done", f"{duration(time.monotonic() - self._started)}{measured}")
            return None
        if self.signals_sent == len(STOPPING) or (self.signals_sent and code in STOPPED):
            watcher.ended(run.name, "stopped", "")
            return None
        failure: dict[str, Any] = {
            "variant": run.variant.name,
            "seed": run.seed,
            "exit_code": code,
            "message": _last_words(run.log_path, self._log_offset, code),
            "log": os.fspath(run.log_path),
        }
        with writing(folder.failures_path):
            append_line(folder.failures_path, failure)
        watcher.ended(run.name, "failed", failure["message"])
        return failure

    def _size_of_metrics(self) -> int:
        path = self.run.folder.metrics_path
        return path.stat().st_size if path.is_file() else 0


def _last_words(log: Path, offset: int, code: int) -> str:
    """Return what a run printed about its failure: from its last `error` on, else its last line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = log.read_bytes()[offset:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    errors = [index for index, line in enumerate(lines) if line.startswith("error ")]
    if errors:
        return " ".join(" ".join(lines[errors[-1] :]).split()[1:])
    return lines[-1] if lines else f"exit code {code}, and nothing was printed"
