"""The type of temperatures on command lines and in a chat."""

from __future__ import annotations

from typing import Any

import click

LEAST, MOST = 0.01, 100.0
"""Below, logits overflow; above, all tokens are drawn alike."""


class Temperature(click.ParamType[float]):
    """A number from LEAST to MOST, or, with `greedy`, 0 for the likeliest token."""

    name = "float"

    def __init__(self, *, greedy: bool) -> None:
        self.greedy = greedy

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raises BadParameter for anything else, also NaN."""
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if LEAST <= number <= MOST or (self.greedy and number == 0):
            return number
        zero = "0 or " if self.greedy else ""
        what = f"not a temperature: {value or 'nothing'}; it is {zero}from {LEAST:g} to {MOST:g}"
        raise click.BadParameter(what, ctx, param)
