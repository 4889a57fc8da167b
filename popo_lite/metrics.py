"""Define every metric of a training step once: its name, label, unit and meaning; and compute some. Free of torch.

A step's record, one line of metrics.jsonl, maps these names to values. Views, comparisons and docs read this schema.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from popo_lite.redaction import redact
from popo_lite.types import FinishReason, Group, count_outcomes

if TYPE_CHECKING:
    from popo_lite.tasks import Task

Unit = Literal["count", "tokens", "nats", "ratio", "number", "seconds", "tokens/s", "bytes", "text", "counts", "ratios"]

StepRecord = Mapping[str, Any]
"""Metric name -> value. A value is None if it does not exist for the step, such as the loss of a skipped step."""


@dataclass(frozen=True)
class Metric:
    """Describe a metric. `ratios`, `counts`, and most in `seconds` and `tokens/s` map a figure, outcome or stage.

    `trl` is the name of the same quantity in TRL's GRPOTrainer, which trackers get as well; docs/trackers.md has what
    differs. For a metric that is a mapping, {} stands for the key; a name without {} is that of the sum.
    """

    label: str
    unit: Unit
    meaning: str
    trl: str | None = None


METRICS: Mapping[str, Metric] = {
    "step": Metric("step", "count", "Number of the step, from 0."),
    "policy_version": Metric("policy version", "count", "Optimizer steps so far."),
    "lag": Metric("lag", "count", "Optimizer steps between the policy that sampled and the one trained, 0 or 1."),
    "skipped_reason": Metric("skipped", "text", "Why the step changed no weights; None if it did."),
    # what was sampled
    "level": Metric("level", "count", "Difficulty of the problems, from 0 (data.curriculum)."),
    "prompts": Metric("prompts", "count", "Prompts sampled."),
    "prompts_skipped": Metric("prompts skipped", "count", "Known prompts left out (rollout.skip_known)."),
    "prompts_with_positive": Metric("prompts with a positive", "count", "Prompts with at least one positive."),
    "prompts_with_positive_ratio": Metric("prompts with a positive", "ratio", "The same as a fraction of prompts."),
    "rollouts": Metric("rollouts", "count", "Answers sampled."),
    "positives": Metric("positives", "count", "Rollouts that count as right (reward.positive_if)."),
    "groups_none_right": Metric("none right", "count", "Groups without a positive."),
    "groups_some_right": Metric("some right", "count", "Groups with positives and others."),
    "groups_all_right": Metric("all right", "count", "Groups of positives only."),
    "groups_ungraded": Metric("ungraded", "count", "Groups in which no answer could be graded."),
    "outcomes": Metric("outcomes", "counts", "Rollouts by outcome of grading."),
    "pass_rate": Metric("pass rate", "ratio", "Fraction of positives in the first round of rollouts."),
    "reward_mean": Metric(
        "reward", "ratio", "Mean reward of the answers that could be graded, first round.", trl="reward"
    ),
    "equal_rewards_ratio": Metric(
        "equal rewards", "ratio", "Fraction of graded groups whose rewards are all equal.", trl="frac_reward_zero_std"
    ),
    "rewards": Metric(
        "rewards", "ratios", "Mean value of each reward function where it applies, first round.", trl="rewards/{}/mean"
    ),
    "unique_answers_mean": Metric("different", "number", "Different final answers per prompt, first round."),
    "top_shape": Metric("top shape", "text", "Most frequent shape (shapes.py) of positives, shared by two prompts."),
    "top_shape_ratio": Metric("same shape", "ratio", "Fraction of positives with this shape."),
    "top_shape_start_ratio": Metric("at start", "ratio", "Fraction of the first step's answers with this shape."),
    "task_figures": Metric("task", "ratios", "Figures that the task itself defines, first round."),
    "truncated_ratio": Metric(
        "truncated",
        "ratio",
        "Fraction of answers cut off at the length limit, first round.",
        trl="completions/clipped_ratio",
    ),
    "completion_tokens_mean": Metric(
        "mean tokens", "tokens", "Mean length of answers, first round.", trl="completions/mean_length"
    ),
    "positive_tokens_mean": Metric("positive tokens", "tokens", "Mean length of positives."),
    "rollout_tokens": Metric("rollout tokens", "tokens", "Tokens sampled."),
    "rollouts_per_positive_prompt": Metric("rollouts per hit", "number", "Rollouts per prompt with a positive."),
    "rollout_tokens_per_positive_prompt": Metric("tokens per hit", "tokens", "Tokens per prompt with a positive."),
    "sampled_entropy": Metric("sampled entropy", "nats", "Mean -log-prob of sampled tokens, first round, all answers."),
    "tokens_of_all": Metric("tokens of all", "tokens", "Prompt and answer tokens of all rollouts."),
    "tokens_of_positives": Metric("tokens of positives", "tokens", "The same of the positives."),
    "tokens_of_mixed_groups": Metric("tokens of mixed groups", "tokens", "The same of groups with unequal rewards."),
    "trained_tokens": Metric("trained tokens", "tokens", "Tokens that the update forwarded."),
    "shared_tokens": Metric("shared tokens", "tokens", "Tokens saved by computing prompts and equal answers once."),
    # what was learned from it
    "loss": Metric("loss", "number", "The step's loss.", trl="loss"),
    "loss_policy": Metric("policy", "number", "Policy term: L_nll, or GRPO's surrogate with its KL term."),
    "loss_similarity": Metric("similarity", "number", "L_sim, before its coefficient."),
    "loss_entropy": Metric("entropy", "nats", "L_ent, minus the mean entropy, before its coefficient."),
    "entropy": Metric("token entropy", "nats", "Mean entropy over the tokens of the entropy term."),
    "entropy_over_start": Metric("of start", "ratio", "Entropy over that of the first step."),
    "entropy_coef": Metric(
        "entropy_coef", "number", "Coefficient of the entropy term in this step.", trl="entropy_coef"
    ),
    "effective_sample_size": Metric("eff. positives", "number", "1 / sum w^2, mean over prompts."),
    "effective_sample_ratio": Metric("eff. ratio", "ratio", "The same over the number of positives."),
    "siamese_cosine": Metric("cosine", "number", "Weighted mean cosine between predictions and siamese targets."),
    "siamese_drift": Metric("drift", "number", "L2 distance between trained and averaged weights."),
    "siamese_drift_over_bound": Metric("of bound", "ratio", "Drift over the bound of Lemma 3.2."),
    "logp_gap_mean": Metric(
        "logp gap",
        "nats",
        "Mean |sampler - policy| log-prob of the trained tokens, with `lora.dropout`.",
        trl="sampling/sampling_logp_difference/mean",
    ),
    "logp_gap_p99": Metric("logp gap p99", "nats", "99th percentile of the same."),
    "logp_gap_max": Metric("logp gap max", "nats", "Largest of the same.", trl="sampling/sampling_logp_difference/max"),
    "logp_k3": Metric("k3", "nats", "Estimate of KL(sampler || policy) (Schulman 2020)."),
    "grad_norm": Metric("gradient norm", "number", "Global gradient norm before clipping.", trl="grad_norm"),
    "update_norm": Metric("update norm", "number", "L2 norm of the weight change."),
    "learning_rate": Metric("learning rate", "number", "Learning rate of the adapters.", trl="learning_rate"),
    "head_learning_rate": Metric("head learning rate", "number", "Learning rate of the predictor head."),
    "rank_tokens_ratio": Metric("rank balance", "number", "Most tokens that a rank forwarded, over the mean of ranks."),
    "reduced_bytes": Metric("reduced", "bytes", "Gradients summed over ranks; none with one rank."),
    "micro_batches": Metric("micro-batches", "count", "Micro-batches of the update."),
    "microbatch_tokens": Metric("micro-batch tokens", "tokens", "Token budget of a micro-batch."),
    # what it took
    "seconds": Metric("seconds", "seconds", "Wall-clock seconds by stage.", trl="step_time"),
    "seconds_ahead": Metric(
        "seconds ahead", "seconds", "Seconds of rollouts and grading while the step before trained; not in `seconds`."
    ),
    "tokens_per_second": Metric("tokens/s", "tokens/s", "Throughput by stage."),
    "peak_memory_bytes": Metric("peak memory", "bytes", "CUDA: most bytes reserved. CPU: most resident bytes."),
}


def make_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's record: every metric in order, None if `values` lacks it. Raises KeyError for unknown names."""
    if unknown := values.keys() - METRICS.keys():
        raise KeyError(f"not in METRICS: {sorted(unknown)}")
    return {name: values.get(name) for name in METRICS}


def rollout_metrics(groups: Sequence[Group], task: Task, *, first_round: int) -> dict[str, Any]:
    """Return the metrics that rollouts and rewards decide.

    An adaptive budget gives hard prompts more rollouts, so ratios over all rollouts would say how it samples and not
    what the policy does. Those described as "first round" count the first `first_round` rollouts of each prompt.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    first = [rollout for rollout in rollouts if rollout.index < first_round]
    graded = [group for group in groups if any(r.reward.outcome.is_graded for r in group.rollouts)]
    right = [len(group.positives) for group in graded]
    all_right = sum(count == len(group.rollouts) for count, group in zip(right, graded, strict=True))
    with_positive = sum(count > 0 for count in right)
    positives = [rollout for group in groups for rollout in group.positives]
    answers = [{r.reward.answer for r in group.rollouts[:first_round]} - {None} for group in groups]
    tokens = sum(len(r.completion.sampler_logps) for r in rollouts)
    verdicts = [[r for r in group.rollouts if r.reward.outcome.is_graded] for group in graded]
    unequal = [verdict for verdict in verdicts if len({r.reward.value for r in verdict}) > 1]
    values = [r.reward.value for r in first if r.reward.outcome.is_graded]
    return {
        "prompts": len(groups),
        "prompts_with_positive": with_positive,
        "prompts_with_positive_ratio": with_positive / len(groups),
        "rollouts": len(rollouts),
        "positives": len(positives),
        "groups_none_right": right.count(0),
        "groups_some_right": len(graded) - right.count(0) - all_right,
        "groups_all_right": all_right,
        "groups_ungraded": len(groups) - len(graded),
        "outcomes": count_outcomes([rollout.reward for rollout in rollouts]),
        "pass_rate": statistics.fmean(rollout.reward.positive for rollout in first),
        "reward_mean": statistics.fmean(values) if values else None,
        "equal_rewards_ratio": (len(graded) - len(unequal)) / len(graded) if graded else None,
        "rewards": _means([rollout.reward.parts for rollout in first]),
        "unique_answers_mean": statistics.fmean(map(len, answers)),
        "task_figures": dict(task.figures([rollout.completion.text for rollout in first])),
        "truncated_ratio": statistics.fmean(r.completion.finish_reason is FinishReason.LENGTH for r in first),
        "completion_tokens_mean": statistics.fmean(len(r.completion.sampler_logps) for r in first),
        "positive_tokens_mean": statistics.fmean(len(r.completion.sampler_logps) for r in positives)
        if positives
        else None,
        "rollout_tokens": tokens,
        "rollouts_per_positive_prompt": len(rollouts) / with_positive if with_positive else None,
        "rollout_tokens_per_positive_prompt": tokens / with_positive if with_positive else None,
        "sampled_entropy": -statistics.fmean(logp for r in first for logp in r.completion.sampler_logps),
        "tokens_of_all": sum(r.tokens for r in rollouts),
        "tokens_of_positives": sum(r.tokens for r in positives),
        "tokens_of_mixed_groups": sum(r.tokens for verdict in unequal for r in verdict),
    }


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each name's values."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: statistics.fmean(part[name] for part in parts if name in part) for name in names}


def sampler_summary(engine: str, swap_seconds: Sequence[float], records: Sequence[StepRecord]) -> dict[str, Any]:
    """Return the sampler's part of summary.json, over all steps; `swap_seconds` are those of this process.

    `logp_gap` in nats: `mean` and `p99` are means over steps, `max` is the largest of all.
    """
    trained = [record for record in records if record["logp_gap_mean"] is not None]
    over_steps: dict[str, Any] = {"mean": statistics.fmean, "p99": statistics.fmean, "max": max}
    gap = {name: combine(r[f"logp_gap_{name}"] for r in trained) for name, combine in over_steps.items() if trained}
    with_positive = sum(record["prompts_with_positive"] for record in records)
    rollouts, tokens = (sum(record[name] for record in records) for name in ("rollouts", "rollout_tokens"))
    # A run that began with an older version has no seconds ahead.
    seconds = sum(r["seconds"]["rollout"] + (r.get("seconds_ahead") or {}).get("rollout", 0.0) for r in records)
    return {
        "engine": engine,
        "tokens_per_second": tokens / max(1e-9, seconds),
        "swap_seconds": {"median": statistics.median(swap_seconds), "max": max(swap_seconds)} if swap_seconds else None,
        "logp_gap": gap or None,
        "rollouts_per_prompt_with_positive": rollouts / with_positive if with_positive else None,
    }


def sample_views(step: int, groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
    """Return `count` prompts with the texts of a right and a wrong answer (None: no such), those with both first."""
    views = []
    for group in groups:
        # In reverse, so that of the right answers the first remains, and of the wrong ones.
        texts = {r.reward.positive: r.completion.text for r in reversed(group.rollouts)}
        views.append({**_asked(step, group), "right": texts.get(True), "wrong": texts.get(False)})
    return sorted(views, key=lambda view: (view["right"] is None) + (view["wrong"] is None))[:count]


def sample_line(step: int, group: Group) -> dict[str, Any]:
    """Return one line of samples.jsonl: a whole group."""
    answers = [
        {
            "text": rollout.completion.text,
            **({"messages": list(rollout.completion.messages)} if rollout.completion.messages else {}),
            "tokens": len(rollout.completion.token_ids),
            "finish_reason": rollout.completion.finish_reason.value,
            "reward": rollout.reward.value,
            "positive": rollout.reward.positive,
            "rewards": dict(rollout.reward.parts),
            "outcome": rollout.reward.outcome.value,
            "detail": redact(rollout.reward.detail),  # of an error in the user's function, such as a judge's URL
        }
        for rollout in group.rollouts
    ]
    return {**_asked(step, group), "answers": answers}


def _asked(step: int, group: Group) -> dict[str, Any]:
    problem = group.prompt.problem
    return {"step": step, "problem": problem.id, "question": problem.question, "reference": problem.answer}
