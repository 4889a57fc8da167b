"""95 % intervals of means and shares. Free of torch and of SciPy."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean of `count` values with its 95 % interval; `low` and `high` are None where nothing tells its width."""

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Student's t interval of the mean of one value or more; a single one has no interval.

    The interval is cut at `least` and `most`, what such a mean can be: few values may give one that goes beyond.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean=mean, low=None, high=None, count=count)
    margin = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean=mean, low=max(least, mean - margin), high=min(most, mean + margin), count=count)


def share_interval(share: float, trials: int) -> Estimate:
    """Wilson's score interval of a share of `trials` (Wilson 1927): within [0, 1], and sound at 0 and 1."""
    square = NORMAL_QUANTILE**2 / trials
    centre = (share + square / 2) / (1 + square)
    margin = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return Estimate(mean=share, low=max(0.0, centre - margin), high=min(1.0, centre + margin), count=1)


@functools.cache
def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution with `degrees` >= 1 degrees of freedom, to 1e-9."""
    low, high = 0.0, 13.0  # 12.706 at one degree, and falling
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, degrees) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _inside(t: float, degrees: int) -> float:
    """P(|T| < t), the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for order in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (order - 1) / order
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
