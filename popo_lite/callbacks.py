"""Receive the events of a run. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

from popo_lite.controls import Controls
from popo_lite.metrics import StepRecord


class TerminalGone(OSError):  # noqa: N818  # an event, not always an error
    """Raised by a view if its terminal is closed, or if nothing reads its pipe any more."""


class Callback:
    """Receive the events of a run. Every method does nothing here: override those you need.

    Methods must return at once. `message` may come from a signal handler, in the middle of another call. A method that
    raises ends the run, which is saved first. A callback is a context manager; leaving it calls `close`, also after an
    error.
    """

    def attach(self, controls: Controls) -> None:
        """Receive the controls of the run before it starts, to show notices, pause it or ask for more."""

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """Begin a run. `facts` are shown in order: model, adapters, data, device, run folder.

        `first_step` is how many of `total_steps` are done already: 50 for a run that resumes from its 50th step.
        Records number steps from 0; people are shown that number plus one.
        """

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Enter a stage, such as "rollout" or "update". `total` is its amount of work, if known."""

    def advance(self, amount: int) -> None:
        """Finish `amount` of the stage's total."""

    def step(self, record: StepRecord) -> None:
        """End a step, whether it changed weights or was skipped.

        Steps come again after the run went back to a checkpoint.
        """

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Receive answers of the latest step, which replace those of the step before.

        Each has "step", "question", "reference" (the right answer), and the texts "right" and "wrong" or None.
        """

    def sampled(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Receive answers that were asked for (`Controls.request("sample")`), as `samples` has them."""

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Receive an evaluation on held-out problems, a line of evaluations.jsonl.

        It has "when" ("before", "after", "step N", or "asked" for one that was asked for), "step", the number of steps
        done, and what `EvalResult.summary` has.
        """

    def saved(self, checkpoint: Path) -> None:
        """Receive the folder of a complete checkpoint. It is deleted when newer ones replace it."""

    def message(self, text: str) -> None:
        """Receive a notice that must not be lost, such as the folder of a checkpoint. May come before `start`."""

    def close(self) -> None:
        """Clean up after the run, however it ended. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


EVENTS = ("attach", "start", "stage", "advance", "step", "samples", "sampled", "evaluated", "saved", "message")
"""The methods of `Callback` that receive an event."""


class CallbackList(Callback):
    """Pass every call on to several callbacks, in order; enter and close all of them.

    One that raises gets nothing more, except TerminalGone: it may pass events on to others that need no terminal.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks, self._entered = list(callbacks), ExitStack()
        for method in EVENTS:
            setattr(self, method, partial(self._call_all, method))

    def __enter__(self) -> Self:
        for callback in reversed(self._callbacks):  # the first, which may hold the terminal, is closed first
            self._entered.enter_context(callback)
        return self

    def close(self) -> None:  # noqa: D102
        self._entered.close()

    def _call_all(self, method: str, *values: Any, **named: Any) -> None:
        failed: list[Exception] = []
        for callback in tuple(self._callbacks):
            try:
                getattr(callback, method)(*values, **named)
            except TerminalGone as error:
                failed.append(error)
            except Exception as error:
                self._callbacks.remove(callback)
                failed.insert(0, error)
        if failed:
            raise failed[0]
