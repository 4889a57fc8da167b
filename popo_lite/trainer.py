"""Training. `Trainer.train_step` is the whole algorithm, one stage after another; read it first.

Departures from the published code, each explained in docs/method.md: the base is 4-bit and frozen, so the siamese
averages adapters and predictor head alone; divisors are fixed for a whole step; by default the entropy is taken over
positives, so that POPO never forwards a negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from popo_lite.ahead import Drawn, Start
from popo_lite.curriculum import Budget, level_pass_rate, next_level, remember
from popo_lite.interrupts import StageClock
from popo_lite.metrics import StepRecord, make_record, rollout_metrics, sample_line, sample_views
from popo_lite.objective import StepPlan, nothing_to_learn, steered_entropy_coef
from popo_lite.run_folder import peak_memory_bytes
from popo_lite.run_loop import TOTALS, RunLoop, RunResult
from popo_lite.samplers.probe import PROBE_PROMPTS
from popo_lite.seeding import stream_seed
from popo_lite.shapes import count_takeover, shape_metrics, start_shapes, takeover_message
from popo_lite.types import Group
from popo_lite.update import RECENT_NORMS, UpdateResult, gradient_problem, learning_rate_factor

__all__ = ["RunResult", "Trainer"]


class Trainer(RunLoop):
    """One run: everything it holds (`OpenRun`), the loop around its steps (`RunLoop`), and the step."""

    def train_step(self, step: int) -> None:
        """Do one step: problems, rollouts, rewards, weights, siamese targets, gradients, optimizer, record, sync."""
        clock = StageClock(self.callback, self.policy.device)
        cursor, version = self.cursor, self.policy.version
        drawn = self.rollouts.take(step, version)
        if drawn is None:
            # Stages "prompts", "rollout" and "grade".
            start = Start(step, cursor.next_problem, cursor.history, cursor.level, version)
            drawn = self.rollouts.draw(start, self.worker, clock, self.advance)
        groups, lag = drawn.groups, version - drawn.start.policy_version
        clock.seconds |= drawn.waited
        if self.recipe.rollout.async_level and self._goes_on_after(step + 1):
            # Its history and level know nothing of this step.
            start = Start(step + 1, drawn.choice.next_problem, cursor.history, cursor.level, version)
            self.rollouts.start(start, self.worker)
        with clock("weights"):
            self.sampler.sleep()
            plan = self.learner.plan(groups)
        result: UpdateResult | None = None
        skipped: str | None = None
        if plan is None:
            skipped = nothing_to_learn(self.recipe.objective)
        checked, gap = [group.rollouts[0] for group in groups[:PROBE_PROMPTS]], None
        # A sampler that went wrong finds no positives; and dropout would count as a gap in the update. The gap of
        # rollouts that lag includes an update.
        if not lag and (self.recipe.lora.dropout or (plan is None and self.sampler.engine != "hf")):
            gap = self.ranks.from_first(self.learner.gap_mean(checked))  # all judge the same number
        if plan is not None:
            mine = self.learner.part(plan)
            with clock("siamese"):
                # Before any graph exists: the averaged weights stand in the place of the trained ones. Both are None
                # for objectives without a similarity or a KL term.
                targets = self.learner.siamese_targets(step, mine)
                reference_logps = self.learner.reference_logps(mine)
            with clock("update", total=len(mine.sequences)):
                # All that torch draws in a step (LoRA dropout) follows from the step, so a resumed run needs no state.
                torch.manual_seed(stream_seed("step", self.recipe.train.seed, step, self.ranks.rank))
                result = self.learner.backward(
                    mine, targets, reference_logps, self.cursor.entropy_coef, progress=self.advance
                )
                gap = result.gap_mean if gap is None and not lag else gap
                largest = self.recipe.optimizer.max_grad_norm
                if skipped := gradient_problem(result.grad_norm, self.cursor.recent_grad_norms, largest):
                    result = None
        if gap is not None:
            self.guard.check(step, gap, checked)
        if result is not None:
            with clock("optimizer"):
                weights = self.learner.prepare()
                # From here to the record, weights and cursor belong to different steps: nothing may save or stop.
                self._consistent = False
                rate = self.cursor.learning_rate_scale * self._rate_factor(step)
                self.learner.apply(result, weights, rate)  # the optimizer's step, then the siamese's average
        self._consistent = False  # also for a skipped step: its record moves the cursor
        self.learner.optimizer.zero_grad(set_to_none=True)
        record, level = self._record(step, drawn, lag, plan, result, skipped, clock.seconds), cursor.level
        self._move_cursor(record, drawn, plan, result)
        self._unwritten.append((self.folder.metrics_path, record))
        for group in groups[: self.recipe.output.samples_per_step if self.ranks.first else 0]:
            self._unwritten.append((self.folder.samples_path, sample_line(step, group)))
        self._consistent = True
        self._write_lines()
        self._report(record, groups, plan, level)
        # After the record: an engine that does not take the adapter, or rollouts that fail, cost no step.
        if self.recipe.rollout.async_level:
            self.callback.stage("rollout")
        # A run that stops drops the next step; several ranks would have to agree on it.
        self.rollouts.wait(self.advance, lambda: self.ranks.size == 1 and self.interrupts.requested)
        with clock("sync"):
            self.sampler.sync(self.policy.version)
        self.cursor.add_seconds({"sync": clock.seconds["sync"]})

    # --------------------------------------------------------------------- the stages of a step

    def _record(
        self,
        step: int,
        drawn: Drawn,
        lag: int,
        plan: StepPlan | None,
        result: UpdateResult | None,
        skipped: str | None,
        seconds: dict[str, float],
    ) -> StepRecord:
        recipe, siamese, groups = self.recipe, self.learner.siamese, drawn.groups
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
        factor = self.cursor.learning_rate_scale * self._rate_factor(step)
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
            "lag": lag,
            "skipped_reason": skipped,
            "level": drawn.start.level if recipe.data.curriculum.enabled else None,
            "prompts_skipped": drawn.choice.skipped,
            "entropy_coef": self.cursor.entropy_coef,
            "siamese_drift": drift,
            "siamese_drift_over_bound": drift / bound if bound > 0 else None,
            "learning_rate": recipe.optimizer.learning_rate * factor,
            "head_learning_rate": recipe.optimizer.head_learning_rate * factor,
            "microbatch_tokens": self.learner.micro_batches.budget_tokens,
            "seconds": dict(seconds),
            "seconds_ahead": dict(drawn.ahead) or None,
            "tokens_per_second": {
                stage: count / max(seconds[stage] + drawn.ahead.get(stage, 0.0), 1e-9)
                for stage, count in tokens.items()
                if count
            },
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
        }
        return make_record(values)

    def _move_cursor(
        self, record: StepRecord, drawn: Drawn, plan: StepPlan | None, result: UpdateResult | None
    ) -> None:
        cursor, recipe, choice = self.cursor, self.recipe, drawn.choice
        cursor.history = remember(cursor.history, drawn.groups, recipe, cursor.next_step)
        cursor.shape_steps = count_takeover(cursor.shape_steps, record)
        cursor.next_step += 1
        cursor.next_problem = choice.next_problem
        if recipe.data.curriculum.enabled and drawn.start.level == cursor.level:  # else drawn ahead of the move
            rates = [*cursor.level_rates, level_pass_rate(choice, record["pass_rate"])]
            cursor.level, cursor.level_rates = next_level(
                cursor.level, rates, recipe.data.curriculum, self.train_task.levels
            )
        if result is None and plan is not None:
            cursor.not_finite_steps += 1
            cursor.not_finite_in_a_row += 1
        if result is not None:
            cursor.not_finite_in_a_row = 0
            cursor.recent_grad_norms = [*cursor.recent_grad_norms, result.grad_norm][-RECENT_NORMS:]
            cursor.entropy_coef = steered_entropy_coef(cursor.entropy_coef, result.entropy, recipe.objective)
        asked, budget = recipe.train.tokens_per_microbatch, self.learner.micro_batches.budget_tokens
        cursor.lowered_budget = (asked, budget) if budget < asked else ()
        for name in TOTALS:
            cursor.totals[name] = cursor.totals.get(name, 0) + record[name]
        cursor.add_seconds(record["seconds"])

    def _report(self, record: StepRecord, groups: Sequence[Group], plan: StepPlan | None, level_before: int) -> None:
        self.callback.step(record)
        count = max(self.recipe.output.samples_per_step, 1)
        self.callback.samples(sample_views(record["step"], groups, count))
        if text := takeover_message(record, groups, self.cursor.shape_steps):
            self.callback.message(text)
        level, curriculum = self.cursor.level, self.recipe.data.curriculum
        if level != level_before:
            why, move = f"above data.curriculum.high = {curriculum.high:g}", "on"
            if level < level_before:
                why, move = f"below data.curriculum.low = {curriculum.low:g}", "back"
            where = f"level {level + 1} of {self.train_task.levels}"
            self.callback.message(f"pass rate {why} over {curriculum.window} steps: {move} to {where}")
        for text in self.verdicts.of(record, planned=plan is not None, equals_base=self.learner.equals_base):
            self.callback.message(text)

    def _rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer)
