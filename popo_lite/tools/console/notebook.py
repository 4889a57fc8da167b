"""The view of a run in a notebook: the same sections as on a terminal, in one output that is replaced."""

from __future__ import annotations

import io
import math
import time
from typing import Any

from rich.console import Console
from rich.segment import Segment, SegmentLines
from rich.terminal_theme import TerminalTheme

from popo_lite.tools.console import words
from popo_lite.tools.console.dashboard import Remembered, dashboard
from popo_lite.tools.console.views import Clock, RunState

WIDTH, HEIGHT = 100, 36
REFRESH_SECONDS = 1.0
_COLOURS = [(0, 0, 0), (208, 69, 59), (46, 158, 68), (160, 120, 0), (40, 110, 220), (163, 79, 181), (23, 147, 166),
            (128, 128, 128)]  # fmt: skip
# They can be read on white and on black. The default colour is left to the notebook's theme.
_THEME = TerminalTheme((255, 255, 255), (0, 0, 0), _COLOURS, _COLOURS)
_PAGE = '<pre style="font-family: monospace; line-height: 1.2; overflow-x: auto">{code}</pre>'


class NotebookView(RunState):
    """Draw below the cell, at most once a second, when the run reports something: in the thread of the cell."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._remembered = Remembered()
        self._shown, self._due = "", -math.inf
        self._handle: Any = None

    def start(self, **facts: Any) -> None:
        super().start(**facts)
        self._draw(now=True)

    def stage(self, name: str, *, total: int | None = None) -> None:
        super().stage(name, total=total)
        self._draw()

    def advance(self, amount: int) -> None:
        super().advance(amount)
        self._draw()

    def message(self, text: str) -> None:
        """Show a notice; before the run starts it is printed."""
        super().message(text)
        if self._handle is None:
            print(*map(words.clean, text.splitlines()), sep="\n")  # noqa: T201

    def close(self) -> None:
        """Leave the last state in the notebook, and below it all messages, of which the picture has only the last."""
        if self._handle is not None:
            self._draw(now=True)
            self._handle = None
            for notice in self.notices:
                print(notice)  # noqa: T201

    def html(self) -> str:
        """Return the picture as it is now."""
        console = Console(file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True,
                          force_jupyter=False, color_system="standard", _environ={})  # fmt: skip
        with self.lock:
            lines = dashboard(self, console, self._remembered)
        console.print(SegmentLines([[Segment(s.text, s.style) for s in line] for line in lines], new_lines=True))
        return console.export_html(theme=_THEME, code_format=_PAGE, inline_styles=True)

    def _draw(self, *, now: bool = False) -> None:
        if not now and (self.clock() < self._due or self._handle is None):
            return
        self._due = self.clock() + REFRESH_SECONDS
        html = self.html()
        if html == self._shown:
            return
        import IPython.display  # the notebook has it

        self._shown, output = html, IPython.display
        picture = output.HTML(html)  # type: ignore[no-untyped-call]
        if self._handle is None:
            self._handle = output.display(picture, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(picture)
