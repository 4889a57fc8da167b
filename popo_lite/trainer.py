"""Training. `Trainer.train_step` is the whole algorithm, one stage after another; read it first.

Departures from the published code, each explained in docs/method.md: the base is 4-bit and frozen, so the siamese
averages adapters and predictor head alone; divisors are fixed for a whole step; by default the entropy is taken over
positives, so that POPO never forwards a negative.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from types import FrameType
from typing import Any, Self

import torch

from popo_lite.callbacks import Callback
from popo_lite.checkpoint import Cursor, checkpoint_folders, load_checkpoint, save_checkpoint
from popo_lite.curriculum import Budget, Choice, choose_problems, collect, level_pass_rate, next_level, remember
from popo_lite.damage import read_json
from popo_lite.errors import CheckpointError, EngineError, PopoError
from popo_lite.evaluation import check_references, evaluate, fitting, not_solved
from popo_lite.grading import TRIED_PROBLEMS, Grader
from popo_lite.metrics import StepRecord, make_record, rollout_metrics, sample_line, sample_views, sampler_summary
from popo_lite.objective import StepPlan, nothing_to_learn, steered_entropy_coef
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.device import check_cpu_size, check_dtype, cuda_problem, pick_device
from popo_lite.policy.load import load_config
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.policy.policy import load_policy
from popo_lite.policy.tokens import open_renderer
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
from popo_lite.samplers import open_sampler, pick_engine
from popo_lite.samplers.probe import PROBE_PROMPTS, SamplerGuard
from popo_lite.seeding import stream_seed
from popo_lite.shapes import count_takeover, shape_metrics, start_shapes, takeover_message
from popo_lite.tasks import open_tasks
from popo_lite.tasks.datasets import changes, digests, first
from popo_lite.types import EvalResult, Group
from popo_lite.update import Learner, UpdateResult, learning_rate_factor

ADVISE_AFTER = 5
"""Give advice after this many steps in a row that changed nothing."""

TOTALS = ("prompts_skipped", "prompts_with_positive", "rollouts", "rollout_tokens", "trained_tokens", "shared_tokens")
"""Metrics whose sum over all steps is part of the summary."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: `summary` is None if it was interrupted; `next_step` steps are done."""

    folder: RunFolder
    summary: dict[str, Any] | None
    next_step: int


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """Ctrl-C came twice: abandon the step in progress."""


class Interrupts:
    """Ctrl-C and SIGTERM: the first finishes the step, the second abandons it, never in the middle of an update.

    A signal never raises by itself, because it may come while weights are swapped or half updated. `check` raises, at
    places that call it. Outside the main thread no signal is handled.
    """

    def __init__(self, notify: Callable[[str], None]) -> None:
        self.requested = False
        self._abandon = False
        self._notify = notify
        self._previous: dict[int, signal.Handlers | Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: only note it. May be installed before the context is entered, and stay afterwards."""
        if self.requested:
            self._abandon = True
        else:
            self.requested = True
            self._notify("finishing this step, then saving; Ctrl-C again abandons the step and saves")

    def check(self) -> None:
        """Raise StopRequested after a second signal. Call it only while no weight is half changed."""
        if self._abandon:
            raise StopRequested


class StageClock:
    """Wall-clock seconds by stage of a step; announces each stage to the callback."""

    def __init__(self, callback: Callback, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._callback, self._device = callback, device

    @contextmanager
    def __call__(self, stage: str, *, total: int | None = None) -> Iterator[None]:
        """Time the block as `stage`; `total` is its amount of work, for the callback."""
        self._callback.stage(stage, total=total)
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # kernels still run after the call that queued them
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Trainer:
    """One run: everything it holds, and the loop. Use as a context manager.

    `memory_advice` returns what to change in the recipe when GPU memory runs out.
    """

    folder: RunFolder

    def __init__(
        self,
        recipe: Recipe,
        callback: Callback,
        *,
        memory_advice: Callable[[], str] = lambda: "popo-lite plan RECIPE shows what takes how much memory",
    ) -> None:
        self.recipe, self.callback, self.memory_advice = recipe, callback, memory_advice
        # Before anything is opened: the recipe may want a GPU that is not there, or a dtype that it lacks.
        device = pick_device(recipe.train.device)
        check_dtype(recipe.model, device)
        if device.type == "cpu" and recipe.train.device == "auto" and (problem := cuda_problem()):
            callback.message(f"training on the CPU: {problem[0]}; {problem[1]}")
        if recipe.train.cpu_threads:
            torch.set_num_threads(recipe.train.cpu_threads)
        _, self.engine = pick_engine(recipe)
        with ExitStack() as stack:
            self._open_task(stack)
            self.learner = Learner(recipe, self.policy, notify=callback.message, memory_advice=memory_advice)
            self._open_sampler(stack)
            self._resources = stack.pop_all()
        self.cursor = Cursor(entropy_coef=getattr(recipe.objective, "entropy_coef", 0.0))
        self.interrupts = Interrupts(callback.message)
        self.guard = SamplerGuard(recipe, self.policy, self.sampler, callback.message)
        self._consistent = True  # weights and cursor belong to the same step
        self._skipped_in_a_row = 0

    def _open_task(self, stack: ExitStack) -> None:
        """Open grader and problems, and load the policy; `popo-lite bench` makes them up."""
        check_cpu_size(self.recipe, pick_device(self.recipe.train.device))
        self.train_task, self.eval_task = open_tasks(self.recipe)
        self.held_out = self.eval_task.held_out(self.recipe.eval.problems) if self.recipe.eval.problems else []
        self.renderer = open_renderer(self.recipe)
        grader = Grader(self.recipe.grading, thinking_open=self.renderer.opens_thinking)
        self.grader = stack.enter_context(grader)
        self._check_references()
        self.grader.check([self.train_task.train_problem(self.recipe.train.seed, i) for i in range(TRIED_PROBLEMS)])
        self._check_prompts()  # before gigabytes are read
        self.policy = load_policy(self.recipe)
        for notice in self.policy.notices:
            self.callback.message(notice)

    def _open_sampler(self, stack: ExitStack) -> None:
        sampler = open_sampler(self.recipe, self.policy, text=self.renderer.text, notify=self.callback.message)
        self.sampler = stack.enter_context(sampler)
        if not self.engine.startswith(sampler.engine):
            self.engine = sampler.engine  # the one that was picked did not start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    # --------------------------------------------------------------------- the run

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

    def train_step(self, step: int) -> None:
        """Do one step: problems, rollouts, rewards, weights, siamese targets, gradients, optimizer, record, sync."""
        clock = StageClock(self.callback, self.policy.device)
        with clock("prompts"):
            cursor = self.cursor
            choice = choose_problems(
                self.train_task, self.recipe, step, cursor.next_problem, cursor.history, cursor.level
            )
            prompts = [self.renderer.render(problem) for problem in choice.problems]
        # Stages "rollout" and "grade".
        groups = collect(
            prompts,
            self.recipe,
            self.sampler,
            self.grader,
            self.renderer,
            self.policy.version,
            step,
            clock,
            self._advance,
        )
        with clock("weights"):
            self.sampler.sleep()
            plan = self.learner.plan(groups)
        result: UpdateResult | None = None
        skipped: str | None = None
        if plan is None:
            skipped = nothing_to_learn(self.recipe.objective)
        checked, gap = [group.rollouts[0] for group in groups[:PROBE_PROMPTS]], None
        # A sampler that went wrong finds no positives; and dropout would count as a gap in the update.
        if self.recipe.lora.dropout or (plan is None and self.sampler.engine != "hf"):
            gap = self.learner.gap_mean(checked)
        if plan is not None:
            with clock("siamese"):
                # Before any graph exists: the averaged weights stand in the place of the trained ones. Both are None
                # for objectives without a similarity or a KL term.
                targets = self.learner.siamese_targets(step, plan)
                reference_logps = self.learner.reference_logps(plan)
            with clock("update", total=len(plan.sequences)):
                # All that torch draws in a step (LoRA dropout) follows from the step, so a resumed run needs no state.
                torch.manual_seed(stream_seed("step", self.recipe.train.seed, step))
                result = self.learner.backward(
                    plan, targets, reference_logps, self.cursor.entropy_coef, progress=self._advance
                )
                gap = result.gap_mean if gap is None else gap
                if not math.isfinite(result.grad_norm):
                    result, skipped = None, "the gradient is not finite"
        if gap is not None:
            self.guard.check(step, gap, checked)
        if result is not None:
            with clock("optimizer"):
                weights = self.learner.prepare()
                # From here to the record, weights and cursor belong to different steps: nothing may save or stop.
                self._consistent = False
                self.learner.apply(step, result, weights)  # the optimizer's step, then the siamese's average
        self._consistent = False  # also for a skipped step: its record moves the cursor
        self.learner.optimizer.zero_grad(set_to_none=True)
        record = self._record(step, choice, groups, plan, result, skipped, clock.seconds)
        self._move_cursor(record, choice, groups, result)
        append_line(self.folder.metrics_path, record)
        for group in groups[: self.recipe.output.samples_per_step]:
            append_line(self.folder.samples_path, sample_line(step, group))
        self._consistent = True
        self._report(record, groups)
        # After the record: an engine that does not take the adapter costs no step.
        with clock("sync"):
            self.sampler.sync(self.policy.version)
        self.cursor.add_seconds({"sync": clock.seconds["sync"]})

    # --------------------------------------------------------------------- the stages of a step

    def _record(
        self,
        step: int,
        choice: Choice,
        groups: Sequence[Group],
        plan: StepPlan | None,
        result: UpdateResult | None,
        skipped: str | None,
        seconds: dict[str, float],
    ) -> StepRecord:
        recipe, siamese = self.recipe, self.learner.siamese
        first_round = Budget.of(recipe.rollout).round_size
        sampled = rollout_metrics(groups, self.train_task, first_round=first_round)
        if step == 0:
            self.cursor.start_shapes = start_shapes(groups, first_round)
        learned: dict[str, Any] = {"trained_tokens": 0, "shared_tokens": 0, "micro_batches": 0}
        if result is not None and plan is not None:
            learned = result.metrics(plan)
        if result is not None and self.cursor.start_entropy is None:
            self.cursor.start_entropy = result.entropy
        if result is not None and self.cursor.start_entropy:
            learned["entropy_over_start"] = result.entropy / self.cursor.start_entropy
        factor = learning_rate_factor(step, recipe.train.steps, recipe.optimizer)
        drift, bound = siamese.drift(), siamese.drift_bound()
        forwarded = self.learner.micro_batches.tokens
        before_update = forwarded["siamese"] + forwarded["reference"]  # of which an objective needs one at most
        tokens = {"rollout": sampled["rollout_tokens"], "siamese": before_update, "update": learned["trained_tokens"]}
        values = {
            **sampled,
            **shape_metrics(groups, self.cursor.start_shapes),
            **learned,
            "step": step,
            "policy_version": self.policy.version,
            "skipped_reason": skipped,
            "level": self.cursor.level if recipe.data.curriculum.enabled else None,
            "prompts_skipped": choice.skipped,
            "entropy_coef": self.cursor.entropy_coef,
            "siamese_drift": drift,
            "siamese_drift_over_bound": drift / bound if bound > 0 else None,
            "learning_rate": recipe.optimizer.learning_rate * factor,
            "head_learning_rate": recipe.optimizer.head_learning_rate * factor,
            "microbatch_tokens": self.learner.micro_batches.budget_tokens,
            "seconds": dict(seconds),
            "tokens_per_second": {stage: count / max(seconds[stage], 1e-9) for stage, count in tokens.items() if count},
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
        }
        return make_record(values)

    def _move_cursor(
        self, record: StepRecord, choice: Choice, groups: Sequence[Group], result: UpdateResult | None
    ) -> None:
        cursor, recipe = self.cursor, self.recipe
        cursor.history = remember(cursor.history, groups, recipe, cursor.next_step)
        cursor.shape_steps = count_takeover(cursor.shape_steps, record)
        cursor.next_step += 1
        cursor.next_problem = choice.next_problem
        if recipe.data.curriculum.enabled:
            rates = [*cursor.level_rates, level_pass_rate(choice, record["pass_rate"])]
            cursor.level, cursor.level_rates = next_level(
                cursor.level, rates, recipe.data.curriculum, self.train_task.levels
            )
        if result is not None:
            cursor.entropy_coef = steered_entropy_coef(cursor.entropy_coef, result.entropy, recipe.objective)
        asked, budget = recipe.train.tokens_per_microbatch, self.learner.micro_batches.budget_tokens
        cursor.lowered_budget = (asked, budget) if budget < asked else ()
        for name in TOTALS:
            cursor.totals[name] = cursor.totals.get(name, 0) + record[name]
        cursor.add_seconds(record["seconds"])

    def _report(self, record: StepRecord, groups: Sequence[Group]) -> None:
        self.callback.step(record)
        count = max(self.recipe.output.samples_per_step, 1)
        self.callback.samples(sample_views(record["step"], groups, count))
        if text := takeover_message(record, groups, self.cursor.shape_steps):
            self.callback.message(text)
        level, curriculum = self.cursor.level, self.recipe.data.curriculum
        if record["level"] is not None and record["level"] != level:
            why, move = f"above data.curriculum.high = {curriculum.high:g}", "on"
            if level < record["level"]:
                why, move = f"below data.curriculum.low = {curriculum.low:g}", "back"
            where = f"level {level + 1} of {self.train_task.levels}"
            self.callback.message(f"pass rate {why} over {curriculum.window} steps: {move} to {where}")
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if record["skipped_reason"] else 0
        if self._skipped_in_a_row and self._skipped_in_a_row % ADVISE_AFTER == 0:
            advice = (
                "lower optimizer.learning_rate and start again from an earlier checkpoint"
                if record["positives"]
                else "easier problems (data.filter), more rollout.num_generations or a warm start (lora.init_from) help"
            )
            self.callback.message(
                f"{self._skipped_in_a_row} steps changed nothing: {record['skipped_reason']}; {advice}"
            )

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
        before, now = read_json(path), self._digests()
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

    # --------------------------------------------------------------------- helpers

    def _facts(self) -> dict[str, str]:
        recipe, policy = self.recipe, self.policy
        trained = sum(parameter.numel() for _, parameter in policy.trainable_parameters())
        quantized = "not quantised"
        if policy.quantized_modules:
            quantized = f"NF4, {policy.quantized_modules} layers, {policy.quantized_share:.0%} of the weights"
        if settings := getattr(load_config(recipe.model), "quantization_config", None):
            stored = str(settings.get("bnb_4bit_compute_dtype") or "float32")
            quantized += " as stored" if stored == recipe.model.dtype else f" as stored; {stored} there is not used"
        adaptive = " at most, adaptive" if recipe.rollout.adaptive.enabled else ""
        return {
            "model": f"{recipe.model.id} ({quantized}, {recipe.model.dtype})",
            "trained": f"{trained:,} weights (LoRA rank {recipe.lora.rank} + predictor head)",
            "siamese": f"+{self.learner.siamese.extra_bytes / 2**20:.2f} MiB",
            "data": self.train_task.name + (f", {self.train_task.levels} levels" if self.train_task.levels > 1 else ""),
            "rollouts": f"{self.engine}, {recipe.data.prompts_per_step} x {recipe.rollout.num_generations}{adaptive}",
            "stops at": " ".join(map(str, policy.tokenizer.convert_ids_to_tokens(sorted(policy.stop_ids)))),
            "device": str(policy.device),
            "sequences": "one at a time" if policy.packing == "off" else f"packed ({policy.packing})",
            "folder": str(self.folder.path),
        }

    def _check_references(self) -> None:
        """Leave out training problems that cannot be graded, and count those held out, now and not at step 400."""
        tasks = {id(task): task for task in (self.train_task, self.eval_task)}  # one task may be both
        for notice in chain.from_iterable(task.notices for task in tasks.values()):
            self.callback.message(notice)
        training, where = self.train_task.training(), "eval.dataset" if self.recipe.eval.dataset else "data.dataset"
        if unreadable := check_references(training, self.grader, "training rows", "data.dataset"):
            dropped = self.train_task.drop_training(lambda problem: unreadable.get(problem.id))
            what = f"{len(dropped)} of {len(training):,} training rows cannot be graded and are left out"
            self.callback.message(what + first(dropped))
        if unreadable := check_references(self.held_out, self.grader, "held-out problems", where):
            self.callback.message(not_solved(unreadable, len(self.held_out), "held-out problems"))

    def _check_prompts(self) -> None:
        """Find prompts that are too long, or that the chat template refuses, now and not at step 400."""
        if warning := self.renderer.check(self.train_task.train_problem(self.recipe.train.seed, 0)):
            self.callback.message(warning)
        if self.recipe.data.overlong_prompts == "error":
            for problem in (*self.held_out, *self.train_task.longest_candidates()):
                self.renderer.render(problem)
            return
        dropped = len(self.train_task.drop_training(lambda each: None if self.renderer.fits(each) else "is too long"))
        asked, self.held_out = len(self.held_out), fitting(self.held_out, self.renderer, self.recipe)
        if dropped or asked > len(self.held_out):
            self.callback.message(
                f"prompts longer than {self.renderer.max_prompt_length} tokens skipped: {dropped} of training, "
                f"{asked - len(self.held_out)} of evaluation"
            )

    def _advance(self, amount: int) -> None:
        """Report progress inside a stage, and raise StopRequested after a second Ctrl-C."""
        self.interrupts.check()
        if amount:
            self.callback.advance(amount)
