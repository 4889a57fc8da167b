"""`popo-lite train`."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path

import click

from popo_lite.api import load_trainer
from popo_lite.errors import UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import dated, find_run_folder, new_run_folder
from popo_lite.trust import refuse_untrusted, trust_option

VIEWS = click.Choice(["auto", "live", "plain", "silent"])
INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C, as in shells."""


@click.command(short_help="Train with a recipe.")
@click.argument("recipe", metavar="RECIPE")
@click.option("--seed", type=click.IntRange(min=0), help="Same as --set train.seed=N.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run; default runs/<recipe>-seed<N>.")
@click.option("--resume", is_flag=True, help="Continue this recipe's newest unfinished run, or the one in --output.")
@click.option(
    "overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; no value unsets it."
)
@click.option(
    "--view", type=VIEWS, default="auto", show_default=True, help="Live view on a terminal, else one plain line a step."
)
@click.option("--ignore-plan", is_flag=True, help="Start although the memory plan says that the run does not fit.")
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print the summary as JSON at the end and nothing else.")
def train(recipe: str, seed: int | None, output: Path | None, resume: bool, overrides: tuple[str, ...], view: str,
          ignore_plan: bool, trust: bool, as_json: bool) -> None:  # fmt: skip
    """Train with RECIPE: a TOML file, or the name of a shipped recipe (`popo-lite recipe list`).

    Writes a run folder with recipe, metrics, samples, checkpoints, adapters and summary. Ctrl-C finishes the step,
    saves, and says how to continue; a second Ctrl-C abandons the step and saves.

    On a GPU the memory plan comes first (`popo-lite plan`): a run that will not fit is refused with what to change.
    """
    settings = load_recipe(recipe, overrides if seed is None else (*overrides, f"train.seed={seed}"))
    refuse_untrusted(settings, recipe, trust, overrides=overrides)
    resumed = find_run_folder(settings, Path(recipe).stem, output) if resume else None
    settings = dated(settings, resumed)
    # Imported here because it takes seconds: a recipe with errors is refused at once.
    from popo_lite.policy.memory import memory_named
    from popo_lite.tools.console.output import closing_report
    from popo_lite.tools.console.views import open_view

    advice = f"popo-lite plan {shlex.quote(recipe)}   (what takes how much memory, and what to change)"
    with open_view("silent" if as_json else view) as watcher:  # type: ignore[arg-type]  # click checks the choice
        try:
            trainer = load_trainer(settings, watcher, ignore_plan=ignore_plan, advice=advice)
        except UserInputError as error:
            raise error.within(recipe) from error
        with trainer:
            # The folder is made after everything has loaded: a run that cannot start leaves nothing behind.
            folder = resumed or new_run_folder(settings, Path(recipe).stem, output)
            # The run handles Ctrl-C itself; one that comes before it starts stops it at its first step.
            default = signal.signal(signal.SIGINT, trainer.interrupts.note)
            with memory_named("before the first step", advice):
                result = trainer.run(folder, resume=resume)
            # One that comes after it must not stop anything. Not a Python handler: the interpreter removes those when
            # it exits, and then the signal would kill it.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            question = trainer.held_out[0].question if trainer.held_out else ""
    if result.summary is None:
        done = f"stopped after {result.next_step} of {settings.train.steps} steps; saved. To continue:"
        click.echo(f"{done}\n  {result.folder.resume_command}{' --ignore-plan' if ignore_plan else ''}", err=as_json)
        raise SystemExit(INTERRUPTED)
    signal.signal(signal.SIGINT, default)
    if as_json:
        click.echo(json.dumps(result.summary))
        return
    question = shlex.quote(question if 0 < len(question) < 80 else "your question")
    path = result.folder.path
    commands = [f"popo-lite generate {path} {question}", f"popo-lite eval {path}", f"popo-lite export {path}"]
    closing_report(result.summary, commands)
