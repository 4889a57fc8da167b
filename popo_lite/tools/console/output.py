"""Tables, errors, progress and reports of commands. Readable without colour, in a narrow terminal and in a file."""

from __future__ import annotations

import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from types import TracebackType
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from popo_lite.errors import PopoError
from popo_lite.metrics import Unit
from popo_lite.tools.console import words
from popo_lite.types import EvalResult

_NUMBER = re.compile(r"[+-]?[\d.,:]+(e[+-]?\d+)?%?( (s|[MG]iB))?|-")
_PLAIN_SECONDS = 10.0
_MEASURES: Sequence[tuple[str, str, Unit]] = (
    ("truncated", "truncated_ratio", "ratio"),
    ("ungraded", "ungraded_ratio", "ratio"),
    ("mean tokens", "completion_tokens_mean", "tokens"),
    ("tokens sampled", "rollout_tokens", "count"),
    ("time", "seconds", "seconds"),
    ("problems", "problems", "count"),
    ("answers each", "samples_per_problem", "count"),
)


def open_console(stream: TextIO) -> Console:
    """Return a console on `stream`. A file has no width, so nothing written to one is wrapped or cut."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else 10_000
    return Console(file=stream, width=width, highlight=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], console: Console | None = None) -> None:
    """Print title, table, blank line. Cells are text (never markup) or bars; numbers align right, long cells fold."""
    console = console or open_console(sys.stdout)
    built = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown = [[c if isinstance(c, ProgressBar) else safe("" if c is None else str(c), console) for c in r] for r in rows]
    for index, column in enumerate(columns):
        cells = [row[index] for row in shown if row[index]]
        numeric = bool(cells) and all(isinstance(cell, str) and _NUMBER.fullmatch(cell) for cell in cells)
        # What a row is about is folded last.
        longest = max((len(cell) for cell in cells if isinstance(cell, str)), default=0)
        built.add_column(
            Text(safe(column, console)),
            justify="right" if numeric else "left",
            overflow="fold",
            min_width=min(longest, console.width // 2) if index == 0 else None,
        )
    for row in shown:
        built.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    parts = (Text(safe(title, console), "bold"), built, "")
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    # In a file, a cell of 500 characters would add 500 blanks to the line of every other cell of its column.
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    console.out("\n".join(line.rstrip() for line in captured.get().split("\n")), end="", highlight=False)


def safe(text: str, console: Console) -> str:
    """Return `text` on one line, without control characters, in the console's encoding."""
    return words.encodable(words.clean(text), console.encoding)


def notify(text: str) -> None:
    """Print untrusted lines, such as a notice that quotes a dataset, to standard error."""
    write(text, sys.stderr)


def write(text: str, stream: TextIO) -> None:
    """Print untrusted `text` line by line, without control characters, in the stream's encoding. Nothing is folded."""
    print(words.encodable(words.printable(text), getattr(stream, "encoding", None) or "utf-8"), file=stream)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does, but as untrusted text. For `sys.excepthook`."""
    write("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


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


def closing_report(summary: Mapping[str, Any], next_commands: Sequence[str], console: Console | None = None) -> None:
    """Print a run's accuracy before and after, time, tokens, memory and folder, from the content of summary.json."""
    console = console or open_console(sys.stdout)
    console.print()
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name) is not None}
    text = ""
    if len(results) > 1:
        first, second, *_ = results.values()
        problems = min(first["problems"], second["problems"])
        margin = 100 * noise(first["pass_at_1"], second["pass_at_1"], problems)
        text = f"With {problems:,} problems, a difference of pass@1 within ±{margin:.1f} points may be chance (95%).\n"
    _print_results(results, text, console)
    stages, total = words.by_stage(summary["seconds"])
    if (other := total - sum(stages.values())) > 0.005 * total:
        stages["other"] = other
    rows = [(k, words.duration(s), f"{s / total:.0%}", ProgressBar(total, s, width=24)) for k, s in stages.items()]
    table(f"Time: {words.duration(total)}", ("", "", "", ""), rows, console)
    facts = {
        "steps": f"{summary['steps']:,}",
        "tokens sampled": f"{summary['rollout_tokens']:,}",
        "tokens trained on": f"{summary['trained_tokens']:,} ({summary['shared_tokens']:,} more not computed again)",
        "peak memory": words.memory(summary["peak_memory_bytes"]),
        "siamese": f"{words.memory(summary['siamese_extra_bytes'])} beside the policy",
        "4-bit modules": f"{summary['quantized_modules']:,}" if summary["quantized_modules"] else "none: not quantised",
        "saved to": safe(str(summary["output"]), console),
    }
    # Not a table: paths and commands are copied, so they must stay on one line.
    lines = [Text("The run", "bold"), *(Text.assemble((f"  {k:<19}", "dim"), text) for k, text in facts.items())]
    if next_commands:
        lines += [Text("\nNext", "bold"), *(Text(f"  {safe(command, console)}", "cyan") for command in next_commands)]
    console.print(*lines, sep="\n", soft_wrap=True)


def eval_report(results: Sequence[EvalResult], console: Console | None = None) -> None:
    """Print accuracy on held-out problems, with a column for each of the evaluated weights."""
    text = ""
    if len(results) > 1:
        first, second, *_ = results
        low, high = paired_interval(first.pass_rates, second.pass_rates)
        gap = points(second.pass_at_1 - first.pass_at_1, low, high)
        chance = ", so it may be chance" if low <= 0 <= high else ""
        text = f"pass@1, {second.weights} - {first.weights}: {gap}{chance} ({first.problems:,} problems, same draws).\n"
    if any(result.weights == "siamese" for result in results):
        text += "siamese: the running average of the trained weights.\n"
    _print_results({result.weights: asdict(result) for result in results}, text, console or open_console(sys.stdout))


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of second - first, two pass rates of each problem (Agresti and Min 2005).

    Half a problem of each outcome of a pair of answers is added (n + 2, sum of squares + 1), so that a few problems
    without a difference are not taken for certainty.
    """
    differences = [after - before for before, after in zip(first, second, strict=True)]
    count = len(differences) + 2
    mean = sum(differences) / count
    variance = (sum(gap * gap for gap in differences) + 1) / count - mean * mean
    margin = 1.96 * math.sqrt(variance / count)
    return mean - margin, mean + margin


def points(gap: float, low: float, high: float) -> str:
    """Return a difference of two pass rates and its interval for people to read."""
    return f"{100 * gap:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f}"


def noise(first: float, second: float, problems: int) -> float:
    """Return how far two pass rates may differ by chance alone (95 %): 1.96 standard errors of their difference.

    Each is a ratio of `problems` answers, with two successes and two failures added (Agresti and Coull) so that 0 and
    1 have an error as well. Counting several samples of a problem, or pairing the problems, would only make it smaller.
    """
    adjusted = [(rate * problems + 2) / (problems + 4) for rate in (first, second)]
    return 1.96 * math.sqrt(sum(rate * (1 - rate) / (problems + 4) for rate in adjusted))


def measured(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Unit], list[Any]]:
    """Return what is known by label and unit: a value, or None, for each of the results."""
    all_found = []
    for result in results:
        # JSON makes strings of the k, so pass@k of a summary that was read from its file needs int().
        rates = {1: result["pass_at_1"]} | {int(k): rate for k, rate in result["pass_at_k"].items()}
        found: dict[tuple[str, Unit], Any] = {(f"pass@{k}", "ratio"): rates[k] for k in sorted(rates)}
        figures = result["task_figures"].items()
        found |= {(name.removesuffix("_ratio").replace("_", " "), "ratio"): value for name, value in figures}
        found |= {(label, unit): result[name] for label, name, unit in _MEASURES if result.get(name) is not None}
        all_found.append(found)
    return {key: [found.get(key) for found in all_found] for key in dict.fromkeys(chain(*all_found))}


def _print_results(results: Mapping[str, Mapping[str, Any]], below: str, console: Console) -> None:
    """Print a column for each result; after the second, how it differs from the first; then the text `below`."""
    if not results:
        console.print("Nothing was measured on held-out problems.\n")
        return
    columns, rows, both = ["", *results], [], len(results) > 1
    for (label, unit), values in measured(results.values()).items():
        rows.append([label, *(words.quantity(value, unit) for value in values)])
        if both:
            known = None not in values[:2] and unit in ("ratio", "tokens")
            factor = 100 if unit == "ratio" else 1
            rows[-1].insert(3, f"{factor * (values[1] - values[0]):+,.1f}" if known else "")
    if both:
        columns.insert(3, "difference")
    table("Held-out problems", columns, rows, console)
    if unreadable := max(result.get("unreadable", 0) for result in results.values()):
        below = f"{unreadable:,} problems cannot be graded and count as not solved.\n{below}"
    if below:
        console.print(Text(words.encodable(words.printable(below), console.encoding)))
