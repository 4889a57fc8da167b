"""Turn the records of steps into charts: paths, ticks and values that the page's template draws as SVG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from popo_lite.metrics import METRICS, StepRecord, Unit
from popo_lite.recipe import Recipe
from popo_lite.tools.console import words
from popo_lite.tools.report.files import names_in, number_in
from popo_lite.tools.sweep.compare import ratio_interval

BUCKETS = 120
"""Parts of the x-axis; a curve with more than two points in each is thinned to the least and the largest of a part."""
SMOOTHED = 25
"""Curves are smoothed over this part of the steps: 1 / SMOOTHED."""
MOST_SERIES, LONGEST_LABEL = 8, 40
SIZE = 1000  # of the drawing, in units that the page stretches to any width and height

Values = list[float | None]
Points = list[tuple[float, float | None]]  # x and value; None is a gap

LINES: Sequence[tuple[str, Unit, Sequence[str]]] = (
    ("Entropy", "nats", ("entropy", "sampled_entropy")),
    ("Answer length", "tokens", ("completion_tokens_mean", "positive_tokens_mean")),
    ("Truncated answers", "ratio", ("truncated_ratio",)),
    ("Different answers per prompt", "number", ("unique_answers_mean",)),
    ("Siamese drift", "number", ("siamese_drift",)),
    ("Siamese cosine", "number", ("siamese_cosine",)),
    ("Gap of log-probs, sampler to trainer", "nats", ("logp_gap_mean", "logp_gap_p99")),
    ("Gradient norm", "number", ("grad_norm",)),
    ("Learning rate", "number", ("learning_rate",)),
    ("Rollouts per prompt with a positive", "number", ("rollouts_per_positive_prompt",)),
    ("Level of difficulty", "count", ("level",)),
)
BY_NAME: Sequence[tuple[str, Unit, str]] = (
    ("Rewards by function", "ratio", "rewards"),
    ("Figures of the task", "ratio", "task_figures"),
    ("Throughput by stage", "tokens/s", "tokens_per_second"),
)
EXACT = ("Learning rate", "Siamese drift", "Level of difficulty")  # not smoothed: they do not jump from step to step
GROUPS = {"groups_all_right": 2, "groups_some_right": 0, "groups_none_right": 1, "groups_ungraded": 6}
"""Metric -> colour, bottom area first."""


class Series(NamedTuple):
    """One curve: a value for each x."""

    label: str
    values: Values
    colour: int | None = None  # default: its place among the others


def charts(steps: Sequence[StepRecord], evaluations: Sequence[Mapping[str, Any]], recipe: Recipe) -> Iterator[Any]:
    """Yield every chart that has values, as data for the template."""

    def values(*keys: str) -> Values:
        return [number_in(record, *keys) for record in steps]

    xs = [float(record["step"] + 1) for record in steps]
    if xs or evaluations:
        yield lines("Pass rate", "ratio", xs, [Series("training", values("pass_rate"))], evaluations=evaluations)
    if not xs:
        return
    groups = [Series(METRICS[name].label, values(name), colour) for name, colour in GROUPS.items()]
    yield areas("Groups of answers", "count", xs, groups)
    yield lines("Loss and its terms", "number", xs, loss_terms(values, recipe))
    for title, unit, metrics in LINES:
        yield lines(title, unit, xs, [Series(METRICS[name].label, values(name)) for name in metrics])
    for title, unit, metric in BY_NAME:
        named = [Series(name, values(metric, name)) for name in names_in(steps, metric)]
        yield lines(title, unit, xs, named)
    stages = [Series(name, values("seconds", name)) for name in names_in(steps, "seconds")]
    # Those that take most, so that more than fit lose the least.
    stages.sort(key=lambda series: -sum(value or 0 for value in series.values))
    yield areas("Seconds by stage", "seconds", xs, stages)


def loss_terms(values: Callable[..., Values], recipe: Recipe) -> list[Series]:
    """Return the loss and what each term adds to it, with its coefficient."""
    similarity = getattr(recipe.objective, "similarity_coef", 0.0)
    entropy = zip(values("loss_entropy"), values("entropy_coef"), strict=True)
    terms = [
        Series("loss", values("loss")),
        Series("policy", values("loss_policy")),
        Series("similarity", [None if v is None else similarity * v for v in values("loss_similarity")]),
        Series("entropy", [None if v is None or coef is None else coef * v for v, coef in entropy]),
    ]
    return [terms[0], *(term for term in terms[1:] if any(term.values))]


def lines(
    title: str, unit: Unit, xs: Sequence[float], series: Sequence[Series], evaluations: Sequence[Mapping[str, Any]] = ()
) -> Any:
    """Return a chart of curves, with held-out evaluations as points with intervals; None if there are no values."""
    series = _known(series)
    points = [(number_in(line, "step") or 0.0, rate, line) for line in evaluations
              if (rate := number_in(line, "pass_at_1")) is not None]  # fmt: skip
    found = [value for each in series for value in each.values if value is not None]
    if not found and not points:
        return None
    low, high, ticks = _axis([0.0, 1.0] if evaluations else found)
    first = 0.0 if points else xs[0]
    last = max([*xs, *(x for x, *_ in points)])
    window = 1 if title in EXACT else max(1, len(xs) // SMOOTHED) | 1
    scale = _Scale(first, last, low, high)
    drawn: list[Any] = []
    data: list[tuple[Series, Points]] = []
    for each in series:
        raw = thinned(list(zip(xs, each.values, strict=True)))
        smooth = thinned(list(zip(xs, smoothed(each.values, window), strict=True)))
        pale = scale.path(raw) if window > 1 and len(series) <= 2 else ""
        drawn.append({"colour": each.colour, "path": scale.path(smooth), "pale": pale})
        data.append((each, smooth))
    dots = []
    for x, rate, line in points:
        interval = rate_interval(line)
        dots.append({
            "left": scale.left(x), "top": scale.top(rate), "bar": scale.top(interval["high"]),
            "height": round(scale.top(interval["low"]) - scale.top(interval["high"]), 2),
            "label": f"step {x:,.0f}: {rate_text(line)} on held-out problems",
        })  # fmt: skip
    if points:
        data.append((Series("held-out", [], 1), [(x, rate) for x, rate, _ in points]))
    return _chart(title, unit, data, ticks, scale) | {"lines": drawn, "dots": dots, "window": window}


def rate_interval(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return pass@1 of an evaluation with its 95 % interval."""
    return ratio_interval(line["pass_at_1"], max(1, int(number_in(line, "problems") or 1)))


def rate_text(line: Mapping[str, Any]) -> str:
    """Return pass@1 with its 95 % interval for people to read."""
    mean, low, high = (words.share(rate_interval(line)[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def areas(title: str, unit: Unit, xs: Sequence[float], series: Sequence[Series]) -> Any:
    """Return a chart of stacked areas; None if there are no values. Parts of the x-axis are averaged, to add up."""
    series = _known(series)
    if not series:
        return None
    size = math.ceil(len(xs) / BUCKETS)
    starts = range(0, len(xs), size)
    places = [statistics.fmean(xs[i : i + size]) for i in starts]
    means = [[statistics.fmean(v or 0.0 for v in each.values[i : i + size]) for i in starts] for each in series]
    tops = [
        [0.0] * len(places),
        *accumulate(means, lambda below, own: [a + b for a, b in zip(below, own, strict=True)]),
    ]
    low, high, ticks = _axis([0.0, *tops[-1]])
    if len(places) == 1:  # an area needs a width
        places, means = [places[0], places[0] + 1], [[*each, *each] for each in means]
        tops = [[*each, *each] for each in tops]
    else:
        places[0], places[-1] = xs[0], xs[-1]
    scale = _Scale(places[0], places[-1], low, high)
    drawn = []
    for index, each in enumerate(series):
        edge = [*zip(places, tops[index + 1], strict=True), *reversed([*zip(places, tops[index], strict=True)])]
        drawn.append({"colour": each.colour, "path": scale.path(list(edge)) + "z"})
    data: list[tuple[Series, Points]] = [
        (each, list(zip(places, mean, strict=True))) for each, mean in zip(series, means, strict=True)
    ]
    return _chart(title, unit, data, ticks, scale) | {"areas": drawn, "window": size}


def smoothed(values: Values, window: int) -> Values:
    """Return the mean of the known values among `window`, an odd number, around each one; a gap stays a gap."""
    sums = list(accumulate((value or 0.0 for value in values), initial=0.0))
    counts = list(accumulate((value is not None for value in values), initial=0))
    found: Values = []
    for index, value in enumerate(values):
        start, end = max(0, index - window // 2), min(len(values), index + window // 2 + 1)
        found.append(None if value is None else (sums[end] - sums[start]) / (counts[end] - counts[start]))
    return found


def thinned(points: Points) -> Points:
    """Return `points` with only the least and the largest value of each part, in their order; a gap if all are."""
    if len(points) <= 2 * BUCKETS:
        return points
    kept: Points = []
    size = math.ceil(len(points) / BUCKETS)
    for start in range(0, len(points), size):
        part = [(value, x) for x, value in points[start : start + size] if value is not None]
        if part:
            kept += sorted({(x, value) for value, x in (min(part), max(part))})
        else:
            kept.append((points[start][0], None))
    return kept


class _Scale:
    """Turn x and value into places on the drawing."""

    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        self.first, self.last, self.low, self.high = first, last, low, high

    def left(self, x: float) -> float:
        return round(100 * (x - self.first) / ((self.last - self.first) or 1), 2)

    def top(self, value: float) -> float:
        return round(100 * (self.high - value) / (self.high - self.low), 2)

    def path(self, points: Points) -> str:
        """Return the path of an SVG; a point between two gaps becomes a dot."""
        parts, pen = [], "M"
        for x, value in points:
            if value is None:
                pen = "M"
                continue
            at = f"{round(self.left(x) * SIZE / 100)} {round(self.top(value) * SIZE / 100)}"
            parts.append(f"{pen}{at}" + ("h0" if pen == "M" else ""))
            pen = "L"
        return "".join(parts)


def _known(series: Sequence[Series]) -> list[Series]:
    """Return the first few series that have values, with labels that fit."""
    known = [each for each in series if any(value is not None for value in each.values)]
    return [
        Series(words.clean(label)[:LONGEST_LABEL], values, index if colour is None else colour)
        for index, (label, values, colour) in enumerate(known[:MOST_SERIES])
    ]


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return the ends of an axis for `values`, and three to six round ticks on it."""
    low, high = min(values), max(values)
    if low > 0 and low < high / 2:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # all are equal
        margin = abs(high) / 2 or 1.0
        low, high = low - margin if low else 0.0, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= 4.5)
    ticks = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return low, high, ticks


def _text(value: float | None, unit: Unit) -> str:
    """Return a value of a chart with its unit, to four digits."""
    if value is None or unit in ("ratio", "seconds"):
        return words.quantity(value, unit)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _chart(title: str, unit: Unit, data: Sequence[tuple[Series, Points]], ticks: Sequence[float], scale: _Scale) -> Any:
    """Return what all charts have: ticks, a legend, a table, and the values to show under the pointer."""
    rows = {}
    for part in range(11):
        x = scale.first + (scale.last - scale.first) * part / 10
        nearest = [min(points, key=lambda point: abs(point[0] - x))[1] for _, points in data]
        rows[f"{x:,.0f}"] = [_text(value, unit) for value in nearest]
    legend, exact = [], []
    for series, points in data:
        known = [value for _, value in points if value is not None]
        legend.append({"colour": series.colour, "label": series.label, "value": _text(known[-1], unit)})
        values = [value if value is None else float(f"{value:.4g}") for _, value in points]
        exact.append({"label": series.label, "colour": series.colour, "x": [x for x, _ in points], "y": values})
    pointed = {"unit": unit, "first": scale.first, "last": scale.last, "series": exact}
    return {
        "title": title,
        "unit": {"number": "", "count": "", "ratio": ""}.get(unit, unit),
        "table": [(x, *cells) for x, cells in rows.items()],
        "legend": legend,
        "first": f"{scale.first:,.0f}",
        "last": f"{scale.last:,.0f}",
        "ticks": [(scale.top(tick), f"{100 * tick:.3g}%" if unit == "ratio" else f"{tick:,.6g}") for tick in ticks],
        "data": json.dumps(pointed, separators=(",", ":")),
    }
