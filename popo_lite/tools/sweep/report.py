"""Report a comparison (`popo_lite.tools.sweep.compare.compare`): tables, plots, and one HTML file with both."""

from __future__ import annotations

import base64
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from popo_lite.metrics import METRICS
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.tools.console.words import ABSENT
from popo_lite.tools.report.html import render
from popo_lite.tools.sweep.compare import CURVES, Values

if TYPE_CHECKING:  # matplotlib is imported inside functions: no other command should wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
LINES = [(colour, dash) for dash in ("solid", "dashed", "dotted") for colour in COLOURS]  # one per group
WIDTH_INCHES, DOTS_PER_INCH = 12.0, 150
STYLE: Any = {
    "font.family": "DejaVu Sans", "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "lines.dashed_pattern": (5, 2), "lines.dotted_pattern": (1.5, 1.5),
    "lines.linewidth": 1.8, "text.parse_math": False,  # a variant's name is not a formula
}  # fmt: skip
UNITS = {"ratio": (" %", "%", 100, 1), "nats": (" nats", "nats", 1, 3), "tokens": ("", "tokens", 1, 1),
         "number": ("", "", 1, 3), "seconds": ("", "seconds", 1, 1),
         "total": (", k", "thousand tokens", 1e-3, 1)}  # fmt: skip
"""Unit of a metric, or `total` for tokens summed over steps -> suffix of headings, unit of axes, factor, decimals."""
DECIMALS = {"unique_answers_mean": 2, "effective_sample_ratio": 2}  # figures with other decimals than their unit
FIGURES = {key: (metric.label, metric.unit) for key, metric in METRICS.items()} | {
    "rollout_tokens": ("rollout tokens", "total"), "trained_tokens": ("trained tokens", "total"),
    "held_out_tokens": ("mean tokens", "tokens"), "trained_ratio": ("of all", "ratio"), "steps": ("steps", "tokens"),
    "sampled_entropy_over_start": ("sampled entropy of start", "ratio"),
}  # fmt: skip
"""Figure without `reach_` -> label and unit."""
TRAINING = ("pass_rate", "completion_tokens_mean", "unique_answers_mean", "sampled_entropy",
            "sampled_entropy_over_start", "entropy", "effective_sample_ratio", "siamese_drift")  # fmt: skip
COST = ("rollout_tokens", "trained_tokens", "trained_ratio", "seconds")
REACH = ("reach_steps", "reach_seconds", "reach_rollout_tokens", "reach_trained_tokens")
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, columns, rows that begin with the group's name


def print_report(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables of a comparison."""
    console = console or open_console(sys.stdout)
    for each in tables(comparison):
        table(*each, console)
    console.print(*(Text(safe(note, console)) for note in _notes(comparison)), sep="\n", soft_wrap=True)


def html_page(comparison: Mapping[str, Any], png: bytes) -> str:
    """Return plots and tables as one HTML file with the image inside it, without network or script."""
    names = [group["name"] for group in comparison["groups"]]
    return render(
        Path(__file__).with_name("comparison.html.jinja"),
        title=f"Comparison of {', '.join(names)}", runs=sum(len(group["runs"]) for group in comparison["groups"]),
        bands="bands" if len(names) <= len(COLOURS) else f"the band (of {names[0]} alone)",
        lines=dict(zip(names, itertools.cycle(LINES), strict=False)), smoothing_steps=comparison["smoothing_steps"],
        image=base64.b64encode(png).decode("ascii"), tables=tables(comparison), notes=_notes(comparison),
    )  # fmt: skip


def tables(comparison: Mapping[str, Any], shown: Set[str] | None = None) -> Iterator[Table]:
    """Yield the tables of a comparison, with the figures in `shown` or by default with all."""
    groups = comparison["groups"]
    rates = {key for group in groups for key in group["figures"] if key.startswith("pass_at_")}
    final = (*sorted(rates, key=lambda key: int(key[8:])), "held_out_tokens")
    counts = [str(len(group["runs"])) for group in groups]
    reached = [group["figures"]["reach_steps"] for group in groups]
    states = [f"{each['count']} of {n}" if each else "not reached" for each, n in zip(reached, counts, strict=True)]
    for title, figures, lead, leads, few in (
        ("Held-out problems, at the end", final, "runs", counts, " (n = {})"),
        ("Training, last tenth of the steps", TRAINING, "runs", counts, " (n = {})"),
        ("Cost of the training steps", COST, "runs", counts, " (n = {})"),
        (f"To a training pass rate of {comparison['reach'] * 100:g}%", REACH, "reached", states, ""),
    ):
        keys = [key for key in figures if shown is None or key in shown]
        rows = [[group["name"], first, *_cells(group, keys, few)] for group, first in zip(groups, leads, strict=True)]
        yield title, ["variant", lead, *(_look(key)[1] for key in keys)], rows
    if len(groups) > 1:
        keys = [key for key in (*final, *TRAINING[2:4], *COST[1:]) if shown is None or key in shown]
        rows = [[group["name"], *_cells(group, keys, " ({} of {} paired)", "differences")] for group in groups[1:]]
        columns = ["variant", *(_look(key)[1] for key in keys)]
        yield f"Difference from {groups[0]['name']}, paired by seed", columns, rows


def _cells(group: Mapping[str, Any], keys: Sequence[str], few: str, kind: str = "figures") -> Iterator[str]:
    """Yield a group's figures or differences; `few` is added to those that only some of its runs have."""
    for key in keys:
        *_, factor, decimals = _look(key)
        found, runs = group[kind].get(key), len(group["runs"])
        note = few.format(found["count"], runs) if found and found["count"] < runs else ""
        yield cell(found, factor, decimals, sign="+" if kind == "differences" else "") + note


def cell(estimate: Mapping[str, Any] | None, scale: float = 1, decimals: int = 2, *, sign: str = "") -> str:
    """Return `83.4 [81.2, 85.6]`, or the mean alone if it has no interval."""
    if estimate is None:
        return ABSENT
    parts = [estimate[name] for name in ("mean", "low", "high") if estimate[name] is not None]
    mean, *interval = [format(value * scale, f"{sign},.{decimals}f") for value in parts]
    return f"{mean} [{', '.join(interval)}]" if interval else mean


def _look(key: str) -> tuple[str, str, str, float, int]:
    """Return a figure's label, heading of its column, unit of its axis, factor to that unit, and decimals."""
    label, unit = FIGURES.get(key.removeprefix("reach_")) or (f"pass@{key.removeprefix('pass_at_')}", "ratio")
    suffix, axis, factor, decimals = UNITS[unit]
    return label, label + suffix, axis, factor, DECIMALS.get(key, decimals)


def _notes(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield ("[low, high]: 95 % interval; Student's t over the seeds of a variant, clipped to the possible range, "
           "Wilson's over problems for pass@1 of a single run. There is none if all seeds agree: that does not make "
           "a mean certain. (n = 2): only two of the runs have the figure, and only they are averaged.")  # fmt: skip
    yield (f"A pass rate is reached when the mean of {comparison['smoothing_steps']} steps is. If only some runs reach "
           "it, time and tokens are means of those fast runs, without an interval.")  # fmt: skip
    if len(comparison["groups"]) > 1:
        yield "A difference whose interval excludes 0 is unlikely to be chance, but one in twenty does so by chance."
    if comparison["left_out"]:
        yield f"Left out: {'; '.join(comparison['left_out'])}."


def draw(comparison: Mapping[str, Any]) -> Figure:
    """Return the plots: six panels of curves, and three of final figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    groups, until = comparison["groups"], f" until {comparison['reach'] * 100:g}%"
    rows_inches = 0.9 + 0.26 * len(groups)
    size, layout = (WIDTH_INCHES, 6.6 + rows_inches), ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout=layout, facecolor="white")
        axes = figure.subplots(3, 3, height_ratios=[2.8, 2.8, rows_inches])
        for axis, key in zip(axes.flat, (*CURVES, "pass_at_1", "reach_seconds", "reach_trained_tokens"), strict=True):
            label, _, unit, factor, _ = _look(key)
            (_draw_curve if key in CURVES else _draw_ends)(axis, key, unit, factor, groups)
            axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True) if key in CURVES else MaxNLocator(6))
            title = "Held-out pass@1 at the end" if key == "pass_at_1" else label.capitalize()
            axis.set_title(title + until if key.startswith("reach_") else title)
        for axis in axes[2][1:]:
            axis.tick_params(left=False, labelleft=False)
        figure.align_ylabels(axes[:2])
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(groups), 5),
                      frameon=False, handlelength=2.6)  # fmt: skip
    return figure


def _draw_curve(axis: Axes, key: str, unit: str, factor: float, groups: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean over seeds by step, with its interval as a band."""
    known: list[float] = []
    for index, (group, (colour, dash)) in enumerate(zip(groups, itertools.cycle(LINES), strict=False)):
        mean, low, high = (_scaled(group["curves"][key][part], factor) for part in ("mean", "low", "high"))
        known += [value for value in mean if not math.isnan(value)]
        steps = range(1, len(mean) + 1)
        # The first group, with which the others are compared, lies on top.
        axis.plot(steps, mean, label=group["name"], color=colour, linestyle=dash, zorder=3 - 0.01 * index)
        if index == 0 or len(groups) <= len(COLOURS):  # more bands would hide the lines
            axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    if known:
        # A band much wider than the means, as two seeds give, is clipped, so that it does not flatten them.
        least, most = min(known), max(known)
        margin = 0.25 * (most - least) or 0.05 * most or 1.0
        top = min(most + margin, 100.0 + 0.1 * margin) if unit == "%" else most + margin
        axis.set_ylim(max(0.0, least - margin), top)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
    axis.set(ylabel=unit, xlabel="step")
    axis.margins(x=0.01)


def _draw_ends(axis: Axes, key: str, unit: str, factor: float, groups: Sequence[Mapping[str, Any]]) -> None:
    """Draw one row per group: a dot per seed, the mean, and its interval."""
    for index, (group, (colour, _)) in enumerate(zip(groups, itertools.cycle(LINES), strict=False)):
        values, found = group["values"].get(key, []), group["figures"].get(key) or {}
        mean, *interval = _scaled([found.get(part) for part in ("mean", "low", "high")], factor)
        axis.plot(_scaled(values, factor), [index] * len(values), "o", color=colour, alpha=0.35, markersize=5)
        axis.plot(interval, [index, index], color=colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot([mean], [index], "D", color=colour, markersize=7, markeredgecolor="white")
        if key.startswith("reach") and None in values:
            reached = f"{len(values) - values.count(None)} of {len(values)} reached it"
            axis.annotate(reached, (1.0, index), (0, 3), fontsize=8, ha="right", va="bottom",
                          xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axis.set_yticks(range(len(groups)), [group["name"] for group in groups])
    axis.set(xlabel=unit, ylim=(len(groups) - 0.4, -0.6))
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.08)


def _scaled(values: Values, factor: float) -> list[float]:
    return [math.nan if value is None else value * factor for value in values]
