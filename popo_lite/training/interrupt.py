"""Ctrl-C during training: once finishes the step, twice abandons it, and never in the middle of an update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """The step in progress is to be abandoned."""


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered. Outside the main thread it notes nothing.

    A signal never raises by itself, as it may come while weights are swapped or half updated; `check` does, at
    the places that call it.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._abandon = False
        self._notify = notify
        self._previous: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """The handler. It may be installed before this is entered, and stay when this is left: it only notes."""
        if self.requested:
            self._abandon = True
        else:
            self.requested = True
            self._notify("finishing this step, then saving; Ctrl-C again abandons the step and saves")

    def check(self) -> None:
        """Raise StopRequested where a second signal has come. To be called where no weight is half changed."""
        if self._abandon:
            raise StopRequested
