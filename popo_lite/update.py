"""The update of a step: targets of the similarity term, gradients over micro-batches, optimizer, siamese.

`Learner` holds the policy with its siamese and optimizer; the trainer calls its stages in order.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from popo_lite.balance import divide
from popo_lite.chunks import chunk_tokens
from popo_lite.distributed import Ranks
from popo_lite.errors import EngineError, NotFiniteError
from popo_lite.fused import fused_loss, refuse_without_compiler, score
from popo_lite.micro_batches import MicroBatch, MicroBatches
from popo_lite.objective import LOSSES, StepPlan, Tokens, noisy_target, plan_step, similarity_loss
from popo_lite.policy.policy import Policy
from popo_lite.policy.siamese import Siamese
from popo_lite.recipe import GrpoObjective, OptimizerRecipe, PopoObjective, Recipe
from popo_lite.seeding import stream_seed
from popo_lite.types import Group, Rollout

# --------------------------------------------------------------------------- optimizer


def build_optimizer(policy: Policy, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Build AdamW over adapters and predictor head; vectors (biases, norms, DoRA magnitudes) do not decay.

    Each parameter group keeps its peak learning rate as `peak_lr`.
    """
    groups = []
    adapters, head = [parameter for _, parameter in policy.adapter_parameters()], list(policy.predictor.parameters())
    for parameters, rate in ((adapters, recipe.learning_rate), (head, recipe.head_learning_rate)):
        for decay, is_matrix in ((recipe.weight_decay, True), (0.0, False)):
            members = [parameter for parameter in parameters if (parameter.ndim > 1) == is_matrix]
            if members:
                groups.append({"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    if recipe.name == "adamw":
        # Fused on a GPU: one kernel, and no temporary as large as what is trained.
        return torch.optim.AdamW(groups, fused=policy.device.type == "cuda")
    import bitsandbytes as bnb

    kind = bnb.optim.AdamW8bit if recipe.name == "adamw8bit" else bnb.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups)
    return optimizer


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the optimizer's moments to `device`. Step counts stay, and so does paged state, which the driver moves."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1 and not getattr(value, "is_paged", False):
                state[name] = value.to(device)


def learning_rate_factor(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """Return the fraction of the peak learning rate at `step`: linear warm-up, then the recipe's schedule down to 0."""
    warmup = round(recipe.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 1.0 - progress if recipe.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


# --------------------------------------------------------------------------- the update

EXPLODES = 1_000
"""An update is skipped if its gradient is clipped and its norm exceeds this many times the median of recent norms."""
RECENT_NORMS, ENOUGH_NORMS = 50, 10
"""The most norms that the median is taken of, and the fewest."""


def gradient_problem(norm: float, recent: Sequence[float], max_norm: float) -> str | None:
    """Return why an update with a gradient of this norm is skipped, or None. `max_norm` is where clipping starts."""
    if not math.isfinite(norm):
        return "the gradient is not finite"
    usual = statistics.median(recent) if len(recent) >= ENOUGH_NORMS else math.inf
    if norm > max(EXPLODES * usual, max_norm):
        return f"the gradient explodes: its norm is {norm:.3g}, and {usual:.3g} in recent steps"
    return None


START_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24
"""Factor of the loss in float16, in which most gradients would be 0 otherwise, and the most that it grows to."""
SCALE_DIVISOR = 16.0
"""An update whose gradients overflow is repeated with a scale this many times smaller."""
SCALE_GROWS_EVERY = 50
"""Steps after which the scale doubles."""


@dataclass(kw_only=True)
class UpdateResult:
    """Sums over a step's micro-batches: `sums` by metric, and policy - sampler log-probs, `log_ratios` [N].

    `rank_tokens` are the tokens that each rank forwarded, all together in `micro_batches` passes; `reduced_bytes` of
    gradients were summed over the ranks.
    """

    sums: dict[str, float] = field(default_factory=dict)
    log_ratios: list[Tensor] = field(default_factory=list)
    micro_batches: int = 0
    rank_tokens: list[int] = field(default_factory=list)
    reduced_bytes: int | None = None
    grad_norm: float = math.nan
    update_norm: float | None = None

    @property
    def entropy(self) -> float:
        """Mean entropy of the completion tokens whose entropy counts, nats."""
        return -self.sums["loss_entropy"]

    @property
    def tokens(self) -> int:
        """Tokens forwarded by all ranks."""
        return sum(self.rank_tokens)

    @property
    def gap_mean(self) -> float:
        """Mean |sampler - policy| log-prob of the trained tokens, nats."""
        return float(torch.cat(self.log_ratios).abs().mean())

    def metrics(self, plan: StepPlan) -> dict[str, Any]:
        """Return the metrics that the update decides (`popo_lite.metrics.METRICS`).

        `logp_k3` is the mean of exp(r) - 1 - r, r the log-ratio: an unbiased estimate of KL(sampler || policy) that is
        never negative (Schulman 2020).
        """
        ratios = torch.cat(self.log_ratios)
        gaps = ratios.abs().sort().values
        return {
            **self.sums,
            "entropy": self.entropy,
            "effective_sample_size": _mean([size for size, _ in plan.sample_sizes]),
            "effective_sample_ratio": _mean([size / count for size, count in plan.sample_sizes]),
            "logp_gap_mean": self.gap_mean,
            "logp_gap_p99": float(gaps[math.ceil(0.99 * len(gaps)) - 1]),
            "logp_gap_max": float(gaps[-1]),
            "logp_k3": float((ratios.exp() - 1 - ratios).mean()),
            "grad_norm": self.grad_norm,
            "update_norm": self.update_norm,
            "trained_tokens": self.tokens,
            "shared_tokens": plan.sequence_tokens - self.tokens,
            "micro_batches": self.micro_batches,
            "rank_tokens_ratio": max(self.rank_tokens) * len(self.rank_tokens) / self.tokens,
            "reduced_bytes": self.reduced_bytes,
        }


def _to_host(terms: dict[str, Tensor], log_ratios: Tensor) -> tuple[dict[str, float], Tensor]:
    """Return a micro-batch's terms and log-ratios as numbers and as float64 on the host."""
    values = torch.stack([term.detach() for term in terms.values()]).tolist()  # one transfer
    return dict(zip(terms, values, strict=True)), log_ratios.cpu().double()


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


class Learner:
    """The policy with its siamese and optimizer. Nothing here samples, grades, records or saves."""

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        *,
        notify: Callable[[str], None],
        memory_advice: Callable[[], str],
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe, self.policy, self.ranks = recipe, policy, ranks or Ranks()
        self.siamese = Siamese(policy.trainable_parameters(), recipe.siamese.tau)
        self.optimizer = build_optimizer(policy, recipe.optimizer)
        self.micro_batches = MicroBatches(
            recipe.train.tokens_per_microbatch,
            policy,
            notify=notify,
            memory_advice=memory_advice,
        )
        self.loss_scale = START_SCALE if policy.head.weight.dtype == torch.float16 else 1.0
        self._chunk = chunk_tokens(policy.head.weight.shape[0], memory_bytes=recipe.train.logits_mib * 2**20)
        self._compile_rows = recipe.train.compile_loss and policy.device.type == "cuda"
        if self._compile_rows:
            refuse_without_compiler(policy.head)  # here, not after the rollouts of the first step

    def plan(self, groups: Sequence[Group]) -> StepPlan | None:
        """Return what the step trains on, with log-probs for the weights from the sampler or a no-grad pass."""
        self.micro_batches.tokens.clear()
        objective = self.recipe.objective
        from_trainer = (
            isinstance(objective, PopoObjective)
            and objective.weights_from == "trainer"
            and objective.weights != "uniform"
        )
        return plan_step(
            groups,
            objective,
            max_completion_length=self.recipe.rollout.max_completion_length,
            mean_logps=self._policy_mean_logps if from_trainer else None,
        )

    def part(self, plan: StepPlan) -> StepPlan:
        """Return the part of `plan` that this rank trains on."""
        return plan.part(self._divide([sequence.rollout for sequence in plan.sequences]))

    def _divide(self, rollouts: Sequence[Rollout]) -> list[int]:
        return divide(rollouts, self.ranks.size, shared_prefix=self.policy.shared_prefix)[self.ranks.rank]

    @torch.no_grad()
    def siamese_targets(self, step: int, plan: StepPlan) -> Tensor | None:
        """Return the noisy targets q [S, D] of the plan's S sequences, or None without a similarity term.

        The siamese makes them: the averaged weights stand in the policy's modules meanwhile. Rows of sequences without
        a positive weight are 0.
        """
        objective = self.recipe.objective
        if not isinstance(objective, PopoObjective) or not objective.similarity_coef:
            return None
        targets = next(self.policy.predictor.parameters()).new_zeros(
            len(plan.sequences), self.policy.head.weight.shape[1]
        )
        positives = plan.positives
        rollouts = [plan.sequences[index].rollout for index in positives]
        self.policy.model.eval()

        def fill(batch: MicroBatch) -> None:
            features = batch.mean_features(self.policy.hidden_states(batch.input_ids, batch.row))
            if objective.target == "predictor":
                features = self.policy.predictor(features)
            noise = torch.stack([self._noise(step, rollouts[member], features) for member in batch.members])
            rows = [positives[member] for member in batch.members]
            targets[rows] = noisy_target(features, noise, objective.noise_sigma)

        with self.siamese.swapped():
            self.micro_batches.run(rollouts, fill, stage="siamese")
        return targets

    def reference_logps(self, plan: StepPlan) -> list[Tensor] | None:
        """Return each sequence's log-probs under the base without adapter, or None without a KL term."""
        objective = self.recipe.objective
        if not isinstance(objective, GrpoObjective) or not objective.kl_coef:
            return None
        logps_of: dict[int, Tensor] = {}
        with self.policy.model.disable_adapter():
            for batch, logps in self._score([sequence.rollout for sequence in plan.sequences], stage="reference"):
                logps_of.update(zip(batch.members, batch.by_sequence(logps), strict=True))
        return [logps_of[member] for member in range(len(plan.sequences))]

    def backward(
        self,
        plan: StepPlan,
        targets: Tensor | None,
        reference_logps: Sequence[Tensor] | None,
        entropy_coef: float,
        *,
        progress: Callable[[int], None],
    ) -> UpdateResult:
        """Leave the step's clipped gradients in the parameters: the sum over micro-batches, however they are split.

        `plan`, `targets` and `reference_logps` are this rank's part, the gradients and the result those of all ranks.
        A collective, also for a rank that has no sequences.

        In float16 all is done again with a smaller loss scale while gradients overflow. `progress` gets the number of
        sequences that are done, a negative one if they are done again, and may raise.
        """
        start, found = self.loss_scale, False
        try:
            result = self._backward(plan, targets, reference_logps, entropy_coef, progress)
            while not (found := math.isfinite(result.grad_norm)) and self.loss_scale > SCALE_DIVISOR:
                self.loss_scale /= SCALE_DIVISOR
                self.micro_batches.tokens["update"] = 0
                progress(-len(plan.sequences))
                result = self._backward(plan, targets, reference_logps, entropy_coef, progress)
        finally:
            if not found:  # no scale helps, or the step was not finished and is done again with this one
                self.loss_scale = start
        self._add_up(result)
        return result

    def _backward(
        self,
        plan: StepPlan,
        targets: Tensor | None,
        reference_logps: Sequence[Tensor] | None,
        entropy_coef: float,
        progress: Callable[[int], None],
    ) -> UpdateResult:
        """Do `backward` once, with the current loss scale."""
        result = UpdateResult()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.model.train()

        def accumulate(batch: MicroBatch) -> None:
            loss, terms, log_ratios = self._loss(plan, batch, targets, reference_logps, entropy_coef)
            loss.backward()
            values, log_ratios = _to_host(terms, log_ratios)
            for name, value in values.items():
                result.sums[name] = result.sums.get(name, 0.0) + value
            result.log_ratios.append(log_ratios)
            progress(len(batch.members))

        def restart(done: int) -> None:
            # What ran out of memory may have added part of its gradients to the step's: a second set costs too much.
            self.optimizer.zero_grad(set_to_none=True)
            result.sums.clear()
            result.log_ratios.clear()
            progress(-done)

        rollouts = [sequence.rollout for sequence in plan.sequences]
        result.micro_batches = self.micro_batches.run(rollouts, accumulate, stage="update", restart=restart)
        parameters = [parameter for _, parameter in self.policy.trainable_parameters()]
        if self.ranks.size > 1:
            result.reduced_bytes = self.ranks.sum_gradients(parameters)
        if self.loss_scale != 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.loss_scale)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Cards of several kinds may round the norm differently: all take that of rank 0, and so stay equal.
        norm.fill_(self.ranks.from_first(norm.item()))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.optimizer.max_grad_norm, norm)
        result.grad_norm = norm.item()
        return result

    def _add_up(self, result: UpdateResult) -> None:
        """Replace this rank's sums by those of all ranks, which add them in the same order."""
        batches = self.micro_batches
        mine = (result.sums, result.log_ratios, result.micro_batches, batches.tokens, batches.budget_tokens)
        parts = self.ranks.gather(mine)
        names = dict.fromkeys(name for sums, *_ in parts for name in sums)
        result.sums = {name: sum(sums.get(name, 0.0) for sums, *_ in parts) for name in names}
        result.log_ratios = [ratios for _, log_ratios, *_ in parts for ratios in log_ratios]
        result.micro_batches = sum(count for _, _, count, *_ in parts)
        result.rank_tokens = [tokens["update"] for *_, tokens, _ in parts]
        batches.tokens = sum((tokens for *_, tokens, _ in parts), Counter())
        batches.budget_tokens = min(budget for *_, budget in parts)

    def _loss(
        self,
        plan: StepPlan,
        batch: MicroBatch,
        targets: Tensor | None,
        reference_logps: Sequence[Tensor] | None,
        entropy_coef: float,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return a micro-batch's share of the scaled loss, of the loss and its terms by metric, and of the log-ratios.

        The log-ratios are policy - sampler log-probs [N], float64.
        """
        objective, head, scale = self.recipe.objective, self.policy.head, self.loss_scale
        sequences = [plan.sequences[member] for member in batch.members]
        hidden = self.policy.hidden_states(batch.input_ids, batch.row)

        def of_sequences(values: Sequence[float]) -> Tensor:
            return hidden.new_tensor(values, dtype=head.compute_dtype)

        weights = of_sequences([sequence.weight for sequence in sequences])
        divisors = of_sequences([sequence.divisor for sequence in sequences])
        counts_in_entropy = of_sequences([float(sequence.counts_in_entropy) for sequence in sequences])
        tokens = Tokens(
            sampler_logps=batch.sampler_logps.to(head.compute_dtype),
            reference_logps=None
            if reference_logps is None
            else torch.cat([reference_logps[member] for member in batch.members]),
            weights=weights[batch.sequence_of_token],
            divisors=divisors[batch.sequence_of_token],
            entropy_weights=counts_in_entropy[batch.sequence_of_token] / plan.entropy_tokens,
        )
        loss_of_tokens = LOSSES[objective.algorithm]

        def scaled_loss(logps: Tensor, entropies: Tensor, part: slice) -> Tensor:
            # Scaled here: the fused loss stores gradients in the head's dtype, and float16 would round most to 0.
            return scale * loss_of_tokens(logps, entropies, tokens.at(part), objective, entropy_coef)

        output = fused_loss(
            batch.predicting(hidden),
            batch.targets,
            head,
            scaled_loss,
            chunk=self._chunk,
            compile_rows=self._compile_rows,
        )
        mean_entropy = (tokens.entropy_weights * output.entropies).sum()
        loss, of_tokens = output.loss, output.loss.detach() / scale
        terms = {
            "loss": of_tokens,
            "loss_policy": of_tokens + entropy_coef * mean_entropy,
            "loss_entropy": -mean_entropy,
        }
        if targets is not None and isinstance(objective, PopoObjective):
            predictions = self.policy.predictor(batch.mean_features(hidden))
            similarity, cosine = similarity_loss(
                predictions, targets[list(batch.members)], weights.clamp(min=0) / plan.prompts
            )
            loss = loss + scale * objective.similarity_coef * similarity
            terms["loss"] = of_tokens + objective.similarity_coef * similarity
            terms |= {"loss_similarity": similarity, "siamese_cosine": cosine}
        return loss, terms, output.logps - batch.sampler_logps

    def prepare(self) -> list[Tensor]:
        """Return a copy of the trained weights, with the optimizer's state on the device: all memory `apply` needs.

        Separate from `apply` so that running out of memory changes nothing. (The optimizer makes its state in its
        first step, when there is nothing to lose.)
        """
        move_state(self.optimizer, self.policy.device)
        return [parameter.detach().clone() for _, parameter in self.policy.trainable_parameters()]

    def apply(self, result: UpdateResult, before: list[Tensor], rate_factor: float) -> None:
        """Move optimizer, siamese and version together. `before` comes from `prepare` and is emptied.

        `rate_factor` is the fraction of the peak learning rate. Raises NotFiniteError if the weights are damaged now.
        """
        set_learning_rate(self.optimizer, rate_factor)
        self.optimizer.step()
        self.policy.version += 1  # before any check can fail: no checkpoint of this version holds these weights
        if self.recipe.rollout.vllm.enable_sleep_mode:
            # The optimizer runs once a step; until then its memory belongs to the rollout engine.
            move_state(self.optimizer, torch.device("cpu"))
        torch._foreach_sub_(before, [parameter.detach() for _, parameter in self.policy.trainable_parameters()])
        result.update_norm = float(torch.stack(torch._foreach_norm(before)).double().norm())
        before.clear()  # the caller's list would keep them while the rollout engine wakes up
        if not math.isfinite(result.update_norm):
            self.refuse_not_finite()
        self.siamese.update(result.update_norm)
        if self.loss_scale != 1 and self.policy.version % SCALE_GROWS_EVERY == 0:
            self.loss_scale = min(2 * self.loss_scale, LARGEST_SCALE)

    def refuse_divergence(self) -> None:
        """Raise EngineError unless all ranks hold the same trained and averaged weights, bit for bit. A collective."""
        if self.ranks.size == 1:
            return
        digest = hashlib.blake2b()
        for _, parameter in self.policy.trainable_parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
        for average in self.siamese.average.values():
            digest.update(average.cpu().numpy().tobytes())
        digests = self.ranks.gather(digest.hexdigest())
        if different := [f"rank {rank}" for rank, each in enumerate(digests) if each != digests[0]]:
            what = f"other weights than rank 0's are held by {' and '.join(different)}, and all must be the same"
            next_step = "run on cards of one kind with the same versions; if they are, test their memory"
            raise EngineError(what, next_step=next_step)

    def refuse_not_finite(self) -> None:
        """Raise NotFiniteError if a trained or averaged weight is not finite: such weights are never saved."""
        tensors = [parameter.detach() for _, parameter in self.policy.trainable_parameters()]
        norms = torch._foreach_norm([*tensors, *self.siamese.average.values()], torch.inf)
        if not bool(torch.stack(norms).isfinite().all()):
            next_step = "lower optimizer.learning_rate, then resume from the newest checkpoint"
            raise NotFiniteError("the trained weights are not finite", next_step=next_step)

    @property
    def equals_base(self) -> bool:
        """True as long as every B is 0, so that the adapter adds nothing. Never for DoRA, which also scales."""
        names = ("lora_B", "lora_embedding_B")
        factors = [p for name, p in self.policy.adapter_parameters() if any(part in name for part in names)]
        return not self.recipe.lora.dora and not any(bool(factor.any()) for factor in factors)

    def gap_mean(self, rollouts: Sequence[Rollout]) -> float:
        """Return the mean |sampler - policy| log-prob of the rollouts' tokens in nats, by a forward pass."""
        gaps = [(logps - batch.sampler_logps).abs() for batch, logps in self._score(rollouts, stage="weights")]
        return float(torch.cat(gaps).mean())

    def _policy_mean_logps(self, rollouts: Sequence[Rollout]) -> list[float]:
        mine, means = self._divide(rollouts), dict[int, float]()
        for batch, logps in self._score([rollouts[index] for index in mine], stage="weights"):
            values = torch.stack([part.mean() for part in batch.by_sequence(logps)]).tolist()  # one transfer
            means |= {mine[member]: mean for member, mean in zip(batch.members, values, strict=True)}
        everywhere = {index: mean for part in self.ranks.gather(means) for index, mean in part.items()}
        return [everywhere[index] for index in range(len(rollouts))]

    @torch.no_grad()
    def _score(self, rollouts: Sequence[Rollout], *, stage: str) -> list[tuple[MicroBatch, Tensor]]:
        """Return micro-batches of `rollouts` with the policy's log-probs [N] of their completion tokens."""
        self.policy.model.eval()
        scored: list[tuple[MicroBatch, Tensor]] = []

        def add(batch: MicroBatch) -> None:
            hidden = batch.predicting(self.policy.hidden_states(batch.input_ids, batch.row))
            logps, _ = score(
                hidden, batch.targets, self.policy.head, chunk=self._chunk, compile_rows=self._compile_rows
            )
            scored.append((batch, logps))

        self.micro_batches.run(rollouts, add, stage=stage)
        return scored

    def _noise(self, step: int, rollout: Rollout, like: Tensor) -> Tensor:
        """Draw standard normal [D] from (seed, step, problem, sample), whatever batch the rollout is in."""
        source = torch.Generator().manual_seed(
            stream_seed("noise", self.recipe.train.seed, step, rollout.prompt.problem.id, rollout.index)
        )
        return torch.randn(like.shape[-1], generator=source, dtype=torch.float64).to(like)
