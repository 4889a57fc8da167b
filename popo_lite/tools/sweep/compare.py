"""Compare runs by variant: means with 95 % intervals, differences paired by seed, and curves. Free of torch."""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.metrics import StepRecord
from popo_lite.recipe_file import flatten
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.tools.sweep.folder import SweepFolder, load_sweep, named_values

BOOKKEEPING = ("train.seed", "output.dir", "output.samples_per_step")
"""Settings in which runs of one group may differ."""
LONGEST_NAME = 40
ROUNDING = 1e-12
"""Values that differ by less, relatively or absolutely, are equal but for rounding."""
CONFIDENCE = 0.95
RATIOS = ("pass_at_", "pass_rate", "effective_sample_ratio", "trained_ratio")
"""Beginnings of the names of figures and curves that cannot exceed 1. No figure can be below 0."""
SMOOTHING_STEPS = 5
"""Steps of the trailing mean in curves and for reaching a pass rate."""
LAST_RATIO = 0.1
"""The figures of training are means over this last part of a run's steps."""
CURVES = ("pass_rate", "completion_tokens_mean", "sampled_entropy", "effective_sample_ratio", "siamese_drift",
          "trained_tokens")  # fmt: skip
"""Metrics that are drawn step by step."""
AVERAGED = ("pass_rate", "completion_tokens_mean", "unique_answers_mean", "sampled_entropy", "entropy",
            "effective_sample_ratio")  # fmt: skip
"""Metrics averaged over the last steps; the figures have the same names."""
TOTALS = ("rollout_tokens", "tokens_of_all", "tokens_of_positives", "tokens_of_mixed_groups", "trained_tokens")
"""Metrics summed over the run; the figures have the same names."""

Values = Sequence[float | None]
Estimate = dict[str, Any]
"""`mean` of `count` values with its 95 % interval; `low` and `high` are None if the width is unknown."""


class RunFigures(NamedTuple):
    """One finished run: its figures, None if not measured or not reached, and CURVES, with one value per step."""

    path: Path
    seed: int
    figures: Mapping[str, float | None]
    curves: Mapping[str, Values]
    problems: int


Group = tuple[str, Sequence[RunFigures]]
"""A name, and the finished runs of one recipe, at most one per seed."""


def compare(sources: Sequence[Path], *, reach: float) -> dict[str, Any]:
    """Compare the runs and sweeps at `sources`, with costs up to a training pass rate of `reach`; return plain data.

    Raises UserInputError or CheckpointError if a source is neither run nor sweep, or named twice, a single run has not
    ended, or a group has a seed twice.
    """
    _refuse_repeated((f"the folder {source.resolve()}", source) for source in sources)
    groups: list[Group] = []
    left_out: list[str] = []
    sweeps = [source for source in sources if SweepFolder(source).sweep_path.is_file()]
    folders = [source.resolve().name for source in sweeps]
    for source, folder in zip(sweeps, folders, strict=True):
        prefix = f"{folder if folders.count(folder) == 1 else source}/" if len(sweeps) > 1 else ""
        sweep = load_sweep(SweepFolder(source).sweep_path)
        runs = SweepFolder(source).runs(sweep)
        left_out += [f"{prefix}{run.name}: not finished" for run in runs if run.state != "finished"]
        for variant in sweep.variants:
            ended = [run.folder.path for run in runs if run.state == "finished" and run.variant is variant]
            if ended:
                groups.append((prefix + variant.name, [read_run(path, reach=reach) for path in ended]))
    single = [read_run(source, reach=reach) for source in sources if source not in sweeps]
    groups += _single_groups(single, taken={name for name, _ in groups})
    if not groups:
        raise CheckpointError("no run has ended yet", where=", ".join(map(str, sources)))
    return comparison_of(groups, reach=reach, left_out=left_out)


def comparison_of(groups: Sequence[Group], *, reach: float, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Compare `groups` with the first of them. Raises UserInputError if a group has a seed twice."""
    names = list(dict.fromkeys(figure for _, runs in groups for run in runs for figure in run.figures))
    compared: list[dict[str, Any]] = []
    for group, runs in groups:
        _refuse_repeated((f"seed {run.seed} of {group}", run.path) for run in runs)
        values = {name: [run.figures.get(name) for run in runs] for name in names}
        first = {run.seed: run.figures for run in groups[0][1]}
        pairs = [(run.figures, first[run.seed]) for run in runs if run.seed in first] if compared else []
        compared.append({
            "name": group, "seeds": [run.seed for run in runs], "runs": [str(run.path) for run in runs],
            "figures": {name: _estimate(name, values[name], runs[0].problems) for name in names}, "values": values,
            "differences": {name: _difference(name, pairs) for name in names} if compared else {},
            "curves": {name: _band(name, [run.curves[name] for run in runs]) for name in CURVES},
        })  # fmt: skip
    return {"reach": reach, "smoothing_steps": SMOOTHING_STEPS, "left_out": list(left_out), "groups": compared}


def mean_interval(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Return the mean of one value or more with Student's t interval, clipped to `least` and `most`.

    A single value has no interval. Equal values have none either: a few seeds that agree do not make the mean certain.
    """
    mean, count = statistics.fmean(values), len(values)
    if count < 2 or math.isclose(min(values), max(values), rel_tol=ROUNDING, abs_tol=ROUNDING):
        return {"mean": mean, "low": None, "high": None, "count": count}
    margin = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return {"mean": mean, "low": max(least, mean - margin), "high": min(most, mean + margin), "count": count}


def ratio_interval(ratio: float, trials: int) -> Estimate:
    """Return Wilson's score interval of a ratio of `trials` (Wilson 1927): within [0, 1], and sound at 0 and 1."""
    square = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2 / trials
    centre = (ratio + square / 2) / (1 + square)
    margin = math.sqrt(square * ratio * (1 - ratio) + square**2 / 4) / (1 + square)
    return {"mean": ratio, "low": max(0.0, centre - margin), "high": min(1.0, centre + margin), "count": 1}


@functools.cache
def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t with `degrees` >= 1 degrees of freedom, to 1e-9."""
    # P(|T| < t) is the integral of cos^(degrees - 1) up to atan(t / sqrt(degrees)) over that up to pi / 2, by the
    # reduction formula, as in Abramowitz and Stegun 26.7.3 and 26.7.4. SciPy is no dependency of this package.
    low, high = 0.0, 13.0  # 12.706 at one degree, and falling
    while high - low > 1e-10:
        angle = math.atan((low + high) / 2 / math.sqrt(degrees))
        part, whole = (angle, math.pi / 2) if degrees % 2 else (math.sin(angle), 1.0)
        for power in range(3 - degrees % 2, degrees, 2):
            part = (math.cos(angle) ** (power - 1) * math.sin(angle) + (power - 1) * part) / power
            whole *= (power - 1) / power
        low, high = ((low + high) / 2, high) if part / whole < CONFIDENCE else (low, (low + high) / 2)
    return (low + high) / 2


def _estimate(name: str, values: Values, problems: int) -> Estimate | None:
    """Return the mean over the runs that have a figure or a step's value, with its interval; None if none has it.

    Over seeds it is Student's t interval, clipped to the possible range. A single run's pass@1 has Wilson's interval
    over problems, in which several answers to a problem count as one, so it is too wide rather than too narrow.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if name == "pass_at_1" and len(values) == 1:
        return ratio_interval(known[0], problems)
    found = mean_interval(known, least=0.0, most=1.0 if name.startswith(RATIOS) else math.inf)
    # If only the fast runs reached a pass rate, an interval over them would not describe the recipe.
    return {**found, "low": None, "high": None} if name.startswith("reach_") and len(known) < len(values) else found


def _difference(name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Estimate | None:
    """Return the mean of a figure minus that of the first group's run with the same seed, with the t interval of pairs.

    None without a common seed, or if one of those runs lacks the figure: only the lucky seeds would be compared.
    """
    values: list[tuple[Any, Any]] = [(own.get(name), other.get(name)) for own, other in pairs]
    if not values or any(None in pair for pair in values):
        return None
    return mean_interval([own - other for own, other in values])


def _band(name: str, curves: Sequence[Values]) -> dict[str, Values]:
    """Return mean and interval by step over runs; a step for which no run has a value is None."""
    points = [_estimate(name, values, 0) or {} for values in itertools.zip_longest(*curves)]
    return {part: [point.get(part) for point in points] for part in ("mean", "low", "high")}


def _single_groups(runs: Sequence[RunFigures], taken: Set[str]) -> list[Group]:
    """Group runs with equal recipes, apart from BOOKKEEPING, and name the groups by the settings that differ.

    They are named by a path if that leaves them alike, or like the names in `taken`.
    """
    grouped: dict[str, tuple[Mapping[str, Any], list[RunFigures]]] = {}
    for run in runs:
        values = flatten(RunFolder(run.path).recipe())
        settings = {key: value for key, value in values.items() if key not in BOOKKEEPING}
        grouped.setdefault(repr(settings), (settings, []))[1].append(run)
    recipes, members = [settings for settings, _ in grouped.values()], [group for _, group in grouped.values()]
    keys = sorted({key for settings in recipes for key in settings})
    differing = [key for key in keys if any(settings.get(key) != recipes[0].get(key) for settings in recipes)]
    names = [", ".join(named_values(settings, differing)) for settings in recipes]
    if len(names) == 1 or len({*names} - taken) < len(names) or any(len(name) > LONGEST_NAME for name in names):
        names = [str(group[0].path) for group in members]
    return list(zip(names, members, strict=True))


def _refuse_repeated(items: Iterable[tuple[str, Path]]) -> None:
    """Raise UserInputError if two of the (description, path) pairs have the same description."""
    seen: dict[str, Path] = {}
    for what, path in items:
        if seen.setdefault(what, path) is not path:
            raise UserInputError(f"{seen[what]} and {path} are both {what}", next_step="leave one of them out")


def read_run(path: Path, *, reach: float) -> RunFigures:
    """Return the figures of the finished run at `path`, with time and tokens to a training pass rate of `reach`.

    Raises CheckpointError if there is no run, it has not ended, or its records lack a metric.
    """
    run = RunFolder(path)
    recipe = run.recipe()
    if not run.summary_path.is_file():
        next_step = f"popo-lite train {run.recipe_path} --resume --output {path}"
        raise CheckpointError("the run has not ended", where=str(path), next_step=next_step)
    after = json.loads(run.summary_path.read_text(encoding="utf-8"))["after"] or {}
    steps = read_lines(run.metrics_path)
    try:
        figures = {
            "pass_at_1": after.get("pass_at_1"),
            **{f"pass_at_{k}": rate for k, rate in (after.get("pass_at_k") or {}).items() if k != "1"},
            "held_out_tokens": after.get("completion_tokens_mean"),
            **_of_steps(steps, reach),
        }
        by_step = {name: [line[name] for line in steps] for name in CURVES}
    except KeyError as error:
        what = f"its steps lack the metric {error.args[0]}: another version of popo-lite wrote them"
        next_step = "train the run again, or leave it out"
        raise CheckpointError(what, where=str(run.metrics_path), next_step=next_step) from error
    curves = {name: smoothed(values) for name, values in by_step.items()}
    curves["siamese_drift"] = by_step["siamese_drift"]
    curves["trained_tokens"] = list(itertools.accumulate(by_step["trained_tokens"]))
    return RunFigures(path, recipe.train.seed, figures, curves, after.get("problems", 0))


def smoothed(values: Values) -> list[float | None]:
    """Return the mean of each value and those before it, SMOOTHING_STEPS in all; None if all of them are."""
    return [_mean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def _of_steps(steps: Sequence[StepRecord], reach: float) -> dict[str, float | None]:
    """Return the figures of training, and what it took until the smoothed pass rate first was `reach`."""

    def seconds(steps: Sequence[StepRecord]) -> float:
        return math.fsum(seconds for line in steps for seconds in line["seconds"].values())

    last = steps[-max(1, math.ceil(LAST_RATIO * len(steps))) :]
    means = {name: _mean([line[name] for line in last]) for name in AVERAGED}
    totals = {name: sum(line[name] for line in steps) for name in TOTALS}
    entropy, start = means["sampled_entropy"], steps[0]["sampled_entropy"]
    rates = smoothed([line["pass_rate"] for line in steps])
    window = min(SMOOTHING_STEPS, len(steps))  # only whole windows count
    end = next((end for end, rate in enumerate(rates, 1) if end >= window and rate is not None and rate >= reach), None)
    spent = steps[:end]
    costs = {"reach_steps": float(len(spent)), "reach_seconds": seconds(spent)}
    costs |= {f"reach_{name}": sum(line[name] for line in spent) for name in ("rollout_tokens", "trained_tokens")}
    return {
        **means, **totals, "trained_ratio": totals["trained_tokens"] / totals["tokens_of_all"],
        "sampled_entropy_over_start": entropy / start if entropy is not None and start else None,
        "siamese_drift": steps[-1]["siamese_drift"], "seconds": seconds(steps),
        **{name: None if end is None else cost for name, cost in costs.items()},
    }  # fmt: skip


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
