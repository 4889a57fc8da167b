"""Compute the figures and curves of one finished run from its folder. Free of torch."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from popo_lite.errors import CheckpointError
from popo_lite.metrics import StepRecord
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, read_lines

SMOOTHING_STEPS = 5
"""Steps of the trailing mean in curves and for reaching a pass rate."""
LAST_RATIO = 0.1
"""The figures of training are means over this last part of a run's steps."""

CURVES = (
    "pass_rate",
    "completion_tokens_mean",
    "sampled_entropy",
    "effective_sample_ratio",
    "siamese_drift",
    "trained_tokens",
)
"""Metrics that are drawn step by step."""
AVERAGED = (
    "pass_rate",
    "completion_tokens_mean",
    "unique_answers_mean",
    "sampled_entropy",
    "entropy",
    "effective_sample_ratio",
)
"""Metrics averaged over the last steps; the figures have the same names."""
TOTALS = ("rollout_tokens", "tokens_of_all", "tokens_of_positives", "tokens_of_mixed_groups", "trained_tokens")
"""Metrics summed over the run; the figures have the same names."""

Values = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One finished run.

    `figures` maps a name to a value, None if it was not measured or a pass rate was not reached. `curves` maps each
    of CURVES to one value per step. `problems` is the number of held-out problems in the last evaluation.
    """

    path: Path
    recipe: Recipe
    figures: Mapping[str, float | None]
    curves: Mapping[str, Values]
    problems: int

    @property
    def seed(self) -> int:
        """Return the run's seed."""
        return self.recipe.train.seed


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
            **_of_training(steps),
            **_to_reach(steps, reach),
        }
        curves = {name: _curve(steps, name) for name in CURVES}
    except KeyError as error:
        raise CheckpointError(
            f"its steps lack the metric {error.args[0]}: another version of popo-lite wrote them",
            where=str(run.metrics_path),
            next_step="train the run again, or leave it out",
        ) from error
    return RunFigures(path=path, recipe=recipe, figures=figures, curves=curves, problems=after.get("problems", 0))


def smoothed(values: Values) -> list[float | None]:
    """Return the mean of each value and those before it, SMOOTHING_STEPS in all; None if all of them are."""
    return [_mean(values[max(0, end - SMOOTHING_STEPS) : end]) for end in range(1, len(values) + 1)]


def _of_training(steps: Sequence[StepRecord]) -> dict[str, float | None]:
    last = steps[-max(1, math.ceil(LAST_RATIO * len(steps))) :]
    means = {name: _mean([line[name] for line in last]) for name in AVERAGED}
    totals = {name: sum(line[name] for line in steps) for name in TOTALS}
    entropy, start = means["sampled_entropy"], steps[0]["sampled_entropy"]
    return {
        **means,
        **totals,
        "sampled_entropy_over_start": entropy / start if entropy is not None and start else None,
        "siamese_drift": steps[-1]["siamese_drift"],
        "trained_ratio": totals["trained_tokens"] / totals["tokens_of_all"],
        "seconds": _seconds(steps),
    }


def _to_reach(steps: Sequence[StepRecord], reach: float) -> dict[str, float | None]:
    """Return steps, seconds and tokens until the smoothed pass rate first was `reach`; only whole windows count."""
    rates = smoothed([line["pass_rate"] for line in steps])
    window = min(SMOOTHING_STEPS, len(steps))
    end = next((end for end, rate in enumerate(rates, 1) if end >= window and rate is not None and rate >= reach), None)
    spent = steps[:end]
    costs = {
        "reach_steps": float(len(spent)),
        "reach_seconds": _seconds(spent),
        "reach_rollout_tokens": sum(line["rollout_tokens"] for line in spent),
        "reach_trained_tokens": sum(line["trained_tokens"] for line in spent),
    }
    return {name: None if end is None else cost for name, cost in costs.items()}


def _seconds(steps: Sequence[StepRecord]) -> float:
    return math.fsum(seconds for line in steps for seconds in line["seconds"].values())


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _curve(steps: Sequence[StepRecord], name: str) -> Values:
    """Return a metric by step: tokens as their sum so far, the drift as it is, the rest smoothed."""
    values = [line[name] for line in steps]
    if name == "trained_tokens":
        return list(itertools.accumulate(values))
    return values if name == "siamese_drift" else smoothed(values)
