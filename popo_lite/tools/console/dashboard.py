"""Lay out the live screen. On a small terminal the less important sections shrink, then vanish."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from popo_lite.metrics import METRICS, StepRecord
from popo_lite.tools.console import words
from popo_lite.tools.console.views import RunState
from popo_lite.types import SampleView

# Metric -> the note beside it, and the metric in the note. Labels and units are those of METRICS.
_LEARNING = {
    "loss": ("", ""),
    "loss_policy": ("", ""),
    "loss_similarity": ("", ""),
    "loss_entropy": ("coef {}", "entropy_coef"),
    "entropy": ("{} of start", "entropy_over_start"),
    "effective_sample_size": ("{} of all", "effective_sample_ratio"),
    "siamese_cosine": ("to siamese", "siamese_drift"),
    "siamese_drift": ("{} of bound", "siamese_drift_over_bound"),
    "grad_norm": ("", ""),
    "logp_gap_mean": ("max {}", "logp_gap_max"),
}
_ANSWERS = {
    "completion_tokens_mean": ("{} truncated", "truncated_ratio"),
    "positives": ("of {}", "rollouts"),
    "unique_answers_mean": ("per prompt", "prompts"),
}
_GROUPS = {
    "all_right": ("█", "green", "all right"),
    "some_right": ("▓", "cyan", "some"),
    "none_right": ("░", "yellow", "none"),
    "ungraded": ("?", "red", "ungraded"),
}
_LABEL, _RIGHT, _REST, _DIM = {"width": 15}, {"justify": "right"}, {"ratio": 1}, {"style": "dim"}
_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of the chart of the pass rate
_SCREEN = ("header", "progress", "prompts", "pass rate", "figures", "sample", "messages")


@dataclass(frozen=True)
class _Sized:
    """A renderable made for the width and height of the place that it gets."""

    make: Callable[[int, int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.make(options.max_width, options.height or 1)


def dashboard(state: RunState, console: Console) -> RenderableType:
    """Return the screen for the console's size."""
    header = _header(state, console.width - 2)
    # By importance. The numbers are lines: the fewest that make sense, enough, and the most that are of use.
    sections: dict[str, tuple[RenderableType, int, int, int]] = {
        "header": (Group(*header), 1, min(2, len(header)), len(header)),
        "progress": (_progress(state), 3, 3, 3),
    }
    if state.records:
        sections["pass rate"] = (_Sized(lambda width, rows: _pass_rate(state, width, rows)), 3, 3, 8)
        sections["prompts"] = (_prompts(state.records[-1]), 1, 1, 1)
        figures, rows = _figures(state, console.width - 2)
        sections["figures"] = (figures, 4, min(rows, 9), rows)
    if notices := state.notices:
        messages = _Sized(lambda _, rows: Group(_rule("messages"), *map(_line, notices[1 - rows :])))
        sections["messages"] = (messages, 2, 2, min(1 + len(notices), 8))
    if (sample := state.sample()) is not None:
        sections["sample"] = (_Sized(lambda width, rows: _sample(sample, width, rows, console)), 4, 4, 12)
    wanted = {name: lines for name, (_, *lines) in sections.items()}
    # Blank lines between the sections, if all of them have enough without these.
    blank = 1
    heights = share_height(wanted, console.height - len(sections) + 1)
    if any(heights.get(name, 0) < lines[1] for name, lines in wanted.items()):
        blank, heights = 0, share_height(wanted, console.height)
    screen = Layout()
    screen.split_column(
        *(
            Layout(Padding(sections[name][0], (0, 1, blank, 1)), size=heights[name] + blank)
            for name in _SCREEN
            if name in heights
        ),
        Layout(Text(" "), minimum_size=0),
    )
    return screen


def share_height(wanted: Mapping[str, Sequence[int]], height: int) -> dict[str, int]:
    """Return lines for each section that fits with its fewest; what is left goes by importance, level after level."""
    given = {}
    for name, (fewest, *_) in wanted.items():
        if fewest <= height:
            given[name] = fewest
            height -= fewest
    for level in (1, 2):
        for name in given:
            more = min(wanted[name][level] - given[name], height)
            given[name] += more
            height -= more
    return given


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _grid(columns: Sequence[Mapping[str, Any]], *rows: Iterable[RenderableType]) -> Table:
    """Return a table without lines, as wide as its place. Strings are text and never markup."""
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    for column in columns:
        grid.add_column(no_wrap=True, **column)
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def _rule(title: str, note: str = "") -> RenderableType:
    rule = Rule(Text(title, "bold"), align="left", style="dim")
    return _grid([_REST, _DIM], [rule, note]) if note else rule


def _header(state: RunState, width: int) -> list[Text]:
    lines = [Text.assemble(("popo-lite", "bold cyan"), "  ", (state.title, "bold"), no_wrap=True, overflow="ellipsis")]
    for name, value in state.facts.items():
        fact = Text.assemble((name, "dim"), " ", value, no_wrap=True, overflow="ellipsis")
        if len(lines) > 1 and lines[-1].cell_len + 3 + fact.cell_len <= width:
            lines[-1].append("   ").append_text(fact)
        else:
            lines.append(fact)
    return lines


def _progress(state: RunState) -> RenderableType:
    done, total, pace, left = state.steps_done, state.total_steps, *state.pace()
    far = f"{done / max(total, 1):4.0%}   {words.duration(state.clock() - state.started)} elapsed"
    below = "no step has ended yet"
    if pace is not None and left is not None:
        far += f"   {words.duration(left)} left"
        below = f"{words.duration(pace)} a step"
        below += f"   done about {words.clock_time(datetime.now(), left)}" if left else ""
        skipped = [record["skipped_reason"] for record in state.records if record["skipped_reason"] is not None]
        below += f"   {len(skipped)} of {len(state.records)} steps skipped" if skipped else ""
        if (reason := state.records[-1]["skipped_reason"]) is not None:
            below = f"step {done} changed no weights ({len(skipped)} of {len(state.records)} skipped): "
            below += words.clean(reason)
    ran = words.duration(state.clock() - state.stage_since) if state.stage_name else ""
    if stage_total := state.stage_total:
        ran = f"{state.stage_done / stage_total:4.0%}   {state.stage_done:,} of {stage_total:,}   {ran}"
    bars = _grid(
        [{**_LABEL, "style": "bold"}, _REST, {"min_width": 33}],
        [f"step {done}/{total}", ProgressBar(max(total, 1), done, complete_style="cyan"), far],
        [state.stage_name or "starting", ProgressBar(stage_total, state.stage_done, complete_style="green"), ran],
    )
    return Group(bars, _grid([_LABEL, {**_REST, **_DIM}], ["", below]))


def _prompts(record: StepRecord) -> RenderableType:
    counts = {name: record[f"groups_{name}"] for name in _GROUPS}
    legend = Text("  ").join(
        Text.assemble(_GROUPS[name][:2], f" {count} ", (_GROUPS[name][2], "dim"))
        for name, count in counts.items()
        if count
    )

    def bar(width: int, _: int) -> Text:
        drawn, before = Text(), 0
        for name, count in counts.items():
            # Rounding the ends and not the lengths makes the whole exactly `width` wide.
            ends = [round(part * width / max(sum(counts.values()), 1)) for part in (before, before + count)]
            drawn.append(_GROUPS[name][0] * (ends[1] - ends[0]), _GROUPS[name][1])
            before += count
        return drawn

    return _grid([{**_LABEL, "style": "bold"}, _REST, {}], ["prompts", _Sized(bar), legend])


def _pass_rate(state: RunState, width: int, rows: int) -> RenderableType:
    values = state.trend("pass_rate")
    known = [value for value in values if value is not None]
    top = next((top for top in _TOPS if max(known, default=0) <= top), 1.0)
    beside = [("now", words.share(values[-1]))]
    if len(known) > 10:
        beside += [("last 10", words.share(sum(known[-10:]) / 10)), ("highest", words.share(max(known)))]
    names = "\n".join(f"{name:<8}{value:>6}" for name, value in beside[: rows - 1])
    drawn = chart(values, max(width - 16, 1), rows - 1, 0.0, top, state.total_steps - state.first_step)
    note = f"steps {state.first_step + 1} to {state.steps_done}, chart from 0 to {top:.0%}"
    return Group(_rule("pass rate", note), _grid([_LABEL, {**_REST, "style": "green"}], [names, "\n".join(drawn)]))


def _figures(state: RunState, width: int) -> tuple[RenderableType, int]:
    """Return learning on the left, answers and time on the right or below, and the lines that this takes."""
    record = state.records[-1]
    learning = [_row(state, name, *note) for name, note in _LEARNING.items()]
    answers = [_row(state, name, *note) for name, note in _ANSWERS.items()]
    for name, value in record["task_figures"].items():
        answers.append((words.spoken(name), words.share(value), "", _sparkline(state, name)))
    other = {
        name: count for name, count in record["outcomes"].items() if count and name not in ("correct", "incorrect")
    }
    if other:
        most = max(other, key=lambda name: other[name])
        answers.append(("not judged", str(sum(other.values())), f"{other[most]} {most}", ""))
    stages, total = words.by_stage(record["seconds"])
    times: list[Sequence[RenderableType]] = []
    # The longest first: on a small screen the others are cut off.
    for name in sorted(stages, key=lambda name: -stages[name]):
        speed = record["tokens_per_second"].get(name)
        tokens = "" if speed is None else f"{speed:,.0f} tok/s"
        bar = ProgressBar(max(total, 1e-9), stages[name], complete_style="cyan", finished_style="cyan")
        times.append((name, words.duration(stages[name]), bar, tokens))
    columns = [
        {**_DIM, **_LABEL},
        {**_RIGHT, "min_width": 8},
        {**_DIM, "min_width": 12},
        {**_REST, "style": "dim cyan"},
    ]
    left = (_rule("learning", f"learning rate {words.figure(record['learning_rate'])}"), _grid(columns, *learning))
    right = (
        _rule("answers", "of this step"),
        _grid(columns, *answers),
        _rule("time and memory", f"peak {words.memory(record['peak_memory_bytes'])}"),
        _grid([_DIM, _RIGHT, _REST, _RIGHT], *times),
    )
    heights = 1 + len(learning), 2 + len(answers) + len(times)
    if width < 76:
        return Group(*left, *right), sum(heights)
    columns_side_by_side = Layout()
    columns_side_by_side.split_row(Layout(Group(*left)), Layout(Text(" "), size=3), Layout(Group(*right)))
    return columns_side_by_side, max(heights)


def _row(state: RunState, name: str, note: str, other: str) -> Sequence[RenderableType]:
    record, metric = state.records[-1], METRICS[name]
    value = Text(words.quantity(record[name], metric.unit))
    if name == "siamese_drift" and (record["siamese_drift_over_bound"] or 0) > 1:
        value.stylize("bold red")  # beyond the bound the siamese is not the average that the method assumes
    beside = ""
    if record.get(other) is not None:
        unit = METRICS[other].unit
        beside = note.format(f"{record[other]:.0%}" if unit == "ratio" else words.quantity(record[other], unit))
    label = f"  {metric.label}" if name.startswith("loss_") else metric.label
    return label, value, beside, _sparkline(state, name)


def _sparkline(state: RunState, name: str) -> _Sized:
    def draw(width: int, _: int) -> Text:
        values = _means(state.trend(name), width)
        known = [value for value in values if value is not None] or [0.0]
        low, high = min(known), max(known)
        if high - low <= 1e-6 * max(abs(low), abs(high)):
            low, high = low - 1, high + 1  # a flat line, not rounding errors at full height
        return Text(chart(values, width, 1, low, high, state.total_steps - state.first_step)[0] if width > 3 else "")

    return _Sized(draw)


def chart(values: Sequence[float | None], width: int, rows: int, low: float, high: float, expected: int) -> list[str]:
    """Return columns over time, as lines from top to bottom.

    Each column is the mean of some values, or each value has several columns if `expected` values leave space for
    that. The lowest value is a thin line and None a gap, so that 0 and "not measured" look different.
    """
    each = max(width // max(expected, len(values), 1), 1)
    levels = []
    for value in _means([value for value in values for _ in range(each)], width):
        part = 0.0 if value is None else min(max((value - low) / (high - low), 0.0), 1.0)
        levels.append(0 if value is None else max(round(part * 8 * rows), 1))
    return ["".join(" ▁▂▃▄▅▆▇█"[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(rows))]


def _means(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return at most `width` means of the known values of equal parts."""
    bins = min(len(values), width)
    edges = [index * len(values) // bins for index in range(bins + 1)] if bins else [0]
    parts = [[v for v in values[start:end] if v is not None] for start, end in pairwise(edges)]
    return [sum(part) / len(part) if part else None for part in parts]


def _sample(sample: SampleView, width: int, rows: int, console: Console) -> RenderableType:
    lines, width = [], max(width - 16, 1)
    answers = [text if text is None else text or "an answer without any text" for text in (sample.right, sample.wrong)]
    texts = {"question": (sample.question, "bold"), "✓ right": (answers[0], "bold green")}
    left = rows - 1
    for index, (name, (text, style)) in enumerate({**texts, "✗ wrong": (answers[1], "bold red")}.items()):
        text = "none among the answers to this" if text is None else text
        shown = fit(text, width, left // (3 - index), console)
        left -= len(shown)
        lines.append((Text(name, style), "\n".join(shown)))
    title = f"sample of step {sample.step + 1}"
    return Group(_rule(title, f"the answer is {sample.reference[:40]}"), _grid([_LABEL, _REST], *lines))


def fit(text: str, width: int, height: int, console: Console) -> list[str]:
    """Return `text` as at most `height` lines. The middle of a longer text is left out: its end counts most."""
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, width)] or [""]
    if len(lines) <= height:
        return lines
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, max(width - 2, 1))]
    first = height // 2
    return [*lines[:first], *(f"{'… ' * (not index)}{line}" for index, line in enumerate(lines[first - height :]))]
