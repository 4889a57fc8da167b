"""Open a run on all of its ranks. Imports torch only when it must."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from popo_lite.errors import StopRequested
from popo_lite.launch import processes_of_run
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, dated, new_run, read_files, write_files
from popo_lite.trust import refuse_untrusted, trust_own

if TYPE_CHECKING:
    from popo_lite.distributed import Ranks

Opened = tuple[RunFolder, Recipe, dict[str, Any]]
"""A run's folder and recipe, and options of `Trainer.run`."""


@contextmanager
def started_run(
    recipe: Recipe | str | Path, output: Path | None, overrides: Sequence[str] = (), *, trust: bool = False
) -> Iterator[Opened]:
    """Lock a new folder for a run of `recipe`, as `new_run` does; yield as `resumed_run` does.

    The folder is taken before anything is loaded, and a run that cannot start leaves nothing behind. Raises
    UserInputError for an error in the recipe, a folder that is taken, or code that is not trusted. A `Recipe` counts as
    the user's own.
    """
    if isinstance(recipe, Recipe):
        settings, name = recipe, "run"
        trust_own(recipe)
    else:
        settings, name = load_recipe(recipe, overrides), Path(recipe).stem
        refuse_untrusted(settings, recipe, trust, overrides=overrides)
    settings = dated(settings)
    with new_run(settings, name, output) as folder:
        yield folder, settings, {}


@contextmanager
def joined(opening: AbstractContextManager[Opened]) -> Iterator[tuple[Ranks, RunFolder, Recipe, dict[str, Any]]]:
    """Open a run with `opening` on rank 0, and yield the ranks with what it yields.

    Other ranks get the same recipe and options. Their folder is a temporary one, with a copy of the run's files except
    checkpoints and samples, so they write the small files of a run like rank 0, and nobody reads them.
    """
    if processes_of_run() == 1:
        with opening as (folder, recipe, options):
            from popo_lite.distributed import Ranks

            yield Ranks(), folder, recipe, options
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is gone is reported without C++ stacks
    from popo_lite.distributed import join, refuse_other_versions

    with _signal_kept(), _interrupted(), join() as ranks:
        refuse_other_versions(ranks)
        if ranks.first:
            with opening as (folder, recipe, options):
                folder.resume_command = _by_torchrun(folder.resume_command)
                files = read_files(folder.path, "*")
                files.pop(folder.samples_path.name, None)  # the largest, and no rank reads it
                ranks.from_first((recipe, options, files, folder.resume_command))
                yield ranks, folder, recipe, options
            return
        recipe, options, files, resume_command = ranks.from_first((Recipe(), {}, {}, ""))
        with TemporaryDirectory(prefix="popo-lite-") as path, _saved_from_torchrun():
            folder = RunFolder(Path(path))
            folder.resume_command = resume_command
            write_files(folder.path, files)
            yield ranks, folder, recipe, options


def _by_torchrun(command: str) -> str:
    """Return the command `popo-lite ...` for several ranks."""
    return command.replace("popo-lite", "torchrun --nproc-per-node N -m popo_lite", 1)


@contextmanager
def _interrupted() -> Iterator[None]:
    """End the block by KeyboardInterrupt if another rank was interrupted before the run could handle it."""
    try:
        yield
    except StopRequested as error:
        raise KeyboardInterrupt from error


@contextmanager
def _signal_kept() -> Iterator[None]:
    """Handle SIGTERM after the block as before it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _saved_from_torchrun() -> Iterator[None]:
    """Let SIGTERM end this process in order: torchrun sends it when another rank has ended, to clean up after that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending
