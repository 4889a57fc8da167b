"""`popo-lite chat`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from popo_lite.errors import PopoError, UserInputError
from popo_lite.tools.chat.temperature import Temperature
from popo_lite.tools.checkpoint_option import checkpoint_option
from popo_lite.tools.completion import complete_run
from popo_lite.trust import trust_option

if TYPE_CHECKING:
    from popo_lite.tools.chat.session import Session

MODEL_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(context_settings={"show_default": True})
@click.argument("model", shell_complete=complete_run, metavar="MODEL_OR_RUN")
@click.option("--weights", type=click.Choice(["policy", "siamese"]), help="Weights of a run.  [default: policy]")
@checkpoint_option
@click.option("--compare", is_flag=True, help="Show the base's answer to each message, too.")
@click.option(
    "--temperature", type=Temperature(greedy=True), default=0.7, help="0 for the likeliest token, or 0.01 to 100."
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer; default as in training.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--system-prompt", metavar="TEXT", help='Default as in training; "" for none.')
@click.option("--chat-template", type=MODEL_FILE, help="Jinja file, for a model without one.")
@trust_option
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object for each answer and nothing else.")
def chat(
    model: str, weights: str | None, checkpoint: int | str | None, compare: bool, temperature: float,
    max_tokens: int | None, seed: int, system_prompt: str | None, chat_template: Path | None, trust: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Talk with MODEL_OR_RUN: the folder of a run or of a model, a GGUF file, or a Hub id.

    On a terminal F2 switches a run's adapter off and on, and /help lists the commands. Without one, each line of
    standard input is a message of one conversation, and only the answers go to standard output.

    \b
    Example:
      echo "What is 3+4?" | popo-lite chat runs/tiny_cpu-seed0
    """
    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what, where = f"cannot be read: {error}", f"--chat-template {chat_template}"
            raise UserInputError(what, where=where, next_step="save the file as UTF-8") from error

    from popo_lite.tools.chat.model import open_chat, open_subject, utf8
    from popo_lite.tools.chat.session import Session
    from popo_lite.tools.console.chat import ChatScreen

    if system_prompt is not None:
        utf8(system_prompt, "--system-prompt")
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    screen = ChatScreen(plain=not interactive, silent=as_json)
    subject = open_subject(model, weights, checkpoint)
    if template is not None:
        subject = replace(subject, recipe=subject.recipe.with_values({"data.chat_template": template}))
    if interactive:
        screen.note(f"loading {subject.recipe.model.id} ...")
    with open_chat(subject, weights, compare=compare, trust=trust, source=model) as opened:
        if system_prompt is not None:
            opened.renderer.system_prompt = system_prompt or None
        session = Session(opened, screen, temperature=temperature, max_tokens=max_tokens, seed=seed, compare=compare,
                          as_json=as_json)  # fmt: skip
        if interactive:
            _converse(session)
        else:
            all(_take(session, line) for line in _lines())  # until one of them ends it
    if interactive and opened.has_adapter:
        command = ["popo-lite", "export", model]
        command += ["--weights", weights] if weights else []
        command += ["--checkpoint", str(checkpoint)] if checkpoint else []
        session.screen.note(f"To keep the model:  {shlex.join(command)}")


def _take(session: Session, line: str) -> bool:
    """Run a command or answer a message; return False if it ends the chat."""
    from popo_lite.tools.chat.model import utf8

    if utf8(line, "this message").startswith("/"):
        return session.command(line)
    if line.strip():
        session.say(line.strip())
    return True


def _lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            next_step = "write the messages in UTF-8"
            raise UserInputError(
                "is not UTF-8 text", where=f"line {number} of the input", next_step=next_step
            ) from error


def _converse(session: Session) -> None:
    """Read messages from the terminal until Ctrl-D or /quit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from popo_lite.tools.console.output import print_error

    keys = KeyBindings()

    @keys.add("f2")
    @keys.add("c-t")
    def _(_event: KeyPressEvent) -> None:
        session.switch_adapter()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session.introduce()
    prompt = PromptSession[str](
        lambda: f"{session.weights}> ", multiline=True, prompt_continuation="  ", key_bindings=keys,
        bottom_toolbar=lambda: session.status,
    )  # fmt: skip
    while True:
        try:
            if not _take(session, prompt.prompt()):
                return
        except KeyboardInterrupt:
            session.screen.note("Ctrl-D leaves")
        except EOFError:
            return
        except PopoError as error:
            print_error(error)
