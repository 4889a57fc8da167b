"""Tables, errors and one-off progress for commands. Readable without colour, in a narrow terminal and in a file."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from popo_lite.errors import PopoError
from popo_lite.tools.console import words

_NUMBER = re.compile(r"[+-]?[\d.,:]+(e[+-]?\d+)?%?( (s|[MG]iB))?|-")
_PLAIN_SECONDS = 10.0


def open_console(stream: TextIO) -> Console:
    """Return a console on `stream`. A file has no width, so nothing written to one is wrapped or cut."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else 10_000
    return Console(file=stream, width=width, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console | None = None) -> None:
    """Print a title, a table and a blank line. Cells are text, never markup, or progress bars.

    Columns of numbers are aligned right; long cells are folded.
    """
    console = console or open_console(sys.stdout)
    built = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown = [[c if isinstance(c, ProgressBar) else safe("" if c is None else str(c), console) for c in r] for r in rows]
    for index, column in enumerate(columns):
        cells = [row[index] for row in shown if row[index]]
        numeric = bool(cells) and all(isinstance(cell, str) and _NUMBER.fullmatch(cell) for cell in cells)
        built.add_column(safe(column, console), justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        built.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    console.print(Text(safe(title, console), "bold"), built, "", sep="\n")


def safe(text: str, console: Console) -> str:
    """Return `text` on one line, without control characters, in the console's encoding."""
    return words.encodable(words.clean(text), console.encoding)


def print_error(error: PopoError, console: Console | None = None) -> None:
    """Print what is wrong, where, and what to do next, to standard error."""
    console = console or open_console(sys.stderr)
    parts = (("error", error.what, "bold red"), ("where", error.where, "bold"), ("next", error.next_step, "bold"))
    for label, text, style in parts:
        for line in (text or "").splitlines():
            # Not a table: its cells would be padded with blanks up to the width of the longest.
            for folded in Text(safe(line, console)).wrap(console, max(console.width - 7, 1)):
                console.print(Text.assemble((f"{label:<7}", style), folded), soft_wrap=True)
                label = ""


@contextmanager
def progress(
    description: str, total: int | None = None, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error for one piece of work; call what it yields with each amount done.

    Without a terminal: a line at the start, one every ten seconds in which something was done, one at the end.
    """
    console = console or open_console(sys.stderr)
    description = safe(description, console)
    if console.is_terminal and not console.is_dumb_terminal:
        counts = () if total is None else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda amount: bars.advance(task, amount)
        return
    began, printed, done = time.monotonic(), time.monotonic(), 0

    def advance(amount: int) -> None:
        nonlocal done, printed
        done += amount
        if time.monotonic() - printed >= _PLAIN_SECONDS:
            printed = time.monotonic()
            console.print(Text(f"{description}: {done:,}" + (f" of {total:,}" if total is not None else "")))

    console.print(Text(f"{description} ..."))
    yield advance
    console.print(Text(f"{description}: done in {words.duration(time.monotonic() - began)}"))
