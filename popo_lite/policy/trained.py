"""A policy as a run left it, to be measured, asked or exported."""

from __future__ import annotations

from pathlib import Path

from popo_lite.policy.adapters import adapter_folder
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe


def load_trained_policy(recipe: Recipe, adapter: Path) -> Policy:
    """The recipe's base with the adapter in `adapter` (PEFT format), in eval mode. The predictor head is untrained."""
    folder = adapter_folder(adapter, key="run folder")
    # The run's own adapter stands in for the one it may have started from, which may be gone by now.
    trained = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"init_from": str(folder)})})
    policy = load_policy(trained)
    policy.model.eval()
    return policy
