"""Load problems with checkable answers and turn them into token ids."""

from __future__ import annotations

from popo_lite.recipe import DatasetRecipe, Recipe
from popo_lite.tasks.datasets import DatasetTask
from popo_lite.tasks.generated import ArithmeticTask, ComparisonTask, GeneratedTask

__all__ = ["ArithmeticTask", "ComparisonTask", "Task", "open_tasks"]

Task = GeneratedTask | DatasetTask
"""A source of problems; `train_problem` and `held_out` are pure functions of their arguments."""


def open_tasks(recipe: Recipe) -> tuple[Task, Task]:
    """Return (task to train on, task to evaluate on). Raises DataError if a dataset cannot be used."""
    data, evaluation = recipe.data, recipe.eval
    kept_back = evaluation.problems if evaluation.dataset is None else 0
    train = _generated(data, data.digits) or DatasetTask(data, section="data", held_out=kept_back)
    if evaluation.dataset is None:
        return train, train
    return train, _generated(evaluation, data.digits) or DatasetTask(evaluation, section="eval")


def _generated(part: DatasetRecipe, digits: int) -> GeneratedTask | None:
    if part.dataset == "arithmetic":
        return ArithmeticTask(digits)
    return ComparisonTask() if part.dataset == "comparison" else None
