"""What a step learns with: credit, siamese targets, gradients and the update. The loop calls it stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popo_lite.objective.chunks import chunk_tokens
from popo_lite.objective.grpo import surrogate
from popo_lite.objective.logprobs import refuse_without_compiler, token_logprobs, weighted_token_logprobs
from popo_lite.objective.losses import (
    LossTerms,
    entropy_coefficient,
    noisy_target,
    popo_loss,
    truncated_importance,
)
from popo_lite.policy.policy import Policy
from popo_lite.policy.siamese import Siamese
from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed
from popo_lite.training.backoff import MicroBatches
from popo_lite.training.batching import MicroBatch
from popo_lite.training.credit import StepPlan, plan_step, teaching_groups
from popo_lite.training.metrics import MicroBatchFigures, UpdateFigures
from popo_lite.training.optimizer import build_optimizer, learning_rate_factor, move_state, set_learning_rate
from popo_lite.types import Group, Rollout


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """`targets` [S, D] of a plan's S sequences, and each one's `reference_logps`; None for what is off."""

    targets: Tensor | None
    reference_logps: Sequence[Tensor] | None

    def targets_of(self, batch: MicroBatch) -> Tensor | None:
        """The targets [B, D] of a micro-batch."""
        return None if self.targets is None else self.targets[list(batch.members)]

    def reference_of(self, batch: MicroBatch) -> Tensor | None:
        """The reference log-probs [N] of a micro-batch's completion tokens."""
        if self.reference_logps is None:
            return None
        return torch.cat([self.reference_logps[member] for member in batch.members])


class Learner:
    """The policy with its siamese and optimizer. Nothing here samples, grades, records or saves."""

    def __init__(
        self, recipe: Recipe, policy: Policy, *, notify: Callable[[str], None], relief: Callable[[], str]
    ) -> None:
        self.recipe, self.policy = recipe, policy
        self.siamese = Siamese(policy.trainable_parameters(), recipe.siamese.tau)
        self.optimizer = build_optimizer(policy, recipe.optimizer)
        self.micro_batches = MicroBatches(
            recipe.train.tokens_per_microbatch, policy.device, notify=notify, relief=relief
        )
        self._chunk = chunk_tokens(policy.head.weight.shape[0], memory_bytes=recipe.train.logits_mib * 2**20)
        self._compile_rows = recipe.train.compile_loss and policy.device.type == "cuda"
        if self._compile_rows:
            refuse_without_compiler(policy.head)  # now, and not after the first step's rollouts

    def credit(self, groups: Sequence[Group]) -> StepPlan | None:
        """Weights on whole groups, from the sampler's log-probs or from a no-grad pass over the positives."""
        objective = self.recipe.objective
        groups = teaching_groups(groups, objective)
        positives = [rollout for group in groups for rollout in group.positives(objective.reward_threshold)]
        if (
            getattr(objective, "weights_from", "sampler") == "sampler"
            or getattr(objective, "weights", "uniform") == "uniform"
        ):
            means = [rollout.completion.mean_logp for rollout in positives]
        else:
            means = self._policy_mean_logps(positives)
        return plan_step(
            groups,
            objective,
            mean_logps={
                (rollout.prompt.problem.id, rollout.index): mean for rollout, mean in zip(positives, means, strict=True)
            },
            max_completion_length=self.recipe.rollout.max_completion_length,
        )

    def anchors(self, step: int, plan: StepPlan) -> Anchors:
        """What the update holds the policy against: the siamese's targets, and the base's log-probs."""
        return Anchors(targets=self._siamese_targets(step, plan), reference_logps=self._reference_logps(plan))

    @torch.no_grad()
    def _siamese_targets(self, step: int, plan: StepPlan) -> Tensor | None:
        """The noisy targets [S, D] of the plan's sequences, 0 where the weight is; None where the term is off."""
        objective = self.recipe.objective
        if getattr(objective, "similarity_coef", 0.0) == 0:
            return None
        first = next(self.policy.predictor.parameters())
        targets = first.new_zeros(len(plan.sequences), self.policy.head.weight.shape[1])
        weighted = plan.anchored(objective)
        rollouts = [plan.sequences[index].rollout for index in weighted]
        self.policy.model.eval()

        def learn(batch: MicroBatch) -> None:
            features = batch.mean_features(self.policy.hidden_states(batch.input_ids, batch.lengths))
            if getattr(objective, "target", "predictor") == "predictor":
                features = self.policy.predictor(features)
            noise = torch.stack([self._noise(step, rollouts[member], features) for member in batch.members])
            places = [weighted[member] for member in batch.members]
            targets[places] = noisy_target(features, noise, getattr(objective, "noise_sigma", 0.0))

        with self.siamese.swapped():
            self.micro_batches.run(rollouts, learn, stage="siamese")
        return targets

    def _reference_logps(self, plan: StepPlan) -> list[Tensor] | None:
        """Each sequence's log-probs under the base, which is the policy without its adapter; None without a KL term."""
        if getattr(self.recipe.objective, "kl_coef", 0.0) == 0:
            return None
        found: dict[int, Tensor] = {}
        with self.policy.model.disable_adapter():
            scored = self._scored([sequence.rollout for sequence in plan.sequences], stage="reference")
        for batch, logps in scored:
            found.update(zip(batch.members, batch.by_sequence(logps), strict=True))
        return [found[member] for member in range(len(plan.sequences))]

    def backward(
        self, plan: StepPlan, anchors: Anchors, *, beta: float, advance: Callable[[int], None]
    ) -> UpdateFigures:
        """Clipped gradients, summed over micro-batches; the sum is the step's whatever the cut.

        `advance` is told how many sequences are done, and may raise.
        """
        figures = UpdateFigures()
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        sums: list[Tensor | None] = [None] * len(parameters)
        self.policy.model.train()

        def learn(batch: MicroBatch) -> None:
            try:
                terms, ratios = self._loss(plan, batch, anchors, beta)
                terms.total.backward()
                share = MicroBatchFigures.of(terms, ratios)
                # From here nothing asks for memory: the step's sums stand apart from the running micro-batch's, so one
                # that runs out of memory, wherever, has added nothing.
                for index, parameter in enumerate(parameters):
                    if parameter.grad is not None:
                        before = sums[index]
                        sums[index] = parameter.grad if before is None else before.add_(parameter.grad)
            finally:
                for parameter in parameters:
                    parameter.grad = None
            figures.add(share)
            advance(len(batch.members))

        rollouts = [sequence.rollout for sequence in plan.sequences]
        figures.micro_batches = self.micro_batches.run(rollouts, learn, stage="update")
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total
        figures.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.max_grad_norm))
        return figures

    def prepare(self) -> list[Tensor]:
        """A copy of the trained weights, and the optimizer's state on the device: the memory that `apply` needs.

        Apart from it because nothing has changed yet if there is none left. (The optimizer makes its state in its first
        step, when there is nothing to lose.)
        """
        move_state(self.optimizer, self.policy.device)
        return [parameter.detach().clone() for _, parameter in self.policy.trainable_parameters()]

    def apply(self, step: int, figures: UpdateFigures, before: list[Tensor]) -> None:
        """Optimizer, siamese and version move together; `before` comes from `prepare`, and is used up."""
        set_learning_rate(self.optimizer, learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer))
        self.optimizer.step()
        if self.recipe.rollout.vllm.enable_sleep_mode:
            # Wanted for this one call a step; until the next the memory belongs to the rollout engine.
            move_state(self.optimizer, torch.device("cpu"))
        torch._foreach_sub_(before, [parameter.detach() for _, parameter in self.policy.trainable_parameters()])
        figures.update_norm = float(torch.stack(torch._foreach_norm(before)).double().norm())
        before.clear()  # or the caller's list would hold them while the rollout engine wakes
        self.siamese.update(figures.update_norm)
        self.policy.version += 1

    def gap_mean(self, rollouts: Sequence[Rollout]) -> float:
        """Mean |sampler - policy| log-prob of the rollouts' tokens, nats, by a forward pass of their own."""
        gaps = [(logps - batch.sampler_logps).abs() for batch, logps in self._scored(rollouts)]
        return float(torch.cat(gaps).mean())

    def _policy_mean_logps(self, rollouts: Sequence[Rollout]) -> list[float]:
        means = [0.0] * len(rollouts)
        for batch, logps in self._scored(rollouts):
            for member, mean in zip(batch.members, batch.sequence_means(logps).tolist(), strict=True):
                means[member] = mean
        return means

    @torch.no_grad()
    def _scored(self, rollouts: Sequence[Rollout], *, stage: str = "weights") -> list[tuple[MicroBatch, Tensor]]:
        """Micro-batches of `rollouts` with the policy's log-probs [N] of their completion tokens."""
        self.policy.model.eval()
        found: list[tuple[MicroBatch, Tensor]] = []

        def score(batch: MicroBatch) -> None:
            hidden = self.policy.hidden_states(batch.input_ids, batch.lengths)[batch.predicting]
            logps, _ = token_logprobs(
                hidden, batch.targets, self.policy.head, chunk=self._chunk, compile_rows=self._compile_rows
            )
            found.append((batch, logps))

        self.micro_batches.run(rollouts, score, stage=stage)
        return found

    def _noise(self, step: int, rollout: Rollout, like: Tensor) -> Tensor:
        """Standard normal [D], a function of (seed, step, problem, sample) and not of the batch it is in."""
        source = torch.Generator().manual_seed(
            stream_seed("noise", self.recipe.train.seed, step, rollout.prompt.problem.id, rollout.index)
        )
        return torch.randn(like.shape[-1], generator=source, dtype=torch.float64).to(like)

    def _loss(self, plan: StepPlan, batch: MicroBatch, anchors: Anchors, beta: float) -> tuple[LossTerms, Tensor]:
        """The micro-batch's terms, and policy minus sampler log-probs [N]."""
        objective, head = self.recipe.objective, self.policy.head
        members = [plan.sequences[member] for member in batch.members]
        hidden = self.policy.hidden_states(batch.input_ids, batch.lengths)

        def by_sequence(values: Sequence[float]) -> Tensor:
            return hidden.new_tensor(values, dtype=head.compute_dtype)

        coefficients = by_sequence([member.coefficient for member in members])[batch.sequence_of_token]
        entropy_ratio = by_sequence([float(member.counts_in_entropy) for member in members])[batch.sequence_of_token]
        per_token = self._policy_term(
            batch, by_sequence([member.advantage for member in members]), anchors.reference_of(batch)
        )
        # Each token's slope needs its own log-prob alone, so the gradient is formed in the forward pass, when the
        # log-probs of its chunk are known, and no chunk of logits is computed twice.
        terms = weighted_token_logprobs(
            hidden.index_select(0, batch.predicting),
            batch.targets,
            head,
            logp_coefficients=coefficients,
            entropy_coefficients=entropy_coefficient(plan.normalizers, beta) * entropy_ratio,
            factor=lambda logps, part: per_token(logps, part)[1],
            chunk=self._chunk,
            compile_rows=self._compile_rows,
        )
        values, _ = per_token(terms.logps, slice(None))
        targets = anchors.targets_of(batch)
        loss = popo_loss(
            token_gradient=terms.total,
            policy=(coefficients * values).sum(),
            entropy=(entropy_ratio * terms.entropies).sum() / plan.normalizers.entropy_tokens,
            weights=by_sequence([member.weight for member in members]),
            predictions=None if targets is None else self.policy.predictor(batch.mean_features(hidden)),
            targets=targets,
            normalizers=plan.normalizers,
            alpha=getattr(objective, "similarity_coef", 0.0),
            beta=beta,
        )
        return loss, terms.logps - batch.sampler_logps

    def _policy_term(
        self, batch: MicroBatch, advantages: Tensor, reference_logps: Tensor | None
    ) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
        """(log-probs of some tokens, which they are) -> (what their coefficients multiply, its slope): detached."""
        objective = self.recipe.objective
        if objective.algorithm == "grpo":
            of_token = advantages[batch.sequence_of_token]

            def by_advantage(logps: Tensor, part: slice) -> tuple[Tensor, Tensor]:
                reference = None if reference_logps is None else reference_logps[part]
                return surrogate(logps, batch.sampler_logps[part], of_token[part], reference, objective)

            return by_advantage

        def by_likelihood(logps: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            if getattr(objective, "importance_sampling_clip_max", None) is None:
                return logps, torch.ones_like(logps)
            weights = truncated_importance(
                logps - batch.sampler_logps[part], getattr(objective, "importance_sampling_clip_max", None)
            )
            return weights * logps, weights

        return by_likelihood
