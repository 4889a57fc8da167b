"""The reports at the end of a run and of an evaluation."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from popo_lite.metrics import Unit
from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.types import EvalResult

_MEASURES: Sequence[tuple[str, str, Unit]] = (
    ("truncated", "truncated_ratio", "ratio"),
    ("ungraded", "ungraded_ratio", "ratio"),
    ("mean tokens", "completion_tokens_mean", "tokens"),
    ("tokens sampled", "rollout_tokens", "count"),
    ("time", "seconds", "seconds"),
    ("problems", "problems", "count"),
    ("answers each", "samples_per_problem", "count"),
)


def closing_report(summary: Mapping[str, Any], next_commands: Sequence[str], console: Console | None = None) -> None:
    """Print a run's accuracy before and after, time, tokens, memory and folder, from the content of summary.json."""
    console = console or open_console(sys.stdout)
    console.print()
    results = {name: summary[name] for name in ("before", "after", "siamese") if summary.get(name) is not None}
    _print_results(results, "Nothing was measured on held-out problems.\n", console)
    stages, total = words.by_stage(summary["seconds"])
    stages["other"] = total - sum(stages.values())
    rows = [
        (name, words.duration(seconds), f"{seconds / total:.0%}", ProgressBar(total, seconds, width=24))
        for name, seconds in stages.items()
        if name != "other" or seconds > 0.005 * total
    ]
    table(f"Time: {words.duration(total)}", ("", "", "", ""), rows, console)
    facts = {
        "steps": f"{summary['steps']:,}",
        "tokens sampled": f"{summary['rollout_tokens']:,}",
        "tokens trained on": f"{summary['trained_tokens']:,}",
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
    by_weights = {result.weights: asdict(result) for result in results}
    _print_results(by_weights, "Nothing was evaluated.", console or open_console(sys.stdout))


def noise(first: float, second: float, problems: int) -> float:
    """Return how far two pass rates may differ by chance alone (95 %): 1.96 standard errors of their difference.

    Each is a ratio of `problems` answers, with two successes and two failures added (Agresti and Coull) so that 0 and
    1 have an error as well. Counting several samples of a problem, or pairing the problems, would only make it smaller.
    """
    adjusted = [(rate * problems + 2) / (problems + 4) for rate in (first, second)]
    return 1.96 * math.sqrt(sum(rate * (1 - rate) / (problems + 4) for rate in adjusted))


def _print_results(results: Mapping[str, Mapping[str, Any]], none: str, console: Console) -> None:
    if not results:
        console.print(Text(none))
        return
    columns, rows = ["", *results], []
    found = [_figures(result) for result in results.values()]
    for label, unit in dict.fromkeys(figure for figures in found for figure in figures):
        values = [figures.get((label, unit)) for figures in found]
        rows.append([label, *(words.quantity(value, unit) for value in values)])
        if len(found) > 1:
            # The second against the first stands after the second.
            rows[-1].insert(3, _difference(values[0], values[1], unit))
    if len(found) > 1:
        columns.insert(3, "difference")
    table("Held-out problems", columns, rows, console)
    if len(found) > 1:
        first, second = list(results.values())[:2]
        problems = min(first["problems"], second["problems"])
        margin = 100 * noise(first["pass_at_1"], second["pass_at_1"], problems)
        text = f"With {problems:,} problems, a difference of pass@1 within ±{margin:.1f} points may be chance (95%).\n"
        console.print(Text(words.encodable(text, console.encoding)))


def _figures(result: Mapping[str, Any]) -> dict[tuple[str, Unit], Any]:
    """Return what is known, by label and unit."""
    # JSON makes strings of the k, so pass@k of a summary that was read from its file needs int().
    rates = {1: result["pass_at_1"]} | {int(k): rate for k, rate in result["pass_at_k"].items()}
    found: dict[tuple[str, Unit], Any] = {(f"pass@{k}", "ratio"): rates[k] for k in sorted(rates)}
    found |= {(words.spoken(name), "ratio"): value for name, value in result["task_figures"].items()}
    return found | {(label, unit): result[name] for label, name, unit in _MEASURES if result.get(name) is not None}


def _difference(first: float | None, second: float | None, unit: Unit) -> str:
    if first is None or second is None or unit not in ("ratio", "tokens"):
        return ""
    return f"{100 * (second - first):+.1f}" if unit == "ratio" else f"{second - first:+,.1f}"
