"""What a view knows of the run so far. Free of rich; whoever shares one across threads locks it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from popo_lite.console import words
from popo_lite.types import SampleView, StepRecord

TRENDS = (
    "pass_rate",
    "loss",
    "loss_nll",
    "loss_similarity",
    "loss_entropy",
    "entropy",
    "effective_sample_size",
    "siamese_cosine",
    "siamese_drift",
    "completion_tokens_mean",
    "step_by_step_ratio",
    "unique_answers_mean",
    "logp_gap_mean",
    "grad_norm",
)
"""Figures of a step whose whole course is kept."""

_RECENT_STEPS = 20
_SAMPLE_SECONDS = 10.0
_STRAY_LINES = 50
_LONGEST_SAMPLE = 4000  # characters: no screen shows more of one answer


@dataclass
class Stage:
    """The stage now running: how much of it is done, and when it began."""

    name: str
    total: int | None
    since: float
    done: int = 0


@dataclass(frozen=True)
class Notice:
    """A line to keep, and the local time at which it came."""

    at: datetime
    text: str


class RunState:
    """The run so far. `clock` returns seconds that only grow; `now` is the local time."""

    def __init__(self, clock: Callable[[], float], now: Callable[[], datetime] = datetime.now) -> None:
        self.clock = clock
        self.now = now
        self.title = ""
        self.facts: dict[str, str] = {}
        self.total_steps = 0
        self.first_step = 0
        self.started = clock()
        self.running: Stage | None = None
        self.record: StepRecord | None = None
        self.trends: dict[str, list[float | None]] = {name: [] for name in TRENDS}
        self.notices: list[Notice] = []
        self.stray: deque[str] = deque(maxlen=_STRAY_LINES)
        self.stray_count = 0
        self.skipped = 0
        self._last_step: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._samples: list[SampleView] = []
        self._next_sample = 0
        self._shown: SampleView | None = None
        self._shown_since = 0.0

    def start(self, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """The run begins."""
        self.title = words.clean(title)
        self.facts = {words.clean(key): words.clean(value) for key, value in facts.items()}
        self.total_steps = total_steps
        self.first_step = first_step
        self.started = self.clock()

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins."""
        self.running = Stage(words.clean(name), total, self.clock())

    def advance(self, amount: int) -> None:
        """The running stage moved on."""
        if self.running is not None:
            self.running.done += amount

    def step(self, record: StepRecord) -> None:
        """A step ended."""
        now = self.clock()
        # The first step has no predecessor to measure from: the evaluation before it must not count as its time.
        took = by_stage(record.seconds)[1] if self._last_step is None else now - self._last_step
        self._last_step = now
        self._step_seconds.append(took)
        self.record = record
        self.skipped += record.skipped_reason is not None
        for name, values in self.trends.items():
            value: float | None = getattr(record, name)
            values.append(value if value is not None and math.isfinite(value) else None)

    def samples(self, samples: Sequence[SampleView]) -> None:
        """New answers to show, made safe and cut on arrival."""
        self._samples = [
            replace(
                sample,
                question=_fit(sample.question),
                reference=_fit(sample.reference),
                right=None if sample.right is None else _fit(sample.right),
                wrong=None if sample.wrong is None else _fit(sample.wrong),
            )
            for sample in samples
        ]
        self._next_sample = 0

    def notice(self, text: str) -> None:
        """Something to keep."""
        self.notices.extend(Notice(self.now(), words.clean(line)) for line in text.splitlines() if line.strip())

    def stray_line(self, text: str) -> None:
        """Something that other code printed; the latest ones are kept."""
        self.stray.append(words.clean(text))
        self.stray_count += 1

    @property
    def steps_here(self) -> int:
        """Steps of this process."""
        return len(self.trends["pass_rate"])

    @property
    def steps_planned_here(self) -> int:
        """Steps that this process will have done at the end."""
        return self.total_steps - self.first_step

    @property
    def steps_done(self) -> int:
        """Steps done, those before a resume included."""
        return self.first_step + self.steps_here

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since this process started the run."""
        return self.clock() - self.started

    @property
    def step_seconds(self) -> float | None:
        """Median seconds of the latest steps, everything between two steps included."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the steps left will take at the median pace."""
        pace = self.step_seconds
        return None if pace is None else pace * max(self.total_steps - self.steps_done, 0)

    def shown_sample(self) -> SampleView | None:
        """The sample to show now. Each stays long enough to be read, however fast steps pass."""
        now = self.clock()
        if self._samples and (self._shown is None or now - self._shown_since >= _SAMPLE_SECONDS):
            self._shown = self._samples[self._next_sample % len(self._samples)]
            self._next_sample += 1
            self._shown_since = now
        return self._shown


def by_stage(seconds: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """(seconds of each stage, seconds of them all), whether or not the mapping brings a "total" itself."""
    stages = {name: value for name, value in seconds.items() if name != "total"}
    return stages, seconds.get("total", sum(stages.values()))


def _fit(text: str) -> str:
    if len(text) > _LONGEST_SAMPLE:
        text = f"{text[: _LONGEST_SAMPLE // 2]} … {text[-_LONGEST_SAMPLE // 2 :]}"
    return words.clean(text)
