"""What `import popo_lite` offers: training, evaluation and export as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from popo_lite.callbacks import Callback, CallbackList
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, new_run_folder, refuse_other_recipe

if TYPE_CHECKING:
    from popo_lite.tools.export.pipeline import ExportReport
    from popo_lite.trainer import RunResult
    from popo_lite.types import EvalResult


def train(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train and return the result: run folder, summary (None if interrupted) and number of steps done.

    Args:
        recipe: From `load_recipe`, or a file or the name of a shipped recipe.
        output: Folder of the run; by default a new one in the recipe's `output.dir`.
        resume: Continue the run in `output`.
        callbacks: Each is told what happens: see `Callback`.

    Raises PopoError (UserInputError, ModelError, EngineError and others) with what to do next.
    """
    from popo_lite.trainer import Trainer

    name = "run" if isinstance(recipe, Recipe) else Path(recipe).stem
    settings = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    path = None if output is None else Path(output)
    if resume:
        if path is None:
            raise ValueError("resume needs the run's folder: train(recipe, output=..., resume=True)")
        refuse_other_recipe(RunFolder(path), settings)
    with CallbackList(callbacks) as callback, Trainer(settings, callback) as trainer:
        folder = RunFolder(path) if resume and path else new_run_folder(settings, name, path)
        return trainer.run(folder, resume=resume)


def evaluate(
    run: str | Path, *, weights: Sequence[str] = (), problems: int | None = None, samples: int = 8
) -> list[EvalResult]:
    """Return the accuracy of a run's weights on its held-out problems, `samples` answers to each.

    `weights` are some of "base", "adapter" and "siamese"; by default all three. `problems` defaults to the recipe's.
    """
    from popo_lite.tools.benchmarks.held_out import evaluate_run

    return evaluate_run(Path(run), weights=weights, problems=problems, samples=samples)


def export(
    run: str | Path, *, what: str = "merged", weights: str = "policy", output: str | Path | None = None
) -> ExportReport:
    """Write a run's model as a folder that transformers loads, check it against the trained policy, and describe it.

    `what` is "merged" or "adapter", `weights` "policy" or "siamese"; the default of `output` is
    `RUN/export/<what>-<weights>`.
    """
    from popo_lite.tools.export.pipeline import export_run

    return export_run(RunFolder(Path(run)), what=what, weights=weights, output=None if output is None else Path(output))
