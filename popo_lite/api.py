"""Train, resume, evaluate and export by functions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from popo_lite.callbacks import Callback, CallbackList
from popo_lite.joining import Opened, joined, started_run
from popo_lite.recipe import Recipe
from popo_lite.resuming import resumed_run
from popo_lite.run_folder import RunFolder
from popo_lite.tools.console.views import View, open_view
from popo_lite.tools.reporting import reporters

if TYPE_CHECKING:
    from popo_lite.distributed import Ranks
    from popo_lite.tools.export.folder import ExportReport
    from popo_lite.trainer import RunResult, Trainer
    from popo_lite.types import EvalResult


def train(
    recipe: Recipe | str | Path,
    *,
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    view: View = "silent",
    trust: bool = False,
) -> RunResult:
    """Train and return the result: run folder, summary (None if interrupted) and number of steps done.

    Args:
        recipe: From `load_recipe`, or a file or the name of a shipped recipe.
        output: Folder of the run; by default a new one in the recipe's `output.dir`.
        callbacks: Each receives the events of the run: see `Callback`.
        view: What is shown: "auto" is a live view in a notebook and on a terminal, and plain lines anywhere else.
        trust: Run the code that the recipe's file names, and remember it. A `Recipe` counts as your own.

    Raises PopoError (UserInputError, ModelError, EngineError and others) with what to do next.

    Under torchrun all ranks call it and get a result, whose folder is on the machine of rank 0. Ranks above 0 call no
    callbacks, and end with SystemExit where rank 0 raises a PopoError. What follows belongs on rank 0.
    """
    opening = started_run(recipe, None if output is None else Path(output), trust=trust)
    return _run(opening, callbacks, view)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    checkpoint: int | None = None,
    callbacks: Sequence[Callback] = (),
    view: View = "silent",
    trust: bool = False,
) -> RunResult:
    """Continue the run in the folder `run` from its newest checkpoint; return the result as `train` does.

    Args:
        run: Folder of the run.
        overrides: Changes of its recipe, `section.key=value`. One that would make it another experiment is refused.
            More `train.steps` continue a run that has ended.
        checkpoint: Go back to the checkpoint after this many steps. Later ones are renamed, and not used any more.
        callbacks: Each receives the events of the run: see `Callback`.
        view: What is shown, as in `train`.
        trust: Run the code that the run's recipe names, and remember it.

    Raises PopoError (CheckpointError, UserInputError, ModelError, EngineError and others) with what to do next. For
    several ranks see `train`.
    """
    return _run(resumed_run(Path(run), overrides, checkpoint, trust=trust), callbacks, view)


def _run(opening: AbstractContextManager[Opened], callbacks: Sequence[Callback], view: View) -> RunResult:
    """Train what `opening` yields. Rank 0 alone shows the run and calls the callbacks."""
    with joined(opening) as (ranks, folder, settings, options), ExitStack() as stack:
        path = ranks.from_first(folder.path)  # other ranks' own folders are gone at the end
        watchers = [open_view(view), *callbacks, *reporters(folder, settings)] if ranks.first else []
        callback = stack.enter_context(CallbackList(watchers))
        result = stack.enter_context(load_trainer(settings, callback, ranks=ranks)).run(folder, **options)
    run = RunFolder(path)
    run.resume_command = folder.resume_command
    return replace(result, folder=run)


def load_trainer(
    recipe: Recipe,
    callback: Callback,
    *,
    ignore_plan: bool = False,
    advice: str = "popo-lite plan RECIPE",
    ranks: Ranks | None = None,
) -> Trainer:
    """Check that `recipe` fits the GPU by the memory plan, then load everything it needs.

    `advice` is the next step of the error if memory runs out all the same, `ranks` are the processes of the run.
    """
    if recipe.model.backend == "unsloth":
        from popo_lite.policy.load import import_unsloth

        import_unsloth()  # before transformers and peft, which it patches
    from popo_lite.policy.memory import memory_named
    from popo_lite.tools.plan.advice import memory_advice, refuse_without_room
    from popo_lite.trainer import Trainer

    callback.message(f"loading {recipe.model.id}")
    with memory_named("while the run was loaded", advice):
        if not ignore_plan:
            refuse_without_room(recipe, callback.message)
        return Trainer(recipe, callback, memory_advice=lambda: memory_advice(recipe), ranks=ranks)


def evaluate(
    run: str | Path,
    *others: str | Path,
    task: str | Path | None = None,
    weights: Sequence[str] = (),
    problems: int | None = None,
    samples: int = 8,
    temperature: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    checkpoint: int | str | None = None,
    trust: bool = False,
) -> list[EvalResult]:
    """Return the accuracy of runs and models on a run's held-out problems, `samples` answers to each, the same draws.

    `run` and `others` are runs, folders of models, GGUF files, or Hub ids. A run is measured in its `weights`, some of
    "base", "adapter" and "siamese" (default: all). `task` is the run or recipe whose problems are asked, by default the
    first run. `problems`, `temperature` and `engine` ("auto", "hf", "vllm" or "server") default to its own. `seed` is
    that of the sampled answers. `checkpoint` is the number of steps of the runs' checkpoint to measure, or "best"; by
    default the end's weights or, for a run that has not ended, those of its newest checkpoint.
    `trust` runs the code that runs and `task` name, and remembers it.
    """
    from popo_lite.tools.benchmarks.subject import evaluate_models

    names, asked = [str(model) for model in (run, *others)], None if task is None else str(task)
    return evaluate_models(names, task=asked, weights=weights, problems=problems, samples=samples,
                           temperature=temperature, seed=seed, engine=engine, checkpoint=checkpoint,
                           trust=trust)  # fmt: skip


def export(
    run: str | Path,
    *,
    what: str = "merged",
    weights: str = "policy",
    base: str = "trained",
    output: str | Path | None = None,
    dtype: str | None = None,
    gguf: str | None = None,
    prompts: int = 32,
    problems: int | None = None,
    checkpoint: int | str | None = None,
    trust: bool = False,
) -> ExportReport:
    """Write a run's model as a folder that transformers loads, check it against the trained policy, and describe it.

    `what` is "merged" or "adapter", `weights` "policy" or "siamese". `base` is what to merge into: "trained", the base
    as it was trained on (dequantised), or "original". `checkpoint` is the number of steps of the checkpoint to export,
    or "best"; by default the end or, for a run that has not ended, its newest one. `output` is by default
    RUN/export/WHAT-WEIGHTS, for a checkpoint with its name at the end. `gguf` is the
    type of weights in a GGUF file, such as "q8_0", which is written instead. `dtype` is the precision of the merge, by
    default the recipe's, for a GGUF file "float32". `prompts` and `problems` (default: the recipe's number, 0 for none)
    are what a merged model is checked on. `trust` runs the code that the run names, and remembers it.
    """
    from popo_lite.tools.export.pipeline import export_run

    folder = None if output is None else Path(output)
    return export_run(RunFolder(Path(run)), what=what, weights=weights, base=base, output=folder, dtype=dtype,
                      gguf=gguf, prompts=prompts, problems=problems, checkpoint=checkpoint, trust=trust)  # fmt: skip
