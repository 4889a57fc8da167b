"""The full-screen view of a run, which keeps what other code prints meanwhile.

On a small terminal the less important sections shrink, then vanish.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from itertools import pairwise
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.segment import Segment, SegmentLines
from rich.table import Table
from rich.text import Text

from popo_lite.metrics import METRICS
from popo_lite.tools.console import words
from popo_lite.tools.console.views import GROUPS, Clock, RunState, writing

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
_GROUP_LOOKS = (("█", "green", "all right"), ("▓", "cyan", "some"), ("░", "yellow", "none"), ("?", "red", "ungraded"))
_LABEL, _RIGHT, _REST, _DIM = {"width": 15}, {"justify": "right"}, {"ratio": 1}, {"style": "dim"}
_NAME = {**_LABEL, "style": "bold"}
_TOPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # of the chart of the pass rate


class LiveView(RunState):
    """Draw on the terminal's alternate screen. Closing brings back what was there, and writes messages below it."""

    def __init__(self, console: Console, *, refresh_seconds: float = 0.5, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=1 / refresh_seconds,
                          screen=True, redirect_stdout=False, redirect_stderr=False)  # fmt: skip
        self._other: deque[str] = deque(maxlen=50)
        self._other_count = 0
        self._screen: ExitStack | None = None

    def start(self, **facts: Any) -> None:
        """Take the screen."""
        super().start(**facts)
        with writing(), ExitStack() as taken:
            # Undone in reverse order: the screen is given back before other output may reach it.
            taken.enter_context(caught_output(self._catch))
            # If terminal and program disagree about the width of a character, a line may be too long. With automatic
            # wrapping the whole screen would scroll by a line; without it the terminal clips the line.
            taken.callback(self._console.file.write, "\x1b[?7h")
            self._console.file.write("\x1b[?7l")
            taken.enter_context(self._live)
            self._screen = taken.pop_all()

    def message(self, text: str) -> None:
        """Show a notice, which is written again on closing. Before `start` it is written at once."""
        if self._screen is None:
            self._print(*map(words.clean, text.splitlines()))
        else:
            super().message(text)

    def close(self) -> None:
        """Give the screen back; write where the run got to, all messages and the last lines of other output."""
        if self._screen is None:
            return
        self._screen.close()
        self._screen = None
        took = words.duration(self.clock() - self.started)
        self._print(f"{self.title}: {self.steps_done} of {self.total_steps} steps, {took} in this session")
        self._print(*([self.step_line()] if self.records else []), *self.notices)
        if other := self._other:
            last = f", the last {len(other)}" if len(other) < self._other_count else ""
            self._print(f"Other output during the run (lines: {self._other_count}{last}):", *(f"  {o}" for o in other))

    def render(self) -> SegmentLines:
        """Return the screen as it is now, at the size that the terminal has now."""
        with self.lock:
            lines = dashboard(self, self._console)
        encoding = self._console.encoding
        lines = [[Segment(words.encodable(text, encoding), style) for text, style, _ in line] for line in lines]
        return SegmentLines(lines, new_lines=True)

    def _catch(self, line: str) -> None:
        with self.lock:  # other threads print too
            self._other.append(words.clean(line))
            self._other_count += 1

    def _print(self, *lines: str) -> None:
        with writing():
            for line in lines:
                self._console.out(words.encodable(line, self._console.encoding), highlight=False)


class _LineCatcher(io.TextIOBase):
    """Call `receive` with each finished line. Of a line rewritten by carriage returns only the last state counts."""

    def __init__(self, receive: Callable[[str], None], original: TextIO) -> None:
        self._receive, self._pending = receive, ""
        self.fileno = original.fileno  # type: ignore[method-assign]  # child processes need a real one

    def write(self, text: str) -> int:
        *finished, rest = (self._pending + text).split("\n")
        self._pending = rest[rest.rstrip("\r").rfind("\r") + 1 :]
        for line in finished:
            if shown := line.rstrip("\r").rsplit("\r", 1)[-1].strip():
                self._receive(shown)
        return len(text)


@contextmanager
def caught_output(receive: Callable[[str], None]) -> Iterator[None]:
    """Hand lines that Python code of this process prints to stdout and stderr to `receive`.

    Log handlers that hold the old streams are redirected too. C libraries and child processes are not caught.
    """
    loggers = (logging.root, *logging.root.manager.loggerDict.values())
    # A handler without a stream of its own follows sys.stderr by itself.
    handlers = [h for logger in loggers for h in getattr(logger, "handlers", ()) if "stream" in vars(h)]
    with ExitStack() as undo:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            catcher = cast(TextIO, _LineCatcher(receive, stream))
            undo.callback(catcher.write, "\n")
            undo.enter_context(redirect(catcher))
            for handler in handlers:
                if handler.stream is stream:
                    handler.setStream(catcher)
                    undo.callback(handler.setStream, stream)
        yield


def dashboard(state: RunState, console: Console) -> list[list[Segment]]:
    """Return the lines of the screen for the console's size."""
    width, notices, sample = max(console.width - 2, 1), state.notices, state.sample()
    header = [Text.assemble(("popo-lite", "bold cyan"), "  ", (state.title, "bold"))]
    for name, value in state.facts.items():
        fact = Text.assemble((name, "dim"), " ", value)
        if len(header) > 1 and header[-1].cell_len + 3 + fact.cell_len <= width:
            header[-1].append("   ").append_text(fact)
        else:
            header.append(fact)
    # From top to bottom: the fewest lines that make sense, the most that are of use, and what draws so many.
    sections: list[tuple[int, int, Callable[[int], RenderableType]]] = [(1, len(header), lambda _: Group(*header))]
    sections.append((3, 3, lambda _: _progress(state)))
    if state.records:
        figures, lines = _figures(state, width)
        sections.append((1, 1, lambda _: _prompts(state, width)))
        sections.append((3, 8, lambda rows: _pass_rate(state, width, rows)))
        sections.append((min(lines, 9), lines, lambda _: figures))
    if notices:
        title, most = _rule("messages", f"{len(notices):,} in all"), min(1 + len(notices), 8)
        sections.append((2, most, lambda rows: Group(title, *map(Text, notices[1 - rows :]))))
    if sample is not None:
        sections.append((4, 12, lambda rows: _sample(sample, width, rows, console)))
    blank = int(console.height >= 30)  # between sections, where all of them have space
    heights = share_height(sections, console.height - blank * (len(sections) - 1))
    screen = []
    for rows, (*_, draw) in zip(heights, sections, strict=True):
        if rows:
            options = console.options.update(height=rows + blank, no_wrap=True, overflow="ellipsis")
            screen += console.render_lines(Padding(draw(rows), (0, 1, blank, 1)), options)
    return screen[: console.height]


def share_height(wanted: Sequence[Sequence[Any]], height: int) -> list[int]:
    """Return lines for each section: its fewest, or 0 if they do not fit, then up to its most; the first ones first."""
    given: list[int] = []
    for fewest, *_ in wanted:
        given.append(fewest if fewest <= height - sum(given) else 0)
    for index, (_, most, *_) in enumerate(wanted):
        if given[index]:
            given[index] = min(most, given[index] + height - sum(given))
    return given


def _grid(columns: Sequence[Mapping[str, Any]], *rows: Iterable[RenderableType]) -> Table:
    """Return a table without lines, as wide as its place. Strings are text and never markup."""
    grid = Table.grid(padding=(0, 1, 0, 0), expand=True)
    for column in columns:
        grid.add_column(no_wrap=True, **column)
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def _rule(title: str, note: str) -> RenderableType:
    return _grid([_REST, _DIM], [Rule(Text(title, "bold"), align="left", style="dim"), note])


def _progress(state: RunState) -> RenderableType:
    done, total, records, (pace, left) = state.steps_done, state.total_steps, state.records, state.pace()
    far = f"{done / max(total, 1):4.0%}   {words.duration(state.clock() - state.started)} elapsed"
    below = "no step has ended yet"
    if records:
        far += f"   {words.duration(left)} left"
        reason, skips, steps = records[-1]["skipped_reason"], state.skips, state.steps_done - state.first_step
        below = f"{words.duration(pace)} a step"
        below += f"   done about {words.clock_time(datetime.now(), left)}" if left else ""
        below += f"   {skips} of {steps} steps skipped" if skips else ""
        if reason is not None:
            below = f"step {done} changed no weights ({skips} of {steps} skipped): {words.clean(reason)}"
    ran = words.duration(state.clock() - state.stage_since) if state.stage_name else ""
    if stage_total := state.stage_total:
        ran = f"{state.stage_done / stage_total:4.0%}   {state.stage_done:,} of {stage_total:,}   {ran}"
    bars = _grid(
        [_NAME, _REST, {"min_width": 33}],
        [f"step {done}/{total}", ProgressBar(max(total, 1), done, complete_style="cyan"), far],
        [state.stage_name or "starting", ProgressBar(stage_total, state.stage_done, complete_style="green"), ran],
    )
    return Group(bars, _grid([_LABEL, {**_REST, **_DIM}], ["", below]))


def _prompts(state: RunState, width: int) -> RenderableType:
    looks = zip(GROUPS, _GROUP_LOOKS, strict=True)
    groups = [(count, *look) for name, look in looks if (count := state.records[-1][name])]
    legend = Text("  ").join(Text.assemble((mark, style), f" {n} ", (label, "dim")) for n, mark, style, label in groups)
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
    if len(known) > 10:
        beside += [("last 10", words.share(sum(known[-10:]) / 10)), ("highest", words.share(highest))]
    names = "\n".join(f"{name:<8}{value:>6}" for name, value in beside[: rows - 1])
    drawn = chart(values, max(width - 16, 1), rows - 1, 0.0, top, state.total_steps - state.first_step)
    note = f"steps {state.first_step + 1} to {state.steps_done}, chart from 0 to {top:.0%}"
    if (level := state.records[-1]["level"]) is not None:
        note = f"level {level + 1}, {note}"
    return Group(_rule("pass rate", note), _grid([_LABEL, {**_REST, "style": "green"}], [names, "\n".join(drawn)]))


def _figures(state: RunState, width: int) -> tuple[RenderableType, int]:
    """Return learning on the left, answers and time on the right or below, and the lines that this takes."""
    record, wide = state.records[-1], width >= 76
    space = ((width - 3) // 2 if wide else width) - 40  # beside label, value and note
    learning, answers, times = list[Any](), list[Any](), list[Any]()

    def add(rows: list[Any], name: str, label: str, value: RenderableType, note: str) -> None:
        course = chart(state.trend(name), space, 1, None, None, state.total_steps - state.first_step)[0]
        rows.append((label, value, note, course if space >= 4 else ""))

    for rows, metrics in ((learning, _LEARNING), (answers, _ANSWERS)):
        for name, note in metrics.items():
            label = f"  {METRICS[name].label}" if name.startswith("loss_") else METRICS[name].label
            # Beyond the bound the siamese is not the average that the method assumes.
            beyond = name == "siamese_drift" and (record["siamese_drift_over_bound"] or 0) > 1
            value = Text(words.quantity(record[name], METRICS[name].unit), "bold red" if beyond else "")
            try:
                note = note.format_map(record)
            except TypeError:  # a metric of it is None
                note = ""
            add(rows, name, label, value, note)
    if len(record["rewards"]) > 1:  # of a single one, the pass rate says enough
        for name, value in record["rewards"].items():
            add(answers, f"reward {name}", words.clean(name.rpartition(":")[2]), words.share(value), "mean reward")
    for name, value in record["task_figures"].items():
        add(answers, name, name.removesuffix("_ratio").replace("_", " "), words.share(value), "")
    if other := {k: count for k, count in record["outcomes"].items() if count and k not in ("correct", "incorrect")}:
        most = max(other, key=lambda name: other[name])
        answers.append(("not judged", str(sum(other.values())), f"{other[most]} {most}", ""))
    stages, total = words.by_stage(record["seconds"])
    speeds = {name: f"{speed:,.0f} tok/s" for name, speed in record["tokens_per_second"].items()}
    for name, took in sorted(stages.items(), key=lambda stage: -stage[1]):  # a small screen cuts the shortest off
        bar = ProgressBar(max(total, 1e-9), took, complete_style="cyan", finished_style="cyan")
        times.append((name, words.duration(took), bar, speeds.get(name, "")))
    layout = ({**_DIM, **_LABEL}, {**_RIGHT, "min_width": 8}, {**_DIM, "min_width": 12}, {**_REST, "style": "dim cyan"})
    left = (_rule("learning", f"learning rate {words.figure(record['learning_rate'])}"), _grid(layout, *learning))
    right = (
        _rule("answers", "of this step"),
        _grid(layout, *answers),
        _rule("time and memory", f"peak {words.memory(record['peak_memory_bytes'])}"),
        _grid([_DIM, _RIGHT, _REST, _RIGHT], *times),
    )
    heights = 1 + len(learning), 2 + len(answers) + len(times)
    if not wide:
        return Group(*left, *right), sum(heights)
    return _grid([{"width": (width - 3) // 2}, {"width": 1}, _REST], [Group(*left), "", Group(*right)]), max(heights)


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


def _sample(sample: Mapping[str, Any], width: int, rows: int, console: Console) -> RenderableType:
    lines, left = [], rows - 1
    texts = (("question", "question", "bold"), ("✓ right", "right", "bold green"), ("✗ wrong", "wrong", "bold red"))
    for index, (name, key, style) in enumerate(texts):
        text = "none among the answers to this" if sample[key] is None else sample[key] or "an answer without any text"
        # Not wrapped whole: no screen shows more than 4,000 characters.
        text = words.clean(text if len(text) <= 4000 else f"{text[:2000]} … {text[-2000:]}")
        shown = fit(text, max(width - 16, 1), left // (3 - index), console)
        left -= len(shown)
        lines.append((Text(name, style), "\n".join(shown)))
    title = _rule(f"sample of step {sample['step'] + 1}", f"the answer is {words.clean(sample['reference'])[:40]}")
    return Group(title, _grid([_LABEL, _REST], *lines))


def fit(text: str, width: int, height: int, console: Console) -> list[str]:
    """Return `text` as at most `height` lines. The middle of a longer text is left out: its end counts most."""
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, width)] or [""]
    if len(lines) <= height:
        return lines
    lines = [line.plain.rstrip() for line in Text(text).wrap(console, max(width - 2, 1))]
    first = height // 2
    return [*lines[:first], *(f"{'… ' * (not index)}{line}" for index, line in enumerate(lines[first - height :]))]
