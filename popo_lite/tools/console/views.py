"""Views of a run: what they remember, plain lines, and the choice of a view. Does not import rich."""

from __future__ import annotations

import errno
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TextIO, get_args

import click

from popo_lite.callbacks import Callback, TerminalGone
from popo_lite.controls import Action, Controls
from popo_lite.errors import UserInputError
from popo_lite.metrics import METRICS, StepRecord
from popo_lite.tools.console import words

Clock = Callable[[], float]  # returns seconds that only grow

_LINE = ("pass_rate", "loss", "entropy", "entropy_over_start", "siamese_cosine", "completion_tokens_mean")
MOST_SHOWN = 4000  # characters of a notice's line: no screen shows more, and it is drawn twice a second
GROUPS = ("groups_all_right", "groups_some_right", "groups_none_right", "groups_ungraded")


PAUSED = "paused"
"""The stage of a run that waits."""


View = Literal["auto", "live", "plain", "silent"]
view_option = click.option(
    "--view",
    type=click.Choice(get_args(View)),
    default="auto",
    show_default=True,
    help="Live view on a terminal, else one plain line a step.",
)


class Key(NamedTuple):
    """Describe a key: the action that it requests, its label and its help."""

    action: Action
    short: str
    meaning: str


KEYS = {
    "p": Key("pause", "pause", "pause after this step and give the GPU back; p again continues"),
    "s": Key("sample", "sample", "answer a few held-out problems with the current weights, after this step"),
    "e": Key("evaluate", "evaluate", "evaluate on all held-out problems, after this step"),
    "c": Key("checkpoint", "checkpoint", "save a checkpoint after this step"),
    "q": Key("stop", "quit", "finish this step, save and stop, as one Ctrl-C does"),
}

SHOWN = 1000
"""Records that are kept for trends. Each takes some 10 kB."""


@contextmanager
def writing() -> Iterator[None]:
    """Raise TerminalGone if a write inside fails because the terminal, or the reader of the pipe, is gone."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EIO, errno.EPIPE, errno.ENXIO, errno.EBADF):
            raise TerminalGone(error.errno, error.strerror) from error
        raise


class RunState(Callback):
    """Remember what the run reported."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        # Another thread draws; a signal handler may report in the middle of a report.
        self.lock = threading.RLock()
        self.title, self.total_steps, self.first_step, self.steps_done = "", 0, 0, 0  # done: with those before a resume
        self.facts: dict[str, str] = {}
        self.stage_name, self.stage_done, self.stage_since, self.started = "", 0, 0.0, clock()
        self.stage_total: int | None = None
        self.records: deque[StepRecord] = deque(maxlen=SHOWN)
        self.skips = 0
        self.notices: list[str] = []
        self._step_ends: deque[float] = deque(maxlen=20)
        self._samples: deque[Mapping[str, Any]] = deque()
        self._asked: deque[Mapping[str, Any]] = deque()  # samples that were asked for: they come first
        self._sample: Mapping[str, Any] | None = None  # shown until then
        self._sample_until = -math.inf
        self.evaluations: list[Mapping[str, Any]] = []
        self.controls: Controls | None = None
        self.said: datetime | None = None  # when, if not now
        self.changes = 0  # counts what was reported, except the progress of a stage
        self.keys: Mapping[str, Key] = {}  # those that work now
        self.help_shown = False
        self.before_the_first_step = "no step has ended yet"

    def attach(self, controls: Controls) -> None:
        self.controls = controls

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        self.title, self.total_steps = words.clean(title), total_steps
        self.first_step = self.steps_done = first_step
        self.facts = {words.clean(key): words.clean(value) for key, value in facts.items()}
        self.started = self.clock()
        self.changes += 1

    def stage(self, name: str, *, total: int | None = None) -> None:
        with self.lock:
            now = self.clock()
            if self.stage_name == PAUSED:  # a pause is no part of a step
                self._step_ends = deque((end + now - self.stage_since for end in self._step_ends), maxlen=20)
            self.stage_name, self.stage_total = words.clean(name), total
            self.stage_done, self.stage_since = 0, now

    def advance(self, amount: int) -> None:
        self.stage_done += amount

    def step(self, record: StepRecord) -> None:
        with self.lock:
            if not self._step_ends:
                # The time since the start would count the evaluation before the first step as part of it.
                self._step_ends.append(self.clock() - words.by_stage(record["seconds"])[1])
            self._step_ends.append(self.clock())
            self.first_step = min(self.first_step, record["step"])
            if record["step"] < self.steps_done:  # it comes again
                self.evaluations = [line for line in self.evaluations if line["step"] <= record["step"]]
            while self.records and self.records[-1]["step"] >= record["step"]:  # the run went back to a checkpoint
                self.skips -= self.records.pop()["skipped_reason"] is not None
            self.records.append(record)
            self.changes += 1
            self.skips += record["skipped_reason"] is not None
            self.steps_done = record["step"] + 1  # less than before if the run went back to a checkpoint

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        with self.lock:
            self._samples = deque(samples)
            self.changes += 1

    def sampled(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Remember answers that were asked for, to show them next."""
        with self.lock:
            self._asked = deque({**sample, "asked": True} for sample in samples)
            self.changes += 1
            self._sample_until = -math.inf

    def evaluated(self, record: Mapping[str, Any]) -> None:
        with self.lock:
            self.evaluations.append(record)
            self.changes += 1

    def message(self, text: str) -> None:
        """Remember the notice and when it came."""
        self.notices += [
            f"{self.said or datetime.now():%H:%M:%S}  {words.clean(line[:MOST_SHOWN])}" for line in text.splitlines()
        ]
        self.changes += 1

    def pace(self) -> tuple[float | None, float | None]:
        """Return the median seconds between the ends of two recent steps, and the seconds left at this pace."""
        if not self._step_ends:
            return None, None
        median = statistics.median(later - earlier for earlier, later in pairwise(self._step_ends))
        return median, median * max(self.total_steps - self.steps_done, 0)

    def trend(self, name: str) -> list[float | None]:
        """Return a metric, a task figure, or `reward NAME` at each of the last `SHOWN` steps; None if one had none."""
        rewards = [{f"reward {key}": value for key, value in record["rewards"].items()} for record in self.records]
        values = [
            {**record["task_figures"], **own, **record}.get(name)
            for record, own in zip(self.records, rewards, strict=True)
        ]
        return [value if value is not None and math.isfinite(value) else None for value in values]

    def sample(self) -> Mapping[str, Any] | None:
        """Return the sample to show now. Each stays long enough to be read, however fast steps are."""
        waiting = self._asked or self._samples
        if waiting and self.clock() >= self._sample_until:
            self._sample = waiting[0]
            if self._asked:
                self._asked.popleft()
            else:
                self._samples.rotate(-1)
            self._sample_until = self.clock() + 10.0
        return self._sample

    def shown_samples(self, count: int) -> list[Mapping[str, Any]]:
        """Return up to `count` samples to show now: the one whose turn it is, and those after it."""
        first = self.sample()
        others = [sample for sample in (*self._asked, *self._samples) if sample is not first]
        return [] if first is None else [first, *others[: count - 1]]

    def step_line(self) -> str:
        """Return the latest step as one line of `name value` pairs, with two blanks between the pairs."""
        record, (pace, left) = self.records[-1], self.pace()
        texts = {METRICS[name].label: words.quantity(record[name], METRICS[name].unit) for name in _LINE}
        texts["prompts all/some/none/ungraded"] = "/".join(str(record[name]) for name in GROUPS)
        if record["level"] is not None:
            texts["level"] = str(record["level"] + 1)
        texts["memory"] = words.memory(record["peak_memory_bytes"])
        texts |= {"pace": words.duration(pace), "left": words.duration(left)}
        if record["skipped_reason"] is not None:
            texts["SKIPPED:"] = words.clean(record["skipped_reason"])
        known = (f"{name} {text}" for name, text in texts.items() if text != words.ABSENT)
        return "  ".join((f"step {self.steps_done}/{self.total_steps}", *known))


class PlainView(RunState):
    """Print a line for each step and message, no samples; after `heartbeat_seconds` without one, a sign of life."""

    def __init__(self, stream: TextIO, *, heartbeat_seconds: float = 30.0, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self.records = deque(maxlen=1)  # it shows no trends
        self._stream, self._heartbeat_seconds, self._printed = stream, heartbeat_seconds, clock()
        self._waiting: list[str] = []  # lines
        self._is_printing = False
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._live, name="popo-lite heartbeat", daemon=True)

    def start(self, **facts: Any) -> None:
        super().start(**facts)
        resumed = f", {self.first_step} done already" if self.first_step else ""
        self._print(f"{self.title}: {self.total_steps} steps{resumed}", *(f"  {k}: {v}" for k, v in self.facts.items()))

    def step(self, record: StepRecord) -> None:
        with self.lock:
            super().step(record)
            self._print(self.step_line())

    def sampled(self, samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in samples:
            mark, answer = ("wrong", sample["wrong"]) if sample["right"] is None else ("right", sample["right"])
            asked = (words.clean(sample[name])[:MOST_SHOWN] for name in ("question", "reference"))
            self._print(
                "question: {} (the answer is {})".format(*asked), f"  {mark}: {words.clean(answer)[:MOST_SHOWN]}"
            )

    def message(self, text: str) -> None:
        self._print(*map(words.clean, text.splitlines()))

    def close(self) -> None:
        """Stop the signs of life."""
        self._done.set()
        if self._heart.ident is not None:
            self._heart.join()

    def _live(self) -> None:
        wait = self._heartbeat_seconds
        with suppress(TerminalGone):  # the run finds out by itself
            while not self._done.wait(wait):
                with self.lock:
                    now = self.clock()
                    if now - self._printed >= self._heartbeat_seconds:
                        doing = self.stage_name or "preparing"
                        doing += f" {self.stage_done:,} of {self.stage_total:,}" if self.stage_total else ""
                        doing += f", {words.duration(now - self.stage_since)} in this stage" if self.stage_name else ""
                        doing = doing if self.stage_name == PAUSED else f"running: {doing}"
                        self._print(f"{doing}, {words.duration(now - self.started)} in all")
                    wait = self._heartbeat_seconds - (now - self._printed)

    def _print(self, *lines: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"  # that of io.StringIO is None
        with self.lock, writing():
            self._waiting += [
                words.encodable(f"{self.said or datetime.now():%H:%M:%S}  {line}", encoding) + "\n" for line in lines
            ]
            if self._is_printing:  # a signal handler in the middle of the lines below: a stream refuses a second write
                return
            self._is_printing = True
            try:
                while self._waiting:
                    self._stream.write(self._waiting.pop(0))
                    if not self._waiting:
                        self._stream.flush()
            finally:
                self._is_printing = False
            self._printed = self.clock()
            if self._heart.ident is None and not self._done.is_set():
                self._heart.start()  # with the first line: loading a model, before the run starts, takes time as well


def open_view(
    mode: View = "auto",
    stream: TextIO | None = None,
    *,
    keys: Mapping[str, Key] = KEYS,
) -> Callback:
    """Return the view for `stream`, by default standard output. Without a terminal `live` raises UserInputError.

    `auto` is live on a terminal that can move its cursor and in a notebook, and plain anywhere else. NO_COLOR removes
    the colours. `keys` are those of the live view on a terminal.
    """
    if mode == "silent":
        return Callback()
    if stream is None and mode != "plain" and in_notebook():
        from popo_lite.tools.console.notebook import NotebookView

        return NotebookView()
    stream = stream or sys.stdout
    can_move = stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    if mode == "live" and not can_move:
        what = "the live view needs a terminal that can move its cursor, and standard output is not one"
        raise UserInputError(what, next_step="choose the plain view or auto")
    if mode == "plain" or not can_move:
        return PlainView(stream)
    from rich.console import Console  # only the live view needs rich

    from popo_lite.tools.console.live import LiveView

    return LiveView(Console(file=stream, highlight=False), keys=keys)


def in_notebook() -> bool:
    """Return True in a cell of Jupyter, Colab or VS Code, whose output can be replaced."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
