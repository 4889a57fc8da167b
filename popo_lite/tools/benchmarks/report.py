"""What a person reads when benchmarks have been measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.output import build_table, open_console, print_table, safe
from popo_lite.types import BenchmarkResult


def benchmark_report(
    results: Sequence[BenchmarkResult],
    *,
    k: int,
    titles: Mapping[str, str],
    published: Mapping[str, int],
    output: str,
    console: Console | None = None,
) -> None:
    """Print one row for each benchmark and set of weights, and where there are several seeds a table of them.

    `titles` and `published` map a benchmark's name to how people call it and to how many problems it has.
    """
    console = console if console is not None else open_console(sys.stdout)
    # Weights of one benchmark stand below one another: they are what is compared.
    names = list(dict.fromkeys(result.benchmark for result in results))
    ordered = sorted(results, key=lambda result: names.index(result.benchmark))
    samples = ordered[0].pooled.samples_per_problem
    columns = ["benchmark", "weights", "problems", f"avg@{samples}", "95%", f"pass@{k}", "95%", f"maj@{k}", "95%"]
    rows = [
        [
            titles.get(result.benchmark, result.benchmark),
            result.weights,
            f"{result.problems:,}",
            words.share(result.pooled.average),
            _interval(result, "average"),
            words.share(result.pooled.pass_at_k[k]),
            _interval(result, f"pass@{k}"),
            words.share(result.pooled.majority_at_k[k]),
            _interval(result, f"majority@{k}"),
            words.share(result.pooled.truncated_ratio),
            words.share(result.pooled.ungraded_ratio),
            words.decimals(result.pooled.completion_tokens_mean, 1),
        ]
        for result in ordered
    ]
    print_table(build_table([*columns, "cut off", "ungraded", "mean tokens"], rows, console), "Benchmarks", console)
    _print_seeds(ordered, k, titles, console)
    for result in ordered:
        known = published.get(result.benchmark, result.problems)
        if result.problems != known and result.weights == ordered[0].weights:
            text = f"{titles[result.benchmark]} has {known:,} problems; {result.problems:,} were measured."
            console.print(Text(safe(text, console)))
    console.print(Text("95%: percentile bootstrap over problems; it does not cover another choice of benchmarks."))
    console.print(Text(safe(f"Answers and results: {output}", console)), soft_wrap=True)


def _interval(result: BenchmarkResult, figure: str) -> str:
    low, high = result.pooled.intervals[figure]
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _print_seeds(results: Sequence[BenchmarkResult], k: int, titles: Mapping[str, str], console: Console) -> None:
    seeds = list(results[0].by_seed)
    if len(seeds) < 2:
        return
    samples = results[0].by_seed[seeds[0]].samples_per_problem
    rows = []
    for result in results:
        title = titles.get(result.benchmark, result.benchmark)
        scores = [result.by_seed[seed] for seed in seeds]
        rows.append([title, result.weights, f"avg@{samples}", *(words.share(score.average) for score in scores)])
        rows.append([title, result.weights, f"pass@{k}", *(words.share(score.pass_at_k[k]) for score in scores)])
    columns = ["benchmark", "weights", "", *(f"seed {seed}" for seed in seeds)]
    print_table(build_table(columns, rows, console), "Each seed", console)
