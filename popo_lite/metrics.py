"""The metrics of a training step: every name, label, unit and meaning, defined once. Free of torch.

A step's record is a plain mapping from these names to values, written as one line of metrics.jsonl. The live view,
the plain log, comparisons and docs read this schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["count", "tokens", "nats", "ratio", "number", "seconds", "tokens/s", "bytes", "text", "counts"]

StepRecord = Mapping[str, Any]
"""Metric name -> value. A value is None if it does not exist for the step, such as the loss of a skipped step."""


@dataclass(frozen=True)
class Metric:
    """A metric. `ratio` is in [0, 1]; `seconds`, `tokens/s` and `counts` may be mappings by stage or outcome."""

    label: str
    unit: Unit
    meaning: str


METRICS: Mapping[str, Metric] = {
    "step": Metric("step", "count", "Number of the step, from 0."),
    "policy_version": Metric("policy version", "count", "Optimizer steps so far."),
    "skipped_reason": Metric("skipped", "text", "Why the step changed no weights; None if it did."),
    # what was sampled
    "prompts": Metric("prompts", "count", "Prompts sampled."),
    "prompts_skipped": Metric("prompts skipped", "count", "Known prompts left out (rollout.skip_known)."),
    "prompts_with_positive": Metric("prompts with a positive", "count", "Prompts with at least one positive."),
    "prompts_with_positive_ratio": Metric("prompts with a positive", "ratio", "The same as a fraction of prompts."),
    "rollouts": Metric("rollouts", "count", "Answers sampled."),
    "positives": Metric("positives", "count", "Rollouts with a reward above objective.reward_threshold."),
    "groups_none_right": Metric("none right", "count", "Groups without a positive."),
    "groups_some_right": Metric("some right", "count", "Groups with positives and others."),
    "groups_all_right": Metric("all right", "count", "Groups of positives only."),
    "groups_ungraded": Metric("ungraded", "count", "Groups in which no answer could be graded."),
    "outcomes": Metric("outcomes", "counts", "Rollouts by outcome of grading."),
    "pass_rate": Metric("pass rate", "ratio", "Fraction of positives in the first round of rollouts."),
    "unique_answers_mean": Metric("different", "number", "Different final answers per prompt, first round."),
    "task_figures": Metric("task", "ratio", "Figures that the task itself defines, first round."),
    "truncated_ratio": Metric("truncated", "ratio", "Fraction of answers cut off at the length limit, first round."),
    "completion_tokens_mean": Metric("mean tokens", "tokens", "Mean length of answers, first round."),
    "positive_tokens_mean": Metric("positive tokens", "tokens", "Mean length of positives."),
    "rollout_tokens": Metric("rollout tokens", "tokens", "Tokens sampled."),
    "rollouts_per_positive_prompt": Metric("rollouts per hit", "number", "Rollouts per prompt with a positive."),
    "rollout_tokens_per_positive_prompt": Metric("tokens per hit", "tokens", "Tokens per prompt with a positive."),
    "sampled_entropy": Metric("sampled entropy", "nats", "Mean -log-prob of sampled tokens, first round, all answers."),
    "tokens_of_all": Metric("tokens of all", "tokens", "Prompt and answer tokens of all rollouts."),
    "tokens_of_positives": Metric("tokens of positives", "tokens", "The same of the positives."),
    "tokens_of_mixed_groups": Metric("tokens of mixed groups", "tokens", "The same of groups with unequal rewards."),
    "trained_tokens": Metric("trained tokens", "tokens", "Tokens that the update forwarded."),
    # what was learned from it
    "loss": Metric("loss", "number", "The step's loss."),
    "loss_policy": Metric("policy", "number", "Policy term: L_nll, or GRPO's surrogate with its KL term."),
    "loss_similarity": Metric("similarity", "number", "L_sim, before its coefficient."),
    "loss_entropy": Metric("entropy", "nats", "L_ent, minus the mean entropy, before its coefficient."),
    "entropy": Metric("token entropy", "nats", "Mean entropy over the trained completion tokens."),
    "entropy_over_start": Metric("of start", "ratio", "Entropy over that of the first step."),
    "entropy_coef": Metric("entropy_coef", "number", "Coefficient of the entropy term in this step."),
    "effective_sample_size": Metric("eff. positives", "number", "1 / sum w^2, mean over prompts."),
    "effective_sample_ratio": Metric("eff. ratio", "ratio", "The same over the number of positives."),
    "siamese_cosine": Metric("cosine", "number", "Weighted mean cosine between predictions and siamese targets."),
    "siamese_drift": Metric("drift", "number", "L2 distance between trained and averaged weights."),
    "siamese_drift_over_bound": Metric("of bound", "ratio", "Drift over the bound of Lemma 3.2."),
    "logp_gap_mean": Metric("logp gap", "nats", "Mean |sampler - policy| log-prob of the trained tokens."),
    "logp_gap_p99": Metric("logp gap p99", "nats", "99th percentile of the same."),
    "logp_gap_max": Metric("logp gap max", "nats", "Largest of the same."),
    "logp_k3": Metric("k3", "nats", "Estimate of KL(sampler || policy) (Schulman 2020)."),
    "grad_norm": Metric("gradient norm", "number", "Global gradient norm before clipping."),
    "update_norm": Metric("update norm", "number", "L2 norm of the weight change."),
    "learning_rate": Metric("learning rate", "number", "Learning rate of the adapters."),
    "head_learning_rate": Metric("head learning rate", "number", "Learning rate of the predictor head."),
    "micro_batches": Metric("micro-batches", "count", "Micro-batches of the update."),
    "microbatch_tokens": Metric("micro-batch tokens", "tokens", "Token budget of a micro-batch."),
    # what it took
    "seconds": Metric("seconds", "seconds", "Wall-clock seconds by stage."),
    "tokens_per_second": Metric("tokens/s", "tokens/s", "Throughput by stage."),
    "peak_memory_bytes": Metric("peak memory", "bytes", "CUDA: most bytes reserved. CPU: most resident bytes."),
}
