"""The view for pipes, files and terminals that cannot move their cursor: one line a step. Free of rich."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from popo_lite.console import words
from popo_lite.console.base import RunView
from popo_lite.console.state import RunState
from popo_lite.types import SampleView, StepRecord


def step_line(state: RunState, record: StepRecord) -> str:
    """A step in one line of `name value` pairs, two blanks between them."""
    parts = [f"step {state.steps_done}/{state.total_steps}", f"pass {words.share(record.pass_rate)}"]
    if record.skipped_reason is None:
        parts.append(f"loss {words.figure(record.loss)}")
        ratio = "" if record.entropy_over_start is None else f" ({record.entropy_over_start:.0%} of start)"
        parts.append(f"entropy {words.figure(record.entropy)}{ratio}")
        parts.append(f"cosine {words.figure(record.siamese_cosine)}")
    parts.append(f"tokens {words.decimals(record.completion_tokens_mean, 1)}")
    groups = (
        record.groups_all_right,
        record.groups_some_right,
        record.groups_none_right,
        record.groups_ungraded,
    )
    parts.append("prompts all/some/none/ungraded " + "/".join(str(number) for number in groups))
    parts.append(f"memory {words.memory(record.peak_memory_bytes)}")
    parts.append(f"pace {words.duration(state.step_seconds)}")
    parts.append(f"left {words.duration(state.seconds_left)}")
    if record.skipped_reason is not None:
        parts.append(f"SKIPPED: {words.clean(record.skipped_reason)}")
    return "  ".join(parts)


class PlainView(RunView):
    """Prints a line for every step and message, and a sign of life when nothing was printed for a while.

    Samples are not printed: they are in the run folder's samples.jsonl.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        heartbeat_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._heartbeat_seconds = heartbeat_seconds
        self._state = RunState(clock)
        self._lock = threading.RLock()  # a signal handler may interrupt a line and print one of its own
        self._printed = clock()
        self._done = threading.Event()
        self._heart: threading.Thread | None = None

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """Print title and facts."""
        with self._lock:
            self._state.start(title, facts, total_steps, first_step)
            resumed = f", {first_step} done already" if first_step else ""
            self._print(f"{self._state.title}: {total_steps} steps{resumed}")
            for key, value in self._state.facts.items():
                self._print(f"  {key}: {value}")

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Remembered for the heartbeat."""
        with self._lock:
            self._state.stage(name, total)

    def advance(self, amount: int) -> None:
        """Remembered for the heartbeat."""
        with self._lock:
            self._state.advance(amount)

    def step(self, record: StepRecord) -> None:
        """Print the step."""
        with self._lock:
            self._state.step(record)
            self._print(step_line(self._state, record))

    def samples(self, samples: Sequence[SampleView]) -> None:
        """Nothing: several lines of prose a step would bury the figures."""

    def message(self, text: str) -> None:
        """Print the notice."""
        with self._lock:
            for line in text.splitlines():
                self._print(words.clean(line))

    def close(self) -> None:
        """End the heartbeat."""
        self._done.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None

    def _beat(self) -> None:
        wait = self._heartbeat_seconds
        while not self._done.wait(wait):
            with self._lock:
                quiet = self._state.clock() - self._printed
                if quiet >= self._heartbeat_seconds:
                    self._print(self._sign_of_life())
                    quiet = 0.0
            wait = self._heartbeat_seconds - quiet

    def _sign_of_life(self) -> str:
        state, stage = self._state, self._state.running
        if stage is None:
            doing = "preparing"
        else:
            far = f" {stage.done:,} of {stage.total:,}" if stage.total else ""
            doing = f"{stage.name}{far}, {words.duration(state.clock() - stage.since)} in this stage"
        return f"running: {doing}, {words.duration(state.elapsed_seconds)} in all"

    def _print(self, line: str) -> None:
        stamp = f"{self._state.now():%H:%M:%S}"
        encoding = getattr(self._stream, "encoding", None) or "utf-8"  # io.StringIO has None
        self._stream.write(words.encodable(f"{stamp}  {line}", encoding) + "\n")
        self._stream.flush()
        self._printed = self._state.clock()
        if self._heart is None and not self._done.is_set():
            # From the first line on: loading a model, before the run has started, takes time as well.
            self._heart = threading.Thread(target=self._beat, name="popo-lite heartbeat", daemon=True)
            self._heart.start()
