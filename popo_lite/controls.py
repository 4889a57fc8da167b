"""Ask a run that trains to pause, sample, evaluate, save or stop. Thread-safe, and free of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, get_args

from popo_lite.errors import UserInputError

Action = Literal["pause", "continue", "sample", "evaluate", "checkpoint", "stop"]
ACTIONS: tuple[Action, ...] = get_args(Action)


class Controls:
    """Requests to a run. It serves them between two steps; "stop" does what one Ctrl-C does.

    Any thread may call `request`, also before the run starts. `paused` is True while the run waits, and `over` once its
    last step is done. `say` shows a notice and writes it to the log.
    """

    def __init__(self, stop: Callable[[], None], say: Callable[[str], None]) -> None:
        self._stop = stop
        self.say = say
        self._changed = threading.Condition()
        self._waiting: list[Action] = []
        self._pausing = False
        self.paused = self.over = False

    def request(self, action: Action) -> None:
        """Ask for an action. Asking twice before it is done asks once. Raises UserInputError for an unknown one."""
        if action not in ACTIONS:
            raise UserInputError(f"a run has no control {action!r}", next_step=f"use one of {', '.join(ACTIONS)}")
        if self.over and action not in ("continue", "stop"):
            self.say(f"{action}: not done, because the last step is over")
            return
        with self._changed:
            if action in ("pause", "continue"):
                self._pausing = action == "pause"
            elif action != "stop" and action not in self._waiting:
                self._waiting.append(action)
            self._changed.notify_all()
        if action == "stop":
            self._stop()

    @property
    def pausing(self) -> bool:
        """True from the request to pause until the one to continue."""
        return self._pausing

    @property
    def waiting(self) -> tuple[Action, ...]:
        """Requests that are not done yet."""
        with self._changed:
            first: tuple[Action, ...] = ("pause",) if self._pausing and not self.paused else ()
            return (*first, *self._waiting)

    def take(self) -> Action | None:
        """Return the oldest request, which counts as done from now on; None if there is none. For the run."""
        with self._changed:
            return self._waiting.pop(0) if self._waiting else None

    def wait(self, seconds: float) -> None:
        """Wait for the next request, at most so long. For the run."""
        with self._changed:
            self._changed.wait(seconds)
