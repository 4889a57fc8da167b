"""Compare runs by variant: means with 95 % intervals, differences paired by seed, and curves. Free of torch."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.recipe_file import flatten
from popo_lite.tools.sweep.figures import CURVES, SMOOTHING_STEPS, RunFigures, read_run
from popo_lite.tools.sweep.file import load_sweep, named_values
from popo_lite.tools.sweep.folder import SweepFolder

BOOKKEEPING = ("train.seed", "output.dir", "output.samples_per_step")
"""Settings in which runs of one group may differ."""
LONGEST_NAME = 40
ROUNDING = 1e-12
"""Values that differ by less, relatively or absolutely, are equal but for rounding."""
CONFIDENCE = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
RATIOS = ("pass_at_", "pass_rate", "effective_sample_ratio", "trained_ratio")
"""Beginnings of the names of figures and curves that cannot exceed 1. No figure can be below 0."""


class Estimate(TypedDict):
    """A mean of `count` values with its 95 % interval; `low` and `high` are None if the width is unknown."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Finished runs of one recipe, at most one per seed."""

    name: str
    runs: tuple[RunFigures, ...]

    def by_seed(self, figure: str) -> dict[int, float | None]:
        """Return seed -> value of `figure`."""
        return {run.seed: run.figures.get(figure) for run in self.runs}


def compare(sources: Sequence[Path], *, reach: float) -> dict[str, Any]:
    """Compare the runs and sweeps at `sources` and return plain data for reports, plots and JSON.

    Time and tokens are counted up to a training pass rate of `reach`. Raises UserInputError or CheckpointError if a
    source is neither run nor sweep, or named twice, a single run has not ended, or a group has a seed twice.
    """
    _refuse_repeated([(f"the folder {source.resolve()}", source) for source in sources])
    groups: list[RunGroup] = []
    left_out: list[str] = []
    sweeps = [source for source in sources if SweepFolder(source).sweep_path.is_file()]
    folders = [source.resolve().name for source in sweeps]
    for source, folder in zip(sweeps, folders, strict=True):
        prefix = f"{folder if folders.count(folder) == 1 else source}/" if len(sweeps) > 1 else ""
        groups += _sweep_groups(source, prefix, left_out, reach)
    single = [read_run(source, reach=reach) for source in sources if source not in sweeps]
    groups += _single_groups(single, taken={group.name for group in groups})
    if not groups:
        raise CheckpointError("no run has ended yet", where=", ".join(map(str, sources)))
    return comparison_of(groups, reach=reach, left_out=left_out)


def comparison_of(groups: Sequence[RunGroup], *, reach: float, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Compare `groups` with the first of them. Raises UserInputError if a group has a seed twice."""
    for group in groups:
        _refuse_repeated([(f"seed {run.seed} of {group.name}", run.path) for run in group.runs])
    figures = list(dict.fromkeys(name for group in groups for run in group.runs for name in run.figures))
    first = groups[0]
    return {
        "reach": reach,
        "smoothing_steps": SMOOTHING_STEPS,
        "left_out": list(left_out),
        "groups": [
            {
                "name": group.name,
                "seeds": [run.seed for run in group.runs],
                "runs": [str(run.path) for run in group.runs],
                "figures": {name: estimate(group, name) for name in figures},
                "values": {name: list(group.by_seed(name).values()) for name in figures},
                "differences": {name: difference(group, first, name) for name in figures if group is not first},
                "curves": {name: _band(name, [run.curves[name] for run in group.runs]) for name in CURVES},
            }
            for group in groups
        ],
    }


def estimate(group: RunGroup, figure: str) -> Estimate | None:
    """Return the mean of `figure` over the runs that have it, with its interval; None if none has it.

    Over seeds it is Student's t interval, clipped to the figure's range. A single run's pass@1 has Wilson's interval
    over problems, in which several answers to a problem count as one, so it is too wide rather than too narrow.
    """
    values = list(group.by_seed(figure).values())
    known = [value for value in values if value is not None]
    if not known:
        return None
    if figure.startswith("reach_") and len(known) < len(values):
        # Only the fast runs reached it, so an interval over them would not describe the recipe.
        return Estimate(mean=statistics.fmean(known), low=None, high=None, count=len(known))
    if figure == "pass_at_1" and len(group.runs) == 1:
        return ratio_interval(known[0], group.runs[0].problems)
    return _figure_interval(figure, known)


def difference(group: RunGroup, first: RunGroup, figure: str) -> Estimate | None:
    """Return the mean of `figure` in `group` minus in `first` over their common seeds, with the t interval of pairs.

    None without a common seed, or if one of those runs lacks the figure: only the lucky seeds would be compared.
    """
    ours, theirs = group.by_seed(figure), first.by_seed(figure)
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    gaps = [own - other for own, other in pairs if own is not None and other is not None]
    return mean_interval(gaps) if pairs and len(gaps) == len(pairs) else None


def mean_interval(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Return the mean of one value or more with Student's t interval, clipped to `least` and `most`.

    A single value has no interval. Equal values have none either: a few seeds that agree do not make the mean certain.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or math.isclose(min(values), max(values), rel_tol=ROUNDING, abs_tol=ROUNDING):
        return Estimate(mean=mean, low=None, high=None, count=count)
    margin = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean=mean, low=max(least, mean - margin), high=min(most, mean + margin), count=count)


def ratio_interval(ratio: float, trials: int) -> Estimate:
    """Return Wilson's score interval of a ratio of `trials` (Wilson 1927): within [0, 1], and sound at 0 and 1."""
    square = NORMAL_QUANTILE**2 / trials
    centre = (ratio + square / 2) / (1 + square)
    margin = math.sqrt(square * ratio * (1 - ratio) + square**2 / 4) / (1 + square)
    return Estimate(mean=ratio, low=max(0.0, centre - margin), high=min(1.0, centre + margin), count=1)


@functools.cache
def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t with `degrees` >= 1 degrees of freedom, to 1e-9."""
    # P(|T| < t) by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4. SciPy is no dependency of this package.
    low, high = 0.0, 13.0  # 12.706 at one degree, and falling
    odd = degrees % 2
    while high - low > 1e-10:
        middle = (low + high) / 2
        angle = math.atan(middle / math.sqrt(degrees))
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for order in range(2 + odd, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (order - 1) / order
        inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
        low, high = (middle, high) if inside < CONFIDENCE else (low, middle)
    return (low + high) / 2


def _figure_interval(name: str, values: Sequence[float]) -> Estimate:
    return mean_interval(values, least=0.0, most=1.0 if name.startswith(RATIOS) else math.inf)


def _band(name: str, curves: Sequence[Sequence[float | None]]) -> dict[str, list[float | None]]:
    """Return mean and interval by step over runs; a step for which no run has a value is None."""
    points = []
    for step in range(max(map(len, curves))):
        known = [value for curve in curves for value in curve[step : step + 1] if value is not None]
        points.append(_figure_interval(name, known) if known else None)
    return {
        "mean": [point["mean"] if point else None for point in points],
        "low": [point["low"] if point else None for point in points],
        "high": [point["high"] if point else None for point in points],
    }


def _sweep_groups(source: Path, prefix: str, left_out: list[str], reach: float) -> Iterator[RunGroup]:
    """Yield the variants of a sweep in its order; add the names of unfinished runs to `left_out`."""
    sweep = load_sweep(SweepFolder(source).sweep_path)
    runs = SweepFolder(source).runs(sweep)
    left_out += [f"{prefix}{run.name}: not finished" for run in runs if not run.finished]
    for variant in sweep.variants:
        finished = [run.folder.path for run in runs if run.finished and run.variant.name == variant.name]
        if finished:
            yield RunGroup(name=prefix + variant.name, runs=tuple(read_run(path, reach=reach) for path in finished))


def _single_groups(runs: Sequence[RunFigures], taken: Set[str]) -> list[RunGroup]:
    """Group runs with equal recipes, apart from BOOKKEEPING, and name the groups by the settings that differ.

    They are named by a path if that leaves them alike, or like the names in `taken`.
    """
    grouped: dict[str, tuple[Mapping[str, Any], list[RunFigures]]] = {}
    for run in runs:
        settings = {key: value for key, value in flatten(run.recipe).items() if key not in BOOKKEEPING}
        grouped.setdefault(repr(settings), (settings, []))[1].append(run)
    members = [tuple(group) for _, group in grouped.values()]
    recipes = [settings for settings, _ in grouped.values()]
    keys = sorted({key for settings in recipes for key in settings})
    differing = [key for key in keys if any(settings.get(key) != recipes[0].get(key) for settings in recipes)]
    names = [", ".join(named_values(settings, differing)) for settings in recipes]
    unclear = len({*names} - taken) < len(names) or any(len(name) > LONGEST_NAME for name in names)
    if len(names) == 1 or unclear:
        names = [str(group[0].path) for group in members]
    return [RunGroup(name=name, runs=group) for name, group in zip(names, members, strict=True)]


def _refuse_repeated(items: Sequence[tuple[str, Path]]) -> None:
    """Raise UserInputError if two of the (description, path) pairs have the same description."""
    seen: dict[str, Path] = {}
    for what, path in items:
        if what in seen:
            raise UserInputError(f"{seen[what]} and {path} are both {what}", next_step="leave one of them out")
        seen[what] = path
