"""The terminal of a full-screen view: draw only what changes, read single keys, and give it back as it was."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Sequence
from typing import IO

try:
    import termios
    import tty
except ImportError:  # Windows: views have no keys there
    KEYS_POSSIBLE = False
else:
    KEYS_POSSIBLE = True

# Alternate screen, no cursor, and no automatic wrapping: if terminal and program disagree about the width of a
# character, a line may be too long, and the whole screen would scroll by a line.
TAKE, GIVE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J", "\x1b[?25h\x1b[?1049l\x1b[?7h"


def in_foreground(stream: IO[str]) -> bool:
    """Return False if the terminal belongs to another job, such as the shell after Ctrl-Z."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # a stream without job control
        return True


class Screen:
    """The alternate screen of a terminal. A line is written only if it changed, so little goes over a slow line.

    A write blocks while nothing reads the terminal, as after Ctrl-S: no lock that the run needs may be held then.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lines: list[str] = []
        self._size = (0, 0)
        self.taken = False

    def take(self) -> None:
        """Change to the alternate screen. A second call does nothing."""
        if not self.taken:
            self.taken, self._lines = True, []
            self._write(TAKE)

    def give(self) -> None:
        """Bring back what was there before. A second call does nothing."""
        if self.taken:
            self.taken = False
            self._write(GIVE)

    def draw(self, lines: Sequence[str], size: tuple[int, int]) -> None:
        """Show `lines` from the top; `size` is that of the terminal, which is cleared if that changed."""
        text = ""
        if size != self._size:
            text, self._lines, self._size = "\x1b[2J", [], size
        for row in range(max(len(lines), len(self._lines))):
            new = lines[row] if row < len(lines) else ""
            if row >= len(self._lines) or self._lines[row] != new:
                text += f"\x1b[{row + 1};1H\x1b[K{new}"
        self._lines = list(lines)
        if text:
            self._write(text)

    def _write(self, text: str) -> None:
        self._stream.flush()
        try:
            descriptor = self._stream.fileno() if KEYS_POSSIBLE else None
        except (OSError, ValueError):  # not a file
            descriptor = None
        if descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # Not through the stream: while a write blocks, its lock could not be taken by anyone, nor by Python's exit.
        left = memoryview(text.encode(getattr(self._stream, "encoding", None) or "utf-8", "replace"))
        while left:
            left = left[os.write(descriptor, left) :]


class Keys:
    """Single keys from standard input, if that is a terminal; Ctrl-C and Ctrl-Z stay signals.

    `read` takes the terminal's line mode away while the process is in the foreground, `release` brings it back.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.__stdin__
        self.possible = KEYS_POSSIBLE and self._stream is not None and _is_terminal(self._stream)
        self._fd = self._stream.fileno() if self.possible and self._stream is not None else -1
        self._line_mode: list[object] | None = None  # as it was at first
        self.taken = False
        self._woken = threading.Event()
        self._wake = os.pipe() if KEYS_POSSIBLE else None

    def read(self, seconds: float) -> str:
        """Return what is pressed within `seconds`, or nothing; escape sequences, such as of arrows, are ignored."""
        if self._wake is None:
            self._woken.wait(seconds)
            return ""
        sources = [self._wake[0]]
        if self.possible and self._stream is not None and in_foreground(self._stream):
            try:
                self._take()
                sources.append(self._fd)
            except (termios.error, OSError):  # the terminal is gone
                self.possible = False
        ready, _, _ = select.select(sources, [], [], seconds)
        # Not in the background: to read there would stop the process.
        if self._fd not in ready or self._stream is None or not in_foreground(self._stream):
            return ""
        try:
            content = os.read(self._fd, 64)
        except OSError:
            content = b""
        self.possible = bool(content)
        pressed = content.decode("utf-8", "ignore")
        return "" if pressed.startswith("\x1b") else pressed

    def wake(self) -> None:
        """Let `read` return now."""
        self._woken.set()
        if self._wake is not None:
            os.write(self._wake[1], b"x")

    def release(self) -> None:
        """Give the terminal its line mode back, unless another job has the terminal."""
        taken, self.taken = self.taken, False
        if taken and self._stream is not None and in_foreground(self._stream):
            try:
                termios.tcsetattr(self._fd, termios.TCSANOW, self._line_mode)  # type: ignore[arg-type]
            except (termios.error, OSError):
                self.possible = False

    def close(self) -> None:
        """Release the terminal for good."""
        self.release()
        if self._wake is not None:
            for end in self._wake:
                os.close(end)
            self._wake = None

    def _take(self) -> None:
        if not self.taken:
            self.taken = True
            self._line_mode = self._line_mode or list(termios.tcgetattr(self._fd))
            tty.setcbreak(self._fd, termios.TCSANOW)
            termios.tcflush(self._fd, termios.TCIFLUSH)  # typed before keys were shown, and meant for something else


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty() and stream.fileno() >= 0
    except (OSError, ValueError):  # closed, or replaced by an object without a descriptor
        return False
