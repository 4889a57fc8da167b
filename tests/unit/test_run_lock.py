"""One trainer a folder: the second is told who holds it, before anything is loaded."""

from __future__ import annotations

import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import popo_lite
from popo_lite.cli import main
from popo_lite.errors import UserInputError
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder, new_run

HOLD = """
import sys, time
from pathlib import Path
from popo_lite.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture
def holder(run: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that trains in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def _loads_nothing(monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    for module in ("popo_lite.api", "popo_lite.cli.train"):  # of which the second is hidden by its function
        monkeypatch.setattr(importlib.import_module(module), "load_trainer", load)


@pytest.mark.usefixtures("_loads_nothing")
@pytest.mark.parametrize("begun", [True, False])
def test_a_second_trainer_ends_before_anything_is_loaded(run, holder, begun):
    if begun:
        run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu")))
    time.sleep(1.1)
    arguments = ["resume", str(run.path)] if begun else ["train", "tiny_cpu", "--output", str(run.path)]
    done = CliRunner().invoke(main, arguments)
    text = " ".join(done.output.split())
    assert done.exit_code == 2, text
    assert f"another process trains in this folder: process {holder.pid} on {platform.node()}, for 0:00:0" in text
    assert "for 0:00:00" not in text
    assert run.path.is_dir()
    with pytest.raises(UserInputError, match=f"process {holder.pid}"):
        popo_lite.resume(run.path) if begun else popo_lite.train("tiny_cpu", output=run.path)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_that_a_dead_process_left_is_no_hindrance(run, holder, number):
    os.kill(holder.pid, number)
    holder.wait()
    assert run.lock_path.is_file()
    with run.locked():
        assert str(os.getpid()) in run.lock_path.read_text()
        with pytest.raises(UserInputError, match=f"process {os.getpid()}"), RunFolder(run.path).locked():
            pass
    run.lock_path.write_text("not JSON, and longer than what the next owner writes: " + "x" * 500)
    with run.locked():
        assert "not JSON" not in run.lock_path.read_text()


def test_a_lock_without_its_owners_name_is_a_lock(run):
    with run.locked():
        for text in ("", "\n{", "\n[]", '\n{"pid": "1", "host": "x", "since": "y"}'):
            run.lock_path.write_text(text)
            with pytest.raises(UserInputError, match="an unknown process"), RunFolder(run.path).locked():
                pass


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(run, monkeypatch):
    from popo_lite import lock

    def take(_descriptor: int, *, blocking: bool) -> bool:
        run.lock_path.unlink()  # by the last owner, between open and lock
        return True

    monkeypatch.setattr(lock.filelock, "lock_descriptor", take)
    with pytest.raises(UserInputError, match="an unknown process"), run.locked():
        pass


def test_a_run_that_started_meanwhile_is_no_hindrance_unless_its_folder_was_asked_for(tmp_path, monkeypatch):
    recipe = load_recipe("tiny_cpu", [f"output.dir={tmp_path}"])
    locked = RunFolder.locked

    def other_first(run: RunFolder):
        if not run.path.name.endswith("-2"):
            run.path.mkdir(exist_ok=True)
            run.recipe_path.write_text("")
        return locked(run)

    monkeypatch.setattr(RunFolder, "locked", other_first)
    with new_run(recipe, "x", None) as run:
        assert run.path == tmp_path / "x-seed0-2"
    with pytest.raises(UserInputError, match="there is a run in it"), new_run(recipe, "x", tmp_path / "asked"):
        pass


def test_an_empty_folder_that_was_there_becomes_private(tmp_path):
    tmp_path.chmod(0o755)
    with new_run(load_recipe("tiny_cpu"), "x", tmp_path):
        assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_trained_run_frees_its_folder(run, tmp_path):
    small = ["train.steps=1", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=0"]
    popo_lite.train(load_recipe("tiny_cpu", small), output=tmp_path / "new")
    with RunFolder(tmp_path / "new").locked():
        pass
    with pytest.raises(UserInputError, match="there is a run in it"):
        popo_lite.train("tiny_cpu", output=tmp_path / "new")
