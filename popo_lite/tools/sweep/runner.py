"""Run a sweep: every run is `popo-lite train` in its own process, so that a crash of one ends no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from popo_lite.lock import writing
from popo_lite.recipe_file import flatten, to_toml
from popo_lite.run_folder import append_line, changed_keys
from popo_lite.tools.console.output import open_console, safe
from popo_lite.tools.console.words import duration
from popo_lite.tools.sweep.folder import SEED, SweepFolder, SweepRun, as_options

POLL_SECONDS = 0.2
STOPPING = (
    "stopping: the step is finished and saved; Ctrl-C again abandons it and saves",
    "abandoning the step and saving; Ctrl-C again kills the running processes",
    "killed; the steps since the last checkpoint will be done again",
)
"""Message at each stop signal; the last signal ends every run at once."""
STOPPED = ((), (130, -signal.SIGINT), (130, -signal.SIGINT), (130, -signal.SIGINT, -signal.SIGKILL))
"""Number of signals -> exit codes of a run that stopped as asked: 130 by its handler, -SIGINT while Python starts."""


class SweepView(Progress):
    """Progress on standard error: a bar for the sweep and one for each run on a terminal, plain lines elsewhere."""

    def __init__(self, total_runs: int, finished_runs: int, console: Console | None = None) -> None:
        console = console or open_console(sys.stderr)
        name, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
        super().__init__(*columns, console=console, transient=True, disable=not console.is_interactive)
        self._bars: dict[str, TaskID] = {}
        self.add_task("runs", total=total_runs, completed=finished_runs, note="")

    def started(self, run: str, *, done: int, total: int) -> None:
        """Add a bar, or print a line; `done` of `total` steps are in the run's checkpoint."""
        self._bars[run] = self.add_task(safe(run, self.console), total=total, completed=done, note="loading")
        if self.disable:
            self.message(f"{run}: {f'continues after step {done}' if done else 'starts'}, {total} steps")

    def advanced(self, run: str, *, done: int, pass_rate: float) -> None:
        """Move the bar. The plain view is silent, because the run's log has every step."""
        self.update(self._bars[run], completed=done, note=f"pass {pass_rate:.1%}", refresh=True)

    def ended(self, run: str, state: Literal["done", "failed", "stopped"], details: str) -> None:
        """Print a line and remove the run's bar."""
        self.remove_task(self._bars.pop(run))
        whole = self.tasks[0]
        self.advance(whole.id, state == "done")
        text = f"{run}: {'FAILED' if state == 'failed' else state}{details and ': ' + details}"
        self.message(f"{text} ({whole.completed} of {whole.total} done)", "bold red" if state == "failed" else "")

    def message(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        self.console.print(Text(f"{time.strftime('%H:%M:%S')}  {safe(text, self.console)}", style), soft_wrap=True)


def execute(folder: SweepFolder, runs: Sequence[SweepRun], jobs: int, lock: int, watcher: SweepView,
            *, ignore_plan: bool = False) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    """Run all of `runs` that have not finished, `jobs` at a time; one that was begun is resumed.

    Returns the lines added to failures.jsonl, and whether Ctrl-C left runs to do. SIGINT, SIGTERM and SIGHUP start
    nothing more and are passed on as STOPPING says. Raises PopoError, after stopping the runs, if a file cannot be
    written.
    """
    waiting = [run for run in runs if run.state != "finished"]
    working: list[_Process] = []
    failures: list[dict[str, Any]] = []
    signals: list[int] = []
    passed_on = 0

    def pass_on_next_signal() -> None:
        nonlocal passed_on
        if working and passed_on < min(len(signals), len(STOPPING)):
            passed_on += 1
            for popen in [process.popen for process in working if process.popen.poll() is None]:
                if passed_on < len(STOPPING):
                    popen.send_signal(signal.SIGINT)
                else:  # The whole session, which the run leads: an engine's processes would keep the GPU.
                    os.killpg(popen.pid, signal.SIGKILL)
            with suppress(OSError):  # the terminal may be gone
                watcher.message(STOPPING[passed_on - 1])

    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # ignored under nohup
    handlers = {number: signal.signal(number, lambda number, _: signals.append(number))
                for number in (signal.SIGINT, signal.SIGTERM, *hangup)}  # fmt: skip
    try:
        while working or (waiting and not signals):
            while waiting and len(working) < jobs and not signals:
                working.append(_Process(folder, waiting.pop(0), lock, watcher, ignore_plan=ignore_plan))
            pass_on_next_signal()
            for process in [process for process in working if process.popen.poll() is not None]:
                working.remove(process)
                folder.write_results(runs)
                if failure := process.ended(folder, watcher, passed_on):
                    failures.append(failure)
            for process in working:
                process.report_progress(watcher)
            time.sleep(POLL_SECONDS if working else 0)
    finally:
        if working and not signals:  # the sweep itself failed
            signals.append(signal.SIGINT)
        while any(process.popen.poll() is None for process in working):
            pass_on_next_signal()
            time.sleep(POLL_SECONDS)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return failures, bool(signals) and any(run.state != "finished" for run in runs)


def train_command(folder: SweepFolder, run: SweepRun, *, ignore_plan: bool = False) -> list[str]:
    """Return the command of one run: to train it, or to resume it with what the sweep changed meanwhile."""
    if run.state == "unfinished":
        before, now = flatten(run.folder.recipe()), flatten(run.variant.recipe)
        own = {SEED, "data.date"} - run.settings.keys()  # of the run, not of the variant
        changed = [key for key in changed_keys(before, now) if key not in own]
        command = ["resume", str(run.folder.path)]
        options: Iterable[str] = [f"{key}={to_toml(now[key]) if key in now else ''}" for key in changed]
    else:
        command = ["train", str(folder.recipe_path), "--seed", str(run.seed), "--output", str(run.folder.path)]
        options = as_options(run.settings)
    return [
        # -P: `-m` would import files of the working folder that have a module's name first.
        *(sys.executable, "-P", "-m", "popo_lite", *command, "--view", "plain"),
        *(word for option in options for word in ("--set", option)),
        *(["--ignore-plan"] if ignore_plan else []),
    ]


class _Process:
    """A run at work."""

    def __init__(self, folder: SweepFolder, run: SweepRun, lock: int, watcher: SweepView, *, ignore_plan: bool) -> None:
        folder.forget_failure(run)
        with writing(run.log_path):
            run.log_path.parent.mkdir(parents=True, exist_ok=True)
            log = run.log_path.open("ab")
        watcher.started(run.name, done=run.steps_saved, total=run.variant.recipe.train.steps)
        self.run, self._started = run, time.monotonic()
        self._metrics_bytes: int | None = None
        with log:
            self._log_offset = log.tell()
            # A session of its own: Ctrl-C on the terminal reaches only the sweep, which passes it on once.
            self.popen = subprocess.Popen(
                train_command(folder, run, ignore_plan=ignore_plan), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(lock,))  # fmt: skip

    def report_progress(self, watcher: SweepView) -> None:
        """Show the steps done if there are new ones."""
        path = self.run.folder.metrics_path
        before, self._metrics_bytes = self._metrics_bytes, path.stat().st_size if path.is_file() else 0
        # The text after the last newline is a line that is still being written.
        if before not in (None, self._metrics_bytes) and (lines := path.read_text("utf-8").split("\n")[:-1]):
            watcher.advanced(self.run.name, done=len(lines), pass_rate=json.loads(lines[-1])["pass_rate"])

    def ended(self, folder: SweepFolder, watcher: SweepView, signals: int) -> dict[str, Any] | None:
        """Show how the run ended after that many stop signals; record and return a failure, also one while stopping."""
        run, code = self.run, self.popen.returncode
        if run.state == "finished":
            rate = run.result()["pass_at_1"]
            measured = "" if rate is None else f", pass@1 {rate:.1%}"
            watcher.ended(run.name, "done", f"{duration(time.monotonic() - self._started)}{measured}")
            return None
        if code in STOPPED[signals]:
            watcher.ended(run.name, "stopped", "")
            return None
        log = "\n" + run.log_path.read_bytes()[self._log_offset :].decode("utf-8", "replace").strip()
        _, found, message = log.rpartition("\nerror ")
        if code < 0:
            message = f"killed by {signal.Signals(-code).name}"
        elif not found:
            message = log.rpartition("\n")[2] or f"exit code {code}, and nothing was printed"
        message = " ".join(message.split())
        failure = {"variant": run.variant.name, "seed": run.seed, "exit_code": code, "message": message,
                   "log": str(run.log_path)}  # fmt: skip
        with writing(folder.failures_path):
            append_line(folder.failures_path, failure)
        watcher.ended(run.name, "failed", message)
        return failure
