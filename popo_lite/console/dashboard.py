"""The live screen as lines of text: which sections there are, and how they share the height.

Every section is drawn into exactly the lines it was given. Where the terminal is small, the least important
ones go first; nothing is ever wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from popo_lite.console import words
from popo_lite.console.draw import bar, ceiling, chart, cut_end, cut_middle, stacked_bar, wrap
from popo_lite.console.figures import learning_rows, sampling_rows, time_rows
from popo_lite.console.state import RunState, by_stage
from popo_lite.types import SampleView, StepRecord

LABEL = 16  # cells of the labels on the left, so that bars and chart begin below one another
_RIGHT = 33  # cells for the words to the right of a bar, so that bars end below one another
_TWO_COLUMNS = 76
_GUTTER = 3


@dataclass(frozen=True)
class Section:
    """A part of the screen, drawn into a number of lines.

    With fewer than `least` it is left out; `good` is what it should have; more than `most` are of no use.
    Lower ranks get theirs first.
    """

    rank: int
    draw: Callable[[int], Sequence[Text]]
    least: int
    good: int
    most: int


def dashboard(state: RunState, width: int, height: int, encoding: str) -> list[Text]:
    """At most `height` lines of at most `width` cells."""
    inner = max(width - 2, 1)
    record, sample = state.record, state.shown_sample()
    sections = [_header(state, inner), Section(1, lambda _: _progress(state, inner), 3, 3, 3)]
    # What has nothing to show yet is not there yet.
    if record is not None:
        sections += [
            Section(3, lambda _: _groups(record, inner), 1, 1, 1),
            Section(2, lambda rows: _trend(state, inner, rows), 2, 3, 10),
            _figures(state, record, inner),
        ]
    if sample is not None:
        sections.append(Section(6, lambda rows: _sample(sample, inner, rows), 4, 7, 14))
    if state.notices or state.stray_count:
        sections.append(Section(5, lambda rows: _messages(state, inner, rows), 2, 3, 8))
    # Blank lines between the sections, where all of them are well off without.
    blanks = len(sections) - 1
    heights = share_height(sections, height - blanks)
    airy = all(given >= section.good for given, section in zip(heights, sections, strict=True))
    if not airy:
        heights = share_height(sections, height)
    lines: list[Text] = []
    for section, given in zip(sections, heights, strict=True):
        if given:
            drawn = list(section.draw(given))[:given]
            lines += [Text()] * (airy and bool(lines)) + drawn + [Text()] * (given - len(drawn))
    return [_finished(line, width, encoding) for line in lines]


def share_height(sections: Sequence[Section], height: int) -> list[int]:
    """Lines for each section: by rank the least that it needs, then what is good, then all in turn up to the most."""
    order = sorted(range(len(sections)), key=lambda index: sections[index].rank)
    given = [0] * len(sections)
    left = max(height, 0)
    for index in order:
        if sections[index].least > left:
            break
        given[index] = sections[index].least
        left -= given[index]
    for index in order:
        more = min(left, max(sections[index].good - given[index], 0)) if given[index] else 0
        given[index] += more
        left -= more
    growing = [index for index in order if given[index]]
    while left and growing:
        growing = [index for index in growing if given[index] < sections[index].most]
        for index in growing[:left]:
            given[index] += 1
            left -= 1
    return given


def _finished(line: Text, width: int, encoding: str) -> Text:
    line.truncate(max(width - 2, 1), overflow="ellipsis")
    line.plain = words.encodable(line.plain, encoding)
    finished = Text.assemble(" ", line, no_wrap=True, overflow="crop")
    finished.truncate(width)
    return finished


def rule(title: str, width: int, note: str = "") -> Text:
    """A heading, a thin line, and on its right a note."""
    note = cut_end(note, max(width - len(title) - 6, 0))
    line = Text.assemble((title, "bold"), " ")
    fill = width - line.cell_len - (Text(note).cell_len + 1 if note else 0)
    line.append("─" * max(fill, 0), "dim")
    if note:
        line.append(f" {note}", "dim")
    return line


def _header(state: RunState, width: int) -> Section:
    title = Text.assemble(("popo-lite", "bold cyan"), "  ", (state.title, "bold"))
    facts: list[Text] = []
    for key, value in state.facts.items():
        pair = Text.assemble((key, "dim"), " ", cut_middle(value, max(width - len(key) - 1, 1)))
        if facts and facts[-1].cell_len + 3 + pair.cell_len <= width:
            facts[-1].append("   ").append_text(pair)
        else:
            facts.append(pair)
    return Section(0, lambda rows: [title, *facts][:rows], 1, min(2, 1 + len(facts)), 1 + len(facts))


def _progress(state: RunState, width: int) -> list[Text]:
    lines = []
    done, total = state.steps_done, state.total_steps
    part = done / total if total else 0.0
    right = f"{part:4.0%}   {words.duration(state.elapsed_seconds)} elapsed"
    if state.seconds_left is not None:
        right += f"   {words.duration(state.seconds_left)} left"
    lines.append(_bar_line(f"step {done}/{total}", part, right, width, "cyan"))

    stage = state.running
    if stage is None:
        lines.append(Text("starting", "dim"))
    else:
        ran = words.duration(state.clock() - stage.since)
        if stage.total:
            right = f"{stage.done / stage.total:4.0%}   {stage.done:,} of {stage.total:,}   {ran}"
            lines.append(_bar_line(stage.name, stage.done / stage.total, right, width, "green"))
        else:
            lines.append(
                Text.assemble((f"{cut_end(stage.name, LABEL - 1):<{LABEL}}", "bold"), ("running ", "dim"), ran)
            )
    lines.append(_pace(state, width))
    return lines


def _bar_line(label: str, part: float, right: str, width: int, style: str) -> Text:
    room = max(width - LABEL - 2 - max(len(right), _RIGHT), 0)
    return Text.assemble((f"{cut_end(label, LABEL - 1):<{LABEL}}", "bold"), bar(part, room, style), "  ", right)


def _pace(state: RunState, width: int) -> Text:
    record = state.record
    if record is not None and record.skipped_reason is not None:
        text = f"step {state.steps_done} changed no weights: {words.clean(record.skipped_reason)}"
        tail = f"  ({state.skipped} of {state.steps_here} skipped)"
        return Text.assemble((cut_end(text, max(width - len(tail), 1)), "yellow"), (tail, "dim"))
    if state.step_seconds is None or state.seconds_left is None:
        return Text(" " * LABEL + "no step has ended yet", "dim")
    text = f"{words.duration(state.step_seconds)} a step"
    if state.seconds_left:
        text += f"   done about {words.clock_time(state.now(), state.seconds_left)}"
    if state.skipped:
        text += f"   {state.skipped} of {state.steps_here} steps skipped"
    return Text(" " * LABEL + text, "dim")


def _trend(state: RunState, width: int, rows: int) -> list[Text]:
    values = state.trends["pass_rate"]
    top = ceiling(values)
    note = f"steps {state.first_step + 1} to {state.steps_done}, chart from 0 to {top:.0%}"
    beside = [("now", words.share(values[-1]), "bold")]
    known = [value for value in values if value is not None]
    if len(known) > 10:
        beside.append(("last 10", words.share(sum(known[-10:]) / len(known[-10:])), ""))
        beside.append(("highest", words.share(max(known)), ""))
    lines = [rule("pass rate", width, note)]
    drawn = chart(values, max(width - LABEL, 1), rows - 1, 0.0, top, expected=state.steps_planned_here)
    for index, row in enumerate(drawn):
        name, value, style = beside[index] if index < len(beside) else ("", "", "")
        lines.append(Text.assemble((f"{name:<8}", "dim"), (f"{value:>6}", style), "  ", (row, "green")))
    return lines


def _groups(record: StepRecord, width: int) -> list[Text]:
    parts = [
        (record.groups_all_right, "█", "green", "all right"),
        (record.groups_some_right, "▓", "cyan", "some"),
        (record.groups_none_right, "░", "yellow", "none"),
        (record.groups_ungraded, "?", "red", "ungraded"),
    ]
    legend = Text()
    for amount, character, style, name in parts:
        if amount:
            legend.append(f"  {character} ", style).append(f"{amount} ").append(name, "dim")
    drawn = stacked_bar([part[:3] for part in parts], max(width - LABEL - legend.cell_len, 0))
    return [Text.assemble((f"{'prompts':<{LABEL}}", "bold"), drawn, legend)]


def _figures(state: RunState, record: StepRecord, width: int) -> Section:
    columns = 2 if width >= _TWO_COLUMNS else 1
    column = (width - _GUTTER) // 2 if columns == 2 else width
    rate = f"learning rate {words.figure(record.learning_rate)}"
    peak = f"peak {words.memory(record.peak_memory_bytes)}"
    left = [rule("learning", column, rate), *learning_rows(state, record, column)]
    answers = [rule("answers", column, "of this step"), *sampling_rows(state, record, column)]
    stages = len(by_stage(record.seconds)[0])

    def times(rows: int) -> list[Text]:
        return [rule("time and memory", column, peak), *time_rows(record, column, rows - 1)][:rows]

    if columns == 1:
        return Section(4, lambda _: [*left, *answers, *times(stages + 1)], 4, 12, len(left) + len(answers) + stages + 1)

    def side_by_side(rows: int) -> list[Text]:
        # Answers and times share their column; where it is short, each keeps about half of it.
        below = min(stages + 1, max(rows - len(answers), rows // 2))
        right = answers[: rows - below] + times(below)
        lines = []
        for index in range(rows):
            line = left[index].copy() if index < len(left) else Text()
            line.truncate(column, overflow="ellipsis", pad=True)
            lines.append(line.append(" " * _GUTTER).append_text(right[index] if index < len(right) else Text()))
        return lines

    most = max(len(left), len(answers) + stages + 1)
    return Section(4, side_by_side, 4, len(left), most)


def _sample(sample: SampleView, width: int, rows: int) -> list[Text]:
    lines = [rule(f"sample of step {sample.step + 1}", width, f"the answer is {sample.reference}")]
    room = width - LABEL
    each = (rows - 1) // 3
    question = wrap(sample.question, room, each)
    left = rows - 1 - len(question)
    for name, style, wrapped in (
        ("question", "bold", question),
        ("✓ right", "bold green", wrap(_answer(sample.right), room, left // 2)),
        ("✗ wrong", "bold red", wrap(_answer(sample.wrong), room, left - left // 2)),
    ):
        for index, text in enumerate(wrapped):
            lines.append(Text.assemble((f"{name if not index else '':<{LABEL}}", style), text))
    return lines


def _answer(text: str | None) -> str:
    if text is None:
        return "none among the answers to this"
    return text or "an answer without any text"


def _messages(state: RunState, width: int, rows: int) -> list[Text]:
    shown = state.notices[-(rows - 1) :]
    earlier = len(state.notices) - len(shown)
    notes = [f"{earlier} earlier"] * bool(earlier)
    notes += [f"{words.lines(state.stray_count)} of other output, shown at the end"] * bool(state.stray_count)
    lines = [rule("messages", width, ", ".join(notes))]
    for notice in shown:
        lines.append(Text.assemble((f"{notice.at:%H:%M}  ", "dim"), cut_middle(notice.text, width - 7)))
    return lines
