"""Tables, errors and one-off progress for commands. Right without colour, in a narrow terminal and in a file."""

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
from rich.table import Table
from rich.text import Text

from popo_lite.console import words
from popo_lite.errors import PopoError

_NUMBER = re.compile(r"[+-]?[\d.,:]+(e[+-]?\d+)?%?( (s|[MG]iB))?|-")
_FILE_WIDTH = 10_000
_PLAIN_SECONDS = 10.0


def open_console(stream: TextIO) -> Console:
    """A console on `stream`. A file has no width, so nothing that goes into one is wrapped or cut."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _FILE_WIDTH
    return Console(file=stream, width=width, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console | None = None) -> None:
    """Print a table. Columns that hold nothing but numbers are set flush right; long cells are folded."""
    console = console if console is not None else open_console(sys.stdout)
    print_table(build_table(columns, rows, console), title, console)


def build_table(columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console) -> Table:
    """The table itself. Cells are text and never markup."""
    shown = [[safe("" if cell is None else str(cell), console) for cell in row] for row in rows]
    built = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        cells = [row[index] for row in shown if row[index]]
        numeric = bool(cells) and all(_NUMBER.fullmatch(cell) for cell in cells)
        built.add_column(safe(column, console), justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        built.add_row(*(Text(cell) for cell in row))
    return built


def print_table(built: Table, title: str, console: Console) -> None:
    """Title, table, blank line."""
    console.print(Text(safe(title, console), "bold"))
    console.print(built)
    console.print()


def safe(text: str, console: Console) -> str:
    """`text` on one line, without control characters, in the console's encoding."""
    return words.encodable(words.clean(text), console.encoding)


def print_error(error: PopoError, console: Console | None = None) -> None:
    """Print what was wrong, where, and what to do next, to standard error."""
    console = console if console is not None else open_console(sys.stderr)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, style, text in (
        ("error", "bold red", error.what),
        ("where", "bold", error.where),
        ("next", "bold", error.next_step),
    ):
        if text:
            lines = [safe(line, console) for line in text.splitlines()]
            grid.add_row(Text(name, style), Text("\n".join(lines)))
    console.print(grid)


@contextmanager
def progress(
    description: str, total: int | None = None, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """A bar on standard error for one piece of work; call what it yields with each amount done.

    Without a terminal: a line at the start, one every ten seconds in which something was done, one at the end.
    """
    console = console if console is not None else open_console(sys.stderr)
    description = safe(description, console)
    if console.is_terminal and not console.is_dumb_terminal:
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
        if total is not None:
            columns.insert(2, MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(description, total=total)
            yield lambda amount: bars.advance(task, amount)
        return

    began = printed = time.monotonic()
    done = 0

    def advance(amount: int) -> None:
        nonlocal done, printed
        done += amount
        if time.monotonic() - printed >= _PLAIN_SECONDS:
            printed = time.monotonic()
            console.print(Text(f"{description}: {done:,}" + (f" of {total:,}" if total is not None else "")))

    console.print(Text(f"{description} ..."))
    yield advance
    console.print(Text(f"{description}: done in {words.duration(time.monotonic() - began)}"))
