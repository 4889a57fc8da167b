"""The commands. Importing this must stay cheap: what needs torch is imported inside the commands."""

from __future__ import annotations

import errno
from importlib import metadata
from typing import Any

import click

from popo_lite.cli.train import train
from popo_lite.errors import PopoError
from popo_lite.tools.bench.command import bench
from popo_lite.tools.benchmarks.command import eval_
from popo_lite.tools.export.command import export
from popo_lite.tools.generate import generate
from popo_lite.tools.plan.command import plan
from popo_lite.tools.recipe_docs import recipe
from popo_lite.tools.sweep.command import compare, sweep


class _Commands(click.Group):
    """Turns a PopoError, or a full disk, into its message and exit code; other exceptions keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PopoError as error:
            told = error
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            told = PopoError(
                "there is no room left on the disk",
                where=error.filename,
                next_step="make room and give the command again, train with --resume: what was saved before is whole",
            )
        from popo_lite.tools.console.output import print_error

        print_error(told)
        return ctx.exit(told.exit_code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(metadata.version("popo-lite"), prog_name="popo-lite")
def main() -> None:
    """Make a language model better at something that can be checked, on one consumer GPU.

    \b
    popo-lite train tiny_cpu                       the whole method in minutes, on any CPU
    popo-lite plan recipes/qwen_7b_lora.toml       whether a run fits this GPU, and what to change
    popo-lite bench recipes/qwen_7b_lora.toml      what a step takes here, before anything is downloaded
    popo-lite train recipes/qwen_1_5b_lora.toml    Qwen2.5-Math-1.5B on a GPU
    """


for command in (train, plan, eval_, generate, export, recipe, bench, sweep, compare):
    main.add_command(command)
