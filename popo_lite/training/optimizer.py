"""AdamW over adapters and predictor head, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch

from popo_lite.policy.policy import Policy
from popo_lite.recipe import OptimizerRecipe


def build_optimizer(policy: Policy, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """Three groups: adapters, predictor weights, and vectors (biases, norms, DoRA magnitudes) without decay.

    Each group keeps its peak learning rate as `peak_lr`.
    """
    adapters = [parameter for _, parameter in policy.adapter_parameters()]
    head = list(policy.predictor.parameters())
    groups = []
    for parameters, rate in ((adapters, recipe.learning_rate), (head, recipe.head_learning_rate)):
        for decays in (True, False):
            members = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
            if members:
                groups.append(
                    {
                        "params": members,
                        "lr": rate,
                        "peak_lr": rate,
                        "weight_decay": recipe.weight_decay if decays else 0.0,
                    }
                )
    if recipe.name == "adamw":
        # Fused where there is a GPU: one kernel, and no temporary as large as what is trained.
        return torch.optim.AdamW(groups, fused=policy.device.type == "cuda")
    import bitsandbytes as bnb

    kind = bnb.optim.AdamW8bit if recipe.name == "adamw8bit" else bnb.optim.PagedAdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups)
    return optimizer


def move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the optimizer's state to `device`, all but step counts, which stay where the optimizer has put them.

    Paged state stays where it is: the driver moves its pages.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and not getattr(value, "is_paged", False):
                state[name] = value.to(device)


def learning_rate_factor(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear warm-up, then the recipe's schedule down to 0."""
    warmup = round(recipe.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return 1.0 - progress if recipe.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate by `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
