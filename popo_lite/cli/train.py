"""`popo-lite train` and `popo-lite resume`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from popo_lite.api import load_trainer
from popo_lite.callbacks import Callback, CallbackList
from popo_lite.errors import INTERRUPTED, UserInputError
from popo_lite.joining import joined, started_run
from popo_lite.recipe import Recipe
from popo_lite.resuming import resumed_run
from popo_lite.run_folder import RunFolder
from popo_lite.tools.completion import complete_recipe, complete_run
from popo_lite.tools.console.views import view_option
from popo_lite.tools.reporting import reporters
from popo_lite.trust import trust_option

if TYPE_CHECKING:
    from popo_lite.distributed import Ranks

SET = click.option(
    "overrides", "--set", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a key; no value unsets it."
)
IGNORE_PLAN = click.option(
    "--ignore-plan", is_flag=True, help="Start although the memory plan says that the run does not fit."
)
JSON = click.option("as_json", "--json", is_flag=True, help="Print the summary as JSON at the end and nothing else.")


@click.command()
@click.argument("recipe", metavar="RECIPE", shell_complete=complete_recipe)
@click.option("--seed", type=click.IntRange(min=0), help="Same as --set train.seed=N.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run; default runs/<recipe>-seed<N>.")
@SET
@view_option
@IGNORE_PLAN
@trust_option
@JSON
def train(
    recipe: str, seed: int | None, output: Path | None, overrides: tuple[str, ...], view: str, ignore_plan: bool,
    trust: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train with RECIPE: a TOML file, or the name of a shipped recipe (`popo-lite recipe list`).

    Writes a run folder with recipe, metrics, samples, checkpoints, adapters and summary. Ctrl-C finishes the step,
    saves, and says how to continue; a second Ctrl-C abandons the step and saves.

    On a GPU the memory plan comes first (`popo-lite plan`): a run that will not fit is refused with what to change.

    \b
    Example:
      popo-lite train tiny_cpu
    """
    overrides = overrides if seed is None else (*overrides, f"train.seed={seed}")
    with joined(started_run(recipe, output, overrides, trust=trust)) as (ranks, folder, settings, options):
        _train(ranks, folder, settings, recipe, view, ignore_plan=ignore_plan, as_json=as_json, **options)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN", shell_complete=complete_run)
@SET
@click.option("--checkpoint", type=click.IntRange(min=1), metavar="N", help="Go back to the checkpoint after N steps.")
@view_option
@IGNORE_PLAN
@trust_option
@JSON
def resume(
    run: Path, overrides: tuple[str, ...], checkpoint: int | None, view: str, ignore_plan: bool, trust: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Continue RUN, the folder of a run that was stopped or killed, from its newest checkpoint.

    It continues with its own recipe. Keys that change speed or bookkeeping may be --set freely; a change of what is
    learned from here on, such as of the learning rate or the engine, is recorded in the log and in summary.json; one
    that would make it another experiment is refused. More steps continue a run that has ended: --set train.steps=N.

    \b
    Example:
      popo-lite resume runs/tiny_cpu-seed0 --set train.steps=62
    """
    with joined(resumed_run(run, overrides, checkpoint, trust=trust)) as (ranks, folder, settings, options):
        _train(
            ranks, folder, settings, str(run / "recipe.toml"), view, ignore_plan=ignore_plan, as_json=as_json, **options
        )


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def _handle(handler: Any) -> None:
    """Handle the signals that end a run. One that is ignored stays ignored, as with nohup."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def _closed(callbacks: Sequence[Callback]) -> Iterator[Callback]:
    """Close the callbacks at the end, the view first. A signal then ends the wait for a tracker or the Hub."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    watcher = CallbackList(callbacks)
    try:
        with watcher:
            try:
                yield watcher
            finally:
                for number, handler in before.items():
                    signal.signal(number, signal.default_int_handler if handler != signal.SIG_IGN else handler)
                with suppress(KeyboardInterrupt):
                    watcher.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if any(getattr(callback, "unread", False) for callback in callbacks):
            _write_nowhere()


def _write_nowhere() -> None:
    """Drop what is still written to terminals: nothing reads them, so the process would never end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stream.isatty():
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _train(
    ranks: Ranks, folder: RunFolder, settings: Recipe, recipe: str, view: str, *, ignore_plan: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train in a locked folder and print the summary, or how to continue.

    `recipe` is its name in errors; `options` are those of `Trainer.run`.
    """
    # Imported here because it takes seconds: a recipe with errors is refused at once.
    from popo_lite.policy.memory import memory_named
    from popo_lite.tools.console.output import closing_report
    from popo_lite.tools.console.views import open_view

    advice = f"popo-lite plan {shlex.quote(recipe)}   (what takes how much memory, and what to change)"
    # Rank 0 shows the run.
    screen = open_view(view if ranks.first and not as_json else "silent")  # type: ignore[arg-type]  # click checks it
    with _closed([screen, *(reporters(folder, settings) if ranks.first else ())]) as watcher:
        try:
            trainer = load_trainer(settings, watcher, ignore_plan=ignore_plan, advice=advice, ranks=ranks)
        except UserInputError as error:
            raise error.within(recipe) from error
        with trainer:
            # The run handles signals itself; one that comes before it starts stops it at its first step.
            _handle(trainer.interrupts.note)
            try:
                with memory_named("before the first step", advice):
                    result = trainer.run(folder, **options)
            finally:
                _handle(signal.SIG_IGN)  # what has ended is closed in order
    if result.summary is None:
        done = f"stopped after {result.next_step} of {settings.train.steps} steps; saved. To continue:"
        if ranks.first:
            command = f"{result.folder.resume_command}{' --ignore-plan' if ignore_plan else ''}"
            click.echo(f"{done}\n  {command}", err=as_json)
        # Not a Python handler: the interpreter removes those when it exits, and then the signal would kill it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise SystemExit(INTERRUPTED)
    if not ranks.first:
        return
    if as_json:
        click.echo(json.dumps(result.summary))
        return
    path = shlex.quote(str(result.folder.path))
    closing_report(result.summary, [f"popo-lite {command} {path}" for command in ("report", "chat", "eval", "export")])
