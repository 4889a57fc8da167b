"""A comparison as one page of plots. matplotlib is imported inside functions: no other command should wait for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow."""
DASHES = {"solid": "solid", "dashed": (0, (5, 2)), "dotted": (0, (1.5, 1.5))}
"""Line styles by their names in CSS: the second and the third seven groups have the same colours again."""
INK, FAINT = "#222222", "#DDDDDD"
WIDTH_INCHES, DOTS_PER_INCH = 12.0, 150


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """What a panel shows: a key of the comparison, its words, and how a value becomes the axis's unit."""

    key: str
    title: str
    unit: str
    scale: float = 1.0


COURSES = (
    _Panel(key="pass_rate", title="Training pass rate", unit="% of answers", scale=100),
    _Panel(key="completion_tokens_mean", title="Length of answers", unit="tokens"),
    _Panel(key="sampled_entropy", title="Token entropy of all answers", unit="nats"),
    _Panel(
        key="effective_sample_ratio", title="Effective sample size of the weights", unit="% of positives", scale=100
    ),
    _Panel(key="siamese_drift", title="Drift from the siamese", unit="norm of weights"),
    _Panel(key="trained_tokens", title="Tokens trained on so far", unit="thousand tokens", scale=1e-3),
)


def colour(index: int) -> str:
    """Colour of the group at `index`, the same wherever it is drawn."""
    return COLOURS[index % len(COLOURS)]


def dash(index: int) -> str:
    """Line style of the group at `index`, a key of DASHES."""
    return list(DASHES)[index // len(COLOURS) % len(DASHES)]


def has_band(index: int, groups: int) -> bool:
    """Whether the group at `index` of so many is drawn with its interval: many bands are a fog, so then the first."""
    return groups <= len(COLOURS) or index == 0


def percent(share: float) -> str:
    """A share in [0, 1] as it was asked for: 0.995 is 99.5%."""
    return f"{100 * share:g}%"


def write_png(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the plots of a comparison (`popo_lite.tools.sweep.compare.compare`) to `path`."""
    draw(comparison).savefig(path, facecolor="white")


def draw(comparison: Mapping[str, Any]) -> Figure:
    """The plots: six panels of curves, and three of what each run came to."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups = comparison["groups"]
    rows_inches = 0.9 + 0.26 * len(groups)
    with mpl.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "text.color": INK,
            "text.parse_math": False,  # names of variants are no formulas
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": FAINT,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(
            figsize=(WIDTH_INCHES, 6.6 + rows_inches),
            dpi=DOTS_PER_INCH,
            layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09),
        )
        axes = figure.subplots(3, 3, height_ratios=[2.8, 2.8, rows_inches])
        for axis, panel in zip(axes[:2].flat, COURSES, strict=True):
            _draw_course(axis, panel, groups)
        reach = percent(comparison["reach"])
        ends = (
            _Panel(key="pass_at_1", title="Held-out pass@1 at the end", unit="% of problems", scale=100),
            _Panel(key="reach_seconds", title=f"Time to a training pass rate of {reach}", unit="seconds"),
            _Panel(
                key="reach_trained_tokens", title=f"Tokens trained on until {reach}", unit="thousand tokens", scale=1e-3
            ),
        )
        for axis, panel in zip(axes[2], ends, strict=True):
            _draw_ends(axis, panel, groups)
            if axis is not axes[2][0]:
                axis.tick_params(left=False, labelleft=False)
        for column in range(3):
            figure.align_ylabels(axes[:2, column])
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(len(groups), 5), frameon=False, handlelength=2.6
        )
    return figure


def _draw_course(axis: Axes, panel: _Panel, groups: Sequence[Mapping[str, Any]]) -> None:
    """Mean over seeds by step, with its interval as a band."""
    from matplotlib.ticker import MaxNLocator

    for index, group in enumerate(groups):
        band = group["curves"][panel.key]
        mean, low, high = (_scaled(band[name], panel.scale) for name in ("mean", "low", "high"))
        steps = range(1, len(mean) + 1)
        # The first group, which the others are held against, lies on top.
        axis.plot(
            steps,
            mean,
            color=colour(index),
            linestyle=DASHES[dash(index)],
            linewidth=1.8,
            label=group["name"],
            zorder=3 - 0.01 * index,
        )
        if has_band(index, len(groups)):
            axis.fill_between(steps, low, high, color=colour(index), alpha=0.12, linewidth=0)
    _fit_to_means(axis, panel, [group["curves"][panel.key] for group in groups])
    axis.set_title(panel.title)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("step")
    axis.margins(x=0.01)
    axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _fit_to_means(axis: Axes, panel: _Panel, bands: Sequence[Mapping[str, Sequence[float | None]]]) -> None:
    """Let the means fill the panel: a wide band, of two seeds for instance, is cut and does not flatten them."""
    means = [value * panel.scale for band in bands for value in band["mean"] if value is not None]
    if not means:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center")
        return
    low, high = min(means), max(means)
    room = 0.25 * (high - low) or 0.05 * high or 1.0
    top = high + room
    if panel.unit.startswith("%"):
        top = min(top, 100.0 + 0.1 * room)
    axis.set_ylim(max(0.0, low - room), top)


def _draw_ends(axis: Axes, panel: _Panel, groups: Sequence[Mapping[str, Any]]) -> None:
    """One row a group: a dot a seed, the mean, and its interval."""
    from matplotlib.ticker import MaxNLocator

    for index, group in enumerate(groups):
        values, found = group["values"].get(panel.key, []), group["figures"].get(panel.key)
        known = [value * panel.scale for value in values if value is not None]
        axis.plot(known, [index] * len(known), "o", color=colour(index), alpha=0.35, markersize=5, linewidth=0)
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


def _scaled(values: Sequence[float | None], scale: float) -> list[float]:
    return [float("nan") if value is None else value * scale for value in values]
