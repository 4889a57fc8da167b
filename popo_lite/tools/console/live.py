"""The full-screen view of a run, which takes keys and keeps what other code prints meanwhile."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.segment import Segment, SegmentLines

from popo_lite.callbacks import EVENTS, TerminalGone
from popo_lite.tools.console import words
from popo_lite.tools.console.dashboard import Remembered, dashboard
from popo_lite.tools.console.terminal import Keys, Screen, in_foreground
from popo_lite.tools.console.views import KEYS, Clock, Key, PlainView, RunState, writing

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTSTP", "SIGQUIT") if hasattr(signal, name))
"""Ctrl-Z and Ctrl-\\. Windows has neither."""

UNREAD_SECONDS = 2.0
"""A terminal that takes nothing for so long, as after Ctrl-S or a lost connection, gets nothing more."""


class LiveView(RunState):
    """Draw on the terminal's alternate screen. Closing brings back what was there, and writes messages below it.

    `keys` are those that work if standard input is a terminal.
    """

    def __init__(
        self,
        console: Console,
        *,
        keys: Mapping[str, Key] = KEYS,
        refresh_seconds: float = 0.5,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(clock)
        self._console, self._possible_keys, self._refresh_seconds = console, keys, refresh_seconds
        self._screen, self._writing = Screen(console.file), threading.RLock()
        self._other: deque[str] = deque(maxlen=50)
        self._other_count = 0
        self._remembered = Remembered()
        self._open: ExitStack | None = None
        self._ends = self._stopping = False
        self._gone: OSError | None = None
        self._broken = ""  # traceback of the error that ended the drawing
        self.unread = False  # True if nothing read the terminal at the end

    def start(self, **facts: Any) -> None:
        """Take the screen and the keys."""
        super().start(**facts)
        self._start = facts
        with writing(), ExitStack() as taken:
            # Undone in reverse order: the screen is given back before other output may reach it.
            taken.enter_context(caught_output(self._catch))
            for number in STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ():
                taken.callback(signal.signal, number, signal.signal(number, self._stopped))
            self._typed = Keys()
            taken.callback(self._typed.close)
            self._note_keys()
            thread = threading.Thread(target=self._run, name="popo-lite screen", daemon=True)
            thread.start()
            taken.callback(thread.join, UNREAD_SECONDS)
            taken.callback(self._typed.wake)
            taken.callback(setattr, self, "_ends", True)
            self._open, self._thread = taken.pop_all(), thread

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Begin counting the stage's work. Raises TerminalGone if the terminal is gone."""
        if self._broken:
            self._go_on_in_lines()
        else:
            super().stage(name, total=total)
        if self._gone is not None:
            raise TerminalGone(self._gone.errno, self._gone.strerror)

    def message(self, text: str) -> None:
        """Show a notice, which is written again on closing. Before `start` it is written at once."""
        if self._open is None:
            self._print(*map(words.clean, text.splitlines()))
        else:
            super().message(text)

    def close(self) -> None:
        """Give the screen back; write where the run got to, all messages and the last lines of other output."""
        if self._open is None:
            return
        opened, self._open = self._open, None
        with writing():
            opened.close()
        self.unread = self._thread.is_alive()  # more would wait forever
        if self.unread:
            return
        took = words.duration(self.clock() - self.started)
        self._print(f"{self.title}: {self.steps_done} of {self.total_steps} steps, {took} in this session")
        self._print(*([self.step_line()] if self.records else []), *self.notices)
        if other := self._other:
            last = f", the last {len(other)}" if len(other) < self._other_count else ""
            self._print(f"Other output during the run (lines: {self._other_count}{last}):", *(f"  {o}" for o in other))

    def render(self) -> SegmentLines:
        """Return the screen as it is now, at the size that the terminal has now."""
        with self.lock:
            lines = dashboard(self, self._console, self._remembered)
        encoding = self._console.encoding
        lines = [[Segment(words.encodable(text, encoding), style) for text, style, _ in line] for line in lines]
        return SegmentLines(lines, new_lines=True)

    def press(self, keys: str) -> None:
        """Do what each of `keys` means."""
        for key in keys:
            self.help_shown = key == "?" and not self.help_shown  # any other key shows again what it hides
            if key in self.keys and self.controls is not None:
                action = self.keys[key].action
                self.controls.request("continue" if action == "pause" and self.controls.pausing else action)

    # ------------------------------------------------------------------ the thread that draws and reads keys

    def _run(self) -> None:
        try:
            while not self._ends:
                self._draw()
                self.press(self._typed.read(self._refresh_seconds))
        except Exception as error:  # must not end the run; `stage` reports it
            super().message(f"the live view failed: {error!r}")
            self._broken = traceback.format_exc()
            self._typed.release()
        with suppress(OSError, ValueError), self._writing:
            self._screen.give()

    def _draw(self) -> None:
        self.press(self._typed.read(0))  # keys work before they are shown, also after Ctrl-Z and fg
        self._note_keys()
        with self._console.capture() as captured:
            self._console.print(self.render(), end="")
        lines, size = captured.get().rstrip("\n").split("\n"), (self._console.width, self._console.height)
        # The run goes on while the terminal is slow, or is not read at all.
        with self._writing:
            if self._stopping or self._gone or not in_foreground(self._console.file):
                return
            try:
                self._screen.take()  # again, after Ctrl-Z and fg
                self._screen.draw(lines, size)
            except OSError as error:  # the run learns of it at its next stage
                self._gone = error
            except ValueError:  # the stream is closed
                self._gone = OSError(0, "closed")

    def _go_on_in_lines(self) -> None:
        """Become a plain view, because the screen cannot be drawn."""
        self.close()
        plain = PlainView(cast(TextIO, self._console.file))
        plain.start(**self._start)
        for name in (*EVENTS, "close"):
            setattr(self, name, getattr(plain, name))
        say = self.message if self.controls is None else self.controls.say
        say(f"the live view failed, and the run goes on in plain lines; please report this:\n{self._broken}")

    def _note_keys(self) -> None:
        self.keys = self._possible_keys if self._typed.possible and self.controls is not None else {}

    def _stopped(self, number: int, _frame: object) -> None:
        """Give the terminal back, do what the signal does by itself, and go on when the process is continued."""
        self._stopping = True
        self._typed.release()
        if self._writing.acquire(timeout=UNREAD_SECONDS):
            try:
                with suppress(OSError):
                    self._screen.give()
            finally:
                self._writing.release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._stopped)
        self._typed.taken = False  # the shell has set its own mode meanwhile
        self._stopping = False

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
