"""Draw answers while they grow: one below the other, or two side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from rich.live import Live
from rich.table import Table
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console

SIDE_BY_SIDE = 100
"""Least width in characters of a terminal for two columns."""

Piece = tuple[str, bool]
"""Printable text, and whether it is thinking."""
Draw = Callable[[Iterable[Piece]], object]
"""Takes the next pieces of an answer."""


class ChatScreen:
    """Write answers to standard output. `plain` is for files and pipes; `silent` writes no answers."""

    def __init__(self, *, plain: bool, silent: bool = False) -> None:
        self.plain, self._silent, self._console = plain, silent, open_console(sys.stdout)

    def note(self, text: str) -> None:
        """Print lines about the chat, to standard error if standard output is for answers alone."""
        console = open_console(sys.stderr) if self.plain else self._console
        for line in text.splitlines():
            console.print(Text(words.encodable(words.printable(line), console.encoding), "dim"), soft_wrap=True)

    def answers(self, labels: Sequence[str]) -> AbstractContextManager[Sequence[Draw]]:
        """Yield what draws each answer, in this order. A single one is written without its label."""
        if self._silent:
            return nullcontext([list] * len(labels))
        if len(labels) > 1 and not self.plain and self._console.width >= SIDE_BY_SIDE:
            return self._columns(labels)
        return self._rows(labels)

    @contextmanager
    def _rows(self, labels: Sequence[str]) -> Iterator[Sequence[Draw]]:
        begun: list[str] = []

        def draw(label: str, pieces: Iterable[Piece]) -> None:
            if label not in begun:
                if begun:
                    self._console.print()
                begun.append(label)
                if len(labels) > 1:
                    self._console.print(Text(f"{label}:", "bold"))
            for part in self._drawn(pieces):
                self._console.print(part, end="", soft_wrap=True)

        try:
            yield [partial(draw, label) for label in labels]
        finally:
            self._console.print()

    @contextmanager
    def _columns(self, labels: Sequence[str]) -> Iterator[Sequence[Draw]]:
        texts = [Text() for _ in labels]

        def table(last_lines: int) -> Table:
            built, width = Table.grid(padding=(0, 2), expand=True), self._console.width // len(labels) - 2
            for _ in labels:
                built.add_column(ratio=1)
            built.add_row(*(Text(label, "bold") for label in labels))
            built.add_row(*(Text("\n").join(text.wrap(self._console, width)[-last_lines:]) for text in texts))
            return built

        with Live(console=self._console, transient=True, auto_refresh=False) as live:

            def draw(text: Text, pieces: Iterable[Piece]) -> None:
                for part in self._drawn(pieces):
                    text.append_text(part)
                # Lines that scrolled off the screen could not be drawn again.
                live.update(table(max(self._console.height - 3, 1)), refresh=True)

            yield [partial(draw, text) for text in texts]
        self._console.print(table(max(len(text) for text in texts) + 1))

    def _drawn(self, pieces: Iterable[Piece]) -> Iterator[Text]:
        for piece, thinking in pieces:
            yield Text(words.encodable(piece, self._console.encoding), "dim" if thinking else "")
