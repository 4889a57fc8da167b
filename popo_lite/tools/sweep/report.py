"""Report a comparison of runs: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jinja2
from rich.console import Console
from rich.text import Text

from popo_lite.metrics import METRICS
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.tools.console.words import ABSENT
from popo_lite.tools.sweep import plots

SCALES: Mapping[str, tuple[str, float, int]] = {
    "ratio": (" %", 100, 1),
    "nats": (" nats", 1, 3),
    "tokens": ("", 1, 1),
    "number": ("", 1, 3),
    "total": (", k", 1e-3, 1),
    "seconds": ("", 1, 1),
}
"""Unit of a metric, or `total` for tokens summed over steps -> suffix of the heading, factor, decimals."""


class Table(NamedTuple):
    """Rows of `columns`; the first cell of each is the group's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Column(NamedTuple):
    """A figure of the comparison, its heading with the unit, and the factor and decimals of that unit."""

    key: str
    heading: str
    scale: float
    decimals: int


def column(key: str, label: str = "", unit: str = "", decimals: int | None = None) -> Column:
    """Return the column of a figure, by default with label and unit of the metric with that name."""
    suffix, scale, usual = SCALES[unit or METRICS[key].unit]
    return Column(key, (label or METRICS[key].label) + suffix, scale, usual if decimals is None else decimals)


_HELD_OUT_TOKENS = column("held_out_tokens", METRICS["completion_tokens_mean"].label, "tokens")
_TRAINING = (
    column("pass_rate"),
    column("completion_tokens_mean"),
    column("unique_answers_mean", decimals=2),
    column("sampled_entropy"),
    column(
        "sampled_entropy_over_start",
        f"{METRICS['sampled_entropy'].label} {METRICS['entropy_over_start'].label}",
        "ratio",
    ),
    column("entropy"),
    column("effective_sample_ratio", unit="ratio", decimals=2),
    column("siamese_drift"),
)
_COST = (
    column("rollout_tokens", unit="total"),
    column("trained_tokens", unit="total"),
    column("trained_ratio", "of all", "ratio"),
    column("seconds"),
)
_REACH = (
    column("reach_steps", METRICS["step"].label + "s", "tokens"),
    *(column(f"reach_{key}", METRICS[key].label, unit) for key, unit in
      (("seconds", "seconds"), ("rollout_tokens", "total"), ("trained_tokens", "total"))),
)  # fmt: skip


def print_report(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables of a comparison (`popo_lite.tools.sweep.compare.compare`)."""
    console = console if console is not None else open_console(sys.stdout)
    for each in tables(comparison):
        table(*each, console)
    for note in _notes(comparison):
        console.print(Text(safe(note, console)), soft_wrap=True)


def html_page(comparison: Mapping[str, Any], png: bytes) -> str:
    """Return plots and tables as one HTML file with the image inside it, without network or script."""
    names = [group["name"] for group in comparison["groups"]]
    lines = {name: f"border-top: .2em {plots.dash(index)} {plots.colour(index)}" for index, name in enumerate(names)}
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE).render(
        title=f"Comparison of {', '.join(names)}",
        runs=sum(len(group["runs"]) for group in comparison["groups"]),
        bands="bands" if plots.has_band(1, len(names)) else f"the band (of {names[0]} alone)",
        smoothing_steps=comparison["smoothing_steps"],
        image=base64.b64encode(png).decode("ascii"),
        tables=tables(comparison),
        lines=lines,
        notes=_notes(comparison),
    )  # fmt: skip


def tables(comparison: Mapping[str, Any], shown: Set[str] | None = None) -> Iterator[Table]:
    """Yield the tables of a comparison, with the figures in `shown` or by default with all."""
    groups = comparison["groups"]

    def chosen(columns: Sequence[Column]) -> list[Column]:
        return [each for each in columns if shown is None or each.key in shown]

    ks = sorted({int(key[8:]) for group in groups for key in group["figures"] if key.startswith("pass_at_")})
    final = [*(column(f"pass_at_{k}", f"pass@{k}", "ratio") for k in ks), _HELD_OUT_TOKENS]
    for title, columns in (
        ("Held-out problems, at the end", chosen(final)),
        ("Training, last tenth of the steps", chosen(_TRAINING)),
        ("Cost of the training steps", chosen(_COST)),
    ):
        rows = [(group["name"], str(len(group["runs"])), *_cells(group, "figures", columns, " (n = {})"))
                for group in groups]  # fmt: skip
        yield Table(title, ("variant", "runs", *(each.heading for each in columns)), rows)
    columns, rows = chosen(_REACH), []
    for group in groups:
        values = group["values"]["reach_steps"]
        reached = sum(value is not None for value in values)
        status = f"{reached} of {len(values)}" if reached else "not reached"
        rows.append((group["name"], status, *_cells(group, "figures", columns, "")))
    title = f"To a training pass rate of {plots.percent(comparison['reach'])}"
    yield Table(title, ("variant", "reached", *(each.heading for each in columns)), rows)
    if len(groups) > 1:
        columns = chosen((*final, *_TRAINING[2:4], *_COST[1:]))
        paired = " ({} of {} paired)"
        rows = [(group["name"], *_cells(group, "differences", columns, paired, "+")) for group in groups[1:]]
        headings = ("variant", *(each.heading for each in columns))
        yield Table(f"Difference from {groups[0]['name']}, paired by seed", headings, rows)


def cell(estimate: Mapping[str, Any] | None, scale: float = 1, decimals: int = 2, *, sign: str = "") -> str:
    """Return `83.4 [81.2, 85.6]`, or the mean alone if it has no interval."""
    if estimate is None:
        return ABSENT
    mean, low, high = (
        "" if estimate[name] is None else format(estimate[name] * scale, f"{sign},.{decimals}f")
        for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low else mean


def _cells(group: Mapping[str, Any], kind: str, columns: Sequence[Column], fewer: str, sign: str = "") -> Iterator[str]:
    """Yield the cells of "figures" or "differences", with the text `fewer` if they are of some of the runs only."""
    runs = len(group["runs"])
    for each in columns:
        found = group[kind].get(each.key)
        suffix = fewer.format(found["count"], runs) if found and found["count"] < runs else ""
        yield cell(found, each.scale, each.decimals, sign=sign) + suffix


def _notes(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "[low, high]: 95 % interval; Student's t over the seeds of a variant, clipped to the possible range, Wilson's "
        "over problems for pass@1 of a single run. There is none if all seeds agree: that does not make a mean "
        "certain. (n = 2): only two of the runs have the figure, and only they are averaged."
    )
    yield (
        f"A pass rate is reached when the mean of {comparison['smoothing_steps']} steps is. If only some runs reach "
        "it, time and tokens are means of those fast runs, without an interval."
    )
    if len(comparison["groups"]) > 1:
        yield (
            "A difference whose interval excludes 0 is unlikely to be chance, but one interval in twenty does so by "
            "chance alone."
        )
    if comparison["left_out"]:
        yield f"Left out: {'; '.join(comparison['left_out'])}."


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { max-width: 1200px; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
img { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid #ddd; }
tbody th { font-weight: 600; }
i { display: inline-block; width: 1.7em; margin-right: .5em; vertical-align: middle; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ runs }} runs. Lines are means over seeds, {{ bands }} 95 % intervals; diamonds are means, bars 95 % intervals,
dots single runs. Curves of rates, lengths and entropies are trailing means of {{ smoothing_steps }} steps.</p>
<img src="data:image/png;base64,{{ image }}" alt="{{ title }}">
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="wide"><table>
<thead><tr>{% for heading in table.columns %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th><i style="{{ lines[row[0]] }}"></i>{{ row[0] }}</th>
{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
</body>
</html>
"""
