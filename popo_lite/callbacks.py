"""What a run tells whoever watches it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from popo_lite.metrics import StepRecord
from popo_lite.types import SampleView


class Callback:
    """Watches a run. Every method does nothing here: override those you need.

    Methods must return at once. `message` may come from a signal handler, in the middle of another call. A callback is
    a context manager; leaving it calls `close`, also after an error.
    """

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
        """End a step, whether it changed weights or was skipped."""

    def samples(self, samples: Sequence[SampleView]) -> None:
        """Receive answers of the latest step, which replace those of the step before."""

    def message(self, text: str) -> None:
        """Receive a notice that must not be lost, such as the folder of a checkpoint. May come before `start`."""

    def close(self) -> None:
        """Clean up after the run, however it ended. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CallbackList(Callback):
    """Passes every call on to several callbacks, in order; enters and closes all of them."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        for callback in self._callbacks:
            self._entered.enter_context(callback)
        return self

    def close(self) -> None:  # noqa: D102
        self._entered.close()

    def start(self, **facts: Any) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.start(**facts)

    def stage(self, name: str, *, total: int | None = None) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.stage(name, total=total)

    def advance(self, amount: int) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.advance(amount)

    def step(self, record: StepRecord) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.step(record)

    def samples(self, samples: Sequence[SampleView]) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.samples(samples)

    def message(self, text: str) -> None:  # noqa: D102
        for callback in self._callbacks:
            callback.message(text)
