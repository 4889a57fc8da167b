"""Load problems with checkable answers and turn them into token ids."""

from __future__ import annotations

from popo_lite.recipe import Recipe
from popo_lite.tasks.arithmetic import ArithmeticTask
from popo_lite.tasks.datasets import DatasetTask

__all__ = ["ArithmeticTask", "Task", "open_tasks"]

Task = ArithmeticTask | DatasetTask
"""A source of problems; `train_problem` and `held_out` are pure functions of their arguments."""


def open_tasks(recipe: Recipe) -> tuple[Task, Task]:
    """Return (task to train on, task to evaluate on). Raises DataError if a dataset cannot be used."""
    data, evaluation = recipe.data, recipe.eval
    sums = ArithmeticTask(data.digits)
    kept_back = evaluation.problems if evaluation.dataset is None else 0
    train = sums if data.dataset == "arithmetic" else DatasetTask(data, section="data", held_out=kept_back)
    if evaluation.dataset is None:
        return train, train
    return train, sums if evaluation.dataset == "arithmetic" else DatasetTask(evaluation, section="eval")
