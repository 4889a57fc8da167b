"""What a sweep says: bars on a terminal, lines elsewhere, and never markup."""

from __future__ import annotations

import io

from rich.console import Console

from popo_lite.tools.sweep.runner import SweepView


def watched(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal, color_system=None)
    with SweepView(3, 1, console) as view:
        view.started("[bold]a seed 0", done=0, total=4)
        view.advanced("[bold]a seed 0", done=4, pass_rate=0.25)
        view.ended("[bold]a seed 0", "done", "3.2 s, pass@1 50.0%")
        view.started("b seed 0", done=2, total=4)
        view.ended("b seed 0", "failed", "killed by SIGKILL\x1b[2J")
        view.started("c seed 0", done=0, total=4)
        view.ended("c seed 0", "stopped", "")
    return stream.getvalue()


def test_lines_without_a_terminal() -> None:
    lines = [line.partition("  ")[2] for line in watched(terminal=False).splitlines()]
    assert lines == [
        "[bold]a seed 0: starts, 4 steps",
        "[bold]a seed 0: done: 3.2 s, pass@1 50.0% (2 of 3 done)",
        "b seed 0: continues after step 2, 4 steps",
        "b seed 0: FAILED: killed by SIGKILL\ufffd[2J (2 of 3 done)",
        "c seed 0: starts, 4 steps",
        "c seed 0: stopped (2 of 3 done)",
    ]


def test_bars_on_a_terminal_and_the_same_endings() -> None:
    text = watched(terminal=True)
    assert "[bold]a seed 0: done: 3.2 s, pass@1 50.0% (2 of 3 done)" in text
    assert "b seed 0: FAILED: killed by SIGKILL\ufffd[2J" in text
    assert "starts" not in text
    assert "pass 25.0%" in text
    assert "\x1b[?25h" in text  # the cursor is back
