"""Ctrl-C during training: once finishes the step, twice abandons it; never in the middle of an update."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """The step in progress is to be abandoned. Raised at a place where no weight has changed yet."""


class Interrupts:
    """Catches SIGINT and SIGTERM while it is entered. Outside the main thread it catches nothing."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._notify = notify
        self._protected = False
        self._previous: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._notify("finishing this step, then saving; Ctrl-C again abandons the step and saves")
            return
        if not self._protected:
            raise StopRequested

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Within, a second signal is as patient as the first: weights, siamese, version and record belong together."""
        self._protected = True
        try:
            yield
        finally:
            self._protected = False
