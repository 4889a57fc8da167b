"""The loop around the steps of a run: go on from a checkpoint, evaluate, save, and end however it ends."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from popo_lite.checkpoint import load_checkpoint, save_checkpoint, sync_folder
from popo_lite.distributed import RankLostError
from popo_lite.errors import (
    BadGradientsError,
    CheckpointError,
    DataError,
    EngineError,
    EngineFailedError,
    NotFiniteError,
    PopoError,
    StopRequested,
)
from popo_lite.evaluation import evaluate
from popo_lite.faults import explained
from popo_lite.formats import read_json, reading
from popo_lite.metrics import sampler_summary
from popo_lite.opening import OpenRun
from popo_lite.policy.adapters import save_adapter
from popo_lite.requests import Requests
from popo_lite.resuming import Change
from popo_lite.run_folder import (
    RunFolder,
    append_line,
    checkpoint_folders,
    checkpoint_step,
    go_back,
    is_sound,
    keep_lines,
    peak_memory_bytes,
    read_files,
    read_lines,
    start_files,
    write_files,
    write_json,
)
from popo_lite.samplers.probe import PROBE_PROMPTS
from popo_lite.tasks.datasets import changes as data_changes
from popo_lite.tasks.datasets import digests
from popo_lite.types import EvalResult
from popo_lite.verdicts import Verdicts

TOTALS = ("prompts_skipped", "prompts_with_positive", "rollouts", "rollout_tokens", "trained_tokens", "shared_tokens")
"""Metrics whose sum over all steps is part of the summary."""

HISTORY = ("changes", "doubts", "best", "not_finite_steps", "rollbacks", "learning_rate_scale")
"""Fields of the cursor that are part of the summary: what was out of the ordinary."""

BAD_GRADIENTS = 3
"""Roll back after so many updates in a row that were skipped for their gradient."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Describe the end of a run. `summary` is None if it was interrupted; `next_step` steps are done."""

    folder: RunFolder
    summary: dict[str, Any] | None
    next_step: int


class RunLoop(OpenRun, ABC):
    """Run the steps, and keep what they leave: evaluations, checkpoints, adapters, summary."""

    _consistent = True  # weights and cursor belong to the same step
    _compared = 0  # steps after which the weights of all ranks were last compared
    _reopened_at: int | None = None  # the step at which the engine was last opened again

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.requests = Requests(self)
        self._shown: list[list[str]] = []  # what rank 0 has said lately, if there are several

    @abstractmethod
    def train_step(self, step: int) -> None:
        """Do one step."""

    def run(self, folder: RunFolder, *, resume: bool = False, changes: Sequence[Change] = (),
            checkpoint: int | None = None) -> RunResult:  # fmt: skip
        """Train to the last step, or until interrupted; write all that `RunFolder` names to `folder`.

        The caller holds the folder's lock. `changes` are those of the recipe since the run was stopped: key, before,
        now. `checkpoint` is the number of steps to go back to, by default as many as the newest checkpoint has.
        Whatever ends the run, the last whole step is saved; an error says where.
        """
        self.folder = folder
        self.callback.open_log(folder.log_path)
        self.callback.attach(self.controls)
        with self.interrupts, self._logged():
            if resume:
                self._restore(checkpoint)
                self._note_changes(changes)
            for difference in start_files(folder, self.recipe, self.policy.device):
                self.callback.message(f"not as when the run started: {difference}")
            digests = self._digests()
            self._refuse_other_data(digests)
            write_json(folder.data_path, digests)
            try:
                steps, done = self.recipe.train.steps, self.cursor.next_step
                self.callback.start(title=folder.path.name, facts=self._facts(), total_steps=steps, first_step=done)
                summary = self._train()
                self.ranks.gather(None)  # no rank closes its connections before all have what they need
            except StopRequested as request:
                self.ranks.leave(request)
                summary = None
            except BaseException as error:
                if self.ranks.first:
                    self.ranks.leave(error)
                # Before the advice, which may need memory.
                outcome = self._save_after_error(error)
                shown = explained(error, folder, self.memory_advice)
                self.ranks.leave(shown)
                if not isinstance(shown, PopoError):
                    error.add_note(outcome)  # stands below its traceback
                    self.callback.message(f"{type(error).__name__}: {outcome}")
                    raise
                shown.what += f"; {outcome}"
                if shown is error:
                    raise
                raise shown from error
            if summary is None:
                self._save()
        return RunResult(folder=folder, summary=summary, next_step=self.cursor.next_step)

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Write an error that leaves the block to the log, with its traceback."""
        try:
            yield
        except BaseException:
            self.callback.log.exception("the run ends with an error")
            raise

    def _train(self) -> dict[str, Any] | None:
        """Run all that is left, also after an engine has died or numbers went wrong; return as `_go_on` does."""
        while True:
            try:
                return self._go_on()
            except (EngineFailedError, NotFiniteError) as error:
                recover = self._recovery(error)
                if recover is None:
                    raise
                self.callback.log.warning("the run recovers from an error", exc_info=True)
            self.rollouts.drop()
            recover()  # outside the block: a caught error keeps what the engine holds

    def _go_on(self) -> dict[str, Any] | None:
        """Run all evaluations and steps that are left; return the summary, or None if interrupted."""
        self.controls.over = False
        self._refuse_divergence()
        if not self.stopping():
            self._prove_sampler(self.callback.message)
        if self.cursor.before is None and self.held_out and not self.stopping():
            self.cursor.before = self.evaluate("before").summary()
        if self.cursor.next_step and not self.stopping():
            self._after_step()  # what an interrupt may have left undone
        self.requests.serve()
        while self.cursor.next_step < self.recipe.train.steps and not self.stopping():
            self.train_step(self.cursor.next_step)
            self._after_step()
            self.requests.serve()
        if self.stopping():
            return None
        self.controls.over = True
        return self._finish(self.evaluate("after").summary() if self.held_out else None)

    def stopping(self) -> bool:
        """Return whether any rank was asked to stop, and show what other ranks alone have said. A collective."""
        said, self.callback.said = self.callback.said, []
        parts = self.ranks.gather((self.interrupts.requested, said if self.ranks.size > 1 else []))
        self._shown = [*self._shown, parts[0][1]][-2:]  # what all say may be a gather apart
        for rank, (_, texts) in enumerate(parts if self.ranks.first else []):
            for text in texts:
                if not any(text in shown for shown in self._shown):
                    self.callback.message(f"rank {rank}: {text}")
        return any(requested for requested, _ in parts)

    # --------------------------------------------------------------------- faults

    def _recovery(self, error: PopoError) -> Callable[[], None] | None:
        """Return what to do about the error so that the run can go on, or None.

        An engine is opened once for each step, and the run rolls back once, also after Ctrl-C: a resume would not start
        from weights that went wrong. Several ranks recover from bad gradients, which all of them have: any other error
        may be that of one alone.
        """
        if self.ranks.size > 1 and not isinstance(error, BadGradientsError):
            return None
        step, what = self.cursor.next_step, error.what
        if isinstance(error, EngineFailedError):
            if self.interrupts.requested or not self._consistent or self._reopened_at == step:
                return None
            self._reopened_at = step
            return partial(self._reopen_engine, what)
        target = self.ranks.from_first(self._rollback_target())
        if target is None or self.cursor.rollbacks:
            return None
        return partial(self._roll_back, target, what)

    def _rollback_target(self) -> Path | None:
        """Return the newest checkpoint with other weights than the current ones, or None.

        Those after a multiple of train.save_steps come first: a run that was stopped has others, too, and must end as
        one that was not.
        """

        def order(folder: Path) -> tuple[bool, int]:
            step = checkpoint_step(folder)
            return step > 0 and step % self.recipe.train.save_steps == 0, step

        for folder in sorted(checkpoint_folders(self.folder.checkpoints), key=order, reverse=True):
            if is_sound(folder):
                content = read_json(folder / "cursor.json")
                if content.get("policy_version") != self.policy.version:
                    return folder
        return None

    def _reopen_engine(self, why: str) -> None:
        """Open the engine again, with the current adapter. Draws depend on the step alone, so no number changes."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        done = self.cursor.next_step
        self.callback.message(f"{why}; the engine is opened again, and the run goes on after step {done}")
        self.sampler.reopen()

    def _roll_back(self, target: Path, why: str) -> None:
        """Go back to the checkpoint `target` with half the learning rate; later checkpoints are renamed."""
        before = self.cursor
        self._consistent = False
        self.learner.optimizer.zero_grad(set_to_none=True)
        self._unwritten.clear()
        self._restore(checkpoint_step(target))
        self._note_changes([change for change in before.changes if change["step"] > self.cursor.next_step])
        self.cursor.learning_rate_scale = before.learning_rate_scale / 2
        self.cursor.rollbacks = before.rollbacks + 1
        self.cursor.not_finite_steps, self.cursor.not_finite_in_a_row = before.not_finite_steps, 0
        self._consistent = True
        self.checkpoint()
        self.callback.message(
            f"{why}; back from step {before.next_step} to {self.cursor.next_step}, and on with "
            f"{self.cursor.learning_rate_scale:g} times the learning rate; the next time the run stops"
        )

    def _save_after_error(self, cause: BaseException) -> str:
        """Save the last whole step, and return what is saved. An error in here never hides the first one."""
        self.callback.ending = True
        if doubt := getattr(cause, "doubt", None):
            self.cursor.doubts = [*dict.fromkeys([*self.cursor.doubts, doubt])]
        if not self.ranks.first:
            return "what it has not saved is lost"
        done, newest = self.cursor.next_step, checkpoint_folders(self.folder.checkpoints)
        left = f"the newest checkpoint is {newest[-1]}" if newest else "there is no checkpoint"
        if not self._consistent:
            return f"this was in the middle of an update, so the steps since the last save are lost; {left}"
        if not done and self.cursor.before is None:
            return "no step was done"
        try:
            return f"all {done} steps are saved in {self._save()}"
        except Exception as error:
            self.callback.log.exception("saving failed")
            reason = (str(error).splitlines() or [""])[0]
            return f"saving failed, too ({type(error).__name__}: {reason}); {left}"

    # --------------------------------------------------------------------- checkpoints and evaluation

    def _after_step(self) -> None:
        """Evaluate and save a checkpoint if they are due, in this order: a checkpoint covers what is recorded."""
        done, train, every = self.cursor.next_step, self.recipe.train, self.recipe.eval.every
        if (bad := self.cursor.not_finite_in_a_row) >= BAD_GRADIENTS:
            what = f"the gradients of {bad} updates in a row are not finite, or explode"
            next_step = f"{self.folder.resume_command} with an earlier --checkpoint and a lower "
            next_step += "--set optimizer.learning_rate"
            raise BadGradientsError(what, where=f"step {done}", next_step=next_step)
        is_best = False
        if every and done % every == 0 and self.cursor.evaluated < done < train.steps and self.held_out:
            pass_at_1 = self.evaluate(f"step {done}").pass_at_1
            self.cursor.evaluated = done
            if is_best := self.cursor.best is None or pass_at_1 > self.cursor.best["pass_at_1"]:
                self.cursor.best = {"step": done, "pass_at_1": pass_at_1}
        due = done % train.save_steps == 0 or done == train.steps
        if due:
            self._refuse_divergence()
        if due or is_best:
            self.checkpoint()
        if due:
            # After the checkpoint, which is worth having also if the proof fails. In 16 bit the gap alone cannot tell a
            # stale adapter from rounding.
            self._prove_sampler(lambda _: None)

    def _goes_on_after(self, done: int) -> bool:
        """Return whether the step after the `done`-th follows at once, without a checkpoint or evaluation between them.

        Only such a step is drawn ahead: so a run that resumes from the checkpoint does the same steps as one that goes
        on. Requests do not count, because they must not change a draw.
        """
        train, every = self.recipe.train, self.recipe.eval.every
        evaluates = bool(every and self.held_out) and done % every == 0
        return done < train.steps and done % train.save_steps != 0 and not evaluates

    def _refuse_divergence(self) -> None:
        """Raise EngineError if ranks hold different weights; the steps since they were compared are in doubt."""
        try:
            self.learner.refuse_divergence()
        except RankLostError:
            raise
        except EngineError as error:
            if self.cursor.next_step > self._compared:
                error.doubt = f"steps {self._compared + 1} to {self.cursor.next_step} are in doubt: {error.what}"
            raise
        self._compared = self.cursor.next_step

    def _prove_sampler(self, notify: Callable[[str], None]) -> None:
        cursor = self.cursor
        problems = [self.train_task.train_problem(self.recipe.train.seed, index) for index in range(PROBE_PROMPTS)]
        try:
            self.guard.prove([self.renderer.render(problem) for problem in problems], notify)
        except (EngineFailedError, NotFiniteError, RankLostError):
            raise  # no verdict on the adapter
        except EngineError as error:
            if cursor.next_step > cursor.proven_step:
                error.doubt = f"steps {cursor.proven_step + 1} to {cursor.next_step} are in doubt: since then the "
                error.doubt += f"{self.sampler.engine} sampler has not been proven to use the adapter it is given"
            raise
        cursor.proven_step = cursor.next_step

    def _save(self) -> Path:
        """Save the last completed step with all that is recorded of it."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        self._write_lines()
        return self.checkpoint()

    def _write_lines(self) -> None:
        """Write the records of the last step. Those that a full disk leaves come before the next checkpoint."""
        while self._unwritten:
            append_line(*self._unwritten[0])
            self._unwritten.pop(0)

    def checkpoint(self) -> Path:
        """Save a checkpoint on rank 0, and return its folder."""
        if not self.ranks.first:
            return self.folder.checkpoints
        self.callback.stage("checkpoint")
        start = time.perf_counter()
        folder = save_checkpoint(
            self.folder.checkpoints,
            self.learner,
            self.cursor,
            base_id=self.recipe.model.id,
            keep=self.recipe.train.save_total_limit,
            keep_too=self._rollback_target(),
        )
        self.cursor.add_seconds({"checkpoint": time.perf_counter() - start})
        self.callback.message(f"checkpoint: {folder}")
        self.callback.saved(folder)
        return folder

    def _note_changes(self, changes: Sequence[Change]) -> None:
        """Record and report changes of the recipe. Without a checkpoint the run starts again, so there are none."""
        cursor = self.cursor
        if not (changes and checkpoint_folders(self.folder.checkpoints)):
            return
        for change in changes:
            key, was, now = (change[name] for name in ("key", "before", "now"))
            self.callback.message(f"after step {cursor.next_step}: {key} was {was!r} and is {now!r}")
            if key == "objective.entropy_coef":
                cursor.entropy_coef = getattr(self.recipe.objective, "entropy_coef", 0.0)
            if key == "optimizer.learning_rate":  # a new try, with just this rate
                cursor.learning_rate_scale, cursor.not_finite_in_a_row = 1.0, 0
        cursor.changes += [{**change, "step": cursor.next_step} for change in changes]
        self.checkpoint()  # before recipe.toml is written: a second resume would find nothing changed

    def _restore(self, step: int | None = None) -> None:
        """Go back to the checkpoint after `step` steps, by default the newest, or to step 0 if there is none."""
        checkpoints = checkpoint_folders(self.folder.checkpoints)
        newest = checkpoints[-1] if checkpoints else None
        wanted = next((path for path in checkpoints if checkpoint_step(path) == step), newest)
        if (source := self._from_first(wanted)) is None:
            self.callback.message("there is no checkpoint: the run starts again at step 1")
        else:
            self.cursor = load_checkpoint(source, self.learner)
            if step is not None:
                go_back(self.folder, step)  # not before: the checkpoint may be damaged
            self._check_data()
            self.sampler.sync(self.policy.version)
            lowered = self.cursor.lowered_budget
            if lowered and lowered[0] == self.recipe.train.tokens_per_microbatch:  # another budget is a new try
                self.learner.micro_batches.budget_tokens = lowered[1]
            for doubt in self.cursor.doubts:
                self.callback.message(doubt)
        cursor = self.cursor
        for path in (self.folder.metrics_path, self.folder.samples_path):
            keep_lines(path, lambda line: line["step"] < cursor.next_step)
        with reading(self.folder.metrics_path):
            done = read_lines(self.folder.metrics_path) if cursor.next_step else []
            self.verdicts = Verdicts(self.recipe, self.sampler.engine, done)

        def is_kept(line: dict[str, Any]) -> bool:
            if line["when"] == "before":
                return cursor.before is not None
            if line["when"] == "asked":
                return bool(line["step"] <= cursor.next_step)
            return bool(line["when"] != "after" and line["step"] <= cursor.evaluated)

        keep_lines(self.folder.evaluations_path, is_kept)

    def _from_first(self, checkpoint: Path | None) -> Path | None:
        """Return rank 0's checkpoint, for other ranks a copy of it in their folder. A collective."""
        if self.ranks.size == 1:
            return checkpoint
        found = None if checkpoint is None else (checkpoint.name, read_files(checkpoint, "**/*"))
        if (sent := self.ranks.from_first(found)) is None or self.ranks.first:
            return checkpoint
        write_files(self.folder.checkpoints / sent[0], sent[1])
        return self.folder.checkpoints / sent[0]

    def _digests(self) -> dict[str, dict[str, str]]:
        return {"training": digests(self.train_task.training()), "held_out": digests(self.held_out)}

    def _refuse_other_data(self, digests: Mapping[str, Any]) -> None:
        """Raise DataError if a rank has other training rows or held-out problems than rank 0. A collective."""
        hashed = self.ranks.gather(hashlib.blake2b(json.dumps(digests, sort_keys=True).encode()).hexdigest())
        if different := [f"rank {rank}" for rank, one in enumerate(hashed) if one != hashed[0]]:
            what = f"{' and '.join(different)} found other training rows or held-out problems than rank 0"
            raise DataError(what, where="data.dataset", next_step="copy the same data to all machines")

    def _check_data(self) -> None:
        """Say how the training rows differ from those that the run began with.

        Raises CheckpointError if held-out problems do: the evaluations before and after would not be comparable.
        """
        path = self.folder.data_path
        if not path.is_file():  # killed before it was written
            return
        with reading(path):
            content = read_json(path)
            before = {name: dict(content[name]) for name in ("training", "held_out")}
        now = self._digests()
        if self.cursor.before is not None and (found := data_changes(before["held_out"], now["held_out"])):
            what = f"the held-out problems changed since training began ({found}), so its effect cannot be measured"
            recipe = shlex.quote(str(self.folder.recipe_path))
            next_step = f"restore the data, or start a new run: popo-lite train {recipe}"
            raise CheckpointError(what, where=str(path), next_step=next_step)
        if found := data_changes(before["training"], now["training"]):
            self.callback.message(f"the training rows changed since the run began: {found}; it goes on with those now")
            same = dict(before["training"].items() & now["training"].items())
            self.cursor.history = {name: seen for name, seen in self.cursor.history.items() if name in same}
            if self.cursor.level >= self.train_task.levels:
                self.cursor.level, self.cursor.level_rates = self.train_task.levels - 1, []
            self.checkpoint()  # before data.json is written: a second resume would find nothing changed

    def evaluate(self, when: str) -> EvalResult:
        """Measure the policy on the held-out problems, record and report it. `when` is part of the record."""
        recipe = self.recipe
        self.callback.stage("evaluate", total=len(self.held_out) * recipe.eval.samples_per_problem)
        result = evaluate(
            "policy",
            self.worker,
            self.policy.version,
            self.eval_task,
            self.held_out,
            seed=recipe.train.seed,
            progress=self.advance,
        )
        record = {"when": when, "step": self.cursor.next_step, **result.summary()}
        append_line(self.folder.evaluations_path, record)
        self.cursor.add_seconds({"evaluate": result.seconds})
        self.callback.evaluated(record)
        when = f"asked for after step {record['step']}" if when == "asked" else when
        self.callback.message(f"{when}: pass@1 {result.pass_at_1:.1%} of {result.problems} held-out problems")
        return result

    def _finish(self, after: dict[str, Any] | None) -> dict[str, Any]:
        """Write adapter/, siamese/ and summary.json; return the summary."""
        if self.ranks.first:
            save_adapter(self.policy.model, self.folder.adapter, base_id=self.recipe.model.id)
            with self.learner.siamese.swapped():
                save_adapter(self.policy.model, self.folder.siamese, base_id=self.recipe.model.id)
            sync_folder(self.folder.path)  # summary.json says that both are there, also after a power cut
        sampler, records = self.sampler, read_lines(self.folder.metrics_path)
        summary = {
            "recipe": self.folder.path.name,
            "seed": self.recipe.train.seed,
            "algorithm": self.recipe.objective.algorithm,
            "before": self.cursor.before,
            "after": after,
            "steps": self.cursor.next_step,
            **{name: getattr(self.cursor, name) for name in HISTORY},
            "seconds": {**self.cursor.seconds, "total": sum(self.cursor.seconds.values())},
            **{name: self.cursor.totals.get(name, 0) for name in TOTALS},
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
            "siamese_extra_bytes": self.learner.siamese.extra_bytes,
            "quantized_modules": self.policy.quantized_modules,
            "sampler": sampler_summary(sampler.engine, sampler.swap_seconds, records),
            "output": str(self.folder.path),
        }
        write_json(self.folder.summary_path, summary)
        return summary
