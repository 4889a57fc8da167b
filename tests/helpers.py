"""What several test files use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popo_lite.metrics import make_record


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def record(step: int, **changes: Any) -> dict[str, Any]:
    """The record of a step, as metrics.jsonl has it."""
    values = {
        "step": step,
        "policy_version": step,
        "skipped_reason": None,
        "prompts": 32,
        "prompts_skipped": 0,
        "prompts_with_positive": 19,
        "rollouts": 256,
        "positives": 80,
        "groups_none_right": 12,
        "groups_some_right": 14,
        "groups_all_right": 5,
        "groups_ungraded": 1,
        "outcomes": {"correct": 80, "incorrect": 160, "unparsed": 12, "timeout": 3, "error": 1},
        "pass_rate": 0.11 + 0.01 * step,
        "prompts_with_positive_ratio": 0.6,
        "unique_answers_mean": 3.2,
        "top_shape": "_ is larger than _.",
        "top_shape_ratio": 0.625,
        "top_shape_start_ratio": 0.02,
        "task_figures": {},
        "rewards": {"math": 0.11},
        "truncated_ratio": 0.023,
        "completion_tokens_mean": 143.25,
        "positive_tokens_mean": 120.0,
        "rollout_tokens": 36_000,
        "rollouts_per_positive_prompt": 256 / 19,
        "rollout_tokens_per_positive_prompt": 36_000 / 19,
        "sampled_entropy": 1.3,
        "tokens_of_all": 50_000,
        "tokens_of_positives": 14_000,
        "tokens_of_mixed_groups": 20_000,
        "trained_tokens": 12_000,
        "loss": 0.4312,
        "loss_policy": 0.4421,
        "loss_similarity": 0.0013,
        "loss_entropy": -1.2043,
        "entropy": 1.2043,
        "entropy_over_start": 0.96,
        "entropy_coef": 0.01,
        "effective_sample_size": 3.12,
        "effective_sample_ratio": 0.97,
        "siamese_cosine": 0.9987,
        "siamese_drift": 0.0123,
        "siamese_drift_over_bound": 0.04,
        "logp_gap_mean": 0.0012,
        "logp_gap_p99": 0.02,
        "logp_gap_max": 0.031,
        "logp_k3": 0.001,
        "grad_norm": 0.83,
        "update_norm": 1e-4,
        "learning_rate": 2e-5,
        "head_learning_rate": 1e-3,
        "micro_batches": 4,
        "microbatch_tokens": 8192,
        "seconds": {"rollout": 8.2, "grade": 0.3, "siamese": 0.6, "update": 3.1},
        "tokens_per_second": {"rollout": 4210.0, "update": 3870.0},
        "peak_memory_bytes": 3 * 2**30,
    }
    return make_record(values | changes)
