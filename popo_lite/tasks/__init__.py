"""Load problems with checkable answers and turn them into token ids."""

from __future__ import annotations

from popo_lite.recipe import Recipe
from popo_lite.tasks.arithmetic import ArithmeticTask
from popo_lite.tasks.base import Task

__all__ = ["ArithmeticTask", "Task", "open_tasks"]


def open_tasks(recipe: Recipe) -> tuple[Task, Task]:
    """Return (task to train on, task to evaluate on). Raises DataError if a dataset cannot be used."""
    from popo_lite.tasks.datasets import open_dataset

    data, evaluation = recipe.data, recipe.eval
    own_evaluation = evaluation.dataset not in (None, "arithmetic")
    train: Task
    if data.dataset == "arithmetic":
        train = ArithmeticTask(data.digits)
    else:
        kept_back = recipe.eval.problems if evaluation.dataset is None else 0
        train = open_dataset(data, section="data", held_out=kept_back)
    if own_evaluation:
        return train, open_dataset(evaluation, section="eval")
    if evaluation.dataset == "arithmetic":
        return train, ArithmeticTask(data.digits)
    return train, train
