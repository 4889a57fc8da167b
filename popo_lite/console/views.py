"""Which view a run gets."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, TextIO

from popo_lite.console.base import RunView
from popo_lite.console.plain import PlainView
from popo_lite.errors import UserInputError
from popo_lite.types import SampleView, StepRecord

ViewMode = Literal["auto", "live", "plain", "silent"]


class SilentView(RunView):
    """Shows nothing: for tests, and where standard output is for machines."""

    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:
        """Nothing."""

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def samples(self, samples: Sequence[SampleView]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_view(mode: ViewMode = "auto", stream: TextIO | None = None) -> RunView:
    """The view for `stream`, standard output unless given.

    `auto` is live on a terminal that can move its cursor and plain anywhere else. NO_COLOR takes the
    colours away. Raises UserInputError where `live` is asked for and cannot be had.
    """
    stream = stream if stream is not None else sys.stdout
    if mode == "silent":
        return SilentView()
    can_move = stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    if mode == "live" and not can_move:
        raise UserInputError(
            "the live view needs a terminal that can move its cursor, and standard output is none",
            next_step="choose the plain view, or leave the choice to auto",
        )
    if mode == "plain" or not can_move:
        return PlainView(stream)
    # Only the live view needs rich.
    from rich.console import Console

    from popo_lite.console.live import LiveView

    return LiveView(Console(file=stream, highlight=False))
