"""Print benchmark results."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from popo_lite.tools.benchmarks.datasets import Benchmark
from popo_lite.tools.benchmarks.scores import BenchmarkResult
from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table


def benchmark_report(
    results: Sequence[BenchmarkResult],
    *,
    k: int,
    benchmarks: Mapping[str, Benchmark],
    output: str,
    console: Console | None = None,
) -> None:
    """Print a table with a row per benchmark and weights, and with several seeds a second table of each seed."""
    console = console if console is not None else open_console(sys.stdout)
    titles = {result.benchmark: result.benchmark for result in results}
    titles |= {name: benchmark.title for name, benchmark in benchmarks.items()}
    # The rows of one benchmark are adjacent, so that its weights can be compared.
    order = list(dict.fromkeys(result.benchmark for result in results))
    results = sorted(results, key=lambda result: order.index(result.benchmark))
    rows, seed_rows = [], []
    for result in results:
        score, label = result.pooled, [titles[result.benchmark], result.weights]
        row = [*label, f"{result.problems:,}"]
        values = {"average": score.average, f"pass@{k}": score.pass_at_k[k], f"majority@{k}": score.majority_at_k[k]}
        for figure, value in values.items():
            low, high = score.intervals[figure]
            row += [words.share(value), f"{100 * low:.1f} to {100 * high:.1f}"]
        row += [words.share(score.truncated_ratio), words.share(score.ungraded_ratio)]
        rows.append([*row, words.decimals(score.completion_tokens_mean, 1)])
        seeds = result.by_seed.values()
        each = next(iter(seeds)).samples_per_problem
        seed_rows.append([*label, f"avg@{each}", *(words.share(seed.average) for seed in seeds)])
        seed_rows.append([*label, f"pass@{k}", *(words.share(seed.pass_at_k[k]) for seed in seeds)])
    samples = results[0].pooled.samples_per_problem
    columns = ["benchmark", "weights", "problems", f"avg@{samples}", "95%", f"pass@{k}", "95%", f"maj@{k}", "95%"]
    table("Benchmarks", [*columns, "truncated", "ungraded", "mean tokens"], rows, console)
    if len(results[0].by_seed) > 1:
        columns = ["benchmark", "weights", "", *(f"seed {seed}" for seed in results[0].by_seed)]
        table("Each seed", columns, seed_rows, console)
    for name, count in {
        result.benchmark: result.problems for result in results if result.benchmark in benchmarks
    }.items():
        if count != benchmarks[name].problems:
            text = f"{titles[name]} has {benchmarks[name].problems:,} problems; {count:,} were measured."
            console.print(Text(safe(text, console)))
    console.print(Text("95%: percentile bootstrap over problems; it does not cover another choice of benchmarks."))
    console.print(Text(safe(f"Answers and results: {output}", console)), soft_wrap=True)
