"""The full-screen view of a run, which keeps what other code prints meanwhile."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.segment import Segment, SegmentLines

from popo_lite.tools.console import words
from popo_lite.tools.console.dashboard import dashboard
from popo_lite.tools.console.views import Clock, RunState

# If terminal and program disagree about the width of a character, a line may be too long. With automatic wrapping
# the whole screen would scroll by a line; without it the terminal clips the line.
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"


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
        with ExitStack() as taken:
            # Undone in reverse order: the screen is given back before other output may reach it.
            taken.enter_context(caught_output(self._catch))
            taken.callback(self._console.file.write, _WRAP_ON)
            self._console.file.write(_WRAP_OFF)
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
            line = line.rstrip("\r").rsplit("\r", 1)[-1]
            if line.strip():
                self._receive(line)
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
