"""What a step learns with: credit, siamese targets, gradients and the update. The loop calls it stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from popo_lite.objective.logprobs import token_logprobs
from popo_lite.objective.losses import LossTerms, noisy_target, popo_loss, truncated_importance
from popo_lite.policy.policy import Policy
from popo_lite.policy.siamese import Siamese
from popo_lite.recipe import Recipe
from popo_lite.seeding import stream_seed
from popo_lite.training.batching import MicroBatch, StepPlan, collate, cut, plan_step
from popo_lite.training.metrics import UpdateFigures
from popo_lite.training.optimizer import build_optimizer, learning_rate_factor, move_state, set_learning_rate
from popo_lite.types import Group, Rollout


class Learner:
    """The policy with its siamese and optimizer. Nothing here samples, grades, records or saves."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe, self.policy = recipe, policy
        self.siamese = Siamese(policy.trainable_parameters(), recipe.siamese.tau)
        self.optimizer = build_optimizer(policy, recipe.optimizer)

    def credit(self, groups: Sequence[Group]) -> StepPlan | None:
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

    def collate(self, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
        """Micro-batches of `rollouts` within the token budget, on the policy's device."""
        return [
            collate(rollouts, members, pad_id=self.policy.pad_id, device=self.policy.device)
            for members in cut(rollouts, budget_tokens=self.recipe.train.tokens_per_microbatch)
        ]

    @torch.no_grad()
    def siamese_targets(self, step: int, plan: StepPlan, batches: Sequence[MicroBatch]) -> list[Tensor | None]:
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

    def backward(
        self,
        plan: StepPlan,
        batches: Sequence[MicroBatch],
        targets: Sequence[Tensor | None],
        *,
        beta: float,
        advance: Callable[[int], None],
    ) -> UpdateFigures:
        """Clipped gradients, micro-batch by micro-batch; their sum is the step's whatever the cut.

        `advance` is told how many sequences are done, and may raise.
        """
        figures = UpdateFigures(micro_batches=len(batches))
        self.policy.model.train()
        for batch, target in zip(batches, targets, strict=True):
            terms = self._loss(plan, batch, target, beta, figures)
            terms.total.backward()
            figures.add(terms)
            advance(len(batch.members))
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        figures.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.max_grad_norm))
        return figures

    def apply(self, step: int, figures: UpdateFigures) -> None:
        """Optimizer, siamese and version move together."""
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        # A copy of the trained weights for the length of the optimizer's step, when no activation is alive.
        before = [parameter.detach().clone() for parameter in parameters]
        set_learning_rate(self.optimizer, learning_rate_factor(step, self.recipe.train.steps, self.recipe.optimizer))
        move_state(self.optimizer, self.policy.device)
        self.optimizer.step()
        if self.recipe.rollout.sleep:
            # Wanted for this one call a step; until the next the memory belongs to the rollout engine.
            move_state(self.optimizer, torch.device("cpu"))
        moved = torch._foreach_sub([parameter.detach() for parameter in parameters], before)
        figures.update_norm = float(torch.stack(torch._foreach_norm(moved)).double().norm())
        self.siamese.update(figures.update_norm)
        self.policy.version += 1

    @torch.no_grad()
    def gap_mean(self, rollouts: Sequence[Rollout]) -> float:
        """Mean |sampler - policy| log-prob of the rollouts' tokens, nats, by a forward pass of their own."""
        self.policy.model.eval()
        gaps = []
        for batch in self.collate(rollouts):
            logps, _ = self._logps(self.policy.hidden_states(batch.input_ids, batch.attention_mask), batch)
            gaps.append((logps - batch.sampler_logps).abs())
        return float(torch.cat(gaps).mean())

    @torch.no_grad()
    def _policy_mean_logps(self, rollouts: Sequence[Rollout]) -> list[float]:
        means = [0.0] * len(rollouts)
        self.policy.model.eval()
        for batch in self.collate(rollouts):
            logps, _ = self._logps(self.policy.hidden_states(batch.input_ids, batch.attention_mask), batch)
            sums = logps.new_zeros(len(batch.members)).index_add(0, batch.sequence_of_token, logps)
            for member, mean in zip(batch.members, (sums / batch.lengths).tolist(), strict=True):
                means[member] = mean
        return means

    def _noise(self, step: int, plan: StepPlan, member: int, like: Tensor) -> Tensor:
        """Standard normal [D], a function of (seed, step, problem, sample) and not of the batch it is in."""
        rollout = plan.sequences[member].rollout
        source = torch.Generator().manual_seed(
            stream_seed("noise", self.recipe.train.seed, step, rollout.prompt.problem.id, rollout.index)
        )
        return torch.randn(like.shape[-1], generator=source, dtype=torch.float64).to(like)

    def _loss(
        self, plan: StepPlan, batch: MicroBatch, target: Tensor | None, beta: float, figures: UpdateFigures
    ) -> LossTerms:
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
            beta=beta,
        )

    def _logps(self, hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])[batch.predicting]
        return token_logprobs(flat, batch.targets, self.policy.head, chunk=self.recipe.train.logits_chunk_tokens)
