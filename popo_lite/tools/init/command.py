"""Define `popo-lite init`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from popo_lite.errors import UserInputError

BUILT_IN = "arithmetic, comparison, gsm8k, deepscaler, math500, reasoning-gym:TASK, a file or a Hub id"


@click.command()
@click.option("--model", metavar="MODEL", help="tiny, a Hub id, a folder or a .gguf file.")
@click.option("--data", metavar="DATA", help=f"{BUILT_IN}.")
@click.option("--prompt-column", metavar="NAME", help="Column with the question of a file or Hub dataset.")
@click.option("--answer-column", metavar="NAME", help="Column with the reference answer.")
@click.option(
    "--reward", metavar="REWARD", help="Name of a function, a TOML table with options, or your own module:function."
)
@click.option("--card", metavar="CARD", help="Memory of the GPU, e.g. 24GiB, or cpu; default: what is here.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write; never one that exists.")
@click.option("--yes", is_flag=True, help="Ask nothing: take the default for every option that is not given.")
@click.option("--json", "as_json", is_flag=True, help="Print what was decided as JSON and nothing else.")
def init(
    model: str | None,
    data: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    reward: str | None,
    card: str | None,
    output: Path | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Write your first recipe: asks for model, data, reward and card, looks at all four, and explains each choice.

    The recipe fits the card by the memory plan (`popo-lite plan`). No weights are loaded, and code that comes with a
    model or dataset is never run; a reward function that you name yourself is.

    \b
    Example:
      popo-lite init --model tiny --data arithmetic --card cpu --yes --output first.toml
    """
    asks = not yes and is_terminal() and not as_json
    if not yes and not asks:
        given = {"--model": model, "--data": data, "--reward": reward, "--card": card, "--output": output}
        if missing := [name for name, value in given.items() if value is None]:
            what = f"there is no terminal to ask in, and these are not given: {', '.join(missing)}"
            raise UserInputError(what, where="popo-lite init", next_step="add them, or --yes to take the defaults")
    from popo_lite.tools.init.session import Session

    Session(asks, as_json).run(model, data, (prompt_column, answer_column), reward, card, output)


def is_terminal() -> bool:
    """Check whether questions can be asked and answered."""
    return sys.stdin.isatty() and sys.stdout.isatty()
