"""Training. `Trainer.train_step` is the whole algorithm, one stage after another; read it first.

Departures from the published reference code, each explained in docs/method.md: the base is 4-bit and frozen, so the
siamese averages adapters and head alone; normalisers are fixed for a step and count every token of every positive
alike; the entropy is taken over positives, so that negatives are never forwarded.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from popo_lite.console.base import RunView
from popo_lite.errors import EngineError, PopoError
from popo_lite.evaluation import evaluate, fitting
from popo_lite.grading import Grader
from popo_lite.objective.losses import steered_beta
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.load import pick_device
from popo_lite.policy.memory import is_out_of_memory, refuse_without_room
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import (
    RunFolder,
    append_line,
    keep_lines,
    peak_memory_bytes,
    read_lines,
    start_files,
    write_atomically,
)
from popo_lite.samplers import SamplingParams, open_sampler, pick_engine
from popo_lite.seeding import stream_seed
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.plan import relief
from popo_lite.training.checkpoint import Cursor, latest_checkpoint, load_checkpoint, save_checkpoint
from popo_lite.training.collect import Budget, collect
from popo_lite.training.credit import StepPlan, nothing_to_learn
from popo_lite.training.history import Choice, choose_problems, remember
from popo_lite.training.interrupt import Interrupts, StopRequested
from popo_lite.training.learner import Learner
from popo_lite.training.metrics import (
    StageClock,
    UpdateFigures,
    rollout_figures,
    sample_line,
    sample_views,
    sampler_summary,
    update_figures,
)
from popo_lite.training.optimizer import learning_rate_factor
from popo_lite.training.sampler_guard import PROBE_PROMPTS, SamplerGuard
from popo_lite.types import EvalResult, Group, Prompt, StepRecord

QUIET_STEPS = 5
"""So many steps in a row without a positive call for a word of advice."""


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How `Trainer.run` ended: `summary` is None where it was interrupted, and `next_step` says where it stands."""

    summary: dict[str, Any] | None
    next_step: int


class Trainer:
    """One run: everything it holds, and the loop. Use as a context manager."""

    run_folder: RunFolder

    def __init__(self, recipe: Recipe, view: RunView, *, ignore_plan: bool = False) -> None:
        self.recipe, self.view = recipe, view
        if not ignore_plan:
            refuse_without_room(recipe, pick_device(recipe.train.device), view.message)
        if recipe.train.cpu_threads:
            torch.set_num_threads(recipe.train.cpu_threads)
        _, self.engine = pick_engine(recipe)
        with ExitStack() as stack:
            self.grader = stack.enter_context(Grader(recipe.reward))
            self.grader.check()
            self.train_task, self.eval_task = open_tasks(recipe)
            self.held_out = self.eval_task.held_out(recipe.eval.problems) if recipe.eval.problems else []
            self.policy: Policy = load_policy(recipe)
            self.renderer = Renderer.of(recipe, self.policy.tokenizer)
            self._check_prompts()
            self.learner = Learner(recipe, self.policy, notify=view.message, relief=self._relief)
            self.sampler = stack.enter_context(
                open_sampler(recipe, self.policy, text=self.renderer.text, notify=view.message)
            )
            self._resources = stack.pop_all()
        self.cursor = Cursor(
            next_step=0,
            evaluated=0,
            next_problem=0,
            history={},
            beta=getattr(recipe.objective, "entropy_coef", 0.0),
            start_entropy=None,
            prompts_skipped=0,
            prompts_with_positive=0,
            rollouts=0,
            rollout_tokens=0,
            trained_tokens=0,
            seconds={},
            before=None,
        )
        self.interrupts = Interrupts(view.message)
        self._whole = True
        self.guard = SamplerGuard(recipe, self.policy, self.sampler)
        self._skipped_in_a_row = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    # ------------------------------------------------------------------ the run

    def run(self, folder: RunFolder, *, resume: bool = False) -> RunOutcome:
        """Train to the last step, or until interrupted; leaves all that `RunFolder` names in `folder`."""
        self.run_folder = folder
        steps = self.recipe.train.steps
        with self.interrupts as interrupts:
            if resume:
                self._restore()
            start_files(folder, self.recipe, self.policy.device)
            self._prove_sampler(self.view.message)
            self.view.start(
                title=folder.path.name, facts=self._facts(), total_steps=steps, first_step=self.cursor.next_step
            )
            try:
                if self.cursor.before is None and self.held_out and not interrupts.requested:
                    self._set_cursor(before=asdict(self._evaluate("before")))
                if self.cursor.next_step and not interrupts.requested:
                    self._after_step()  # what an interrupt may have left undone
                while self.cursor.next_step < steps and not interrupts.requested:
                    self.train_step(self.cursor.next_step)
                    self._after_step()
                if not interrupts.requested:
                    after = asdict(self._evaluate("after")) if self.held_out else None
                    return RunOutcome(summary=self._finish(after), next_step=steps)
            except StopRequested:
                pass
            except PopoError:
                self._save_what_is_whole()
                raise
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not is_out_of_memory(error):
                    raise
                self._save_what_is_whole()
                saved = latest_checkpoint(folder.checkpoints)
                raise EngineError(
                    f"the GPU ran out of memory; {f'the run is saved in {saved}' if saved else 'no step was done'}",
                    where=f"step {self.cursor.next_step}",
                    next_step="resume with a smaller rollout.vllm.gpu_memory_utilization or rollout.max_num_seqs where it was the "
                    f"engine's memory; else {self._relief()}",
                ) from error
            self._save_what_is_whole()
        return RunOutcome(summary=None, next_step=self.cursor.next_step)

    def train_step(self, step: int) -> None:
        """One step, read top to bottom: problems, rollouts, rewards, weights, siamese features, update, sync."""
        clock = StageClock(self.view, self._synchronize)

        with clock("prompts"):
            choice = self._choose(step)
            prompts = [self.renderer.render(problem) for problem in choice.problems]
        groups = self._collect(step, prompts, clock)
        with clock("weights"):
            self.sampler.sleep()
            plan = self.learner.credit(groups)
        figures: UpdateFigures | None = None
        skipped: str | None = nothing_to_learn(self.recipe.objective)
        if plan is not None:
            # Before any graph exists: the averaged weights stand where the trained ones do.
            with clock("siamese"):
                anchors = self.learner.anchors(step, plan)
            with clock("update", total=len(plan.sequences)):
                # All that torch draws in a step (LoRA dropout) follows from the step, so a resumed run needs no state.
                torch.manual_seed(stream_seed("step", self.recipe.train.seed, step))
                figures = self.learner.backward(plan, anchors, beta=self.cursor.beta, advance=self._advance)
                self.guard.check(step, figures.gap_mean)
                if math.isfinite(figures.grad_norm):
                    skipped = None
                else:
                    figures, skipped = None, "the gradient is not finite"

        elif self.sampler.engine != "hf":
            # A sampler gone wrong finds no positives: just the steps that learn nothing must not go unchecked.
            unscored = [group.rollouts[0] for group in groups[:PROBE_PROMPTS]]
            self.guard.check(step, self.learner.gap_mean(unscored))

        before: list[torch.Tensor] = []
        if figures is not None:
            with clock("update"):
                before = self.learner.prepare()
        # From here to the written line weights and cursor belong to different steps: nothing may save or stop.
        self._whole = False
        if figures is not None:
            with clock("update"):
                self.learner.apply(step, figures, before)
        self.learner.optimizer.zero_grad(set_to_none=True)
        record = self._record(step, choice, groups, plan, figures, skipped, clock)
        self._write_step(record, groups)
        self._whole = True
        # After the record: an engine that does not take the adapter costs no step.
        with clock("sync"):
            self.sampler.sync(self.policy.version)
        self._set_cursor(seconds=_added(self.cursor.seconds, {"sync": clock.seconds["sync"]}))

    # ------------------------------------------------------------------ the stages of a step

    def _choose(self, step: int) -> Choice:
        return choose_problems(
            self.train_task,
            self.recipe,
            step=step,
            first=self.cursor.next_problem,
            history=self.cursor.history,
        )

    def _collect(self, step: int, prompts: Sequence[Prompt], clock: StageClock) -> list[Group]:
        """Whole groups, in rounds of the stages "rollout" and "grade"."""
        return collect(
            prompts,
            self.recipe,
            sampler=self.sampler,
            grader=self.grader,
            policy_version=self.policy.version,
            step=step,
            clock=clock,
            finished=self._advance,
        )

    # ------------------------------------------------------------------ records, checkpoints, evaluation

    def _record(
        self,
        step: int,
        choice: Choice,
        groups: Sequence[Group],
        plan: StepPlan | None,
        figures: UpdateFigures | None,
        skipped: str | None,
        clock: StageClock,
    ) -> StepRecord:
        start_entropy = self.cursor.start_entropy
        if start_entropy is None and figures is not None:
            start_entropy = figures.entropy
        drift, bound = self.learner.siamese.drift(), self.learner.siamese.drift_bound()
        factor = learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer)
        made = rollout_figures(
            groups,
            self.train_task,
            self.recipe.objective.reward_threshold,
            first_round=Budget.of(self.recipe.rollout).round_size,
        )
        learned = update_figures(
            figures, plan, start_entropy, similarity_on=getattr(self.recipe.objective, "similarity_coef", 0.0) > 0
        )
        seconds = clock.seconds
        record = StepRecord(
            step=step,
            policy_version=self.policy.version,
            skipped_reason=skipped,
            beta=self.cursor.beta,
            siamese_drift=drift,
            siamese_drift_over_bound=drift / bound if bound > 0 else None,
            learning_rate=self.recipe.optimizer.learning_rate * factor,
            head_learning_rate=self.recipe.optimizer.head_learning_rate * factor,
            seconds=seconds,
            tokens_per_second={
                stage: tokens / max(seconds[stage], 1e-9)
                for stage, tokens in (
                    ("rollout", made["rollout_tokens"]),
                    ("siamese", 0 if plan is None else plan.anchored_tokens(self.recipe.objective)),
                    ("update", learned["trained_tokens"]),
                )
                if tokens
            },
            peak_memory_bytes=peak_memory_bytes(self.policy.device),
            prompts_skipped=choice.skipped,
            microbatch_tokens=self.learner.micro_batches.budget_tokens,
            **made,
            **learned,
        )
        self._set_cursor(
            next_step=step + 1,
            next_problem=choice.next_problem,
            history=remember(self.cursor.history, groups, self.recipe, step),
            beta=steered_beta(self.cursor.beta, figures.entropy, self.recipe.objective)
            if figures is not None
            else self.cursor.beta,
            start_entropy=start_entropy,
            lowered_budget=self._lowered_budget(),
            prompts_skipped=self.cursor.prompts_skipped + choice.skipped,
            prompts_with_positive=self.cursor.prompts_with_positive + made["prompts_with_positive"],
            rollouts=self.cursor.rollouts + record.rollouts,
            rollout_tokens=self.cursor.rollout_tokens + record.rollout_tokens,
            trained_tokens=self.cursor.trained_tokens + record.trained_tokens,
            seconds=_added(self.cursor.seconds, seconds),
        )
        return record

    def _write_step(self, record: StepRecord, groups: Sequence[Group]) -> None:
        append_line(self.run_folder.metrics_path, asdict(record))
        count = self.recipe.output.samples_per_step
        for group in groups[:count]:
            append_line(self.run_folder.samples_path, sample_line(record.step, group))
        self.view.step(record)
        self.view.samples(sample_views(record.step, groups, self.recipe.objective.reward_threshold, max(count, 1)))
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record.skipped_reason else 0
        if self._skipped_in_a_row and self._skipped_in_a_row % QUIET_STEPS == 0:
            advice = (
                "easier problems (data.filter), a larger rollout.num_generations or a warm start (lora.init_from) give some"
                if not record.positives
                else "lower optimizer.learning_rate and start again from an earlier checkpoint"
            )
            self.view.message(f"{self._skipped_in_a_row} steps changed nothing: {record.skipped_reason}; {advice}")

    def _after_step(self) -> None:
        """Evaluation and checkpoint where they are due, in this order: a checkpoint covers what is on record."""
        done, train, every = self.cursor.next_step, self.recipe.train, self.recipe.eval.every
        if every and done % every == 0 and self.cursor.evaluated < done < train.steps and self.held_out:
            self._evaluate(f"step {done}")
            self._set_cursor(evaluated=done)
        if done % train.save_steps == 0 or done == train.steps:
            self._prove_sampler(lambda _: None)  # in 16 bit the gap alone cannot tell a stale adapter from rounding
            self._checkpoint()

    def _prove_sampler(self, notify: Callable[[str], None]) -> None:
        problems = [self.train_task.train_problem(self.recipe.train.seed, index) for index in range(PROBE_PROMPTS)]
        self.guard.prove([self.renderer.render(problem) for problem in problems], notify)

    def _save_what_is_whole(self) -> None:
        """Checkpoint the last completed step, unless an error struck between its update and its record."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        if self._whole:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.view.stage("checkpoint")
        start = time.perf_counter()
        folder = save_checkpoint(
            self.run_folder.checkpoints,
            policy=self.policy,
            siamese=self.learner.siamese,
            optimizer=self.learner.optimizer,
            cursor=self.cursor,
            base_id=self.recipe.model.id,
            keep=self.recipe.train.save_total_limit,
        )
        self._set_cursor(seconds=_added(self.cursor.seconds, {"checkpoint": time.perf_counter() - start}))
        self.view.message(f"checkpoint: {folder}")

    def _restore(self) -> None:
        """Go back to the newest checkpoint; to step 0 where the run was killed before its first."""
        checkpoint = latest_checkpoint(self.run_folder.checkpoints)
        if checkpoint is not None:
            self.cursor = load_checkpoint(
                checkpoint, policy=self.policy, siamese=self.learner.siamese, optimizer=self.learner.optimizer
            )
            self.sampler.sync(self.policy.version)
            if self.cursor.lowered_budget and self.cursor.lowered_budget[0] == self.recipe.train.tokens_per_microbatch:
                self.learner.micro_batches.budget_tokens = self.cursor.lowered_budget[1]
        cursor = self.cursor
        for path in (self.run_folder.metrics_path, self.run_folder.samples_path):
            keep_lines(path, lambda line: line["step"] < cursor.next_step)

        def counts(line: dict[str, Any]) -> bool:
            if line["when"] == "before":
                return cursor.before is not None
            return bool(line["when"] != "after" and line["step"] <= cursor.evaluated)

        keep_lines(self.run_folder.evaluations_path, counts)

    def _evaluate(self, when: str) -> EvalResult:
        self.view.stage("evaluate", total=len(self.held_out) * self.recipe.eval.samples_per_problem)
        result = evaluate(
            weights="policy",
            policy=self.policy,
            sampler=self.sampler,
            renderer=self.renderer,
            grader=self.grader,
            task=self.eval_task,
            problems=self.held_out,
            samples_per_problem=self.recipe.eval.samples_per_problem,
            params=self._sampling(self.recipe.eval.temperature),
            threshold=self.recipe.objective.reward_threshold,
            max_ungraded_ratio=self.recipe.reward.max_ungraded_ratio,
            seed=self.recipe.train.seed,
            progress=self._advance,
        )
        append_line(self.run_folder.evaluations_path, {"when": when, "step": self.cursor.next_step, **asdict(result)})
        self._set_cursor(seconds=_added(self.cursor.seconds, {"evaluate": result.seconds}))
        self.view.message(f"{when}: pass@1 {result.pass_at_1:.1%} of {result.problems} held-out problems")
        return result

    def _finish(self, after: dict[str, Any] | None) -> dict[str, Any]:
        """Write adapter/, siamese/ and summary.json."""
        save_adapter(self.policy.model, self.run_folder.adapter, base_id=self.recipe.model.id)
        with self.learner.siamese.swapped():
            save_adapter(self.policy.model, self.run_folder.siamese, base_id=self.recipe.model.id)
        summary = {
            "recipe": self.run_folder.path.name,
            "seed": self.recipe.train.seed,
            "algorithm": self.recipe.objective.algorithm,
            "before": self.cursor.before,
            "after": after,
            "steps": self.cursor.next_step,
            "seconds": {**self.cursor.seconds, "total": sum(self.cursor.seconds.values())},
            "prompts_skipped": self.cursor.prompts_skipped,
            "prompts_with_positive": self.cursor.prompts_with_positive,
            "rollouts": self.cursor.rollouts,
            "rollout_tokens": self.cursor.rollout_tokens,
            "trained_tokens": self.cursor.trained_tokens,
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
            "siamese_extra_bytes": self.learner.siamese.extra_bytes,
            "quantized_modules": self.policy.quantized_modules,
            "sampler": sampler_summary(
                self.sampler.engine, self.sampler.swap_seconds, read_lines(self.run_folder.metrics_path)
            ),
            "output": str(self.run_folder.path),
        }
        write_atomically(self.run_folder.summary_path, json.dumps(summary, indent=2) + "\n")
        return summary

    # ------------------------------------------------------------------ small helpers

    def _facts(self) -> dict[str, str]:
        trained = sum(parameter.numel() for _, parameter in self.policy.trainable_parameters())
        quantised = f"NF4, {self.policy.quantized_modules} layers" if self.policy.quantized_modules else "not quantised"
        return {
            "model": f"{self.recipe.model.id} ({quantised}, {self.recipe.model.dtype})",
            "trained": f"{trained:,} weights (LoRA rank {self.recipe.lora.rank} + predictor head)",
            "siamese": f"+{self.learner.siamese.extra_bytes / 2**20:.2f} MiB",
            "data": self.train_task.name,
            "rollouts": f"{self.engine}, {self.recipe.data.prompts_per_step} x {self.recipe.rollout.num_generations}"
            + (" at most, adaptive" if self.recipe.rollout.adaptive.enabled else ""),
            "stops at": " ".join(self.policy.tokenizer.convert_ids_to_tokens(sorted(self.policy.stop_ids))),
            "device": str(self.policy.device),
            "sequences": "one at a time" if self.policy.packing == "off" else f"packed ({self.policy.packing})",
            "folder": str(self.run_folder.path),
        }

    def _check_prompts(self) -> None:
        """Find prompts that are too long now and not at step 400."""
        if self.recipe.data.overlong_prompts == "skip":
            dropped = self.train_task.drop_training(lambda problem: not self.renderer.fits(problem))
            asked, self.held_out = len(self.held_out), fitting(self.held_out, self.renderer, self.recipe)
            left_out = asked - len(self.held_out)
            if dropped or left_out:
                self.view.message(
                    f"prompts longer than {self.renderer.max_prompt_length} tokens left out: {dropped} of "
                    f"training, {left_out} of evaluation"
                )
            return
        for problem in (*self.held_out, *self.train_task.longest_candidates()):
            self.renderer.render(problem)

    def _advance(self, amount: int) -> None:
        """Progress inside a stage; also where an impatient Ctrl-C is heard."""
        self.interrupts.check()
        if amount:
            self.view.advance(amount)

    def _sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature=temperature, max_completion_length=self.recipe.rollout.max_completion_length)

    def _lowered_budget(self) -> tuple[int, ...]:
        """What a resumed run must not try again; another budget in the recipe is a new try."""
        asked, held = self.recipe.train.tokens_per_microbatch, self.learner.micro_batches.budget_tokens
        return (asked, held) if held < asked else ()

    def _relief(self) -> str:
        """What to change where the GPU ran out of memory while the policy was trained."""
        return relief(self.recipe)

    def _set_cursor(self, **changes: Any) -> None:
        self.cursor = Cursor(**{**self.cursor.__dict__, **changes})

    def _synchronize(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def _added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {key: left.get(key, 0.0) + right.get(key, 0.0) for key in left | right}
