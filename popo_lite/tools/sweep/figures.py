"""What one run came to, and its course: read from its folder. Free of torch."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import CheckpointError
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, read_lines

SMOOTHING_STEPS = 5
"""Steps of the trailing mean that curves and times to a pass rate are taken from."""
LAST_SHARE = 0.1
"""Share of a run's steps, its last ones, that its figures of training are the mean of."""

CURVES = (
    "pass_rate",
    "completion_tokens_mean",
    "sampled_entropy",
    "effective_sample_ratio",
    "siamese_drift",
    "trained_tokens",
)
"""Keys of a step's record whose course is drawn."""
TOTALS = ("rollout_tokens", "tokens_of_all", "tokens_of_positives", "tokens_of_mixed_groups", "trained_tokens")
"""Keys of a step's record that are summed over the run."""
SHARES = ("pass_at_", "train_pass_rate", "pass_rate", "effective_sample_ratio", "trained_ratio")
"""Beginnings of the keys of figures and curves that cannot be above 1. None of them all can be below 0."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One finished run.

    `figures` maps a measure to its value, None where it was not measured; the measures to a pass rate are None where
    it was not reached. `curves` maps each of CURVES to a value a step; a step without that figure is None.
    `problems` is how many held-out problems the last evaluation had.
    """

    path: Path
    recipe: Recipe
    figures: Mapping[str, float | None]
    curves: Mapping[str, Sequence[float | None]]
    problems: int

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.train.seed


def read_run(path: Path, *, reach: float) -> RunFigures:
    """Figures of the finished run at `path`, with time and tokens to a training pass rate of `reach`.

    Raises CheckpointError where there is no run, it has not ended, or its records lack a figure.
    """
    run = RunFolder(path)
    recipe = run.recipe()
    if not run.summary_path.is_file():
        raise CheckpointError(
            "the run has not ended",
            where=str(path),
            next_step=f"popo-lite train {run.recipe_path} --resume --output {path}",
        )
    after = json.loads(run.summary_path.read_text(encoding="utf-8"))["after"] or {}
    steps = read_lines(run.metrics_path)
    at_k = {f"pass_at_{k}": rate for k, rate in (after.get("pass_at_k") or {}).items() if k != "1"}
    evaluated = {
        "pass_at_1": after.get("pass_at_1"),
        **at_k,
        "held_out_tokens": after.get("completion_tokens_mean"),
    }
    try:
        return RunFigures(
            path=path,
            recipe=recipe,
            figures={**evaluated, **_of_training(steps), **_to_reach(steps, reach)},
            curves={key: _course(steps, key) for key in CURVES},
            problems=after.get("problems", 0),
        )
    except KeyError as error:
        raise CheckpointError(
            f"its steps do not tell {error.args[0]}: an older version of popo-lite wrote them",
            where=str(run.metrics_path),
            next_step="train the run anew, or leave it out",
        ) from error


def step_seconds(line: Mapping[str, Any]) -> float:
    """Seconds that a step took, all stages."""
    return float(sum(line["seconds"].values()))


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """Mean of each value and those before it, SMOOTHING_STEPS in all; fewer at the start, None where all are."""
    windows = (values[max(0, end - SMOOTHING_STEPS) : end] for end in range(1, len(values) + 1))
    known = ([value for value in window if value is not None] for window in windows)
    return [statistics.fmean(window) if window else None for window in known]


def _of_training(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    totals = {key: sum(line[key] for line in steps) for key in TOTALS}
    last = steps[-max(1, math.ceil(LAST_SHARE * len(steps))) :]
    return {
        "train_pass_rate": _mean(last, "pass_rate"),
        "train_tokens": _mean(last, "completion_tokens_mean"),
        "unique_answers": _mean(last, "unique_answers_mean"),
        "sampled_entropy": _mean(last, "sampled_entropy"),
        "entropy": _mean(last, "entropy"),
        "sampled_entropy_over_start": _over_start(last, steps, "sampled_entropy"),
        "effective_sample_ratio": _mean(last, "effective_sample_ratio"),
        "siamese_drift": steps[-1]["siamese_drift"],
        **totals,
        "trained_ratio": totals["trained_tokens"] / totals["tokens_of_all"],
        "seconds": sum(step_seconds(line) for line in steps),
    }


def _to_reach(steps: Sequence[Mapping[str, Any]], reach: float) -> dict[str, float | None]:
    """Steps, seconds and tokens until the smoothed pass rate first was `reach`; only whole windows count."""
    rates = smoothed([line["pass_rate"] for line in steps])
    window = min(SMOOTHING_STEPS, len(steps))
    there = next((end for end, rate in enumerate(rates, 1) if end >= window and rate is not None and rate >= reach), 0)
    spent = steps[:there]
    return {
        "reach_steps": float(there) if there else None,
        "reach_seconds": sum(step_seconds(line) for line in spent) if there else None,
        "reach_rollout_tokens": sum(line["rollout_tokens"] for line in spent) if there else None,
        "reach_trained_tokens": sum(line["trained_tokens"] for line in spent) if there else None,
    }


def _mean(steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [line[key] for line in steps if line[key] is not None]
    return statistics.fmean(known) if known else None


def _over_start(last: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], key: str) -> float | None:
    mean, start = _mean(last, key), steps[0][key]
    return mean / start if mean is not None and start else None


def _course(steps: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """What `key` was by step: tokens as their sum so far, the drift as it is, the rest smoothed."""
    values = [line[key] for line in steps]
    if key == "trained_tokens":
        return list(itertools.accumulate(values))
    return values if key == "siamese_drift" else smoothed(values)
