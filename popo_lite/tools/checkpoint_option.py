"""Define the option --checkpoint of the commands that use a run's weights."""

from __future__ import annotations

from typing import Any

import click


class _Checkpoint(click.ParamType[int | str]):
    """A number of steps, or "best"."""

    name = "checkpoint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "best":
            return "best"
        return click.IntRange(min=1).convert(value, param, ctx)


checkpoint_option = click.option(
    "--checkpoint",
    type=_Checkpoint(),
    metavar="N|best",
    help="Weights after N steps, or of the best evaluation during training; default the end, or the newest there is.",
)
