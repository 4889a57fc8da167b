"""Lay out the live view for the terminal's size. On a small terminal sections shrink, then vanish.

Text has the terminal's own colour, so it can be read on dark and on light ones; colours are named ones, which themes
adapt, and none carries a meaning alone. Only lines are dim.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from popo_lite.metrics import METRICS
from popo_lite.tools.console import words
from popo_lite.tools.console.views import GROUPS, PAUSED, RunState

# Metrics, with what stands beside their values if the step has it.
_LEARNING = {
    "loss": "",
    "loss_policy": "",
    "loss_similarity": "",
    "loss_entropy": "coef {entropy_coef:.4f}",
    "entropy": "{entropy_over_start:.0%} of start",
    "effective_sample_size": "{effective_sample_ratio:.0%} of all",
    "siamese_cosine": "to siamese",
    "siamese_drift": "{siamese_drift_over_bound:.0%} of bound",
    "grad_norm": "",
    "logp_gap_mean": "max {logp_gap_max:.4f}",
}
_ANSWERS = {
    "completion_tokens_mean": "{truncated_ratio:.0%} truncated",
    "positives": "of {rollouts:,}",
    "unique_answers_mean": "per prompt",
    "top_shape_ratio": "start {top_shape_start_ratio:.0%}",
}
_GROUP_LOOKS = (
    ("█", "green", "all right"),
    ("▓", "cyan", "some"),
    ("░", "magenta", "none"),
    ("?", "red", "ungraded"),
)
_LABEL, _RIGHT, _REST = {"width": 15}, {"justify": "right", "style": "bold"}, {"ratio": 1}
_NAME = {**_LABEL, "style": "bold"}
_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of the chart of the pass rate
TWO_COLUMNS = 150
"""Width from which sections stand in two columns."""


class Section(NamedTuple):
    """The fewest lines that make sense, the most that are of use, and what draws so many.

    One with a `name` is drawn again only if the state has changed.
    """

    fewest: int
    most: int
    draw: Callable[[int], RenderableType]
    name: str = ""


class Remembered:
    """Cache parts of the screen until the state changes, because drawing takes time from the training."""

    def __init__(self) -> None:
        self._changes, self._values = -1, dict[Any, Any]()

    def __call__(self, state: RunState, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned for `key` since the state changed."""
        if self._changes != state.changes:
            self._changes, self._values = state.changes, {}
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]


def dashboard(state: RunState, console: Console, remembered: Remembered) -> list[list[Segment]]:
    """Return the lines of the screen for the console's size."""
    width, height, keys = max(console.width - 2, 1), console.height, _keys(state)
    two = width + 2 >= TWO_COLUMNS and bool(state.records)
    half = (width - 3) // 2
    part = half if two else width
    header: list[Text] = remembered(state, ("header", width), lambda: _header(state, width))
    above = Section(1, len(header), lambda _: Group(*header), "header")
    left, right = [Section(3, 3, lambda _: _progress(state, part))], list[Section]()
    if state.records:
        left += [
            Section(1, 1, lambda _: _prompts(state, part), "prompts"),
            Section(3, max(8, height // 3) if two else 8, lambda rows: _pass_rate(state, part, rows), "pass rate"),
        ]
        block = half if two or part >= 76 else part
        learning, *others = remembered(
            state, ("figures", block), lambda: [_learning(state, block), _answers(state, block), _times(state)]
        )
        most = sum(other.most for other in others)
        if two:
            left.append(learning)
            right += others
        elif block == half:
            most = max(learning.most, most)
            left.append(Section(min(most, 9), most, lambda _: _beside([learning], others, half), "figures"))
        else:
            most += learning.most
            left.append(Section(min(most, 9), most, lambda _: _stacked([learning, *others]), "figures"))
    if state.help_shown:
        left.insert(1, Section(len(state.keys) + 1, len(state.keys) + 1, lambda _: _help(state), "help"))
    if state.notices:
        left.append(Section(2, 16 if two else 7, lambda rows: _messages(state, part, rows), "messages"))
    for sample in state.shown_samples(4 if two else 1):
        drawn = partial(_sample, sample, part, console=console)
        (right if two else left).append(Section(4, 12, drawn, f"sample {id(sample)}"))

    left_over = height - bool(keys)
    blank = int(left_over >= 29)  # a line between sections, where all of them have space
    column = partial(_column, state, console=console, blank=blank, remembered=remembered)
    if two:
        lines = column([above], width, left_over)
        columns = [column(sections, part, left_over - len(lines)) for sections in (left, right)]
        lines += _joined(columns[0], columns[1], part)
    else:
        lines = column([above, *left], width, left_over)
    lines = lines[:left_over]
    if keys:
        lines += [[] for _ in range(left_over - len(lines))]
        lines += console.render_lines(keys, console.options.update(height=1, no_wrap=True))
    return lines


def share_height(wanted: Sequence[Sequence[Any]], height: int) -> list[int]:
    """Return lines for each section: its fewest, or 0 if they do not fit, then up to its most; the first ones first."""
    given: list[int] = []
    for fewest, *_ in wanted:
        given.append(fewest if fewest <= height - sum(given) else 0)
    for index, (_, most, *_) in enumerate(wanted):
        if given[index]:
            given[index] = min(most, given[index] + height - sum(given))
    return given


def _column(
    state: RunState, sections: Sequence[Section], width: int, height: int, *, console: Console, blank: int,
    remembered: Remembered,
) -> list[list[Segment]]:  # fmt: skip
    lines: list[list[Segment]] = []
    options = console.options.update(width=min(width + 2, console.width), no_wrap=True, overflow="ellipsis")
    heights = share_height(sections, height - blank * (len(sections) - 1))
    for rows, section in zip(heights, sections, strict=True):
        if rows:
            draw = partial(_lines, section, rows, console, options)
            lines += remembered(state, (section.name, rows, width), draw) if section.name else draw()
            lines += [[]] * blank
    return lines[:height]


def _lines(section: Section, rows: int, console: Console, options: ConsoleOptions) -> list[list[Segment]]:
    return console.render_lines(Padding(section.draw(rows), (0, 1)), options)[:rows]


def _joined(left: list[list[Segment]], right: list[list[Segment]], width: int) -> list[list[Segment]]:
    """Return two columns side by side; each has its margins."""
    pairs = zip_longest(left, right, fillvalue=list[Segment]())
    return [[*Segment.adjust_line_length(first, width + 3), *second] for first, second in pairs]


def _stacked(sections: Sequence[Section]) -> RenderableType:
    return Group(*(section.draw(section.most) for section in sections))


def _beside(left: Sequence[Section], right: Sequence[Section], width: int) -> RenderableType:
    return _grid([{"width": width}, {"width": 1}, _REST], [_stacked(left), "", _stacked(right)])


def _grid(columns: Sequence[Mapping[str, Any]], *rows: Iterable[RenderableType]) -> Table:
    """Return a table without lines, as wide as its place. Strings are text and never markup."""
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    for column in columns:
        grid.add_column(no_wrap=True, **column)
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


class _Bar:
    """A bar as wide as its place: thick for what is done, thin for the rest, so that it needs no colours."""

    def __init__(self, total: float | None, done: float, style: str) -> None:
        self._ratio, self._style = min(max(done / total, 0.0), 1.0) if total else 0.0, style

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        done = round(self._ratio * options.max_width)
        yield Segment("━" * done, Style.parse(self._style))
        yield Segment("─" * (options.max_width - done), Style(dim=True))


def _rule(title: str, note: str) -> RenderableType:
    return _grid([_REST, {}], [Rule(Text(title, "bold"), align="left", style="dim"), note])


# --------------------------------------------------------------------------- sections


def _header(state: RunState, width: int) -> list[Text]:
    lines = [Text.assemble(("popo-lite", "bold cyan"), "  ", (state.title, "bold"))]
    for name, value in state.facts.items():
        fact = Text.assemble(f"{name} ", (value, "bold"))
        if len(lines) > 1 and lines[-1].cell_len + 3 + fact.cell_len <= width:
            lines[-1].append("   ").append_text(fact)
        else:
            lines.append(fact)
    return lines


def _progress(state: RunState, width: int) -> RenderableType:
    done, total, records, (pace, left) = state.steps_done, state.total_steps, state.records, state.pace()
    far = f"{done / max(total, 1):4.0%}   {words.duration(state.clock() - state.started)} elapsed"
    below = Text(state.before_the_first_step)
    if records:
        far += f"   {words.duration(left)} left" if left is not None else ""
        reason, skips, steps = records[-1]["skipped_reason"], state.skips, state.steps_done - state.first_step
        text = f"{words.duration(pace)} a step"
        text += f"   done about {words.clock_time(datetime.now(), left)}" if left else ""
        text += f"   {skips} of {steps} steps skipped" if skips else ""
        if reason is not None:
            text = f"step {done} changed no weights ({skips} of {steps} skipped): {words.clean(reason)}"
        below = Text(text)
    if state.stage_name == PAUSED:
        text = "paused: p continues, q saves and stops" if "p" in state.keys else "paused"
        below = Text(text, "bold magenta")
    ran = words.duration(state.clock() - state.stage_since) if state.stage_name else ""
    if stage_total := state.stage_total:
        ran = f"{state.stage_done / stage_total:4.0%}   {state.stage_done:,} of {stage_total:,}   {ran}"
    bars = _grid(
        [_NAME, _REST, {"min_width": min(33, width // 2)}],
        [f"step {done}/{total}", _Bar(total, done, "cyan"), far],
        [state.stage_name or "starting", _Bar(stage_total, state.stage_done, "green"), ran],
    )
    return Group(bars, _grid([_LABEL, _REST], ["", below]))


def _prompts(state: RunState, width: int) -> RenderableType:
    looks = zip(GROUPS, _GROUP_LOOKS, strict=True)
    groups = [(count, *look) for name, look in looks if (count := state.records[-1][name])]
    legend = Text("  ").join(Text.assemble((mark, style), f" {n} {label}") for n, mark, style, label in groups)
    bar, before, space, total = Text(), 0, max(width - 17 - legend.cell_len, 0), sum(count for count, *_ in groups)
    for count, mark, style, _ in groups:
        # Rounding the ends and not the lengths makes the whole exactly as wide as its place.
        start, end = (round(part * space / max(total, 1)) for part in (before, before + count))
        bar.append(mark * (end - start), style)
        before += count
    return _grid([_NAME, _REST, {}], ["prompts", bar, legend])


def _pass_rate(state: RunState, width: int, rows: int) -> RenderableType:
    values = state.trend("pass_rate")
    known = [value for value in values if value is not None]
    highest = max(known, default=0.0)
    top = next((top for top in _TOPS if highest <= top), 1.0)
    beside = [("now", words.share(values[-1]))]
    if state.evaluations:
        beside.append(("held out", words.share(state.evaluations[-1]["pass_at_1"])))
    if len(known) > 10:
        beside += [("last 10", words.share(sum(known[-10:]) / 10)), ("highest", words.share(highest))]
    beside += [(str(e["when"])[:8], words.share(e["pass_at_1"])) for e in state.evaluations[:-1]]
    names = "\n".join(f"{name:<8}{value:>7}" for name, value in beside[: rows - 1])
    drawn = chart(values, max(width - 16, 1), rows - 1, 0.0, top, state.total_steps - state.first_step)
    note = f"steps {state.first_step + 1} to {state.steps_done}, chart from 0 to {top:.0%}"
    if (level := state.records[-1]["level"]) is not None:
        note = f"level {level + 1}, {note}"
    return Group(_rule("pass rate", note), _grid([_LABEL, {**_REST, "style": "green"}], [names, "\n".join(drawn)]))


def _figures(state: RunState, width: int, metrics: Mapping[str, str]) -> list[Any]:
    """Return rows of label, value, note and course."""
    record, rows = state.records[-1], list[Any]()
    for name, note in metrics.items():
        label = f"  {METRICS[name].label}" if name.startswith("loss_") else METRICS[name].label
        # Beyond the bound the siamese is not the average that the method assumes.
        beyond = name == "siamese_drift" and (record["siamese_drift_over_bound"] or 0) > 1
        value = Text(words.quantity(record[name], METRICS[name].unit), "red" if beyond else "")
        try:
            note = note.format_map(record)
        except TypeError:  # a metric of it is None
            note = ""
        rows.append((label, value, note, _course(state, width, name)))
    return rows


def _course(state: RunState, width: int, name: str) -> str:
    space = width - 40  # beside label, value and note
    return chart(state.trend(name), space, 1, None, None, state.total_steps - state.first_step)[0] if space > 3 else ""


_COLUMNS = (_LABEL, {**_RIGHT, "min_width": 8}, {"min_width": 12}, {**_REST, "style": "cyan"})


def _learning(state: RunState, width: int) -> Section:
    rows = _figures(state, width, _LEARNING)
    title = _rule("learning", f"learning rate {words.figure(state.records[-1]['learning_rate'])}")
    return Section(2, 1 + len(rows), lambda n: Group(title, _grid(_COLUMNS, *rows[: n - 1])))


def _answers(state: RunState, width: int) -> Section:
    record, rows = state.records[-1], _figures(state, width, _ANSWERS)
    if len(record["rewards"]) > 1:  # of a single one, the pass rate says enough
        for name, value in record["rewards"].items():
            label, course = words.clean(name.rpartition(":")[2]), _course(state, width, f"reward {name}")
            rows.append((label, words.share(value), "mean reward", course))
    for name, value in record["task_figures"].items():
        label = words.clean(name.removesuffix("_ratio").replace("_", " "))
        rows.append((label, words.share(value), "", _course(state, width, name)))
    if other := {k: count for k, count in record["outcomes"].items() if count and k not in ("correct", "incorrect")}:
        most = max(other, key=lambda name: other[name])
        rows.append(("not judged", str(sum(other.values())), f"{other[most]} {most}", ""))
    title = _rule("answers", "of this step")
    return Section(2, 1 + len(rows), lambda n: Group(title, _grid(_COLUMNS, *rows[: n - 1])))


def _times(state: RunState) -> Section:
    record, rows = state.records[-1], list[Any]()
    stages, total = words.by_stage(record["seconds"])
    speeds = {name: f"{speed:,.0f} tok/s" for name, speed in record["tokens_per_second"].items()}
    for name, took in sorted(stages.items(), key=lambda stage: -stage[1]):  # a small screen cuts the shortest off
        bar = _Bar(total, took, "cyan")
        rows.append((name, words.duration(took), bar, speeds.get(name, "")))
    title = _rule("time and memory", f"peak {words.memory(record['peak_memory_bytes'])}")
    return Section(
        2, 1 + len(rows), lambda n: Group(title, _grid([{}, _RIGHT, _REST, {"justify": "right"}], *rows[: n - 1]))
    )


def chart(
    values: Sequence[float | None], width: int, rows: int, low: float | None, high: float | None, expected: int
) -> list[str]:
    """Return columns over time, as lines from top to bottom. Without `low` and `high` the values' own range is drawn.

    A column is the mean of some values, or a value has several columns if `expected` values leave space for that. The
    lowest value is a thin line and None a gap, so that 0 and "not measured" look different.
    """
    each = max(width // max(expected, len(values), 1), 1)
    values = [value for value in values for _ in range(each)]
    columns = min(len(values), width)
    edges = [index * len(values) // max(columns, 1) for index in range(columns + 1)]
    parts = [[v for v in values[start:end] if v is not None] for start, end in pairwise(edges)]
    means = [sum(part) / len(part) if part else None for part in parts]
    if low is None or high is None:
        known = [mean for mean in means if mean is not None] or [0.0]
        low, high = min(known), max(known)
        if high - low <= 1e-6 * max(abs(low), abs(high)):
            low, high = low - 1, high + 1  # a flat line, not rounding errors at full height
    levels = [0 if mean is None else max(round((mean - low) / (high - low) * 8 * rows), 1) for mean in means]
    return ["".join(" ▁▂▃▄▅▆▇█"[min(max(level - 8 * row, 0), 8)] for level in levels) for row in reversed(range(rows))]


def _messages(state: RunState, width: int, rows: int) -> RenderableType:
    """Return the newest messages, the last one whole if there is room: it may say what to do."""
    lines: list[str] = []
    for notice in reversed(state.notices):
        if len(lines) >= rows - 1:
            break
        time, _, text = notice.partition("  ")
        first, *more = _wrapped(text, max(width - 10, 1))
        lines[:0] = [f"{time}  {first}", *(f"{'':10}{line}" for line in more)]
    # The start of a message matters more than its end.
    shown = lines[: rows - 1] if len(state.notices) == 1 else lines[-(rows - 1) :]
    return Group(_rule("messages", f"{len(state.notices):,} in all"), *map(Text, shown))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _sample(sample: Mapping[str, Any], width: int, rows: int, *, console: Console) -> RenderableType:
    lines, left = [], rows - 1
    texts = [("question", "question", "bold"), ("✓ right", "right", "bold green"), ("✗ wrong", "wrong", "bold red")]
    if asked := sample.get("asked"):
        texts = [text for text in texts if sample[text[1]] is not None]
    for index, (name, key, style) in enumerate(texts):
        text = "none among the answers to this" if sample[key] is None else sample[key] or "an answer without any text"
        # Not wrapped whole: no screen shows more than 4,000 characters.
        text = words.clean(text if len(text) <= 4000 else f"{text[:2000]} … {text[-2000:]}")
        shown = fit(text, max(width - 16, 1), left // (len(texts) - index), console)
        left -= len(shown)
        lines.append((Text(name, style), "\n".join(shown)))
    what = f"answer after step {sample['step'] + 1}, as asked for" if asked else f"sample of step {sample['step'] + 1}"
    title = _rule(what, f"the answer is {words.clean(sample['reference'])[:40]}")
    return Group(title, _grid([_LABEL, _REST], *lines))


def fit(text: str, width: int, height: int, console: Console) -> list[str]:
    """Return `text` as at most `height` lines. The middle of a longer text is left out: its end counts most."""
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, width)] or [""]
    if len(lines) <= height:
        return lines
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, max(width - 2, 1))]
    first = height // 2
    return [*lines[:first], *(f"{'… ' * (not index)}{line}" for index, line in enumerate(lines[first - height :]))]


# --------------------------------------------------------------------------- keys


def _keys(state: RunState) -> Text | None:
    """Return the last line: keys, or what was asked for and waits for the end of the step."""
    if not state.keys:
        return None
    keys = [Text.assemble((key, "bold cyan"), f" {short}") for key, (_, short, _) in state.keys.items()]
    line = Text(" ").append_text(Text("  ").join([*keys, Text.assemble(("?", "bold cyan"), " help")]))
    if state.controls is not None and (waiting := state.controls.waiting):
        line.append(f"   {', '.join(waiting)}: after this step", "bold magenta")
    return line


def _help(state: RunState) -> RenderableType:
    rows = [(Text(key, "bold cyan"), meaning) for key, (_, _, meaning) in state.keys.items()]
    return Group(_rule("keys", "? closes this"), _grid([{"width": 3}, _REST], *rows))
