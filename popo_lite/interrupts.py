"""Stop a run between two changes of its weights, and time the stages of a step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

import torch

from popo_lite.callbacks import Callback
from popo_lite.errors import StopRequested

HANGUP = getattr(signal, "SIGHUP", None)
"""Signal of a closed terminal or a lost connection. Windows has none."""


class Interrupts:
    """Ctrl-C, SIGTERM, SIGHUP: the first finishes the step, the second abandons it, never in the middle of an update.

    SIGHUP stays ignored if it is, as with nohup.

    A signal never raises by itself, because it may come while weights are swapped or half updated. `check` raises, at
    places that call it. Outside the main thread no signal is handled.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._abandon = False
        self._notify = notify
        self._previous: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            hangup = () if self._outlives_terminal() else (HANGUP,)
            for number in (signal.SIGINT, signal.SIGTERM, *filter(None, hangup)):
                self._previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: only note it. May be installed before the context is entered, and stay afterwards."""
        if self.requested:
            self._abandon = True
        else:
            self.requested = True
            with suppress(Exception):  # the message may have come in the middle of another one
                self._notify("finishing this step, then saving; Ctrl-C again abandons the step and saves")

    def stop(self) -> None:
        """Finish the step and stop, as after one signal. Any thread may call it."""
        if not self.requested:
            self.note(0, None)

    def terminal_gone(self) -> None:
        """Stop after this step, unless the run is to outlive its terminal."""
        self.requested = self.requested or not self._outlives_terminal()

    @staticmethod
    def _outlives_terminal() -> bool:
        return HANGUP is not None and signal.getsignal(HANGUP) is signal.SIG_IGN

    def check(self) -> None:
        """Raise StopRequested after a second signal. Call it only while no weight is half changed."""
        if self._abandon:
            raise StopRequested


class StageClock:
    """Wall-clock seconds by stage of a step; announces each stage to the callback."""

    def __init__(self, callback: Callback, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._callback, self._device = callback, device

    @contextmanager
    def __call__(self, stage: str, *, total: int | None = None) -> Iterator[None]:
        """Time the block as `stage`; `total` is its amount of work, for the callback."""
        self._callback.stage(stage, total=total)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # kernels still run after the call that queued them
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
