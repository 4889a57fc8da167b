"""A policy as a run left it, to be measured, asked or exported."""

from __future__ import annotations

from pathlib import Path

from popo_lite.policy.adapters import adapter_folder, load_adapter_weights
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe


def load_trained_policy(recipe: Recipe, adapter: Path) -> Policy:
    """The recipe's base with the adapter in `adapter` (PEFT format), in eval mode. The predictor head is untrained."""
    policy = load_policy(recipe)
    load_adapter_weights(policy.model, adapter_folder(adapter, key="run folder"))
    policy.model.eval()
    return policy
