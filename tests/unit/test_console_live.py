"""The live view at every size, shown a scripted run with skipped steps, missing figures and hostile text."""

import io
import logging
import os
import re
import sys
import time

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_console_state import FACTS, HOSTILE, STEPS, play, record

from popo_lite.controls import Controls
from popo_lite.tools.console.dashboard import share_height
from popo_lite.tools.console.live import LiveView, caught_output
from popo_lite.tools.console.terminal import Keys

SIZES = [(80, 24), (100, 30), (140, 50)]


def live_view(width: int, height: int, **options) -> tuple[LiveView, io.StringIO, list[float]]:
    clock = [100.0]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, height=height, _environ={}, **options)
    return LiveView(console, refresh_seconds=0.02, clock=lambda: clock[0]), stream, clock


def screen(view: LiveView) -> list[str]:
    return ["".join(segment.text for segment in line) for line in view.render().lines]


def played(width: int, height: int, steps: int = STEPS) -> tuple[LiveView, list[float]]:
    """A view after the scripted run, closed; what it showed last can still be rendered."""
    view, _, clock = live_view(width, height)
    with view:
        view.start(title="train " + HOSTILE, facts=FACTS, total_steps=60, first_step=0)
        play(view, clock, steps)
    return view, clock


@pytest.mark.parametrize(("width", "height"), [*SIZES, (200, 70), (60, 20), (40, 12), (30, 6), (10, 3), (1, 1)])
@pytest.mark.parametrize("steps", [0, 1, 4, 30, 60])
def test_live_fits_every_terminal(width, height, steps):
    view, clock = played(width, height, steps)
    for _ in range(3):
        lines = screen(view)
        assert len(lines) <= height
        assert max((cell_len(line) for line in lines), default=0) <= width
        assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in lines)
        clock[0] += 11.0  # the next sample


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_live_shows_the_run_at_every_common_size(width, height):
    view, clock = played(width, height)
    lines = screen(view)
    text = "\n".join(lines)
    bar = next(line for line in lines if line.startswith(" step 30/60"))
    assert re.fullmatch(r" step 30/60 +[━─]+ +50%   6:00 elapsed   6:00 left *", bar)
    assert re.search(r"rollout +[━─]+ +25%   64 of 256   0\.0 s", text)
    assert "12.0 s a step   done about " in text
    assert "2 of 30 steps skipped" in text
    assert re.search(r"now +40\.0%", text)
    assert "steps 1 to 30, chart from 0 to 40%" in text
    assert "█ 5 all right  ▓ 14 some  ░ 12 none  ? 1 ungraded" in text
    for expected in (
        r"learning rate 2\.0e-05",
        r"loss +0\.4312",
        r"policy +0\.4421",
        r"similarity +0\.0013",
        r"entropy +-1\.2043 coef 0\.0100",
        r"token entropy +1\.2043 96% of start",
        r"eff\. positives +3\.1200 97% of all",
        r"cosine +0\.9987 to siamese",
        r"drift +0\.0123 4% of bound",
        r"mean tokens +143\.2 2% truncated",
        r"same shape +62\.5% start 2%",
        r"peak 3\.00 GiB",
        r"rollout +8\.2 s [━─]+ +4,210 tok/s",
        r"update +3\.1 s [━─]+ +3,870 tok/s",
        r"sample of step \d+ ─+ the answer is 71",
        r"question +What is 23 \+ 48\?",
        r"✓ right +20 \+ 40 \+ 11 = 71",
        r"✗ wrong +61",
        r"\d\d:\d\d  checkpoint of step 30 saved to runs/x/step-000030",
    ):
        assert re.search(expected, text), expected
    clock[0] += 10.0
    text = "\n".join(screen(view))
    assert "[bold]markup[/] 日本語 👩🔬 nul�" in text
    assert "✓ right         none among the answers to this" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_live_keeps_its_columns_below_one_another(width, height):
    lines = screen(played(width, height)[0])
    for names, expected in (
        (("answers ", "mean tokens ", "different ", "time and memory "), 1 + (width - 2 - 3) // 2 + 3),
        (("20 + 40 + 11 = 71", "What is 23 + 48?", "12.0 s a step"), 17),
    ):
        for name in names:
            assert {line.index(name) for line in lines if name in line and "tok/s" not in line} == {expected}, name


def test_live_has_more_where_there_is_room():
    def text(width, height):
        return "\n".join(screen(played(width, height)[0]))

    # The label and the value stay, and the course of the figure comes beside them.
    assert re.search(r"policy +0\.4421 +▄+", text(140, 50))
    assert not re.search(r"policy +0\.4421 +▄+", text(80, 24))
    assert "gradient norm" in text(140, 50)
    assert "run folder" in text(140, 50)
    assert "run folder" not in text(80, 24)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_live_says_why_a_step_was_skipped(width, height):
    text = "\n".join(screen(played(width, height, steps=17)[0]))
    assert "step 17 changed no weights (2 of 17 skipped): none of its 32" in text
    assert re.search(r"loss +- ", text)
    assert not re.search(r"\bNone\b|\bnan\b", text)


def test_live_marks_a_drift_beyond_its_bound():
    view, _, _ = live_view(100, 30)
    view.step(record(1, siamese_drift_over_bound=1.5))
    row = next(line for line in view.render().lines if any("drift" in segment.text for segment in line))
    assert "150% of bound" in "".join(segment.text for segment in row)
    assert any("red" in str(segment.style) for segment in row)


def test_live_before_the_first_step_has_no_empty_headings():
    view, _, clock = live_view(80, 24)
    with view:
        view.start(title="train", facts=FACTS, total_steps=60, first_step=20)
        view.stage("evaluate", total=200)
        clock[0] += 70
        view.advance(50)
    text = "\n".join(screen(view))
    assert re.search(r"step 20/60 +[━─]+ +33%   1:10 elapsed *\n evaluate +[━─]+ +25%   50 of 200   1:10 *\n", text)
    for heading in ("pass rate", "learning", "sample", "messages"):
        assert heading not in text


def test_live_bears_figures_that_are_no_numbers():
    view, _, _ = live_view(140, 50)
    for step in range(12):
        view.step(record(step, pass_rate=float("nan"), loss=float("inf"), outcomes={}, seconds={}))
        view.samples([{"step": step, "question": "q", "reference": "r", "right": "", "wrong": None}])
    text = "\n".join(screen(view))
    assert re.search(r"now +- ", text)
    assert re.search(r"loss +inf", text)
    assert "an answer without any text" in text


def test_height_goes_to_the_first_sections_first():
    sections = [(1, 3), (2, 5), (4, 9)]
    for height, expected in {
        0: [0, 0, 0], 3: [1, 2, 0], 6: [3, 3, 0], 7: [1, 2, 4], 10: [3, 3, 4], 13: [3, 5, 5], 99: [3, 5, 9],
    }.items():  # fmt: skip
        assert share_height(sections, height) == expected, height


# ESC and what may follow it: colours, cursor position and visibility, clearing, alternate screen, wrapping.
ALLOWED = re.compile(r"\x1b\[(?:[0-9;]*m|[0-9;]*H|K|2J|\?25[lh]|\?1049[lh]|\?7[lh])")


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_live_gives_the_terminal_back_after_an_exception(width, height):
    view, stream, clock = live_view(width, height, color_system="truecolor")
    before = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError, match="boom"), view:
        view.start(title="train", facts=FACTS, total_steps=60, first_step=0)
        play(view, clock)
        view.message(HOSTILE)
        time.sleep(0.1)  # some frames
        raise RuntimeError("boom")
    output = stream.getvalue()
    for taken, given in (("\x1b[?25l", "\x1b[?25h"), ("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?7l", "\x1b[?7h")):
        assert output.count(taken) == output.count(given) == 1
        assert output.index(taken) < output.index(given)
    rest = ALLOWED.sub("", output)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest)
    assert (sys.stdout, sys.stderr) == before
    # On the screen that the person comes back to: where the run got to, and every message.
    farewell = output[output.rindex("\x1b[?7h") :]
    assert "train: 30 of 60 steps, 6:00 in this session" in farewell
    assert "step 30/60  pass rate 40.0%" in farewell
    for step in (10, 20, 30):
        assert f"checkpoint of step {step} saved to runs/x/step-{step:06}" in farewell
    assert "[bold]markup[/]" in farewell
    view.close()
    assert stream.getvalue() == output


def test_live_without_colour_has_no_colour():
    view, stream, clock = live_view(100, 30, no_color=True)
    with view:
        view.start(title="train", facts=FACTS, total_steps=60, first_step=0)
        play(view, clock)
        time.sleep(0.1)
    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", stream.getvalue()) for code in found.split(";")}
    assert codes <= {"", "0", "1", "2"}  # bold and dim only
    assert "step 30/60" in stream.getvalue()


def test_live_in_a_terminal_without_unicode():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict", newline="")
    console = Console(file=stream, force_terminal=True, width=100, height=30, _environ={})
    view = LiveView(console, refresh_seconds=0.02)
    with view:
        view.start(title="train " + HOSTILE, facts=FACTS, total_steps=60, first_step=0)
        play(view)
        time.sleep(0.1)
        lines = screen(view)
    assert all(line.isascii() for line in lines)
    assert any(re.search(r"step 30/60 +=+-+ +50%", line) for line in lines)
    assert any("# 5 all right  + 14 some  . 12 none  ? 1 ungraded" in line for line in lines)
    assert raw.getvalue().isascii()


def test_live_writes_messages_at_once_where_it_has_no_screen():
    view, stream, _ = live_view(100, 30)
    view.message("loading [/red]\x1b[2J")
    assert stream.getvalue() == "loading [/red]�[2J\n"
    view.close()
    assert stream.getvalue() == "loading [/red]�[2J\n"


def test_live_keeps_what_others_print():
    view, stream, _ = live_view(100, 30)
    old_handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("popo_lite.tests.console")
    logger.addHandler(old_handler)
    logger.addHandler(logging.lastResort)  # follows sys.stderr, and has no stream to turn
    held = old_handler.stream
    try:
        with view:
            view.start(title="train", facts={}, total_steps=60, first_step=0)
            sys.stdout.write("printed \x1b[2J by a library\n")
            sys.stderr.write("half a line")
            logger.warning("logged")
            screen(view)
            assert old_handler.stream is not held
        assert old_handler.stream is held
    finally:
        logger.handlers.clear()
    farewell = stream.getvalue().rpartition("\x1b[?7h")[2]
    assert "Other output during the run (lines: 3):" in farewell
    assert "printed �[2J by a library" in farewell
    assert farewell.count("logged") == 2
    assert "half a linelogged" in farewell


def test_a_fault_in_drawing_leaves_the_run_its_lines(monkeypatch):
    def broken(*_):
        raise KeyError("a figure")

    view, stream, _ = live_view(100, 30)
    said = []
    view.attach(Controls(lambda: None, lambda text: (said.append(text), view.message(text))))
    with view:
        view.start(title="train", facts={}, total_steps=60, first_step=0)
        time.sleep(0.1)
        monkeypatch.setattr("popo_lite.tools.console.live.dashboard", broken)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            view.stage("rollout")
            time.sleep(0.01)
        view.step(record(0))
        view.message("more")
    output = stream.getvalue()
    assert "Traceback" in said[0]
    assert "KeyError: 'a figure'" in said[0]
    assert output.count("\x1b[?1049h") == output.count("\x1b[?1049l") == 1
    lines = output[output.index("\x1b[?7h") :]
    assert "the live view failed: KeyError('a figure')" in lines
    assert re.search(r"\n[0-9:]{8}  step 1/60  pass rate", lines)
    assert lines.endswith("  more\n")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_keys_survive_a_byte_that_is_no_text():
    leader, follower = os.openpty()
    with os.fdopen(follower) as stream:
        keys = Keys(stream)
        os.write(leader, b"typed before\n")
        assert keys.read(0.1) == ""
        os.write(leader, b"\xff")
        assert keys.read(1) == ""
        assert keys.possible
        os.write(leader, b"p")
        assert keys.read(1) == "p"
        keys.close()
    os.close(leader)


def test_caught_output_keeps_the_last_state_of_a_progress_bar():
    caught = []
    with caught_output(caught.append):
        for done in range(1000):
            sys.stderr.write(f"\rloading {done}")
        sys.stderr.write("\n\n  \nafter")
    assert caught == ["loading 999", "after"]


def test_live_shows_the_rewards_of_several_functions():
    view, _, _ = live_view(100, 50)
    view.step(record(1))
    assert "mean reward" not in "\n".join(screen(view))
    view.step(record(2, rewards={"math": 0.4, "my_rewards:bre\x1bvity": 0.9}))
    text = "\n".join(screen(view))
    assert re.search(r"math +40\.0% +mean reward", text)
    assert re.search(r"bre.?vity +90\.0% +mean reward", text)
