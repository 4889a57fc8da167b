"""`popo-lite train`."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C, as shells have it."""


@contextmanager
def _interrupt_is_no_failure() -> Iterator[None]:
    """Leave with INTERRUPTED where Ctrl-C comes before the run hears it: a sweep tells stopped from failed by that."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(INTERRUPTED) from None


@click.command(short_help="Train with a recipe.")
@click.argument("recipe", metavar="RECIPE")
@click.option("--seed", type=click.IntRange(min=0), help="Same as --set train.seed=N.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run; default runs/<recipe>-seed<N>.")
@click.option(
    "--resume", is_flag=True, help="Continue the newest unfinished run of this recipe, or the one in --output."
)
@click.option("overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; may be repeated.")
@click.option(
    "--view",
    type=click.Choice(["auto", "live", "plain", "silent"]),
    default="auto",
    show_default=True,
    help="Live view on a terminal, one plain line a step elsewhere.",
)
@click.option("--ignore-plan", is_flag=True, help="Start although the memory plan says that the run does not fit.")
@click.option("as_json", "--json", is_flag=True, help="Print the summary as JSON at the end and nothing else.")
@_interrupt_is_no_failure()
def train(
    recipe: str,
    seed: int | None,
    output: Path | None,
    resume: bool,
    overrides: tuple[str, ...],
    view: str,
    ignore_plan: bool,
    as_json: bool,
) -> None:
    """Train with RECIPE: a TOML file, or the name of a shipped recipe (`popo-lite recipe list`).

    Leaves a run folder with recipe, metrics, samples, checkpoints, adapters and summary. Ctrl-C finishes the step,
    saves, and says how to go on; twice abandons the step and saves.

    On a GPU the memory plan comes first (`popo-lite plan`): a run that will not fit is refused with what to change.
    """
    from popo_lite.errors import UserInputError
    from popo_lite.recipe_file import load_recipe
    from popo_lite.run_folder import find_run_folder, new_run_folder, refuse_other_recipe

    if seed is not None:
        overrides = (*overrides, f"train.seed={seed}")
    settings = load_recipe(recipe, overrides)
    name = Path(recipe).stem
    if resume:
        run = find_run_folder(settings, name, output)
        refuse_other_recipe(run, settings)

    # Only now what takes seconds to import: a recipe with faults is refused at once.
    from popo_lite.console.reports import closing_report
    from popo_lite.console.views import open_view
    from popo_lite.policy.memory import memory_named
    from popo_lite.training.loop import Trainer

    if settings.model.backend == "unsloth":
        from popo_lite.policy.load import import_unsloth

        import_unsloth()
    with open_view("silent" if as_json else view) as watcher:  # type: ignore[arg-type]  # click checks the choice
        watcher.message(f"loading {settings.model.id}")
        what_helps = f"popo-lite plan {shlex.quote(recipe)}   (what takes how much, and what to change)"
        try:
            with memory_named("while the run was loaded", what_helps):
                trainer = Trainer(settings, watcher, ignore_plan=ignore_plan)
        except UserInputError as error:
            raise error.within(recipe) from error
        with trainer:
            # The folder is made when everything has loaded: a run that cannot start leaves nothing behind.
            if not resume:
                run = new_run_folder(settings, name, output)
            # The run hears Ctrl-C itself; one that comes before it does stops it at its first step.
            default = signal.signal(signal.SIGINT, trainer.interrupts.note)
            with memory_named("before the first step", what_helps):
                outcome = trainer.run(run, resume=resume)
            # One that comes after has nothing left to stop. No handler of Python's: the interpreter takes those down
            # as it leaves, and the signal would kill it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            question = trainer.held_out[0].question if trainer.held_out else ""
    resume_command = f"popo-lite train {run.recipe_path} --resume --output {run.path}"
    if ignore_plan:
        resume_command += " --ignore-plan"
    if outcome.summary is None:
        click.echo(
            f"stopped after {outcome.next_step} of {settings.train.steps} steps; saved. To go on:\n  {resume_command}",
            err=as_json,
        )
        raise SystemExit(INTERRUPTED)
    signal.signal(signal.SIGINT, default)
    if as_json:
        click.echo(json.dumps(outcome.summary))
        return
    closing_report(
        outcome.summary,
        [
            f"popo-lite generate {run.path} {shlex.quote(question if 0 < len(question) < 80 else 'your question')}",
            f"popo-lite eval {run.path}",
            f"popo-lite export {run.path}",
        ],
    )
