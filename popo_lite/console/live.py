"""The full-screen view of a run, for a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

from rich.console import Console, Group
from rich.live import Live

from popo_lite.console import words
from popo_lite.console.base import RunView
from popo_lite.console.capture import caught_output
from popo_lite.console.dashboard import dashboard
from popo_lite.console.plain import step_line
from popo_lite.console.state import RunState
from popo_lite.types import SampleView, StepRecord

# Where terminal and program disagree about the width of a character, a line may come out too long. Without
# automatic wrapping the terminal clips it; with it the whole screen would scroll by a line.
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"


class LiveView(RunView):
    """Draws on the terminal's alternate screen, so that closing it gives back what was there before.

    What was printed meanwhile by other code is kept and written out on closing, after the messages.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        refresh_seconds: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The stream itself: `sys.stdout` is another one while output is caught.
        self._console = console if console is not None else Console(file=sys.stdout, highlight=False)
        self._refresh_seconds = refresh_seconds
        self._state = RunState(clock)
        self._lock = threading.RLock()
        self._screen = ExitStack()
        self._open = False

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """Take the screen."""
        self._state.start(title, facts, total_steps, first_step)
        self._open = True
        with ExitStack() as taken:
            # Undone in reverse order: the screen is given back before stray lines may reach it.
            taken.enter_context(caught_output(self._catch))
            taken.callback(self._write, _WRAP_ON)
            self._write(_WRAP_OFF)
            taken.enter_context(
                Live(
                    get_renderable=self.render,
                    console=self._console,
                    screen=True,
                    refresh_per_second=1 / self._refresh_seconds,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
            )
            self._screen = taken.pop_all()

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Show what runs now."""
        with self._lock:
            self._state.stage(name, total)

    def advance(self, amount: int) -> None:
        """Move the bar of the stage."""
        with self._lock:
            self._state.advance(amount)

    def step(self, record: StepRecord) -> None:
        """Show the figures of a step."""
        with self._lock:
            self._state.step(record)

    def samples(self, samples: Sequence[SampleView]) -> None:
        """Show answers, one prompt after the other."""
        with self._lock:
            self._state.samples(samples)

    def message(self, text: str) -> None:
        """Show a notice; all of them are written out on closing. Without the screen it is written at once."""
        if not self._open:
            self._print(words.clean(line) for line in text.splitlines())
            return
        with self._lock:
            self._state.notice(text)

    def close(self) -> None:
        """Give the screen back and write what must not be lost."""
        if not self._open:
            return
        self._open = False
        self._screen.close()
        self._print(self._farewell())

    def render(self) -> Group:
        """The screen as it is now, at the size the terminal has now."""
        width, height = self._console.size
        with self._lock:
            return Group(*dashboard(self._state, width, height, self._console.encoding))

    def _farewell(self) -> list[str]:
        state = self._state
        took = words.duration(state.elapsed_seconds)
        lines = [f"{state.title}: {state.steps_done} of {state.total_steps} steps, {took} in this session"]
        if state.record is not None:
            lines.append(step_line(state, state.record))
        lines += [f"{notice.at:%H:%M:%S}  {notice.text}" for notice in state.notices]
        if state.stray:
            shown, came = len(state.stray), state.stray_count
            lines.append(f"Other output during the run ({words.lines(came)}{f', the last {shown}' * (shown < came)}):")
            lines += [f"  {line}" for line in state.stray]
        return lines

    def _catch(self, line: str) -> None:
        with self._lock:
            self._state.stray_line(line)

    def _print(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._console.out(words.encodable(line, self._console.encoding), highlight=False)

    def _write(self, code: str) -> None:
        if self._console.is_terminal:
            self._console.file.write(code)
            self._console.file.flush()
