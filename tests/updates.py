"""One update of a trainer on made-up rollouts, for the tests that hold updates against each other."""

from __future__ import annotations

import torch

from popo_lite.callbacks import Callback
from popo_lite.objective import StepPlan
from popo_lite.recipe import Recipe
from popo_lite.tools.plan.advice import memory_advice
from popo_lite.trainer import Trainer
from popo_lite.types import Completion, FinishReason, Group, Outcome, Prompt, Reward, Rollout
from popo_lite.update import UpdateResult


def trainer_of(recipe: Recipe, callback: Callback | None = None) -> Trainer:
    """A trainer as the command opens it."""
    return Trainer(recipe, callback or Callback(), memory_advice=lambda: memory_advice(recipe))


def groups_of(trainer: Trainer, *, hopeless: int = 1) -> list[Group]:
    """Five prompts with 1, 3, 4, 2 and 4 of 4 right, answers of very different lengths, and `hopeless` without any.

    Every second answer is a conversation: some of its tokens are an environment's.
    """
    torch.manual_seed(7)
    groups = []
    for number, right in enumerate([1, 3, 4, 2, 4] + [0] * hopeless):
        problem = trainer.train_task.train_problem(0, number)
        prompt = Prompt(problem=problem, token_ids=trainer.renderer.token_ids(problem))
        rollouts = []
        for index in range(4):
            length = 3 + 7 * index + 5 * number
            mask = tuple(not length // 3 <= place < length // 2 for place in range(length)) if index % 2 else None
            own = length if mask is None else sum(mask)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    completion=Completion(
                        token_ids=tuple(torch.randint(5, 300, (length,)).tolist()),
                        sampler_logps=tuple((-torch.rand(own, dtype=torch.float64)).tolist()),
                        loss_mask=mask,
                        finish_reason=FinishReason.STOP,
                        text="",
                    ),
                    reward=Reward(value=float(index < right), outcome=Outcome.CORRECT, positive=index < right),
                    policy_version=0,
                    index=index,
                )
            )
        groups.append(Group(rollouts=tuple(rollouts)))
    return groups


def backward(trainer: Trainer, plan: StepPlan) -> UpdateResult:
    """Run the passes of step 0 from the siamese to the gradients."""
    return trainer.learner.backward(
        plan,
        trainer.learner.siamese_targets(0, plan),
        trainer.learner.reference_logps(plan),
        entropy_coef=trainer.cursor.entropy_coef,
        progress=lambda _: None,
    )


def update(trainer: Trainer, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Return the gradients of one step, and its loss as `loss`."""
    plan = trainer.learner.plan(groups)
    clip, trainer.recipe.optimizer.__dict__["max_grad_norm"] = trainer.recipe.optimizer.max_grad_norm, 1e30
    result = backward(trainer, plan)
    trainer.recipe.optimizer.__dict__["max_grad_norm"] = clip
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in trainer.policy.trainable_parameters()
    }
    trainer.learner.optimizer.zero_grad(set_to_none=True)
    assert result.grad_norm > 0
    return {
        **found,
        "loss": torch.tensor(result.sums["loss"], dtype=torch.float64),
        "micro_batches": torch.tensor(result.micro_batches),
    }


def assert_same(found, expected):
    found, expected = ({k: v for k, v in one.items() if k != "micro_batches"} for one in (found, expected))
    assert found.keys() == expected.keys()
    norm = torch.stack([tensor.norm() for name, tensor in expected.items() if name != "loss"]).norm()
    for name, tensor in expected.items():
        scale = float(norm) if name != "loss" else 1.0
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-12 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
