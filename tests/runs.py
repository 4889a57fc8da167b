"""Run folders without the time that training takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder

EVALUATION = {
    "problems": 200,
    "samples_per_problem": 1,
    "pass_at_1": 0.295,
    "pass_at_k": {"1": 0.295},
    "task_figures": {"step_by_step_ratio": 0.3},
    "truncated_ratio": 0.0,
    "completion_tokens_mean": 12.4,
}
SUMMARY = {
    "steps": 60,
    "before": EVALUATION,
    "after": {**EVALUATION, "pass_at_1": 0.965, "pass_at_k": {"1": 0.965}, "completion_tokens_mean": 23.5},
}


def finished_run(path: Path, *overrides: str, noise: float = 0.02) -> RunFolder:
    """A run folder as `popo-lite train` leaves it, its two adapters moved at random instead of by training."""
    recipe = load_recipe("tiny_cpu", overrides)
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.recipe_path.write_text(dump_recipe(recipe))
    policy = load_policy(recipe)
    source = torch.Generator().manual_seed(0)
    for folder in (run.adapter, run.siamese):
        with torch.no_grad():
            for _, parameter in policy.adapter_parameters():
                parameter.add_(noise * torch.randn(parameter.shape, generator=source).to(parameter))
        save_adapter(policy.model, folder, base_id=recipe.model.id)
    run.summary_path.write_text(json.dumps(SUMMARY))
    return run
