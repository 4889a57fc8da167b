"""Load the policy that a run trained."""

from __future__ import annotations

from pathlib import Path

from popo_lite.policy.adapters import adapter_folder
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe


def load_trained_policy(recipe: Recipe, adapter: Path) -> Policy:
    """Return the recipe's base with the PEFT adapter in `adapter`, in eval mode. The predictor head is untrained."""
    folder = adapter_folder(adapter, key="run folder")
    # Replaces the adapter that training may have started from, which need not exist any more.
    trained = recipe.with_values({"lora.init_from": str(folder)})
    policy = load_policy(trained)
    policy.model.eval()
    return policy
