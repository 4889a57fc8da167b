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
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from popo_lite.run_folder import append_line
from popo_lite.tools.console.output import open_console, safe
from popo_lite.tools.console.words import duration
from popo_lite.tools.sweep.folder import SweepFolder, SweepRun, as_options, writing

POLL_SECONDS = 0.2
STOPPED = (130, -signal.SIGINT)
"""Exit codes of a run that was stopped: by its own handler, or while Python itself starts."""
STOPPING = (
    "stopping: the step is finished and saved; Ctrl-C again abandons it and saves",
    "abandoning the step and saving; Ctrl-C again kills the running processes",
    "killed; the steps since the last checkpoint will be done again",
)
"""Message at each stop signal; the last signal ends every run at once."""


class SweepView(Progress):
    """Progress on standard error: a bar for the sweep and one for each run on a terminal, plain lines elsewhere.

    A context manager: leaving it restores the terminal.
    """

    def __init__(self, total_runs: int, finished_runs: int, console: Console | None = None) -> None:
        console = console if console is not None else open_console(sys.stderr)
        name, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
        super().__init__(*columns, console=console, transient=True, disable=not console.is_interactive)
        self._total, self._done = total_runs, finished_runs
        self._bars: dict[str, TaskID] = {}
        self._whole = self.add_task("runs", total=total_runs, completed=finished_runs, note="")

    def started(self, run: str, *, done: int, total: int) -> None:
        """Add a bar, or print a line; `done` of `total` steps are in the run's checkpoint."""
        name = safe(run, self.console)
        self._bars[run] = self.add_task(name, total=total, completed=done, note="loading")
        if self.disable:
            self.message(f"{run}: {f'continues after step {done}' if done else 'starts'}, {total} steps")

    def advanced(self, run: str, *, done: int, pass_rate: float) -> None:
        """Move the bar. The plain view is silent, because the run's log has every step."""
        self.update(self._bars[run], completed=done, note=f"pass {pass_rate:.1%}", refresh=True)

    def ended(self, run: str, state: Literal["done", "failed", "stopped"], details: str) -> None:
        """Print a line and remove the run's bar."""
        self._done += state == "done"
        self.remove_task(self._bars.pop(run))
        self.update(self._whole, completed=self._done)
        text = f"{run}: {'FAILED' if state == 'failed' else state}{details and ': ' + details}"
        self.message(f"{text} ({self._done} of {self._total} done)", "bold red" if state == "failed" else "")

    def message(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self.console.print(Text(f"{datetime.now():%H:%M:%S}  {safe(text, self.console)}", style), soft_wrap=True)


def execute(folder: SweepFolder, runs: Sequence[SweepRun], *, jobs: int, lock: int, watcher: SweepView,
            ignore_plan: bool = False) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    """Run all of `runs` that have not finished, `jobs` at a time; one that was begun is resumed.

    Returns the lines added to failures.jsonl, and whether Ctrl-C left runs to do. SIGINT and SIGTERM are passed on: at
    the first the running processes finish their step and save, and nothing more is started; at the second they abandon
    the step; at the third they are killed. Raises PopoError, after stopping the runs, if a file cannot be written.
    """
    waiting = deque(run for run in runs if run.state != "finished")
    working: list[_Process] = []
    failures: list[dict[str, Any]] = []
    signals: list[int] = []
    announced = 0
    handlers = [(number, signal.signal(number, lambda number, _: signals.append(number)))
                for number in (signal.SIGINT, signal.SIGTERM)]  # fmt: skip
    try:
        while working or (waiting and not signals):
            while waiting and len(working) < jobs and not signals:
                working.append(_Process(folder, waiting.popleft(), lock, watcher, ignore_plan=ignore_plan))
            announced = _pass_on(len(signals), announced, working, watcher)
            for process in [process for process in working if process.popen.poll() is not None]:
                working.remove(process)
                folder.write_results(runs)
                if failure := process.ended(folder, watcher):
                    failures.append(failure)
            for process in working:
                process.report_progress(watcher)
            time.sleep(POLL_SECONDS if working else 0)
    finally:
        if working and not signals:  # the sweep itself failed
            signals.append(signal.SIGINT)
        while any(process.popen.poll() is None for process in working):
            announced = _pass_on(len(signals), announced, working, watcher)
            time.sleep(POLL_SECONDS)
        for number, handler in handlers:
            signal.signal(number, handler)
    return failures, bool(signals) and any(run.state != "finished" for run in runs)


def _pass_on(received: int, announced: int, working: Sequence[_Process], watcher: SweepView) -> int:
    """Announce the signals since `announced`, send them to the processes and return their new count."""
    if working and announced < received:
        announced = min(received, len(STOPPING))
        watcher.message(STOPPING[announced - 1])
    for process in working:
        if process.signals_sent >= announced or process.popen.poll() is not None:
            continue
        if announced == len(STOPPING):
            # The whole session, which the run leads: an engine's processes would keep the GPU.
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.signals_sent = announced
        else:
            process.popen.send_signal(signal.SIGINT)
            process.signals_sent += 1
    return announced


def train_command(folder: SweepFolder, run: SweepRun, *, ignore_plan: bool = False) -> list[str]:
    """Return the command of one run."""
    return [
        # -P: `-m` would import files of the working folder that have a module's name first.
        *(sys.executable, "-P", "-m", "popo_lite", "train", str(folder.recipe_path), "--seed", str(run.seed)),
        *(word for option in as_options(run.settings) for word in ("--set", option)),
        *("--output", str(run.folder.path), "--view", "plain"),
        *(["--resume"] if run.state == "unfinished" else []),
        *(["--ignore-plan"] if ignore_plan else []),
    ]


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
        self._metrics_bytes: int | None = None
        with log:
            self._log_offset = log.tell()
            # A session of its own: Ctrl-C on the terminal reaches only the sweep, which passes it on once.
            self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                          start_new_session=True, pass_fds=(lock,))  # fmt: skip

    def report_progress(self, watcher: SweepView) -> None:
        """Show the steps done if there are new ones."""
        path = self.run.folder.metrics_path
        before, self._metrics_bytes = self._metrics_bytes, path.stat().st_size if path.is_file() else 0
        if before is None or before == self._metrics_bytes:
            return
        # The text after the last newline is a line that is still being written.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        if lines:
            watcher.advanced(self.run.name, done=len(lines), pass_rate=json.loads(lines[-1])["pass_rate"])

    def ended(self, folder: SweepFolder, watcher: SweepView) -> dict[str, Any] | None:
        """Show how the run ended; record and return a failure.

        A run stopped on request is not a failure; one that crashed while stopping is.
        """
        run, code = self.run, self.popen.returncode
        if run.state == "finished":
            rate = run.result()["pass_at_1"]
            measured = "" if rate is None else f", pass@1 {rate:.1%}"
            watcher.ended(run.name, "done", f"{duration(time.monotonic() - self._started)}{measured}")
        elif self.signals_sent == len(STOPPING) or (self.signals_sent and code in STOPPED):
            watcher.ended(run.name, "stopped", "")
        else:
            message = _last_words(run.log_path, self._log_offset, code)
            failure = {"variant": run.variant.name, "seed": run.seed, "exit_code": code, "message": message,
                       "log": str(run.log_path)}  # fmt: skip
            with writing(folder.failures_path):
                append_line(folder.failures_path, failure)
            watcher.ended(run.name, "failed", message)
            return failure
        return None


def _last_words(log: Path, offset: int, code: int) -> str:
    """Return what a run printed about its failure: from its last `error` on, else its last line."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [*filter(None, map(str.strip, log.read_bytes()[offset:].decode("utf-8", "replace").split("\n")))]
    if errors := [index for index, line in enumerate(lines) if line.startswith("error ")]:
        return " ".join(" ".join(lines[errors[-1] :]).split()[1:])
    return lines[-1] if lines else f"exit code {code}, and nothing was printed"
