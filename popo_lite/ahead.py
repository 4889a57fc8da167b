"""Draw the graded rollouts of a step; with `rollout.async_level = 1` in a thread, while the step before trains.

The thread samples from the adapter that the servers hold, the one before the update under way, so its groups are one
optimizer step old when they are trained. Nothing is in flight between two steps: `wait` comes before the servers get
the next adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from popo_lite.conversation import RolloutWorker
from popo_lite.curriculum import Choice, Clock, History, choose_problems, collect
from popo_lite.distributed import Ranks
from popo_lite.errors import StalePolicyError, StopRequested
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Progress
from popo_lite.tasks import Task
from popo_lite.types import Group

WAIT_SECONDS = 0.25
"""Seconds between two looks for Ctrl-C while the main thread waits for rollouts."""


class Start(NamedTuple):
    """All that decides the rollouts of a step, beside recipe and data: see `choose_problems`, and who samples."""

    step: int
    next_problem: int
    history: History
    level: int
    policy_version: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The problems of a step and their graded groups.

    For one that was drawn ahead, `waited` are the seconds by stage that the main thread waited for it, and `ahead`
    those that passed before, while it trained; else both are empty.
    """

    start: Start
    choice: Choice
    groups: Sequence[Group]
    waited: Mapping[str, float] = field(default_factory=dict)
    ahead: Mapping[str, float] = field(default_factory=dict)


class Rollouts:
    """Draws steps now (`draw`), or one step ahead: `start`, `wait`, and in the next step `take`.

    `check` raises StopRequested after a second Ctrl-C. `notify` takes the sampler's notices; those that come while a
    step is in flight are passed to `say` by `wait`, so that callbacks are called by one thread only.
    """

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        ranks: Ranks,
        *,
        say: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self._task = task
        # Collectives of two threads must not meet.
        self._ranks_ahead = ranks.another() if recipe.rollout.async_level else ranks
        self._say, self._check = say, check
        self._notices: list[str] | None = None  # None while nothing is in flight
        self._thread = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")  # starts when needed
        self._clock = _QuietClock()
        self._in_flight: futures.Future[Drawn] | None = None
        self._drawn: Drawn | None = None
        self._dropping = False

    def draw(self, start: Start, worker: RolloutWorker, clock: Clock, progress: Progress) -> Drawn:
        """Choose the problems of a step, then sample and grade its groups. Raises what `collect` raises."""
        step, next_problem, history, level, policy_version = start
        with clock("prompts"):
            choice = choose_problems(self._task, worker.recipe, step, next_problem, history, level)
            prompts = [worker.renderer.render(problem) for problem in choice.problems]
        # Stages "rollout" and "grade".
        groups = collect(prompts, worker, policy_version, step, clock, progress)
        return Drawn(start=start, choice=choice, groups=groups)

    def start(self, start: Start, worker: RolloutWorker) -> None:
        """Begin to draw a step in the thread."""
        self._clock, self._notices = _QuietClock(), []
        worker = replace(worker, ranks=self._ranks_ahead)
        self._in_flight = self._thread.submit(self.draw, start, worker, self._clock, lambda _: self._check_ahead())

    def wait(self, progress: Progress, stopping: Callable[[], bool]) -> None:
        """Wait for what is in flight, if anything, and keep it for `take`; raise the error that it ended with.

        Meanwhile `progress` is called often with 0, and may raise: then it stays in flight. It is dropped if `stopping`
        returns True.
        """
        if self._in_flight is None:
            return
        began = time.perf_counter()
        while not futures.wait([self._in_flight], WAIT_SECONDS).done:
            if stopping():
                self.drop()
                return
            progress(0)
        landed, self._in_flight = self._in_flight, None
        self._pass_notices_on()
        drawn = landed.result()
        waited, total = self._clock.seconds(began), self._clock.seconds(-math.inf)
        ahead = {stage: seconds - waited[stage] for stage, seconds in total.items()}
        self._drawn = Drawn(start=drawn.start, choice=drawn.choice, groups=drawn.groups, waited=waited, ahead=ahead)

    def take(self, step: int, policy_version: int) -> Drawn | None:
        """Return the groups that were drawn ahead for `step`, or None. `policy_version` is about to train on them.

        Raises StalePolicyError if they are for another step, or more than one optimizer step old.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return None
        lag = policy_version - drawn.start.policy_version
        if drawn.start.step != step or lag not in (0, 1):
            what = f"step {step} would train on rollouts of step {drawn.start.step}, {lag} optimizer steps old"
            raise StalePolicyError(what, next_step="this is a bug in the order of a step: one step ahead is the limit")
        return drawn

    def drop(self) -> None:
        """Abandon what is in flight, and forget what was drawn ahead. Returns when the thread does nothing any more."""
        self._drawn = None
        if self._in_flight is not None:
            self._dropping = True
            futures.wait([self._in_flight])  # an error is dropped with it: if it lasts, it comes again
            self._dropping, self._in_flight = False, None
            self._pass_notices_on()

    def notify(self, text: str) -> None:
        """Pass on a notice of the sampler."""
        if self._notices is None:
            self._say(text)
        else:
            self._notices.append(text)

    def _pass_notices_on(self) -> None:
        notices, self._notices = self._notices, None
        for text in notices or ():
            self._say(text)

    def _check_ahead(self) -> None:
        if self._dropping:
            raise StopRequested
        self._check()


class _QuietClock:
    """Times the stages of the thread, without telling the callback."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, stage: str, *, total: int | None = None) -> Iterator[None]:  # noqa: ARG002
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append((stage, start, time.perf_counter()))

    def seconds(self, since: float) -> dict[str, float]:
        """Return the seconds by stage after the moment `since`."""
        found = dict.fromkeys((stage for stage, _, _ in self._spans), 0.0)
        for stage, start, end in self._spans:
            found[stage] += max(0.0, end - max(start, since))
        return found
