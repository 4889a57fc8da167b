"""End what sends a run's events elsewhere: wait for all of it together, and let Ctrl-C end the wait."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from popo_lite.callbacks import Callback, CallbackList
from popo_lite.controls import Controls
from popo_lite.tools.console.output import notify

QUIET = 0.3
"""Seconds of waiting after which the user is told."""


class Reporter(Callback, ABC):
    """Send events in a process of its own. `patience` is how many seconds the end of a run waits for it."""

    name: str
    patience: float

    def __init__(self) -> None:
        self.say: Callable[[str], None] = notify

    def attach(self, controls: Controls) -> None:
        self.say = controls.say

    def finish(self) -> None:
        """Begin to send what is left."""

    @abstractmethod
    def is_done(self) -> bool:
        """Check whether all is sent or has failed."""

    @abstractmethod
    def give_up(self, why: str) -> None:
        """End the process, and say or keep for `close` what is not sent."""


class Reporters(CallbackList):
    """Pass events on to all reporters, and close them together."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        super().__init__(reporters)
        self._reporters = reporters

    def close(self) -> None:
        """Wait for all that is left to be sent, until nothing is, each one's patience is over, or Ctrl-C."""
        began, is_said, why = time.monotonic(), False, None
        try:
            for reporter in self._reporters:
                reporter.finish()
            while pending := [each for each in self._reporters if not each.is_done()]:
                waited = time.monotonic() - began
                pending = [each for each in pending if waited < each.patience]
                if not pending:
                    break
                if waited >= QUIET and not is_said:
                    is_said = True
                    names, most = ", ".join(each.name for each in pending), max(each.patience for each in pending)
                    pending[0].say(f"waiting at most {most:.0f} s for {names}; Ctrl-C ends the wait")
                time.sleep(0.02)
        except KeyboardInterrupt:
            why = "Ctrl-C ended the wait"
        finally:
            for reporter in self._reporters:
                if not reporter.is_done():
                    reporter.give_up(why or f"it was not finished in {reporter.patience:g} s")
            super().close()
