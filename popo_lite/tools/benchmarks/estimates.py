"""Figures from samples: pass@k, majority vote, and how far they may be off by the choice of problems."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_RESAMPLES_AT_ONCE = 500


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Share of votes of k answers each that are won by a right one, over the consecutive blocks of k.

    Answers are the same where their normal forms are; None has no vote. Of answers with equally many votes the one
    that was sampled first wins, and it is right where its first sample was graded right. A block without any answer
    is lost. Samples beyond the last whole block are left out.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"a vote of {k} needs as many samples, not {len(answers)}")
    blocks = [range(start, start + k) for start in range(0, len(answers) - k + 1, k)]
    return statistics.fmean(_vote([answers[i] for i in block], [right[i] for i in block]) for block in blocks)


def _vote(answers: Sequence[str | None], right: Sequence[bool]) -> bool:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # equal counts keep the order in which they were first met
    return right[answers.index(winner)]


def bootstrap_interval(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % percentile interval of the mean, over the groups of `values`, of each group's mean (Efron 1979).

    A group is a benchmark and its values are those of its problems, which are drawn with replacement within it
    `RESAMPLES` times. The draws depend on the groups' sizes alone: all weights are judged on the same ones.
    """
    means = np.zeros(RESAMPLES)
    for index, group in enumerate(values):
        generator = np.random.Generator(np.random.Philox(key=stream_seed("bootstrap", index)))
        means += _resampled_means(np.asarray(group, dtype=np.float64), generator) / len(values)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """[problems] -> [RESAMPLES], in parts, as all the draws at once may be many."""
    return np.concatenate(
        [
            values[generator.integers(len(values), size=(_RESAMPLES_AT_ONCE, len(values)))].mean(axis=1)
            for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE)
        ]
    )
