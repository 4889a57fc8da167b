"""The plain and the silent view, and the choice between the views."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
from test_console_state import FACTS, HOSTILE, STEPS, play

from popo_lite.callbacks import Callback
from popo_lite.errors import UserInputError
from popo_lite.tools.console.live import LiveView
from popo_lite.tools.console.views import PlainView, open_view


def test_plain_prints_a_line_a_step():
    clock = [100.0]
    stream = io.StringIO()
    with PlainView(stream, clock=lambda: clock[0]) as view:
        view.start(title="train " + HOSTILE, facts=FACTS, total_steps=60, first_step=5)
        play(view, clock, done=5)
        view.message("two\nlines\x1b[2J")
    lines = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)
    lines = [line[10:] for line in lines]
    assert lines[0].startswith("train [/red] �[31m")
    assert lines[0].endswith(": 60 steps, 5 done already")
    assert lines[1:3] == ["  model: Qwen/Qwen2.5-Math-1.5B", "  quantisation: nf4"]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == STEPS
    assert steps[0] == (
        "step 6/60  pass rate 11.0%  loss 0.4312  token entropy 1.2043  of start 96.0%  cosine 0.9987  "
        "mean tokens 143.2  prompts all/some/none/ungraded 5/14/12/1  memory 3.00 GiB  pace 12.2 s  left 10:59"
    )
    assert steps[3] == (
        "step 9/60  pass rate 0.0%  mean tokens 143.2  prompts all/some/none/ungraded 5/14/12/1  memory 3.00 GiB  "
        "pace 12.0 s  left 10:12  SKIPPED: none of its 32 prompts has a right answer"
    )
    assert "checkpoint of step 10 saved to runs/x/step-000010" in lines
    assert lines[-2:] == ["two", "lines�[2J"]
    assert "\x1b" not in stream.getvalue()


def wait_for(text: str, stream: io.StringIO, seconds: float = 5.0) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if text in stream.getvalue():
            return stream.getvalue()
        time.sleep(0.005)
    raise AssertionError(f"{text!r} did not appear in {stream.getvalue()!r}")


def heartbeats() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "popo-lite heartbeat"]


def test_plain_gives_a_sign_of_life_only_when_it_was_quiet():
    clock = [0.0]
    stream = io.StringIO()
    with PlainView(stream, heartbeat_seconds=0.02, clock=lambda: clock[0]) as view:
        view.message("loading")
        clock[0] = 30.0
        wait_for("running: preparing, 30.0 s in all", stream)
        view.start(title="train", facts={}, total_steps=60, first_step=0)
        time.sleep(0.1)
        assert stream.getvalue().count("running") == 1  # by the view's clock no time has passed since
        clock[0] = 61.0
        wait_for("running: preparing, 31.0 s in all", stream)
        view.stage("rollout", total=1256)
        view.advance(3)
        view.advance(1000)
        clock[0] = 95.0
        wait_for("running: rollout 1,003 of 1,256, 34.0 s in this stage, 1:05 in all", stream)
        view.stage("update")
        clock[0] = 100.0
        output = wait_for("running: update, 5.0 s in this stage, 1:10 in all", stream)
        time.sleep(0.1)
        assert stream.getvalue() == output
        assert heartbeats()
    assert not heartbeats()
    view.close()


def test_plain_in_a_stream_without_unicode():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with PlainView(stream) as view:
        view.start(title=HOSTILE, facts={"modèle": "日本語"}, total_steps=60, first_step=0)
        play(view)
        view.message("saved ✓ " + HOSTILE)


@pytest.fixture
def terminal():
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        yield stream
    os.close(leader)


def test_auto_is_live_on_a_terminal_and_plain_elsewhere(terminal, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    view = open_view("auto", terminal)
    assert isinstance(view, LiveView)
    assert not view._console.no_color
    assert isinstance(open_view("live", terminal), LiveView)
    assert isinstance(open_view("plain", terminal), PlainView)
    assert type(open_view("silent", terminal)) is Callback
    assert isinstance(open_view("auto", io.StringIO()), PlainView)
    monkeypatch.setenv("NO_COLOR", "1")
    assert open_view("auto", terminal)._console.no_color
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_view("auto", terminal), PlainView)


def test_live_refuses_what_is_no_terminal():
    with pytest.raises(UserInputError, match="needs a terminal"):
        open_view("live", io.StringIO())


def test_silent_says_nothing(capsys):
    with open_view("silent") as view:
        view.start(title="train", facts=FACTS, total_steps=60, first_step=0)
        play(view)
    assert capsys.readouterr() == ("", "")


def test_the_loop_needs_neither_rich_nor_torch_to_be_watched():
    code = "import sys, popo_lite.callbacks, popo_lite.tools.console.views as v; v.open_view('plain')\n"
    code += "print(sorted({'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_notebook_gets_one_output_that_is_replaced(monkeypatch):
    from types import SimpleNamespace

    from popo_lite.tools.console.notebook import NotebookView

    shown = []
    handle = SimpleNamespace(update=shown.append)

    def display(picture, display_id):
        shown.append(picture)
        return handle

    output = SimpleNamespace(HTML=lambda html: html, display=display)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=output))
    monkeypatch.setitem(sys.modules, "IPython.display", output)
    assert isinstance(open_view("plain"), PlainView)
    clock = [0.0]
    view = open_view("auto")
    assert isinstance(view, NotebookView)
    view.clock = lambda: clock[0]
    with view:
        view.start(title="train " + HOSTILE, facts=FACTS, total_steps=60, first_step=0)
        play(view)
        assert len(shown) == 1  # no time has passed
        play(view, clock)
    assert 20 < len(shown) <= 2 + 3 * STEPS
    assert "step 30/60" in shown[-1]
    assert "pass rate" in shown[-1]
    assert "\x1b" not in shown[-1]
    assert "<script" not in view.html()
