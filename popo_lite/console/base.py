"""What the training loop may say to whoever is watching. Free of torch and of rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from popo_lite.types import SampleView, StepRecord


class RunView(Protocol):
    """A watcher of one run. Every method returns at once, and any thread may call it.

    A view is a context manager: leaving it closes it, also after an exception.
    """

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """The run begins. `facts` are shown as they are, in order: model, adapters, data, device, run folder.

        `first_step` is how many of `total_steps` lie behind already: 0 for a new run, 50 for one that
        resumes from the checkpoint of its 50th step. Every call of `step` adds one. Records number steps from
        0; people are shown that number plus one.
        """

    def stage(self, name: str, *, total: int | None = None) -> None:
        """What runs from now on, such as "rollout" or "update". `total` is the amount of work, where known."""

    def advance(self, amount: int) -> None:
        """`amount` more of the running stage's total is done."""

    def step(self, record: StepRecord) -> None:
        """A step ended, whether it changed weights or was skipped."""

    def samples(self, samples: Sequence[SampleView]) -> None:
        """Answers of the latest step, for people to read. Replaces those of the step before."""

    def message(self, text: str) -> None:
        """A notice that must not be lost, such as where a checkpoint was saved. May come before `start`."""

    def close(self) -> None:
        """The run ended, well or badly. Leaves the terminal in order; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
