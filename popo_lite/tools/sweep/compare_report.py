"""A comparison of runs for people: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.tools.sweep import plots


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A measure of the comparison, its heading, and how a value becomes the heading's unit."""

    key: str
    heading: str
    scale: float = 1.0
    places: int = 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of `columns`; the first cell of each is the group's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_POLICY = (
    _Column(key="train_pass_rate", heading="pass rate %", scale=100),
    _Column(key="train_tokens", heading="answer tokens"),
    _Column(key="unique_answers", heading="different answers", places=2),
    _Column(key="sampled_entropy", heading="entropy nats", places=3),
    _Column(key="sampled_entropy_over_start", heading="of its start %", scale=100),
    _Column(key="entropy", heading="of those trained on", places=3),
    _Column(key="effective_sample_ratio", heading="eff. sample %", scale=100, places=2),
    _Column(key="siamese_drift", heading="drift", places=3),
)
_COST = (
    _Column(key="rollout_tokens", heading="sampled, k tokens", scale=1e-3),
    _Column(key="trained_tokens", heading="trained on, k tokens", scale=1e-3),
    _Column(key="trained_ratio", heading="of all %", scale=100),
    _Column(key="seconds", heading="seconds"),
)
_REACH = (
    _Column(key="reach_steps", heading="steps"),
    _Column(key="reach_seconds", heading="seconds"),
    _Column(key="reach_rollout_tokens", heading="sampled, k tokens", scale=1e-3),
    _Column(key="reach_trained_tokens", heading="trained on, k tokens", scale=1e-3),
)


def compare_report(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables of a comparison (`popo_lite.tools.sweep.compare.compare`)."""
    console = console if console is not None else open_console(sys.stdout)
    for one in tables(comparison):
        table(one.title, one.columns, one.rows, console)
    for note in (*_notes(comparison), *_left_out(comparison)):
        console.print(Text(safe(note, console)), soft_wrap=True)


def html_page(comparison: Mapping[str, Any], png: bytes) -> str:
    """Plots and tables as one HTML file with the image inside it; no network and no script."""
    image = base64.b64encode(png).decode("ascii")
    names = [group["name"] for group in comparison["groups"]]
    runs = sum(len(group["runs"]) for group in comparison["groups"])
    title = f"Comparison of {', '.join(names)}"
    bands = "bands" if plots.has_band(1, len(names)) else f"the band (of {names[0]} alone)"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{runs} runs. Lines are means over seeds, {html.escape(bands)} 95 % intervals; diamonds are means, "
        f"bars 95 % intervals, dots single runs. Pass rate, length, entropy and sample size are trailing means of "
        f"{comparison['smoothing_steps']} steps.</p>",
        f'<img src="data:image/png;base64,{image}" alt="{html.escape(title)}">',
        *(_html_table(one, names) for one in tables(comparison)),
        "<ul>",
        *(f"<li>{html.escape(note)}</li>" for note in (*_notes(comparison), *_left_out(comparison))),
        "</ul>",
    ]
    # The body first: what it holds may look like a place for the title, but comes after that.
    return _PAGE.replace("BODY", "\n".join(parts), 1).replace("TITLE", html.escape(title), 1)


def tables(comparison: Mapping[str, Any]) -> Iterator[Table]:
    """What a comparison (`popo_lite.tools.sweep.compare.compare`) says in figures, table by table."""
    groups = comparison["groups"]
    ks = sorted({int(key[8:]) for group in groups for key in group["figures"] if key.startswith("pass_at_")})
    final = [_Column(key=f"pass_at_{k}", heading=f"pass@{k} %", scale=100) for k in ks]
    final.append(_Column(key="held_out_tokens", heading="answer tokens"))
    yield _estimates("Held-out problems, at the end", groups, final)
    yield _estimates("Training, last tenth of the steps", groups, _POLICY)
    yield _estimates("Cost of the training steps", groups, _COST)
    yield _reached(f"To a training pass rate of {plots.percent(comparison['reach'])}", groups)
    if len(groups) > 1:
        columns = (*final, *_POLICY[2:4], *_COST[1:])
        rows = [(group["name"], *(_difference(group, column) for column in columns)) for group in groups[1:]]
        headings = ("variant", *(column.heading for column in columns))
        yield Table(title=f"Difference from {groups[0]['name']}, paired by seed", columns=headings, rows=rows)


def _estimates(title: str, groups: Sequence[Mapping[str, Any]], columns: Sequence[_Column]) -> Table:
    rows = [
        (group["name"], str(len(group["runs"])), *(_figure(group, column) for column in columns)) for group in groups
    ]
    return Table(title=title, columns=("variant", "runs", *(column.heading for column in columns)), rows=rows)


def _reached(title: str, groups: Sequence[Mapping[str, Any]]) -> Table:
    """As `_estimates`, with how many runs got there: the figures are of those alone."""
    rows = []
    for group in groups:
        values = group["values"]["reach_steps"]
        there = sum(value is not None for value in values)
        cells = [_cell(group["figures"][column.key], column) for column in _REACH]
        rows.append((group["name"], f"{there} of {len(values)}" if there else "not reached", *cells))
    return Table(title=title, columns=("variant", "reached", *(column.heading for column in _REACH)), rows=rows)


def _figure(group: Mapping[str, Any], column: _Column) -> str:
    """The cell of a figure, with how many runs have it where not all do."""
    found = group["figures"].get(column.key)
    return _cell(found, column) + _fewer(found, group, " (n = {})")


def _difference(group: Mapping[str, Any], column: _Column) -> str:
    """The cell of a difference, with how many pairs there are where a run has none."""
    found = group["differences"][column.key]
    return _cell(found, column, signed=True) + _fewer(found, group, " ({} of {} paired)")


def _fewer(found: Mapping[str, Any] | None, group: Mapping[str, Any], form: str) -> str:
    runs = len(group["runs"])
    return form.format(found["count"], runs) if found is not None and found["count"] < runs else ""


def _cell(estimate: Mapping[str, Any] | None, column: _Column, *, signed: bool = False) -> str:
    """`83.4 [81.2, 85.6]`, or the mean alone where it has no interval."""
    if estimate is None:
        return words.ABSENT
    form = f"{'+' if signed else ''},.{column.places}f"
    mean, low, high = (
        None if estimate[name] is None else format(estimate[name] * column.scale, form)
        for name in ("mean", "low", "high")
    )
    return str(mean) if low is None else f"{mean} [{low}, {high}]"


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    notes = [
        "[low, high]: 95 % interval; Student's t over the seeds of a variant, cut at 0 and 100 %, Wilson's over "
        "problems for pass@1 of a single run. There is none where all seeds agree: that does not make a mean certain. "
        "(n = 2): only so many of the runs have the figure, and it is of those alone.",
        f"A pass rate is reached when the mean of {comparison['smoothing_steps']} steps is; where not every run "
        "reached it, time and tokens are those of the runs that did, the quick ones, and have no interval.",
    ]
    if len(comparison["groups"]) > 1:
        notes.append(
            "A difference whose interval leaves out 0 is unlikely to be chance, but of many intervals one in twenty "
            "does so by chance alone."
        )
    return notes


def _left_out(comparison: Mapping[str, Any]) -> list[str]:
    left_out = comparison["left_out"]
    return [f"Left out: {'; '.join(left_out)}."] if left_out else []


def _html_table(one: Table, names: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in one.columns)
    body = "\n".join(
        f'<tr><th><i style="{_line(names.index(row[0]))}"></i>{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in one.rows
    )
    return (
        f'<h2>{html.escape(one.title)}</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _line(index: int) -> str:
    """CSS of the group's line in the plots."""
    return f"border-top: .2em {plots.dash(index)} {plots.colour(index)}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
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
BODY
</body>
</html>
"""
