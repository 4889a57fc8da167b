"""Collect the commands. Importing this must stay cheap: commands import what needs torch when they run."""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module, metadata
from typing import Any

import click

from popo_lite.errors import INTERRUPTED, EngineError, PopoError, UserInputError, nearest
from popo_lite.launch import processes_of_run

COMMANDS = {
    "doctor": ("popo_lite.tools.doctor.command:doctor", "Check this machine, and write bug reports."),
    "init": ("popo_lite.tools.init.command:init", "Write a first recipe that fits, and explain it."),
    "recipe": ("popo_lite.tools.recipe_docs:recipe", "Show and check recipes."),
    "plan": ("popo_lite.tools.plan.command:plan", "Say whether a recipe fits a GPU, and what to change."),
    "bench": ("popo_lite.tools.bench.command:bench", "Measure a recipe's step with random weights."),
    "train": ("popo_lite.cli.train:train", "Train with a recipe."),
    "resume": ("popo_lite.cli.train:resume", "Continue a run."),
    "watch": ("popo_lite.tools.watch:watch", "Follow a run from another terminal, or look at one."),
    "report": ("popo_lite.tools.report.command:report", "Show a run as one HTML page."),
    "eval": (
        "popo_lite.tools.benchmarks.command:eval_",
        "Measure runs and models, on held-out problems or benchmarks.",
    ),
    "compare": ("popo_lite.tools.sweep.command:compare", "Compare runs and sweeps."),
    "sweep": ("popo_lite.tools.sweep.command:sweep", "Train variants of a recipe with several seeds."),
    "generate": ("popo_lite.tools.generate:generate", "Ask the model that a run trained."),
    "chat": ("popo_lite.tools.chat.command:chat", "Talk with a trained model, and compare it with its base."),
    "serve": ("popo_lite.tools.serve:serve", "Serve a run or a merged model by vLLM, with OpenAI's API."),
    "export": ("popo_lite.tools.export.command:export", "Turn a run into a model that others can load."),
    "push": ("popo_lite.tools.push:push", "Upload an export to the Hugging Face Hub."),
}
"""Name of a command -> where it is defined, and its line in `popo-lite --help`."""
ON_RANKS = ("train", "resume")
"""Commands that torchrun may start several times."""
HELP = ("-h", "--help")


class _Commands(click.Group):
    """Import a command when it is used; print a PopoError, a full disk or a full GPU as a message, without traceback.

    The exit code is that of the error.
    """

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except click.UsageError as error:
            if guess := nearest(args[0], COMMANDS):
                raise click.UsageError(f"{error.message} Did you mean {guess}?", ctx) from error
            raise
        if name not in ON_RANKS and not {*HELP} & {*rest}:
            _refuse_ranks(ctx, args[0])
        return name, command, rest

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            return ctx.exit(INTERRUPTED)  # a sweep tells by it that a run was stopped and did not fail
        except PopoError as error:
            shown = error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise click.UsageError(f"the path {str(error.filename)[:60]!r}... is too long") from error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            next_step = "free some space and rerun the command, `popo-lite resume RUN` for a run; saves are complete"
            shown = PopoError("there is no room left on the disk", where=error.filename, next_step=next_step)
        except click.exceptions.Exit:  # how --help ends; it is a RuntimeError
            raise
        except RuntimeError as error:
            from popo_lite.policy.memory import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            next_step = "free memory of the GPU, or put CUDA_VISIBLE_DEVICES= in front of the command to use the CPU"
            shown = EngineError("the GPU ran out of memory", next_step=next_step)
        from popo_lite.tools.console.output import print_error

        print_error(shown)
        return ctx.exit(shown.exit_code)


def _refuse_ranks(ctx: click.Context, name: str) -> None:
    """Raise UserInputError if torchrun has started `name` several times, all in the same folders; rank 0 reports it."""
    ranks = processes_of_run()
    if ranks == 1 or ctx.resilient_parsing:
        return
    if os.environ.get("RANK", "0") != "0":
        ctx.exit(UserInputError.exit_code)
    next_step = "run it without torchrun; outside of torchrun, unset WORLD_SIZE"
    raise UserInputError(f"{ranks} ranks run popo-lite {name}, and only train and resume can", next_step=next_step)


@click.group(cls=_Commands, context_settings={"help_option_names": HELP})
@click.version_option(metadata.version("popo-lite"), prog_name="popo-lite")
def main() -> None:
    """Make a language model better at something that can be checked, on one consumer GPU.

    \b
    popo-lite train tiny_cpu          the whole method in minutes, on any CPU
    popo-lite plan qwen_7b_lora       whether a run fits this GPU, and what to change
    popo-lite bench qwen_7b_lora      what a step takes here, before anything is downloaded
    popo-lite train qwen_1_5b_lora    Qwen2.5-Math-1.5B on a GPU
    """
    sys.excepthook = _print_traceback
    if sys.platform == "win32":  # there, the encoding of a redirected stream lacks most characters
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8")


def _print_traceback(*error: Any) -> None:
    from popo_lite.tools.console.output import print_traceback

    print_traceback(*error)
