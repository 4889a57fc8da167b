"""Compare runs by variant: means with 95 % intervals, differences paired by seed, and curves. Free of torch."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.formats import reading
from popo_lite.recipe_file import flatten
from popo_lite.run_folder import RunFolder, changed_keys, read_lines
from popo_lite.tools.sweep.folder import SweepFolder, load_sweep, named_values

BOOKKEEPING = ("train.seed", "data.date", "output.dir", "output.samples_per_step")  # may differ within a group
LONGEST_NAME = 40  # of a group of single runs
ROUNDING = 1e-12  # values that differ by less, relatively or absolutely, are equal but for rounding
CONFIDENCE = 0.95
# Beginnings of the names of figures and curves that cannot exceed 1. No figure can be below 0.
RATIOS = ("pass_at_", "pass_rate", "effective_sample_ratio", "trained_ratio")
SMOOTHING_STEPS = 5  # of the trailing mean in curves and for reaching a pass rate
LAST_RATIO = 0.1  # of a run's steps: the part over which the figures of training are averaged
# Metrics that are drawn step by step, averaged over the last steps, and summed over the run. Figures have their names.
CURVES = ("pass_rate", "completion_tokens_mean", "sampled_entropy", "effective_sample_ratio", "siamese_drift",
          "trained_tokens")  # fmt: skip
AVERAGED = ("pass_rate", "completion_tokens_mean", "unique_answers_mean", "sampled_entropy", "entropy",
            "effective_sample_ratio")  # fmt: skip
TOTALS = ("rollout_tokens", "tokens_of_all", "tokens_of_positives", "tokens_of_mixed_groups", "trained_tokens",
          "shared_tokens")  # fmt: skip

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


def compare(sources: Sequence[Path], *, reach: float) -> dict[str, Any]:
    """Compare the runs and sweeps at `sources`, with costs up to a training pass rate of `reach`; return plain data.

    Raises UserInputError or CheckpointError if a source is neither run nor sweep, or named twice, a single run has not
    ended, or a group has a seed twice.
    """
    _refuse_repeated((f"the folder {source.resolve()}", source) for source in sources)
    groups: dict[str, list[RunFigures]] = {}
    left_out: list[str] = []
    sweeps = [source for source in sources if SweepFolder(source).sweep_path.is_file()]
    folders = [source.resolve().name for source in sweeps]
    for source, folder in zip(sweeps, folders, strict=True):
        prefix = f"{folder if folders.count(folder) == 1 else source}/" if len(sweeps) > 1 else ""
        sweep = load_sweep(SweepFolder(source).sweep_path)
        groups |= {prefix + variant.name: [] for variant in sweep.variants}
        for run in SweepFolder(source).runs(sweep):
            if run.state == "finished":
                groups[prefix + run.variant.name].append(read_run(run.folder.path, reach=reach))
            else:
                left_out.append(f"{prefix}{run.name}: not finished")
    groups = {name: runs for name, runs in groups.items() if runs}
    # Single runs are grouped by recipe, apart from BOOKKEEPING, and named after the settings that differ.
    single = [read_run(source, reach=reach) for source in sources if source not in sweeps]
    recipes = [flatten(RunFolder(run.path).recipe()) for run in single]
    differing = sorted({key for recipe in recipes for key in changed_keys(recipes[0], recipe)}.difference(BOOKKEEPING))
    alike: dict[str, list[RunFigures]] = {}
    for one, recipe in zip(single, recipes, strict=True):
        alike.setdefault(", ".join(named_values(recipe, differing)), []).append(one)
    if len(alike) == 1 or not groups.keys().isdisjoint(alike) or any(len(name) > LONGEST_NAME for name in alike):
        alike = {str(members[0].path): members for members in alike.values()}
    groups |= {name if name not in groups else str(runs[0].path.resolve()): runs for name, runs in alike.items()}
    if not groups:
        raise CheckpointError("no run has ended yet", where=", ".join(map(str, sources)))
    return {**comparison_of(groups, reach=reach), "left_out": left_out}


def comparison_of(groups: Mapping[str, Sequence[RunFigures]], *, reach: float) -> dict[str, Any]:
    """Compare `groups`, name -> finished runs, with the first, by seed. Raises UserInputError if one repeats a seed."""
    names = list(dict.fromkeys(figure for runs in groups.values() for run in runs for figure in run.figures))
    compared: list[dict[str, Any]] = []
    first: dict[int, RunFigures] = {}  # the first group's runs by seed
    for group, runs in groups.items():
        _refuse_repeated((f"seed {run.seed} of {group}", run.path) for run in runs)
        values = {name: [run.figures.get(name) for run in runs] for name in names}
        differences: dict[str, Estimate | None] = {}
        for name in names if first else ():
            pairs = [(run.figures.get(name), first[run.seed].figures.get(name)) for run in runs if run.seed in first]
            gaps = [own - other for own, other in pairs if own is not None and other is not None]
            # If a run lacks the figure, the others would be a comparison of lucky seeds.
            differences[name] = mean_interval(gaps) if gaps and len(gaps) == len(pairs) else None
        curves: dict[str, dict[str, Values]] = {}
        for name in CURVES:
            points = itertools.zip_longest(*(run.curves[name] for run in runs))
            estimates = [_estimate(name, point, 0) or {} for point in points]
            curves[name] = {part: [each.get(part) for each in estimates] for part in ("mean", "low", "high")}
        compared.append({
            "name": group, "seeds": [run.seed for run in runs], "runs": [str(run.path) for run in runs],
            "figures": {name: _estimate(name, values[name], runs[0].problems) for name in names}, "values": values,
            "differences": differences, "curves": curves,
        })  # fmt: skip
        first = first or {run.seed: run for run in runs}
    return {"reach": reach, "smoothing_steps": SMOOTHING_STEPS, "left_out": [], "groups": compared}


def mean_interval(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """Return the mean of one value or more with Student's t interval, clipped to `least` and `most`."""
    mean, count = statistics.fmean(values), len(values)
    # A single value has no interval, and equal values have none: a few seeds that agree do not make the mean certain.
    if math.isclose(min(values), max(values), rel_tol=ROUNDING, abs_tol=ROUNDING):
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
    from mpmath import betainc, findroot

    def excess(t: float) -> Any:  # P(|T| > t) by Abramowitz and Stegun 26.7.1 and 26.5.27
        return betainc(degrees / 2, 0.5, 0, degrees / (degrees + t**2), regularized=True) - (1 - CONFIDENCE)

    return float(findroot(excess, (1.9, 13.0), solver="anderson"))  # 12.71 at one degree, 1.96 in the limit


def _estimate(name: str, values: Values, problems: int) -> Estimate | None:
    """Return the mean over the runs that have a figure or a step's value, with its interval; None if none has it."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    # Over problems, in which several answers to a problem count as one: too wide rather than too narrow.
    if name == "pass_at_1" and len(values) == 1:
        return ratio_interval(known[0], problems)
    found = mean_interval(known, least=0.0, most=1.0 if name.startswith(RATIOS) else math.inf)
    # If only the fast runs reached a pass rate, an interval over them would not describe the recipe.
    return {**found, "low": None, "high": None} if name.startswith("reach_") and len(known) < len(values) else found


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
    if not run.ended:
        raise CheckpointError("the run has not ended", where=str(path), next_step=run.resume_command)
    with reading(run.summary_path):
        after = dict(run.summary()["after"] or {})
    steps = read_lines(run.metrics_path)
    with reading(run.metrics_path):
        figures, curves = _figures_of(run, steps, after, reach)
        problems = after.get("problems", 0) + 0
    return RunFigures(path, recipe.train.seed, figures, curves, problems)


def _figures_of(
    run: RunFolder, steps: Sequence[Mapping[str, Any]], after: Mapping[str, Any], reach: float
) -> tuple[dict[str, Any], Mapping[str, Values]]:
    """Return the figures and curves of a run with these records. `after` is its evaluation after training."""
    try:
        by_step = {name: [line[name] for line in steps] for name in (*AVERAGED, *TOTALS, *CURVES, "seconds")}
    except KeyError as error:
        what = f"its steps lack the metric {error.args[0]}: another version of popo-lite wrote them"
        raise CheckpointError(what, where=str(run.metrics_path), next_step="train it again, or leave it out") from error
    by_step["seconds"] = [math.fsum(stages.values()) for stages in by_step["seconds"]]
    last = max(1, math.ceil(LAST_RATIO * len(steps)))
    means = {name: _mean(by_step[name][-last:]) for name in AVERAGED}
    totals = {name: sum(by_step[name]) for name in (*TOTALS, "seconds")}
    entropy, start = means["sampled_entropy"], by_step["sampled_entropy"][0]
    curves = {name: smoothed(by_step[name]) for name in CURVES}
    window = min(SMOOTHING_STEPS, len(steps))  # only whole windows count
    reached = (end for end, rate in enumerate(curves["pass_rate"], 1) if end >= window and (rate or 0.0) >= reach)
    end = next(reached, None)
    costs = {name: sum(by_step[name][:end]) for name in ("seconds", "rollout_tokens", "trained_tokens")}
    figures = {
        "pass_at_1": after.get("pass_at_1"),
        **{f"pass_at_{k}": rate for k, rate in (after.get("pass_at_k") or {}).items() if k != "1"},
        "held_out_tokens": after.get("completion_tokens_mean"),
        **means, **totals,
        "trained_ratio": (totals["trained_tokens"] + totals["shared_tokens"]) / totals["tokens_of_all"],
        "sampled_entropy_over_start": entropy / start if entropy is not None and start else None,
        "siamese_drift": by_step["siamese_drift"][-1],
        **{f"reach_{name}": None if end is None else cost for name, cost in {"steps": end, **costs}.items()},
    }  # fmt: skip
    # Not smoothed: these do not jump from step to step.
    curves["siamese_drift"] = by_step["siamese_drift"]
    curves["trained_tokens"] = list(itertools.accumulate(by_step["trained_tokens"]))
    for value in itertools.chain(figures.values(), *curves.values()):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{value} in place of a number")
    return figures, curves


def smoothed(values: Values) -> list[float | None]:
    """Return the mean of each value and those before it, SMOOTHING_STEPS in all; None if all of them are."""
    return [_mean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
