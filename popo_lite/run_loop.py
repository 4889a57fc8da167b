"""The loop around the steps of a run: go on from a checkpoint, evaluate, save, and end however it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from popo_lite.checkpoint import load_checkpoint, save_checkpoint
from popo_lite.errors import CheckpointError, EngineError, PopoError
from popo_lite.evaluation import evaluate
from popo_lite.interrupts import StopRequested
from popo_lite.metrics import sampler_summary
from popo_lite.opening import OpenRun
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.run_folder import (
    RunFolder,
    append_line,
    checkpoint_folders,
    keep_lines,
    peak_memory_bytes,
    read_lines,
    start_files,
    write_atomically,
)
from popo_lite.samplers.probe import PROBE_PROMPTS
from popo_lite.tasks.datasets import changes, digests
from popo_lite.types import EvalResult

TOTALS = ("prompts_skipped", "prompts_with_positive", "rollouts", "rollout_tokens", "trained_tokens", "shared_tokens")
"""Metrics whose sum over all steps is part of the summary."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: `summary` is None if it was interrupted; `next_step` steps are done."""

    folder: RunFolder
    summary: dict[str, Any] | None
    next_step: int


class RunLoop(OpenRun):
    """Run the steps, and keep what they leave: evaluations, checkpoints, adapters, summary."""

    _consistent = True  # weights and cursor belong to the same step

    def train_step(self, step: int) -> None:
        """Do one step."""
        raise NotImplementedError

    def run(self, folder: RunFolder, *, resume: bool = False) -> RunResult:
        """Train to the last step, or until interrupted; write all that `RunFolder` names to `folder`."""
        self.folder = folder
        with self.interrupts:
            if resume:
                self._restore()
            start_files(folder, self.recipe, self.policy.device)
            write_atomically(folder.data_path, json.dumps(self._digests()))
            self._prove_sampler(self.callback.message)
            steps, done = self.recipe.train.steps, self.cursor.next_step
            self.callback.start(title=folder.path.name, facts=self._facts(), total_steps=steps, first_step=done)
            try:
                summary = self._train()
            except StopRequested:
                summary = None
            except PopoError:
                self._save_if_consistent()
                raise
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                self._save_if_consistent()
                saved = checkpoint_folders(folder.checkpoints)
                raise EngineError(
                    f"the GPU ran out of memory; {f'the run is saved in {saved[-1]}' if saved else 'no step was done'}",
                    where=f"step {self.cursor.next_step}",
                    next_step="if it was the engine's memory, resume with a smaller "
                    f"rollout.vllm.gpu_memory_utilization or rollout.max_num_seqs; else {self.memory_advice()}",
                ) from error
            if summary is None:
                self._save_if_consistent()
        return RunResult(folder=folder, summary=summary, next_step=self.cursor.next_step)

    def _train(self) -> dict[str, Any] | None:
        """Run all evaluations and steps that are left; return the summary, or None if interrupted."""
        steps, stop = self.recipe.train.steps, self.interrupts
        if self.cursor.before is None and self.held_out and not stop.requested:
            self.cursor.before = self._evaluate("before").summary()
        if self.cursor.next_step and not stop.requested:
            self._after_step()  # what an interrupt may have left undone
        while self.cursor.next_step < steps and not stop.requested:
            self.train_step(self.cursor.next_step)
            self._after_step()
        if stop.requested:
            return None
        return self._finish(self._evaluate("after").summary() if self.held_out else None)

    # --------------------------------------------------------------------- checkpoints and evaluation

    def _after_step(self) -> None:
        """Evaluate and save a checkpoint if they are due, in this order: a checkpoint covers what is recorded."""
        done, train, every = self.cursor.next_step, self.recipe.train, self.recipe.eval.every
        if every and done % every == 0 and self.cursor.evaluated < done < train.steps and self.held_out:
            self._evaluate(f"step {done}")
            self.cursor.evaluated = done
        if done % train.save_steps == 0 or done == train.steps:
            self._prove_sampler(lambda _: None)  # in 16 bit the gap alone cannot tell a stale adapter from rounding
            self._checkpoint()

    def _prove_sampler(self, notify: Callable[[str], None]) -> None:
        problems = [self.train_task.train_problem(self.recipe.train.seed, index) for index in range(PROBE_PROMPTS)]
        self.guard.prove([self.renderer.render(problem) for problem in problems], notify)

    def _save_if_consistent(self) -> None:
        """Save the last completed step, unless an error came between its update and its record."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        if self._consistent:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.callback.stage("checkpoint")
        start = time.perf_counter()
        base_id, keep = self.recipe.model.id, self.recipe.train.save_total_limit
        folder = save_checkpoint(self.folder.checkpoints, self.learner, self.cursor, base_id=base_id, keep=keep)
        self.cursor.add_seconds({"checkpoint": time.perf_counter() - start})
        self.callback.message(f"checkpoint: {folder}")

    def _restore(self) -> None:
        """Go back to the newest checkpoint, or to step 0 if the run was killed before its first."""
        if checkpoints := checkpoint_folders(self.folder.checkpoints):
            self.cursor = load_checkpoint(checkpoints[-1], self.learner)
            self._check_data()
            self.sampler.sync(self.policy.version)
            lowered = self.cursor.lowered_budget
            if lowered and lowered[0] == self.recipe.train.tokens_per_microbatch:  # another budget is a new try
                self.learner.micro_batches.budget_tokens = lowered[1]
        cursor = self.cursor
        for path in (self.folder.metrics_path, self.folder.samples_path):
            keep_lines(path, lambda line: line["step"] < cursor.next_step)

        def is_kept(line: dict[str, Any]) -> bool:
            if line["when"] == "before":
                return cursor.before is not None
            return bool(line["when"] != "after" and line["step"] <= cursor.evaluated)

        keep_lines(self.folder.evaluations_path, is_kept)

    def _digests(self) -> dict[str, dict[str, str]]:
        return {"training": digests(self.train_task.training()), "held_out": digests(self.held_out)}

    def _check_data(self) -> None:
        """Say how the training rows differ from those that the run began with.

        Raises CheckpointError if held-out problems do: the evaluations before and after would not be comparable.
        """
        path = self.folder.data_path
        if not path.is_file():  # killed before it was written
            return
        before, now = json.loads(path.read_text(encoding="utf-8")), self._digests()
        if self.cursor.before is not None and (found := changes(before["held_out"], now["held_out"])):
            what = f"the held-out problems changed since training began ({found}), so its effect cannot be measured"
            next_step = "restore the data, or start a new run: the same command without --resume and --output"
            raise CheckpointError(what, where=str(path), next_step=next_step)
        if found := changes(before["training"], now["training"]):
            self.callback.message(f"the training rows changed since the run began: {found}; it goes on with those now")
            same = dict(before["training"].items() & now["training"].items())
            self.cursor.history = {name: seen for name, seen in self.cursor.history.items() if name in same}
            if self.cursor.level >= self.train_task.levels:
                self.cursor.level, self.cursor.level_rates = self.train_task.levels - 1, []
            self._checkpoint()  # before data.json is written: a second resume would find nothing changed

    def _evaluate(self, when: str) -> EvalResult:
        recipe = self.recipe
        self.callback.stage("evaluate", total=len(self.held_out) * recipe.eval.samples_per_problem)
        result = evaluate(
            "policy",
            recipe,
            self.policy,
            self.sampler,
            self.renderer,
            self.grader,
            self.eval_task,
            self.held_out,
            seed=recipe.train.seed,
            progress=self._advance,
        )
        append_line(self.folder.evaluations_path, {"when": when, "step": self.cursor.next_step, **result.summary()})
        self.cursor.add_seconds({"evaluate": result.seconds})
        self.callback.message(f"{when}: pass@1 {result.pass_at_1:.1%} of {result.problems} held-out problems")
        return result

    def _finish(self, after: dict[str, Any] | None) -> dict[str, Any]:
        """Write adapter/, siamese/ and summary.json; return the summary."""
        save_adapter(self.policy.model, self.folder.adapter, base_id=self.recipe.model.id)
        with self.learner.siamese.swapped():
            save_adapter(self.policy.model, self.folder.siamese, base_id=self.recipe.model.id)
        sampler, records = self.sampler, read_lines(self.folder.metrics_path)
        summary = {
            "recipe": self.folder.path.name,
            "seed": self.recipe.train.seed,
            "algorithm": self.recipe.objective.algorithm,
            "before": self.cursor.before,
            "after": after,
            "steps": self.cursor.next_step,
            "seconds": {**self.cursor.seconds, "total": sum(self.cursor.seconds.values())},
            **{name: self.cursor.totals.get(name, 0) for name in TOTALS},
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
            "siamese_extra_bytes": self.learner.siamese.extra_bytes,
            "quantized_modules": self.policy.quantized_modules,
            "sampler": sampler_summary(sampler.engine, sampler.swap_seconds, records),
            "output": str(self.folder.path),
        }
        write_atomically(self.folder.summary_path, json.dumps(summary, indent=2) + "\n")
        return summary
