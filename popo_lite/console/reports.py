"""What a person reads when a run or an evaluation is over."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from popo_lite.console import words
from popo_lite.console.draw import bar
from popo_lite.console.output import build_table, open_console, print_error, print_table, progress, safe, table
from popo_lite.console.state import by_stage
from popo_lite.types import EvalResult

__all__ = ["closing_report", "eval_report", "print_error", "progress", "table"]

_BAR_CELLS = 24


def closing_report(summary: Mapping[str, Any], next_commands: Sequence[str], console: Console | None = None) -> None:
    """Print what a run came to: accuracy before and after, time, tokens, memory, and where it all is.

    `summary` is the content of summary.json; `before`, `after` and, where it was evaluated, `siamese` are
    evaluations with the keys of EvalResult.
    """
    console = console if console is not None else open_console(sys.stdout)
    console.print()
    measured = {name: summary.get(name) for name in ("before", "after", "siamese")}
    found = {name: result for name, result in measured.items() if result is not None}
    if found:
        _print_results(found, console)
    else:
        console.print(Text("Nothing was measured on held-out problems.\n"))
    _print_time(summary["seconds"], console)
    modules = summary["quantized_modules"]
    facts = {
        "steps": f"{summary['steps']:,}",
        "tokens sampled": f"{summary['rollout_tokens']:,}",
        "tokens trained on": f"{summary['trained_tokens']:,}",
        "peak memory": words.memory(summary["peak_memory_bytes"]),
        "siamese": f"{words.memory(summary['siamese_extra_bytes'])} beside the policy",
        "4-bit modules": f"{modules:,}" if modules else "none: the base was not quantised",
        "saved to": str(summary["output"]),
    }
    _print_facts("The run", facts, console)
    if next_commands:
        console.print(Text("Next", "bold"))
        for command in next_commands:
            console.print(Text.assemble("  ", (safe(command, console), "cyan")), soft_wrap=True)


def eval_report(results: Sequence[EvalResult], console: Console | None = None) -> None:
    """Print accuracy on held-out problems, one column for each of the weights that were evaluated."""
    console = console if console is not None else open_console(sys.stdout)
    found = {result.weights: asdict(result) for result in results}
    if found:
        _print_results(found, console)
    else:
        console.print(Text("Nothing was evaluated."))


def noise(first: float, second: float, problems: int) -> float:
    """How far two pass rates may lie apart by chance alone, 95 %: 1.96 standard errors of their difference.

    Each is a share of `problems` answers, with two successes and two failures added (Agresti and Coull) so
    that 0 and 1 have an error as well. Several samples of a problem are not counted as independent, and
    neither is use made of both having seen the same problems: both would only make it smaller.
    """
    variance = 0.0
    for rate in (first, second):
        adjusted = (rate * problems + 2) / (problems + 4)
        variance += adjusted * (1 - adjusted) / (problems + 4)
    return 1.96 * math.sqrt(variance)


def _points(change: float) -> str:
    return f"{100 * change:+.1f}"


# (row, key of the evaluation, how a value is written, how a difference is, if it means anything)
_MEASURES: tuple[tuple[str, str, Callable[[float | None], str], Callable[[float], str] | None], ...] = (
    ("step by step", "step_by_step_ratio", words.share, _points),
    ("cut off", "truncated_ratio", words.share, _points),
    ("ungraded", "ungraded_ratio", words.share, _points),
    ("mean tokens", "completion_tokens_mean", lambda value: words.decimals(value, 1), lambda change: f"{change:+,.1f}"),
    ("tokens sampled", "rollout_tokens", lambda value: words.decimals(value, 0), None),
    ("time", "seconds", words.duration, None),
    ("problems", "problems", lambda value: words.decimals(value, 0), None),
    ("answers each", "samples_per_problem", lambda value: words.decimals(value, 0), None),
)


def _print_results(results: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    found = list(results.values())
    compared = len(found) > 1
    rates = [_pass_rates(result) for result in found]
    ks = sorted({k for rate in rates for k in rate})
    rows = [_row(f"pass@{k}", [rate.get(k) for rate in rates], words.share, _points) for k in ks]
    for name, key, written, difference in _MEASURES:
        values = [result.get(key) for result in found]
        if any(value is not None for value in values):
            rows.append(_row(name, values, written, difference))
    names = list(results)
    columns = ["", *names[:2], "difference", *names[2:]] if compared else ["", *names]
    print_table(build_table(columns, rows, console), "Held-out problems", console)
    if compared:
        first, second = found[:2]
        problems = min(first["problems"], second["problems"])
        margin = 100 * noise(first["pass_at_1"], second["pass_at_1"], problems)
        text = f"With {problems:,} problems, a difference of pass@1 within ±{margin:.1f} points may be chance (95%)."
        console.print(Text(words.encodable(text, console.encoding)))
        console.print()


def _pass_rates(result: Mapping[str, Any]) -> dict[int, float]:
    # JSON has made strings of the k of a summary that was read back from its file.
    return {1: result["pass_at_1"]} | {int(k): rate for k, rate in result["pass_at_k"].items()}


def _row(
    name: str,
    values: Sequence[float | None],
    written: Callable[[float | None], str],
    difference: Callable[[float], str] | None,
) -> list[str]:
    """A measure of each result; of two or more, the second against the first stands after the second."""
    cells = [written(value) for value in values]
    if len(values) > 1:
        first, second = values[:2]
        if difference is None or first is None or second is None:
            cells.insert(2, "")
        else:
            cells.insert(2, difference(second - first))
    return [name, *cells]


def _print_time(seconds: Mapping[str, float], console: Console) -> None:
    stages, total = by_stage(seconds)
    rest = total - sum(stages.values())
    # What lies between the stages is time as well; a report that left it out would not add up.
    if rest > 0.005 * total:
        stages["other"] = rest
    grid = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    for name, took in stages.items():
        part = took / total if total else 0.0
        drawn = bar(part, _BAR_CELLS, "cyan")
        drawn.plain = words.encodable(drawn.plain, console.encoding)
        grid.add_row(Text(safe(name, console)), Text(words.duration(took)), Text(f"{part:.0%}"), drawn)
    console.print(Text(f"Time: {words.duration(total)}", "bold"))
    console.print(Padding(grid, (0, 0, 0, 2), expand=False))
    console.print()


def _print_facts(title: str, facts: Mapping[str, str], console: Console) -> None:
    console.print(Text(title, "bold"))
    for name, value in facts.items():
        # A path is copied: no line break of ours goes into it.
        console.print(Text.assemble((f"  {name:<19}", "dim"), safe(value, console)), soft_wrap=True)
    console.print()
