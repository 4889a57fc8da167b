"""Load problems with checkable answers and turn them into token ids."""

from __future__ import annotations

from popo_lite.recipe import DatasetRecipe, Recipe
from popo_lite.recipe_rules import is_gym
from popo_lite.tasks.datasets import DatasetTask
from popo_lite.tasks.generated import ArithmeticTask, ComparisonTask, GeneratedTask
from popo_lite.tasks.reasoning_gym import ReasoningGymTask

__all__ = ["ArithmeticTask", "ComparisonTask", "ReasoningGymTask", "Task", "open_tasks"]

Task = GeneratedTask | DatasetTask | ReasoningGymTask
"""A source of problems; `train_problem` and `held_out` are pure functions of their arguments."""


def open_tasks(recipe: Recipe) -> tuple[Task, Task]:
    """Return (task to train on, task to evaluate on). Raises DataError if a dataset cannot be used."""
    data, evaluation = recipe.data, recipe.eval
    curriculum = data.curriculum if data.curriculum.enabled else None
    train = _generated(data, data.digits)
    if is_gym(data):
        train = ReasoningGymTask(data, section="data", curriculum=curriculum)
    elif train is None:
        kept_back = evaluation.problems if evaluation.dataset is None else 0
        levels = curriculum.column if curriculum else None
        train = DatasetTask(data, section="data", held_out=kept_back, level_column=levels)
    if evaluation.dataset is None:
        return train, train
    if is_gym(evaluation):
        return train, ReasoningGymTask(evaluation, section="eval")
    return train, _generated(evaluation, data.digits) or DatasetTask(evaluation, section="eval")


def _generated(part: DatasetRecipe, digits: int) -> Task | None:
    if part.dataset == "arithmetic":
        return ArithmeticTask(digits)
    return ComparisonTask() if part.dataset == "comparison" else None
