"""Watching a run from its folder: while it trains, after its end, after a kill, and when steps come again."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest
from click.testing import CliRunner

import popo_lite
from helpers import record
from popo_lite.cli import main
from popo_lite.errors import CheckpointError
from popo_lite.lock import owner_of
from popo_lite.run_folder import RunFolder, append_line, keep_lines
from popo_lite.tools.console.views import PlainView, RunState
from popo_lite.tools.watch import Follower, Lines

SMALL = ("train.steps=2", "data.prompts_per_step=4", "rollout.num_generations=4", "eval.problems=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunFolder:
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    return popo_lite.train(recipe, output=tmp_path_factory.mktemp("watched") / "run").folder


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    """The folder of a run that is about to do its first step."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe_path.write_text(finished.recipe_path.read_text())
    run.lock_path.write_text(finished.lock_path.read_text())
    return run


def files(run: RunFolder) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.path.rglob("*")}


def watched(run: RunFolder, *options: str):
    before = files(run)
    done = CliRunner().invoke(main, ["watch", str(run.path), *options])
    assert done.exit_code == 0, done.output
    assert files(run) == before
    return done


def test_a_finished_run_shows_its_steps_and_its_end(finished):
    shown = watched(finished).output
    for text in ("run: 2 steps", "step 2/2  pass rate", "before: pass@1", "Held-out problems", "popo-lite export"):
        assert text in shown
    state = json.loads(watched(finished, "--json").output)
    assert (state["state"], state["steps_done"], state["steps"], state["trained_by"]) == ("ended", 2, 2, None)
    assert [line["when"] for line in state["evaluations"]] == ["before", "after"]


def test_a_dead_run_says_how_to_go_on(run):
    append_line(run.metrics_path, record(0))
    with run.metrics_path.open("a") as file:
        file.write('{"step": 1, "half')  # as a kill leaves it
    done = watched(run)
    assert "no process trains here, and the run has not ended: 1 of 2 steps are done" in done.stderr
    assert f"popo-lite resume {run.path}" in done.stderr
    assert json.loads(watched(run, "--json").output)["state"] == "stopped"


def test_a_run_that_trains_is_followed_to_its_end(run):
    view = RunState()
    follower = Follower(run, view)
    with run.locked():
        assert "process" in owner_of(run.lock_path)
        assert json.loads(watched(run, "--json").output)["state"] == "training"
        follower.feed()
        assert view.steps_done == 0
        append_line(run.metrics_path, record(0))
        follower.feed()
        assert (view.steps_done, view.stage_name) == (1, "training")
        line = json.dumps(record(1)) + "\n"
        with run.metrics_path.open("a") as file:
            file.write(line[:50])
            file.flush()
            follower.feed()
            assert view.steps_done == 1
            file.write(line[50:])
        follower.feed()
        assert view.steps_done == 2
        run.log_path.write_text(
            "2026-01-02 03:04:05,678 INFO paused after step 2 of 9\nand more\n"
            "2026-01-02 03:04:06,678 ERROR the run ends\nTraceback\n"
        )
        follower.feed()
        assert view.notices == ["03:04:05  paused after step 2 of 9", "03:04:05  and more"]
        assert view.stage_name == "paused"
    assert owner_of(run.lock_path) is None


def test_steps_that_come_again_replace_those_before(run):
    view = RunState()
    follower = Follower(run, view)
    for step in range(4):
        append_line(run.metrics_path, record(step, loss=1.0, skipped_reason="no" if step == 3 else None))
    follower.feed()
    assert (view.steps_done, view.skips) == (4, 1)
    keep_lines(run.metrics_path, lambda line: line["step"] < 2)  # as a resume does
    for step in (2, 3, 4):
        append_line(run.metrics_path, record(step, loss=2.0))
    follower.feed()
    assert view.trend("loss") == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert (view.steps_done, view.skips) == (5, 0)


def test_a_file_that_is_cut_back_in_place_is_read_again(tmp_path):
    lines = Lines(tmp_path / "lines")
    assert lines.new() == []
    lines.path.write_bytes(b"a\nb\nc")
    assert lines.new() == [(1, b"a"), (2, b"b")]
    lines.path.write_bytes(b"a\n")
    assert lines.new() == []
    lines.path.write_bytes(b"a\nd\ne\n")
    assert lines.new() == [(2, b"d"), (3, b"e")]


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", "{}", '{"step": null}', '{"step": -1}', '{"step": 0, "rewards": 7}', '{"step": [], "loss": {}}',
     '{"step": 0, "loss": NaN}', '{"step": 0, "loss": 1e999}', '{"step": 0, "rewards": {"a": "Infinity"}}'],
)  # fmt: skip
def test_a_damaged_line_is_an_error_that_names_it(run, line):
    run.metrics_path.write_text(line + "\n")
    with pytest.raises(CheckpointError) as caught:
        Follower(run, PlainView(io.StringIO())).feed()
    assert "metrics.jsonl" in caught.value.where
    shown = CliRunner().invoke(main, ["watch", str(run.path), "--json"])
    assert isinstance(shown.exception, SystemExit)  # and no traceback


def test_a_run_whose_model_is_loaded_is_waited_for(run):
    recipe = run.recipe_path.read_text()
    run.recipe_path.unlink()
    with ExitStack() as stack:
        stack.enter_context(run.locked())
        threading.Timer(1, lambda: (run.recipe_path.write_text(recipe), stack.close())).start()
        shown = CliRunner().invoke(main, ["watch", str(run.path)])
    assert shown.exit_code == 0, shown.output
    assert "the run is being prepared" in shown.stderr
    assert "0 of 2 steps are done" in shown.stderr


def test_a_message_that_is_written_in_two_parts_is_shown_whole(run):
    view = RunState()
    follower = Follower(run, view)
    for part in ("2026-01-02 03:04:05,678 INFO first\n", "second\n", "2026-01-02 03:04:06,678 ERROR x\n", "trace\n"):
        with run.log_path.open("a") as file:
            file.write(part)
        follower.feed()
    assert view.notices == ["03:04:05  first", "03:04:05  second"]


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    lines = Lines(tmp_path / "lines", last=10)
    lines.path.write_bytes(b"".join(b"line %d\n" % number for number in range(1000)))
    assert [line for _, line in lines.new()] == [b"line 999"]
    with lines.path.open("ab") as file:
        file.write(b"a long line that is new\n")
    assert [line for _, line in lines.new()] == [b"a long line that is new"]


def test_a_process_that_looks_does_not_refuse_the_one_that_trains(run):
    code = "import sys, pathlib; from popo_lite.lock import owner_of\nprint(flush=True)\n"
    code += "while True: owner_of(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, run.lock_path], stdout=subprocess.PIPE) as looking:
        try:
            looking.stdout.readline()
            for _ in range(20):
                with run.locked():
                    pass
        finally:
            looking.kill()
