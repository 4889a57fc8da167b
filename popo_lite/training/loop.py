"""Training. `Trainer.train_step` is the whole algorithm, one stage after another; read it first.

Departures from the published reference code, each explained in docs/method.md: the base is 4-bit and frozen, so the
siamese averages adapters and head alone; normalisers are fixed for a step and count every token of every positive
alike; the entropy is taken over positives, so that negatives are never forwarded.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from popo_lite.console.base import RunView
from popo_lite.errors import EngineError, PopoError
from popo_lite.evaluation import evaluate, fitting
from popo_lite.grading import Grader
from popo_lite.objective.logprobs import token_logprobs
from popo_lite.objective.losses import LossTerms, noisy_target, popo_loss, steered_beta, truncated_importance
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.policy.siamese import Siamese
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
from popo_lite.samplers.probe import prove_adapter_in_use
from popo_lite.seeding import stream_seed
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.training.batching import MicroBatch, StepPlan, collate, cut, plan_step
from popo_lite.training.checkpoint import Cursor, latest_checkpoint, load_checkpoint, save_checkpoint
from popo_lite.training.collect import Budget, collect
from popo_lite.training.history import Choice, choose_problems, remember
from popo_lite.training.interrupt import Interrupts, StopRequested
from popo_lite.training.metrics import (
    StageClock,
    UpdateFigures,
    rollout_figures,
    sample_line,
    sample_views,
    sampler_summary,
    update_figures,
)
from popo_lite.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from popo_lite.types import EvalResult, Group, Prompt, Rollout, StepRecord

QUIET_STEPS = 5
"""So many steps in a row without a positive call for a word of advice."""

PROBE_PROMPTS = 4
ROUNDING_NATS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-3}
"""Mean gap between two right computations of a token's log-prob, by dtype; a probe can only find more than this."""


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """How `Trainer.run` ended: `summary` is None where it was interrupted, and `next_step` says where it stands."""

    summary: dict[str, Any] | None
    next_step: int


class Trainer:
    """One run: everything it holds, and the loop. Use as a context manager."""

    run_folder: RunFolder

    def __init__(self, recipe: Recipe, view: RunView) -> None:
        self.recipe, self.view = recipe, view
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
            self.siamese = Siamese(self.policy.trainable_parameters(), recipe.siamese.tau)
            self.optimizer = build_optimizer(self.policy, recipe.optimizer)
            self.sampler = stack.enter_context(
                open_sampler(recipe, self.policy, text=self.renderer.text, notify=view.message)
            )
            self._resources = stack.pop_all()
        self.cursor = Cursor(
            next_step=0,
            next_problem=0,
            history={},
            beta=recipe.objective.beta,
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
        self._usual_gap = ROUNDING_NATS[self.policy.head.weight.dtype]
        self._skipped_in_a_row = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    # ------------------------------------------------------------------ the run

    def run(self, folder: RunFolder, *, resume: bool = False) -> RunOutcome:
        """Train to the last step, or until interrupted; leaves all that `RunFolder` names in `folder`."""
        self.run_folder = folder
        if resume:
            self._restore()
        start_files(folder, self.recipe, self.policy.device)
        self._prove_sampler()
        steps = self.recipe.train.steps
        self.view.start(
            title=folder.path.name, facts=self._facts(), total_steps=steps, first_step=self.cursor.next_step
        )
        with self.interrupts as interrupts:
            try:
                if self.cursor.before is None and self.held_out:
                    self._set_cursor(before=asdict(self._evaluate("before")))
                while self.cursor.next_step < steps and not interrupts.requested:
                    self.train_step(self.cursor.next_step)
                    self._after_step()
                if not interrupts.requested:
                    after = asdict(self._evaluate("after")) if self.held_out else None
                    return RunOutcome(summary=self._finish(after), next_step=steps)
            except StopRequested:
                pass
            except torch.OutOfMemoryError as error:
                self._save_what_is_whole()
                raise EngineError(
                    "the GPU ran out of memory; the steps before this one are saved",
                    where=f"step {self.cursor.next_step}",
                    next_step="lower rollout.batch_size or train.tokens_per_microbatch, then resume",
                ) from error
            except PopoError:
                self._save_what_is_whole()
                raise
            self._save_what_is_whole()
        return RunOutcome(summary=None, next_step=self.cursor.next_step)

    def train_step(self, step: int) -> None:
        """One step, read top to bottom: problems, rollouts, rewards, weights, siamese features, update, sync."""
        clock = StageClock(self.view, self._synchronize)
        # All that torch draws in a step (LoRA dropout) follows from the step, so a resumed run needs no state.
        torch.manual_seed(stream_seed("step", self.recipe.train.seed, step))

        with clock("prompts"):
            choice = self._choose(step)
            prompts = [self.renderer.render(problem) for problem in choice.problems]
        groups = self._collect(step, prompts, clock)
        self.sampler.sleep()
        with clock("weights"):
            plan = self._credit(groups)
        figures: UpdateFigures | None = None
        skipped: str | None = "no prompt had a positive"
        if plan is not None:
            batches = self._collate([sequence.rollout for sequence in plan.sequences])
            # Before any graph exists: the averaged weights stand where the trained ones do.
            with clock("siamese"):
                targets = self._siamese_targets(step, plan, batches)
            with clock("update", total=len(plan.sequences)):
                figures = self._backward(plan, batches, targets)
                self._refuse_gap(step, figures)
                if math.isfinite(figures.grad_norm):
                    skipped = None
                else:
                    figures, skipped = None, "the gradient is not finite"

        # From here to the written line weights and cursor belong to different steps: nothing may save or stop.
        self._whole = False
        if figures is not None:
            with clock("update"):
                self._apply(step, figures)
        self.optimizer.zero_grad(set_to_none=True)
        with clock("sync"):
            self.sampler.sync(self.policy.version)
        record = self._record(step, choice, groups, plan, figures, skipped, clock)
        self._write_step(record, groups)
        self._whole = True

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

    def _credit(self, groups: Sequence[Group]) -> StepPlan | None:
        """Weights on whole groups, from the sampler's log-probs or from a no-grad pass over the positives."""
        objective = self.recipe.objective
        positives = [rollout for group in groups for rollout in group.positives(objective.reward_threshold)]
        if objective.weights_from == "sampler" or objective.weights == "uniform":
            means = [rollout.completion.mean_logp for rollout in positives]
        else:
            means = self._policy_mean_logps(positives)
        return plan_step(
            groups,
            objective,
            mean_logps={
                (rollout.prompt.problem.id, rollout.index): mean for rollout, mean in zip(positives, means, strict=True)
            },
            max_completion_tokens=self.recipe.rollout.max_completion_tokens,
        )

    @torch.no_grad()
    def _policy_mean_logps(self, rollouts: Sequence[Rollout]) -> list[float]:
        means = [0.0] * len(rollouts)
        self.policy.model.eval()
        for batch in self._collate(rollouts):
            logps, _ = self._logps(self.policy.hidden_states(batch.input_ids, batch.attention_mask), batch)
            sums = logps.new_zeros(len(batch.members)).index_add(0, batch.sequence_of_token, logps)
            for member, mean in zip(batch.members, (sums / batch.lengths).tolist(), strict=True):
                means[member] = mean
        return means

    @torch.no_grad()
    def _siamese_targets(self, step: int, plan: StepPlan, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
        """Each micro-batch's noisy targets [B, D]; None throughout where the similarity term is off."""
        objective = self.recipe.objective
        if objective.alpha == 0:
            return [None] * len(batches)
        targets: list[Tensor | None] = []
        self.policy.model.eval()
        with self.siamese.swapped():
            for batch in batches:
                features = batch.mean_features(self.policy.hidden_states(batch.input_ids, batch.attention_mask))
                if objective.target == "predictor":
                    features = self.policy.predictor(features)
                noise = torch.stack([self._noise(step, plan, member, features) for member in batch.members])
                targets.append(noisy_target(features, noise, objective.noise_sigma))
        return targets

    def _noise(self, step: int, plan: StepPlan, member: int, like: Tensor) -> Tensor:
        """Standard normal [D], a function of (seed, step, problem, sample) and not of the batch it is in."""
        rollout = plan.sequences[member].rollout
        source = torch.Generator().manual_seed(
            stream_seed("noise", self.recipe.train.seed, step, rollout.prompt.problem.id, rollout.index)
        )
        return torch.randn(like.shape[-1], generator=source, dtype=torch.float64).to(like)

    def _backward(
        self, plan: StepPlan, batches: Sequence[MicroBatch], targets: Sequence[Tensor | None]
    ) -> UpdateFigures:
        """Clipped gradients, micro-batch by micro-batch; their sum is the step's whatever the cut."""
        figures = UpdateFigures(micro_batches=len(batches))
        self.policy.model.train()
        for batch, target in zip(batches, targets, strict=True):
            terms = self._loss(plan, batch, target, figures)
            terms.total.backward()
            figures.add(terms)
            self._advance(len(batch.members))
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        figures.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.max_grad_norm))
        return figures

    def _loss(self, plan: StepPlan, batch: MicroBatch, target: Tensor | None, figures: UpdateFigures) -> LossTerms:
        hidden = self.policy.hidden_states(batch.input_ids, batch.attention_mask)
        logps, entropies = self._logps(hidden, batch)
        ratios = logps.detach() - batch.sampler_logps
        figures.add_gaps(ratios)
        members = [plan.sequences[member] for member in batch.members]
        return popo_loss(
            logps=logps,
            token_weights=truncated_importance(ratios, self.recipe.objective.importance_cap),
            entropies=entropies,
            sequence_of_token=batch.sequence_of_token,
            nll_coefficient=logps.new_tensor([member.nll_coefficient for member in members]),
            weights=logps.new_tensor([member.weight for member in members]),
            predictions=None if target is None else self.policy.predictor(batch.mean_features(hidden)),
            targets=target,
            normalizers=plan.normalizers,
            alpha=self.recipe.objective.alpha,
            beta=self.cursor.beta,
        )

    def _logps(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])[batch.predicting]
        return token_logprobs(flat, batch.targets, self.policy.head, chunk=self.recipe.train.logits_chunk_tokens)

    def _refuse_gap(self, step: int, figures: UpdateFigures) -> None:
        """Stop where sampler and trainer have come to disagree: its rollouts are another policy's then."""
        limit = self.recipe.rollout.max_gap_multiple * self._usual_gap
        if figures.gap_mean > limit:
            raise EngineError(
                f"log-probs of the {self.sampler.engine} sampler and of the trainer differ by {figures.gap_mean:.3g} "
                f"nats on average over this step's positives; {self._usual_gap:.3g} is usual here, and the limit is "
                f"rollout.max_gap_multiple = {self.recipe.rollout.max_gap_multiple:g} times that",
                where=f"step {step}",
                next_step="the sampler's adapter, cache or base is not the trainer's; resume, and if it comes back, "
                'set rollout.engine="hf" and please report it',
            )

    def _apply(self, step: int, figures: UpdateFigures) -> None:
        """Optimizer, siamese and version move together."""
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        # A copy of the trained weights for the length of the optimizer's step, when no activation is alive.
        before = [parameter.detach().clone() for parameter in parameters]
        set_learning_rate(self.optimizer, learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer))
        self.optimizer.step()
        moved = torch._foreach_sub([parameter.detach() for parameter in parameters], before)
        figures.update_norm = float(torch.stack(torch._foreach_norm(moved)).double().norm())
        self.siamese.update(figures.update_norm)
        self.policy.version += 1

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
        drift, bound = self.siamese.drift(), self.siamese.drift_bound()
        factor = learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer)
        made = rollout_figures(
            groups,
            self.train_task,
            self.recipe.objective.reward_threshold,
            first_round=Budget.of(self.recipe.rollout).round_size,
        )
        learned = update_figures(figures, plan, start_entropy, similarity_on=self.recipe.objective.alpha > 0)
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
                "rollout": made["rollout_tokens"] / max(seconds["rollout"], 1e-9),
                **{
                    stage: learned["trained_tokens"] / max(seconds[stage], 1e-9)
                    for stage in ("siamese", "update")
                    if stage in seconds
                },
            },
            peak_memory_bytes=peak_memory_bytes(self.policy.device),
            prompts_skipped=choice.skipped,
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
                "easier problems (data.filter), a larger rollout.group_size or a warm start (lora.init_from) give some"
                if not record.positives
                else "lower optimizer.learning_rate and start again from an earlier checkpoint"
            )
            self.view.message(f"{self._skipped_in_a_row} steps changed nothing: {record.skipped_reason}; {advice}")

    def _after_step(self) -> None:
        """Evaluation and checkpoint where they are due, in this order: a checkpoint covers what is on record."""
        done, train, every = self.cursor.next_step, self.recipe.train, self.recipe.eval.every
        if every and done % every == 0 and done < train.steps and self.held_out:
            self._evaluate(f"step {done}")
        if done % train.checkpoint_every == 0 or done == train.steps:
            self._checkpoint()

    def _save_what_is_whole(self) -> None:
        """Checkpoint the last completed step, unless an error struck between its update and its record."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._whole:
            self._checkpoint()

    def _prove_sampler(self) -> None:
        """Show, once before the first step, that the engine samples from the adapter it is given."""
        if self.sampler.engine == "hf":
            return  # it has no weights of its own
        problems = [self.train_task.train_problem(self.recipe.train.seed, index) for index in range(PROBE_PROMPTS)]
        probe = prove_adapter_in_use(
            self.sampler,
            self.policy,
            [self.renderer.render(problem) for problem in {one.id: one for one in problems}.values()],
            temperature=self.recipe.rollout.temperature,
            seed=self.recipe.train.seed,
        )
        self._usual_gap = max(self._usual_gap, probe.gap_mean)
        self.view.message(
            f"sampler proven: log-probs differ from the trainer's by {probe.probe_gap_mean:.2g} nats, and would by "
            f"{probe.ignored_gap_mean:.2g} if the adapter were ignored"
        )

    def _checkpoint(self) -> None:
        self.view.stage("checkpoint")
        start = time.perf_counter()
        folder = save_checkpoint(
            self.run_folder.checkpoints,
            policy=self.policy,
            siamese=self.siamese,
            optimizer=self.optimizer,
            cursor=self.cursor,
            base_id=self.recipe.model.id,
            keep=self.recipe.train.keep_checkpoints,
        )
        self._set_cursor(seconds=_added(self.cursor.seconds, {"checkpoint": time.perf_counter() - start}))
        self.view.message(f"checkpoint: {folder}")

    def _restore(self) -> None:
        """Go back to the newest checkpoint; to step 0 where the run was killed before its first."""
        checkpoint = latest_checkpoint(self.run_folder.checkpoints)
        if checkpoint is not None:
            self.cursor = load_checkpoint(
                checkpoint, policy=self.policy, siamese=self.siamese, optimizer=self.optimizer
            )
            self.sampler.sync(self.policy.version)
        done, before = self.cursor.next_step, self.cursor.before
        for path in (self.run_folder.metrics_path, self.run_folder.samples_path):
            keep_lines(path, lambda line: line["step"] < done)
        keep_lines(
            self.run_folder.evaluations_path,
            lambda line: before is not None
            if line["when"] == "before"
            else line["when"] != "after" and line["step"] <= done,
        )

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
            max_ungraded_share=self.recipe.reward.max_ungraded_share,
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
        with self.siamese.swapped():
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
            "siamese_extra_bytes": self.siamese.extra_bytes,
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
            "siamese": f"+{self.siamese.extra_bytes / 2**20:.2f} MiB",
            "data": self.train_task.name,
            "rollouts": f"{self.engine}, {self.recipe.data.prompts_per_step} x {self.recipe.rollout.group_size}",
            "stops at": " ".join(self.policy.tokenizer.convert_ids_to_tokens(sorted(self.policy.stop_ids))),
            "device": str(self.policy.device),
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
                    f"prompts longer than {self.renderer.max_prompt_tokens} tokens left out: {dropped} of "
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

    def _collate(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        return [
            collate(rollouts, members, pad_id=self.policy.pad_id, device=self.policy.device)
            for members in cut(rollouts, budget_tokens=self.recipe.train.tokens_per_microbatch)
        ]

    def _sampling(self, temperature: float) -> SamplingParams:
        return SamplingParams(temperature=temperature, max_completion_tokens=self.recipe.rollout.max_completion_tokens)

    def _set_cursor(self, **changes: Any) -> None:
        self.cursor = Cursor(**{**self.cursor.__dict__, **changes})

    def _synchronize(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def _added(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    return {key: left.get(key, 0.0) + right.get(key, 0.0) for key in left | right}
