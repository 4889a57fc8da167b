"""Watching a sweep: a bar for the whole and one for each run on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Literal, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from popo_lite.tools.console.output import open_console, safe

EndState = Literal["done", "failed", "stopped"]


class SweepWatcher(Protocol):
    """What a sweep may say to whoever is watching."""

    def started(self, run: str, *, done: int, total: int) -> None:
        """`run` begins, or goes on, with `done` of `total` steps behind it."""

    def advanced(self, run: str, *, done: int, pass_rate: float) -> None:
        """`run` has `done` steps behind it; `pass_rate` is that of the last one."""

    def ended(self, run: str, state: EndState, words: str) -> None:
        """`run` ended; `words` say more."""

    def message(self, text: str) -> None:
        """A notice that must not be lost."""


class SweepView(SweepWatcher):
    """A SweepWatcher on standard error. A context manager: leaving it puts the terminal in order."""

    def __init__(self, total_runs: int, finished_runs: int, console: Console | None = None) -> None:
        self._console = console if console is not None else open_console(sys.stderr)
        self._total, self._done = total_runs, finished_runs
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._whole = self._bars.add_task("runs", total=total_runs, completed=finished_runs, note="")

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, run: str, *, done: int, total: int) -> None:
        """A new bar, or a line."""
        if self._bars is not None:
            self._tasks[run] = self._bars.add_task(
                safe(run, self._console), total=total, completed=done, note="loading"
            )
        else:
            self._print(f"{run}: {f'goes on after step {done}' if done else 'starts'}, {total} steps")

    def advanced(self, run: str, *, done: int, pass_rate: float) -> None:
        """The bar moves; a plain view is silent, as the run's log has every step."""
        if self._bars is not None:
            self._bars.update(self._tasks[run], completed=done, note=f"pass {pass_rate:.1%}", refresh=True)

    def ended(self, run: str, state: EndState, words: str) -> None:
        """A line that stays, and the run's bar goes."""
        self._done += state == "done"
        if self._bars is not None:
            self._bars.remove_task(self._tasks.pop(run))
            self._bars.update(self._whole, completed=self._done)
        told = f"{run}: {'FAILED' if state == 'failed' else state}{words and ': ' + words}"
        self._print(f"{told} ({self._done} of {self._total} done)", "bold red" if state == "failed" else "")

    def message(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(f"{datetime.now():%H:%M:%S}  {safe(text, self._console)}", style), soft_wrap=True)
