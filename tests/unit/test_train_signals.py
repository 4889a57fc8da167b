"""Ctrl-C while a run starts: wherever it comes, it stops the run, and what is left can be resumed."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from popo_lite.callbacks import Callback
from popo_lite.cli import main
from popo_lite.trainer import Trainer


def train(folder: Path) -> Result:
    small = ("train.steps=1", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=2")
    settings = [word for setting in small for word in ("--set", setting)]
    return CliRunner().invoke(main, ["train", "tiny_cpu", *settings, "--output", str(folder)])


def resume(folder: Path) -> Result:
    return CliRunner().invoke(main, ["resume", str(folder)])


def press_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ctrl-C as the first thing in the Trainer's method `name`."""
    method = getattr(Trainer, name)

    def pressed(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return method(*arguments, **options)

    monkeypatch.setattr(Trainer, name, pressed)


@pytest.mark.parametrize("where", ["run", "_prove_sampler"])
def test_a_signal_while_the_run_starts_stops_it_before_anything_else(tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        press_before(patch, where)
        stopped = train(tmp_path / "run")
    assert stopped.exit_code == 130, stopped.output
    assert "stopped after 0 of 1 steps; saved" in stopped.output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    with monkeypatch.context() as patch:
        press_before(patch, "_restore")
        again = resume(tmp_path / "run")
    assert again.exit_code == 130, again.output
    done = resume(tmp_path / "run")
    assert done.exit_code == 0, done.output


def test_a_signal_while_the_model_is_loaded_leaves_nothing_behind(tmp_path, monkeypatch):
    press_before(monkeypatch, "__init__")
    stopped = train(tmp_path / "run")
    assert stopped.exit_code == 130, stopped.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_a_tracker_and_not_the_command(tmp_path, monkeypatch, number):
    closed = []

    class View(Callback):
        def close(self):
            closed.append("view")

    class Slow(Callback):
        def close(self):
            closed.append("tracker")
            os.kill(os.getpid(), number)
            time.sleep(60)

    command = sys.modules["popo_lite.cli.train"]
    monkeypatch.setattr(command, "reporters", lambda *_: [Slow()])
    monkeypatch.setattr("popo_lite.tools.console.views.open_view", lambda *_: View())
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    start = time.monotonic()
    done = train(tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert time.monotonic() - start < 50
    assert closed == ["view", "tracker"]
    assert "popo-lite report" in done.output
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
