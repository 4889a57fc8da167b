"""Compute scores from sampled answers: averages, pass@k, majority votes and bootstrap intervals."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from popo_lite.errors import GradingError
from popo_lite.evaluation import pass_at_k
from popo_lite.seeding import stream_seed
from popo_lite.types import Outcome

AVERAGE = "average"
RESAMPLES = 10_000
CONFIDENCE = 0.95
JUDGED_PROBLEMS = 20
"""The share of ungraded answers is taken of at least this many problems: one problem alone stops no evaluation."""

_RESAMPLES_AT_ONCE = 500
_SHOWN_UNGRADED = 3
_UNGRADED = [outcome.value for outcome in Outcome if not outcome.is_graded]

Key = tuple[str, int, str, str]
"""(weights, seed, benchmark, problem id): one line of `problems.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class ProblemAnswers:
    """All sampled answers to one problem: one line of `problems.jsonl`. Each list has one entry per sample.

    `answers` are final answers in normal form, None if there is none; `tokens` counts completion tokens; `text` is
    the whole text of the first sample, for people to read.
    """

    weights: str
    seed: int
    benchmark: str
    problem: str
    reference: str
    answers: Sequence[str | None]
    outcomes: Sequence[str]
    tokens: Sequence[int]
    truncated: Sequence[bool]
    text: str

    @property
    def key(self) -> Key:
        """Return what identifies this line in its file."""
        return self.weights, self.seed, self.benchmark, self.problem

    @property
    def right(self) -> list[bool]:
        """Return whether each answer is correct; an ungraded one is not."""
        return [outcome == Outcome.CORRECT for outcome in self.outcomes]

    @property
    def ungraded_ratio(self) -> float:
        """Return the share of the answers without a verdict."""
        return sum(map(self.outcomes.count, _UNGRADED)) / len(self.outcomes)


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """Scores of one benchmark, or the unweighted average of several. All but the lengths are in [0, 1].

    `average` is the mean over all samples of a problem (avg@n, an estimate of pass@1), then over problems.
    `intervals` maps `average`, `pass@<k>` and `majority@<k>` to 95 % bootstrap intervals over problems.
    """

    samples_per_problem: int
    average: float
    pass_at_k: Mapping[int, float]
    majority_at_k: Mapping[int, float]
    truncated_ratio: float
    ungraded_ratio: float
    completion_tokens_mean: float
    intervals: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """One benchmark, or "average", under one set of weights: all seeds pooled, and each seed."""

    weights: str
    benchmark: str
    problems: int
    pooled: BenchmarkScore
    by_seed: Mapping[int, BenchmarkScore]


def summarise(lines: Sequence[ProblemAnswers], k: int) -> list[BenchmarkResult]:
    """Return one result per weights and benchmark, in the order of `lines`; after several benchmarks their average.

    All benchmarks must have the same seeds. The average weights benchmarks equally, whatever their size.
    """
    grouped: dict[str, dict[str, dict[int, list[ProblemAnswers]]]] = {}
    for line in lines:
        by_seed = grouped.setdefault(line.weights, {}).setdefault(line.benchmark, {})
        by_seed.setdefault(line.seed, []).append(line)
    results = []
    for weights, benchmarks in grouped.items():
        parts = [(name, [by_seed]) for name, by_seed in benchmarks.items()]
        if len(parts) > 1:
            parts.append((AVERAGE, list(benchmarks.values())))
        for name, members in parts:
            pooled = [_pool(list(by_seed.values())) for by_seed in members]
            results.append(
                BenchmarkResult(
                    weights=weights,
                    benchmark=name,
                    problems=sum(map(len, pooled)),
                    pooled=_score(pooled, k),
                    by_seed={seed: _score([by_seed[seed] for by_seed in members], k) for seed in members[0]},
                )
            )
    return results


def _pool(seeds: Sequence[Sequence[ProblemAnswers]]) -> list[ProblemAnswers]:
    """Return each problem with the samples of all seeds, in the order of the seeds."""
    return [
        replace(
            lines[0],
            answers=[answer for line in lines for answer in line.answers],
            outcomes=[outcome for line in lines for outcome in line.outcomes],
            tokens=[count for line in lines for count in line.tokens],
            truncated=[flag for line in lines for flag in line.truncated],
        )
        for lines in zip(*seeds, strict=True)
    ]


def _score(groups: Sequence[Sequence[ProblemAnswers]], k: int) -> BenchmarkScore:
    """Return scores averaged over the problems of each group, then over groups."""
    samples = len(groups[0][0].answers)
    ks = sorted({k, *(2**power for power in range(samples.bit_length()))})
    averages = [[statistics.fmean(line.right) for line in group] for group in groups]
    passes = {n: [[pass_at_k(samples, sum(line.right), n) for line in group] for group in groups] for n in ks}
    votes = {
        n: [[majority_at_k(line.answers, line.right, n) for line in group] for group in groups]
        for n in sorted({k, samples})
    }
    return BenchmarkScore(
        samples_per_problem=samples,
        average=_mean(averages),
        pass_at_k={n: _mean(values) for n, values in passes.items()},
        majority_at_k={n: _mean(values) for n, values in votes.items()},
        truncated_ratio=_mean([[statistics.fmean(line.truncated) for line in group] for group in groups]),
        ungraded_ratio=_mean([[line.ungraded_ratio for line in group] for group in groups]),
        completion_tokens_mean=_mean([[statistics.fmean(line.tokens) for line in group] for group in groups]),
        intervals={
            "average": bootstrap_interval(averages),
            f"pass@{k}": bootstrap_interval(passes[k]),
            f"majority@{k}": bootstrap_interval(votes[k]),
        },
    )


def _mean(values: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(statistics.fmean(group) for group in values)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the share of consecutive blocks of k samples whose most frequent answer is right.

    Answers are equal if their normal forms are; None does not vote. A tie goes to the answer sampled first, which is
    right if its first sample in the block is. A block without answers is wrong. Samples after the last whole block
    are not used.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"a vote of {k} needs as many samples, not {len(answers)}")
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
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def refuse_ungraded(lines: Sequence[ProblemAnswers], *, planned: int, limit: float) -> None:
    """Raise GradingError if more than the share `limit` of the answers has no verdict.

    `lines` are those so far of one benchmark under one set of weights, out of `planned`. The share is taken of at
    least `JUDGED_PROBLEMS` lines, or of all planned ones if these are fewer.
    """
    ratio = sum(line.ungraded_ratio for line in lines) / max(len(lines), min(JUDGED_PROBLEMS, planned))
    if ratio <= limit:
        return
    worst = sorted(lines, key=lambda line: line.ungraded_ratio, reverse=True)[:_SHOWN_UNGRADED]
    shown = [
        f"{line.problem} ({', '.join(f'{line.outcomes.count(name)} {name}' for name in _UNGRADED)})" for line in worst
    ]
    raise GradingError(
        f"{ratio:.0%} of the answers to {lines[0].benchmark} could not be graded, more than the {limit:.0%} "
        f"(reward.max_ungraded_ratio) up to which scores are meaningful; most of them to {', '.join(shown)}",
        where=f"weights {lines[0].weights}",
        next_step="the last problems were not kept: rerun the command to sample and grade them again; for timeouts, "
        "rerun it when the machine is less busy",
    )
