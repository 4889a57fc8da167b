"""Compute and print scores of sampled answers: averages, pass@k, majority votes and bootstrap intervals."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from popo_lite.errors import GradingError
from popo_lite.evaluation import pass_at_k
from popo_lite.seeding import stream_seed
from popo_lite.tools.benchmarks.datasets import BENCHMARKS
from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.types import Outcome

AVERAGE = "average"
RESAMPLES = 10_000
JUDGED_PROBLEMS = 20  # at least, for the share of ungraded answers: one problem alone stops no evaluation
_RESAMPLES_AT_ONCE = 500
_UNGRADED = [outcome.value for outcome in Outcome if not outcome.is_graded]
_PER_SAMPLE = ("answers", "outcomes", "tokens", "truncated")

Answers = Mapping[str, Any]
"""All sampled answers to one problem, a line of `problems.jsonl`.

`weights`, `seed`, `benchmark` and `problem` (its id) identify it. `reference` is the right answer, `text` the whole
first sample, `unreadable` why nothing can be graded against the right answer, or None: such a problem counts as not
solved. Lists per sample: `answers` (in normal form, or None), `outcomes`, `tokens` (their number), `truncated`.
"""


def summarise(lines: Sequence[Answers], k: int) -> list[dict[str, Any]]:
    """Return one result per weights and benchmark, in the order of `lines`; after several benchmarks their average.

    A result has `weights`, `benchmark`, `problems` (their number), `unreadable` (how many of these), and scores:
    `pooled` over all seeds, and `by_seed`. All benchmarks must have the same seeds. The average weights benchmarks
    equally, whatever their size.
    """
    grouped: dict[str, dict[str, dict[int, list[Answers]]]] = {}
    for line in lines:
        by_seed = grouped.setdefault(line["weights"], {}).setdefault(line["benchmark"], {})
        by_seed.setdefault(line["seed"], []).append(line)
    results = []
    for weights, benchmarks in grouped.items():
        members = {name: [by_seed] for name, by_seed in benchmarks.items()}
        if len(benchmarks) > 1:
            members[AVERAGE] = list(benchmarks.values())
        for name, parts in members.items():
            # Each problem with the samples of all seeds, in the order of the seeds.
            pooled = [
                [
                    {key: [entry for line in same for entry in line[key]] for key in _PER_SAMPLE}
                    for same in zip(*by_seed.values(), strict=True)
                ]
                for by_seed in parts
            ]
            result = {"weights": weights, "benchmark": name, "problems": sum(map(len, pooled))}
            first = [line for by_seed in parts for line in next(iter(by_seed.values()))]
            result["unreadable"] = sum(line["unreadable"] is not None for line in first)
            result["pooled"] = _score(pooled, k)
            result["by_seed"] = {seed: _score([by_seed[seed] for by_seed in parts], k) for seed in parts[0]}
            results.append(result)
    return results


def _score(groups: Sequence[Sequence[Answers]], k: int) -> dict[str, Any]:
    """Return scores averaged over the problems of each group, then over groups, with intervals over problems."""
    scores = [[_problem_score(line, k) for line in group] for group in groups]
    return {
        "samples_per_problem": len(groups[0][0]["answers"]),
        **_mean([_mean(group) for group in scores]),
        "intervals": {
            "average": bootstrap_interval([[score["average"] for score in group] for group in scores]),
            f"pass@{k}": bootstrap_interval([[score["pass_at_k"][k] for score in group] for group in scores]),
            f"majority@{k}": bootstrap_interval([[score["majority_at_k"][k] for score in group] for group in scores]),
        },
    }


def _problem_score(line: Answers, k: int) -> dict[str, Any]:
    samples = len(line["answers"])
    right = [outcome == Outcome.CORRECT for outcome in line["outcomes"]]
    ks = sorted({k, *(2**power for power in range(samples.bit_length()))})
    return {
        "average": statistics.fmean(right),
        "pass_at_k": {n: pass_at_k(samples, sum(right), n) for n in ks},
        "majority_at_k": {n: majority_at_k(line["answers"], right, n) for n in sorted({k, samples})},
        "truncated_ratio": statistics.fmean(line["truncated"]),
        "ungraded_ratio": _ungraded_ratio(line),
        "completion_tokens_mean": statistics.fmean(line["tokens"]),
    }


def _mean(scores: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Return the mean of every value of dicts with the same keys, also of those in nested dicts."""
    return {
        key: (_mean if isinstance(value, dict) else statistics.fmean)([score[key] for score in scores])
        for key, value in scores[0].items()
    }


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the share of consecutive blocks of k samples whose most frequent answer is right.

    None does not vote. A tie goes to the answer sampled first, which is right if its first sample in the block is.
    A block without answers is wrong. Samples after the last whole block are not used.
    """
    wins = []
    for start in range(0, len(answers) - k + 1, k):
        votes = Counter(answer for answer in answers[start : start + k] if answer is not None)
        # most_common keeps the order of first occurrence among equal counts.
        wins.append(bool(votes) and right[answers.index(votes.most_common(1)[0][0], start)])
    return statistics.fmean(wins)


def bootstrap_interval(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of the groups' means (Efron 1979).

    A group holds one value per problem of a benchmark. Problems are drawn with replacement within their group,
    `RESAMPLES` times. The draws depend only on the groups' sizes, so all weights are compared on the same ones.
    """
    means = np.zeros(RESAMPLES)
    for index, group in enumerate(values):
        generator = np.random.Generator(np.random.Philox(key=stream_seed("bootstrap", index)))
        problems = np.asarray(group, dtype=np.float64)
        for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):  # all draws at once may take gigabytes
            drawn = problems[generator.integers(len(problems), size=(_RESAMPLES_AT_ONCE, len(problems)))]
            means[start : start + _RESAMPLES_AT_ONCE] += drawn.mean(axis=1) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def refuse_ungraded(lines: Sequence[Answers], *, planned: int, limit: float) -> None:
    """Raise GradingError if more than the share `limit` of the answers has no verdict.

    `lines` are those so far of one benchmark under one set of weights, out of `planned`. The share is taken of at
    least `JUDGED_PROBLEMS` lines, or of all planned ones if these are fewer. Problems that are unreadable do not count.
    """
    if not (lines := [line for line in lines if line["unreadable"] is None]):
        return
    ratio = sum(map(_ungraded_ratio, lines)) / max(len(lines), min(JUDGED_PROBLEMS, planned))
    if ratio <= limit:
        return
    worst = []
    for line in sorted(lines, key=_ungraded_ratio, reverse=True)[:3]:
        counts = ", ".join(f"{line['outcomes'].count(outcome)} {outcome}" for outcome in _UNGRADED)
        worst.append(f"{line['problem']} ({counts})")
    what = f"{ratio:.0%} of the answers to {lines[0]['benchmark']} could not be graded, more than the {limit:.0%} "
    what += f"(reward.max_ungraded_ratio) up to which scores are meaningful; most of them to {', '.join(worst)}"
    next_step = "rerun to sample the last problems, which were not kept, again; after timeouts, on a less busy machine"
    raise GradingError(what, where=f"weights {lines[0]['weights']}", next_step=next_step)


def _ungraded_ratio(line: Answers) -> float:
    return statistics.fmean(outcome in _UNGRADED for outcome in line["outcomes"])


def benchmark_report(results: Sequence[dict[str, Any]], k: int, output: str, console: Console | None = None) -> None:
    """Print a table with a row per benchmark and weights, and with several seeds a second table of each seed."""
    console = console or open_console(sys.stdout)
    titles = {AVERAGE: AVERAGE} | {name: benchmark.title for name, benchmark in BENCHMARKS.items()}
    # The rows of one benchmark are adjacent, so that its weights can be compared.
    order = list(dict.fromkeys(result["benchmark"] for result in results))
    rows, seed_rows = [], []
    for result in sorted(results, key=lambda result: order.index(result["benchmark"])):
        score, label, seeds = result["pooled"], [titles[result["benchmark"]], result["weights"]], result["by_seed"]
        row = [*label, f"{result['problems']:,}"]
        values = (score["average"], score["pass_at_k"][k], score["majority_at_k"][k])
        for value, (low, high) in zip(values, score["intervals"].values(), strict=True):
            row += [words.share(value), f"{100 * low:.1f} to {100 * high:.1f}"]
        row += [words.share(score["truncated_ratio"]), words.share(score["ungraded_ratio"])]
        rows.append([*row, words.quantity(score["completion_tokens_mean"], "tokens")])
        each = next(iter(seeds.values()))["samples_per_problem"]
        seed_rows.append([*label, f"avg@{each}", *(words.share(seed["average"]) for seed in seeds.values())])
        seed_rows.append([*label, f"pass@{k}", *(words.share(seed["pass_at_k"][k]) for seed in seeds.values())])
    samples, seeds = results[0]["pooled"]["samples_per_problem"], results[0]["by_seed"]
    columns = ["benchmark", "weights", "problems", f"avg@{samples}", "95%", f"pass@{k}", "95%", f"maj@{k}", "95%"]
    table("Benchmarks", [*columns, "truncated", "ungraded", "mean tokens"], rows, console)
    if len(seeds) > 1:
        table("Each seed", ["benchmark", "weights", "", *(f"seed {seed}" for seed in seeds)], seed_rows, console)
    for name, (count, unreadable) in {r["benchmark"]: (r["problems"], r["unreadable"]) for r in results}.items():
        if name in BENCHMARKS and count != BENCHMARKS[name].problems:
            text = f"{titles[name]} has {BENCHMARKS[name].problems:,} problems; {count:,} were measured."
            console.print(Text(safe(text, console)))
        if name in BENCHMARKS and unreadable:
            text = f"{titles[name]}: {unreadable:,} of {count:,} problems cannot be graded and count as not solved."
            console.print(Text(safe(text, console)))
    console.print(Text("95%: percentile bootstrap over problems; it does not cover another choice of benchmarks."))
    console.print(Text(safe(f"Answers and results: {output}", console)), soft_wrap=True)
