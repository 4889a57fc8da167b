"""Do what is asked of a run between two steps: pause, show answers, evaluate, save a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import SafetensorError

from popo_lite.controls import Action
from popo_lite.errors import EngineFailedError, GradingError
from popo_lite.evaluation import draw_samples
from popo_lite.pausing import Pause

if TYPE_CHECKING:
    from popo_lite.run_loop import RunLoop

ASKED_SAMPLES = 3
"""Problems that are answered when samples are asked for. The next time it is the next ones' turn."""


class Requests:
    """Serves the requests in the `controls` of a run."""

    def __init__(self, run: RunLoop) -> None:
        self._run = run
        self._asked = 0  # how often samples were asked for

    def serve(self) -> None:
        """Do what was asked for since the last step. None of it changes a draw or a weight of the run."""
        run = self._run
        while not run.stopping():
            pausing = run.controls.pausing
            pausing, action = run.ranks.from_first((pausing, None if pausing else run.controls.take()))
            if pausing:
                self._pause()
            elif action is None:
                return
            else:
                try:
                    self._do(action)
                except (OSError, SafetensorError, GradingError) as error:  # the run does not depend on it
                    if run.ranks.size > 1 and action != "checkpoint":
                        raise  # the other ranks are in the middle of it
                    run.callback.log.warning("a request failed", exc_info=True)
                    run.callback.message(f"{action}: not done; {error}")
                except EngineFailedError:  # asked again, it might end the run
                    run.callback.message(f"{action}: not done, because the engine failed")
                    raise

    def _do(self, action: Action) -> None:
        run = self._run
        if action == "checkpoint":
            run.checkpoint()
        elif action == "sample":
            self._show_samples()
        elif run.held_out:
            run.evaluate("asked")
        else:
            run.callback.message("nothing to evaluate on: eval.problems is 0")

    def _pause(self) -> None:
        """Wait with an empty GPU until the run is to continue or stop. A run that stops is saved from host memory."""
        run = self._run
        run.callback.stage("paused")
        pause = Pause(run.learner, run.sampler)
        where = f"after step {run.cursor.next_step} of {run.recipe.train.steps}"
        try:
            run.controls.paused = True
            how = 'to continue press p, or request "continue"'
            run.callback.message(f"paused {where}{pause.freed}; {how}; Ctrl-C saves and stops")
            while not run.stopping():
                run.controls.wait(0.2)
                if run.ranks.from_first(run.controls.pausing) or run.stopping():
                    continue
                problems = run.ranks.gather(pause.end())
                if not any(problems):
                    run.sampler.sync(run.policy.version)
                    run.callback.message(f"continued {where}")
                    return
                if problems[run.ranks.rank] is None:
                    pause = Pause(run.learner, run.sampler)
                run.callback.message(next(filter(None, problems)))
                run.controls.request("pause")
        finally:
            run.controls.paused = False

    def _show_samples(self) -> None:
        """Draw and grade an answer to each of a few held-out problems, or training problems, and show them."""
        run = self._run
        run.callback.stage("sample")
        done, self._asked = run.cursor.next_step, self._asked + 1
        problems = run.held_out or [
            run.train_task.train_problem(run.recipe.train.seed, index) for index in range(8 * ASKED_SAMPLES)
        ]
        start = (self._asked - 1) * ASKED_SAMPLES
        chosen = [problems[index % len(problems)] for index in range(start, start + min(ASKED_SAMPLES, len(problems)))]
        drawn = draw_samples(
            run.worker,
            run.policy.version,
            chosen,
            stream=("asked", run.recipe.train.seed, done, self._asked),
            progress=run.advance,
        )
        right = sum(sample["right"] is not None for sample in drawn)
        kind = "held-out" if run.held_out else "training"
        run.callback.sampled([{**sample, "step": done - 1} for sample in drawn])
        run.callback.message(f"after step {done}: {right} of {len(drawn)} answers to {kind} problems are right")
