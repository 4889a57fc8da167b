"""Runs grouped by variant: figures with 95 % intervals, differences paired by seed, and curves. Free of torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.recipe_file import to_toml
from popo_lite.tools.sweep.figures import CURVES, SHARES, SMOOTHING_STEPS, RunFigures, read_run
from popo_lite.tools.sweep.file import flat_recipe, load_sweep
from popo_lite.tools.sweep.folder import SweepFolder
from popo_lite.tools.sweep.intervals import Estimate, mean_interval, share_interval

BOOKKEEPING = ("train.seed", "output.dir", "output.samples_per_step")
"""Keys in which runs of one group may differ."""
LONGEST_NAME = 40
SAME = 1e-12
"""Figures that differ by less, of their size or at all, differ by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Finished runs of one recipe, at most one a seed."""

    name: str
    runs: tuple[RunFigures, ...]

    def by_seed(self, measure: str) -> dict[int, float | None]:
        """Seed -> value of `measure`."""
        return {run.seed: run.figures.get(measure) for run in self.runs}


def compare(sources: Sequence[Path], *, reach: float) -> dict[str, Any]:
    """Compare the runs and sweeps at `sources` as plain data for reports, plots and JSON.

    `reach` is the training pass rate to which time and tokens are counted. Raises UserInputError or CheckpointError
    where a source is neither run nor sweep, or named twice, a single run has not ended, or a group has a seed twice.
    """
    _refuse_named_twice(sources)
    groups: list[RunGroup] = []
    single: list[RunFigures] = []
    left_out: list[str] = []
    sweeps = [source for source in sources if SweepFolder(source).sweep_path.is_file()]
    folders = [sweep.resolve().name for sweep in sweeps]
    for source in sources:
        if source in sweeps:
            folder = source.resolve().name
            prefix = f"{folder if folders.count(folder) == 1 else source}/" if len(sweeps) > 1 else ""
            groups += _sweep_groups(source, prefix, left_out, reach)
        else:
            single.append(read_run(source, reach=reach))
    groups += _single_groups(single, taken={group.name for group in groups})
    if not groups:
        raise CheckpointError("no run has ended yet", where=", ".join(map(str, sources)))
    return comparison_of(groups, reach=reach, left_out=left_out)


def comparison_of(groups: Sequence[RunGroup], *, reach: float, left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison of `groups`, held against the first of them. Raises UserInputError for a seed twice in a group."""
    for group in groups:
        _refuse_twice(group)
    measures = list(dict.fromkeys(key for group in groups for run in group.runs for key in run.figures))
    return {
        "reach": reach,
        "smoothing_steps": SMOOTHING_STEPS,
        "left_out": list(left_out),
        "groups": [_described(group, groups[0], measures) for group in groups],
    }


def estimate(group: RunGroup, measure: str) -> Estimate | None:
    """Mean of `measure` over the runs that have it, with its interval; None where none has.

    Over seeds, Student's t, cut at what the measure can be. A single run's pass@1 has Wilson's interval over problems,
    in which several answers to a problem count as one, so it is rather too wide than too narrow. No interval is stated
    where all seeds agree, nor of what it took to reach a pass rate that some did not reach.
    """
    values = group.by_seed(measure).values()
    known = [value for value in values if value is not None]
    if not known:
        return None
    if measure.startswith("reach_") and len(known) < len(values):
        # Those that got there are the quick ones: an interval of theirs would speak of no recipe.
        return Estimate(mean=statistics.fmean(known), low=None, high=None, count=len(known))
    if measure == "pass_at_1" and len(group.runs) == 1:
        return share_interval(known[0], group.runs[0].problems)
    return _mean(measure, known)


def difference(group: RunGroup, first: RunGroup, measure: str) -> Estimate | None:
    """Mean of `measure` in `group` minus in `first`, over the seeds of both, with Student's t interval of the pairs.

    None where no seed is in both, or a run of them lacks the figure: of a pass rate that only some reach, the
    lucky seeds would be compared.
    """
    ours, theirs = group.by_seed(measure), first.by_seed(measure)
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    gaps = [own - other for own, other in pairs if own is not None and other is not None]
    return _over_seeds(gaps) if pairs and len(gaps) == len(pairs) else None


def _described(group: RunGroup, first: RunGroup, measures: Sequence[str]) -> dict[str, Any]:
    figures = {measure: estimate(group, measure) for measure in measures}
    differences = {measure: difference(group, first, measure) for measure in measures} if group is not first else {}
    return {
        "name": group.name,
        "seeds": [run.seed for run in group.runs],
        "runs": [str(run.path) for run in group.runs],
        "figures": {key: asdict(found) if found else None for key, found in figures.items()},
        "values": {measure: list(group.by_seed(measure).values()) for measure in measures},
        "differences": {key: asdict(found) if found else None for key, found in differences.items()},
        "curves": {key: _band(key, [run.curves[key] for run in group.runs]) for key in CURVES},
    }


def _mean(measure: str, values: Sequence[float]) -> Estimate:
    return _over_seeds(values, least=0.0, most=1.0 if measure.startswith(SHARES) else math.inf)


def _over_seeds(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> Estimate:
    found = mean_interval(values, least=least, most=most)
    if math.isclose(min(values), max(values), rel_tol=SAME, abs_tol=SAME):
        # A few seeds that agree do not make the mean certain, and nothing tells how uncertain it is.
        return replace(found, low=None, high=None)
    return found


def _band(measure: str, courses: Sequence[Sequence[float | None]]) -> dict[str, list[float | None]]:
    """Mean and interval by step over runs; a step that no run has a figure for is None."""
    points = []
    for step in range(max(map(len, courses))):
        known = [value for course in courses for value in course[step : step + 1] if value is not None]
        points.append(_mean(measure, known) if known else None)
    return {
        "mean": [point.mean if point else None for point in points],
        "low": [point.low if point else None for point in points],
        "high": [point.high if point else None for point in points],
    }


def _sweep_groups(source: Path, prefix: str, left_out: list[str], reach: float) -> list[RunGroup]:
    """The variants of a sweep in its order; runs that have not ended are told in `left_out`."""
    folder = SweepFolder(source)
    sweep = load_sweep(folder.sweep_path)
    runs = folder.runs(sweep)
    left_out += [f"{prefix}{run.name}: not finished" for run in runs if not run.finished]
    groups = (
        RunGroup(
            name=f"{prefix}{variant.name}",
            runs=tuple(
                read_run(run.folder.path, reach=reach)
                for run in runs
                if run.finished and run.variant.name == variant.name
            ),
        )
        for variant in sweep.variants
    )
    return [group for group in groups if group.runs]


def _single_groups(runs: Sequence[RunFigures], taken: Set[str]) -> list[RunGroup]:
    """Runs with equal recipes, apart from BOOKKEEPING, together; named by what differs between the groups.

    Named by a path where that does not tell them apart, from each other or from the names `taken`.
    """
    grouped: dict[str, list[RunFigures]] = {}
    for run in runs:
        grouped.setdefault(repr(_settings(run)), []).append(run)
    settings = [_settings(members[0]) for members in grouped.values()]
    keys = sorted({key for one in settings for key in one})
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    names = [_name(one, differing) for one in settings]
    unclear = len({*names} - taken) < len(names) or any(len(name) > LONGEST_NAME for name in names)
    if len(settings) == 1 or unclear:
        names = [str(members[0].path) for members in grouped.values()]
    return [RunGroup(name=name, runs=tuple(members)) for name, members in zip(names, grouped.values(), strict=True)]


def _settings(run: RunFigures) -> dict[str, Any]:
    return {key: value for key, value in flat_recipe(run.recipe).items() if key not in BOOKKEEPING}


def _name(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """`alpha=0.1, beta=0.01`: the values of `keys`; with the section where two of them end alike."""
    ends = [key.partition(".")[2] for key in keys]
    shown = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    values = [settings.get(key) for key in keys]
    words = ["unset" if value is None else value if isinstance(value, str) else to_toml(value) for value in values]
    return ", ".join(f"{name}={word}" for name, word in zip(shown, words, strict=True))


def _refuse_named_twice(sources: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for source in sources:
        if other := seen.get(source.resolve()):
            raise UserInputError(f"{other} and {source} are the same folder", next_step="leave one of them out")
        seen[source.resolve()] = source


def _refuse_twice(group: RunGroup) -> None:
    seen: dict[int, Path] = {}
    for run in group.runs:
        if run.seed in seen:
            raise UserInputError(
                f"two runs of {group.name} have seed {run.seed}: {seen[run.seed]} and {run.path}",
                next_step="leave one of them out",
            )
        seen[run.seed] = run.path
