"""Plot a comparison on one page. matplotlib is imported inside functions: no other command should wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from popo_lite.metrics import METRICS
from popo_lite.tools.sweep.compare import CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow."""
DASHES = {"solid": "solid", "dashed": (0, (5, 2)), "dotted": (0, (1.5, 1.5))}
"""Line styles by their names in CSS: groups beyond the seventh reuse the colours with the next style."""
WIDTH_INCHES, DOTS_PER_INCH = 12.0, 150
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a variant's name is not a formula
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
}


class _Panel(NamedTuple):
    """A figure or curve, and the factor that converts its values to the axis's unit."""

    key: str
    title: str
    unit: str
    scale: float


def colour(index: int) -> str:
    """Return the colour of the group at `index`, the same in all panels."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Return the line style of the group at `index`, a key of DASHES."""
    return list(DASHES)[index // len(COLOURS) % len(DASHES)]


def has_band(index: int, groups: int) -> bool:
    """Return True if the group at `index` is drawn with its interval; of many groups only the first is."""
    return groups <= len(COLOURS) or index == 0


def percent(ratio: float) -> str:
    """Return a ratio in [0, 1] as a percentage without rounding it: 0.995 is 99.5%."""
    return f"{100 * ratio:g}%"


def write_png(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the plots of a comparison (`popo_lite.tools.sweep.compare.compare`) to `path`."""
    draw(comparison).savefig(path, facecolor="white")


def draw(comparison: Mapping[str, Any]) -> Figure:
    """Return the plots: six panels of curves, and three of final figures."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups, reach = comparison["groups"], percent(comparison["reach"])
    rows_inches = 0.9 + 0.26 * len(groups)
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH_INCHES, 6.6 + rows_inches),
            dpi=DOTS_PER_INCH,
            layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09),
        )
        axes = figure.subplots(3, 3, height_ratios=[2.8, 2.8, rows_inches])
        for axis, key in zip(axes[:2].flat, CURVES, strict=True):
            _draw_curve(axis, _panel(key, key), groups)
        ends = (
            _Panel("pass_at_1", "Held-out pass@1 at the end", "%", 100),
            _panel("reach_seconds", "seconds", until=reach),
            _panel("reach_trained_tokens", "trained_tokens", until=reach),
        )
        for axis, panel in zip(axes[2], ends, strict=True):
            _draw_ends(axis, panel, groups)
            if axis is not axes[2][0]:
                axis.tick_params(left=False, labelleft=False)
        for place in range(3):
            figure.align_ylabels(axes[:2, place])
        columns = min(len(groups), 5)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, handlelength=2.6)
    return figure


def _panel(key: str, metric: str, *, until: str = "") -> _Panel:
    """Return the panel of a metric with its label and unit, counted `until` a training pass rate if given."""
    label, unit = METRICS[metric].label.capitalize(), METRICS[metric].unit
    title = f"{label} until {until}" if until else label
    if metric == "trained_tokens":  # summed over steps
        return _Panel(key, title, "thousand tokens", 1e-3)
    return _Panel(key, title, "%", 100) if unit == "ratio" else _Panel(key, title, unit if unit != "number" else "", 1)


def _draw_curve(axis: Axes, panel: _Panel, groups: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean over seeds by step, with its interval as a band."""
    from matplotlib.ticker import MaxNLocator

    for index, group in enumerate(groups):
        curve = group["curves"][panel.key]
        mean, low, high = (
            [float("nan") if value is None else value * panel.scale for value in curve[name]]
            for name in ("mean", "low", "high")
        )
        steps = range(1, len(mean) + 1)
        # The first group, with which the others are compared, lies on top.
        look: Any = {
            "color": colour(index),
            "linestyle": DASHES[dash(index)],
            "linewidth": 1.8,
            "zorder": 3 - 0.01 * index,
        }
        axis.plot(steps, mean, label=group["name"], **look)
        if has_band(index, len(groups)):
            axis.fill_between(steps, low, high, color=colour(index), alpha=0.12, linewidth=0)
    means = [value * panel.scale for group in groups for value in group["curves"][panel.key]["mean"]
             if value is not None]  # fmt: skip
    if means:
        # A band much wider than the means, as two seeds give, is clipped, so that it does not flatten them.
        least, most = min(means), max(means)
        margin = 0.25 * (most - least) or 0.05 * most or 1.0
        top = min(most + margin, 100.0 + 0.1 * margin) if panel.unit == "%" else most + margin
        axis.set_ylim(max(0.0, least - margin), top)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
    axis.set(ylabel=panel.unit, xlabel="step")
    axis.set_title(panel.title)
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _draw_ends(axis: Axes, panel: _Panel, groups: Sequence[Mapping[str, Any]]) -> None:
    """Draw one row per group: a dot per seed, the mean, and its interval."""
    from matplotlib.ticker import MaxNLocator

    for index, group in enumerate(groups):
        values, found = group["values"].get(panel.key, []), group["figures"].get(panel.key)
        known = [value * panel.scale for value in values if value is not None]
        axis.plot(known, [index] * len(known), "o", color=colour(index), alpha=0.35, markersize=5)
        if found is not None:
            if found["low"] is not None:
                interval = [found["low"] * panel.scale, found["high"] * panel.scale]
                axis.plot(interval, [index, index], color=colour(index), linewidth=2.2, solid_capstyle="butt")
            mean = found["mean"] * panel.scale
            axis.plot([mean], [index], "D", color=colour(index), markersize=7, markeredgecolor="white")
        if panel.key.startswith("reach") and len(known) < len(values):
            axis.annotate(
                f"{len(known)} of {len(values)} reached it",
                (1.0, index), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                xytext=(0, 3), textcoords="offset points",
            )  # fmt: skip
    axis.set_yticks(range(len(groups)), [group["name"] for group in groups])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_title(panel.title)
    axis.set_xlabel(panel.unit)
    axis.margins(x=0.08)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6))
