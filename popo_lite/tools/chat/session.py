"""Hold a conversation and its commands, whatever messages are read from."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from popo_lite.errors import PopoError, UserInputError, nearest
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.redaction import redacted
from popo_lite.run_folder import write_atomically
from popo_lite.seeding import stream_seed
from popo_lite.tools.chat.model import Answer, ChatModel
from popo_lite.tools.chat.pieces import Pieces
from popo_lite.tools.chat.temperature import Temperature
from popo_lite.tools.console.chat import ChatScreen, Draw
from popo_lite.types import Problem

HELP = """\
/adapter          switch the adapter on or off (F2, Ctrl-T)
/compare          answer with the base and with the adapter, or stop that
/retry            answer the last message again
/undo             forget the last message and its answer
/reset            forget the whole conversation
/system TEXT      set the system prompt, "" for none; without TEXT show it
/temperature X    set the temperature; 0 takes the likeliest token
/save FILE        write the conversation as JSON
/quit             leave (Ctrl-D)
Ctrl-C stops an answer. Alt-Enter starts a new line. A message that begins with a blank is never a command."""
COMMANDS = ("help", *re.findall(r"^/(\w+)", HELP, re.MULTILINE))
"""Each but quit is a method of `Session`, with an underscore before its name."""
MAKE_ROOM = "/undo forgets the last message, /reset all of them"


@dataclass
class Turn:
    """A message and its answers: by True with the adapter, by False without."""

    message: str
    answers: dict[bool, Answer] = field(default_factory=dict)

    def seen_by(self, adapter: bool) -> Answer:
        """Return the answer that these weights go on from: their own, or else the other ones'."""
        return self.answers.get(adapter) or next(iter(self.answers.values()))


class Session:
    """A conversation with `model`. `as_json` prints an object for each answer and nothing else."""

    def __init__(self, model: ChatModel, screen: ChatScreen, *, temperature: float, max_tokens: int | None, seed: int,
                 compare: bool, as_json: bool = False) -> None:  # fmt: skip
        self.model, self.screen, self.as_json = model, screen, as_json
        self.adapter, self.compare, self.temperature = True, compare, temperature
        self.max_tokens = max_tokens or model.recipe.rollout.max_completion_length
        self.turns: list[Turn] = []
        self._seed, self._draws = seed, 0
        self._environment = model.recipe.rollout.environment

    @property
    def weights(self) -> str:
        """Name the weights that answer the next message."""
        return " and ".join(map(self.model.label, self._asked))

    @property
    def status(self) -> str:
        """Say what the keys do, for the line below the input."""
        other = f"F2: {self.model.label(not self.adapter)}   " if self.model.has_adapter else ""
        return f"{other}temperature {self.temperature:g}   Ctrl-D: leave   /help"

    @property
    def _asked(self) -> tuple[bool, ...]:
        return (False, True) if self.compare else (self.adapter,)

    def introduce(self) -> None:
        """Say what answers and how to switch and leave."""
        model, recipe = self.model, self.model.recipe
        after = "" if model.checkpoint is None else f" after {model.checkpoint:,} steps"
        self.screen.note(f"{model.name}: {model.weights}{after}, answers of at most {self.max_tokens:,} tokens")
        if self._environment.name is not None:
            self.screen.note(
                f"It was trained in conversations with {self._environment.name}: your first message is the problem, "
                f"the others are what the environment says (role {self._environment.role})."
            )
        elif model.has_adapter:
            self.screen.note("It was trained on single questions; /reset before each makes a chat the same.")
        if recipe.data.system_prompt:
            self.screen.note(f"system prompt: {recipe.data.system_prompt}")
        self.screen.note("/help lists the commands, Ctrl-D leaves")

    def switch_adapter(self) -> None:
        """Switch the adapter off, or on again."""
        if self.model.has_adapter:
            self.adapter, self.compare = not self.adapter, False

    def say(self, message: str) -> None:
        """Answer a message and add both to the conversation. Raises PopoError if that is not possible."""
        turn = Turn(message)
        prompts = {adapter: self._prompt(message, adapter) for adapter in self._asked}
        self._draws += 1
        with self.screen.answers([self.model.label(adapter) for adapter in prompts]) as draws:
            for (adapter, prompt), draw in zip(prompts.items(), draws, strict=True):
                turn.answers[adapter] = answer = self._answer(prompt, adapter, draw)
                if answer.finish_reason == "interrupted":
                    break
        for adapter, answer in turn.answers.items():
            self._report(message, adapter, answer)
        if all(answer.token_ids for answer in turn.answers.values()):
            self.turns.append(turn)

    def _answer(self, prompt: tuple[int, ...], adapter: bool, draw: Draw) -> Answer:
        room = self.model.context - len(prompt)
        seed = stream_seed("chat", self._seed, self._draws) % 2**63
        pieces = Pieces(self.model.recipe.reward.thinking_tags, thinking=self.model.renderer.opens_thinking)
        try:
            answer = self.model.answer(
                prompt, adapter=adapter, temperature=self.temperature, max_tokens=min(self.max_tokens, room),
                seed=seed, show=lambda text: draw(pieces.push(text)),
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.model.forget()
            release_memory()
            what = f"memory ran out with {len(prompt):,} tokens before the answer"
            raise PopoError(what, next_step=MAKE_ROOM) from error
        draw(pieces.push(answer.text, final=True))
        return answer

    def _report(self, message: str, adapter: bool, answer: Answer) -> None:
        """Print the answer as JSON, or why it ended if it did not end by itself."""
        if answer.finish_reason == "interrupted" and self.screen.plain:
            raise KeyboardInterrupt  # without a terminal it ends the chat
        if self.as_json:
            click.echo(json.dumps({"message": message, **self._content(adapter, answer)}))
        elif answer.finish_reason == "interrupted":
            self.screen.note(f"({self.model.label(adapter)} stopped)")
        elif answer.finish_reason == "length":
            full = len(answer.prompt_ids) + len(answer.token_ids) >= self.model.context
            why = f"the model's context is full; {MAKE_ROOM}" if full else "--max-tokens allows longer answers"
            self.screen.note(f"({self.model.label(adapter)} was cut off after {len(answer.token_ids):,} tokens: {why})")

    def _prompt(self, message: str, adapter: bool) -> tuple[int, ...]:
        """Return the conversation and `message` as tokens. Raises UserInputError if no answer would fit."""
        renderer, answers = self.model.renderer, [turn.seen_by(adapter) for turn in self.turns]
        if answers and self._environment.name is not None:
            # As in training: the tokens of earlier answers stay, and are not rendered again.
            last = answers[-1]
            ids = (*last.prompt_ids, *last.token_ids, *renderer.observation_ids(last.token_ids[-1], message))
        else:
            said = [
                text for turn, answer in zip(self.turns, answers, strict=True) for text in (turn.message, answer.text)
            ]
            roles = ("user", "assistant")
            messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate([*said, message]))
            ids = renderer.token_ids(Problem(id="chat", messages=messages, answer=""))
        if len(ids) >= self.model.context:
            what = f"the conversation has {len(ids):,} tokens, and the model's context is {self.model.context:,}"
            next_step = MAKE_ROOM if self.turns else "write a shorter message"
            raise UserInputError(what, where="this message was not answered", next_step=next_step)
        return ids

    def _content(self, adapter: bool, answer: Answer) -> dict[str, Any]:
        return {
            "weights": self.model.label(adapter),
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(answer.prompt_ids),
            "tokens": len(answer.token_ids),
        }

    def command(self, line: str) -> bool:
        """Run a command; return False if it ends the chat. Raises UserInputError if it cannot be run."""
        name, _, text = line[1:].strip().partition(" ")
        if name in ("quit", "exit"):
            return False
        if name not in COMMANDS:
            close = nearest(name, COMMANDS)
            next_step = f"did you mean /{close}? " if close else ""
            next_step += "/help lists the commands; put a blank in front of a message that begins with /"
            raise UserInputError(f"there is no command /{name}", next_step=next_step)
        getattr(self, f"_{name}")(text.strip())
        return True

    def _help(self, _text: str) -> None:
        self.screen.note(HELP)

    def _need_adapter(self) -> None:
        if not self.model.has_adapter:
            what = f"{self.model.name} is a model without an adapter"
            raise UserInputError(what, next_step="popo-lite chat RUN talks with base and adapter of a run")

    def _adapter(self, text: str) -> None:
        self._need_adapter()
        if text not in ("", "on", "off"):
            raise UserInputError(f"/adapter takes on or off, not {text}", next_step="/adapter alone switches it")
        if not text or (text == "on") != self.adapter:
            self.switch_adapter()
        self.screen.note(f"answers now come from the {self.weights}")

    def _compare(self, _text: str) -> None:
        self._need_adapter()
        self.compare = not self.compare
        self.screen.note(f"answers now come from the {self.weights}")

    def _retry(self, _text: str) -> None:
        self._need_turn()
        turn = self.turns.pop()
        try:
            self.say(turn.message)
        except PopoError:
            self.turns.append(turn)
            raise

    def _undo(self, _text: str) -> None:
        self._need_turn()
        self.screen.note(f"forgot: {self.turns.pop().message}")

    def _need_turn(self) -> None:
        if not self.turns:
            raise UserInputError("there is no message yet", next_step="write one")

    def _reset(self, _text: str) -> None:
        self.turns.clear()
        self.model.forget()
        self.screen.note("forgot the conversation; the system prompt stays")

    def _system(self, text: str) -> None:
        renderer = self.model.renderer
        if text:
            before, renderer.system_prompt = renderer.system_prompt, None if text == '""' else text
            try:
                renderer.token_ids(Problem(id="chat", messages=({"role": "user", "content": "?"},), answer=""))
            except PopoError:
                renderer.system_prompt = before
                raise
        self.screen.note(f"system prompt: {renderer.system_prompt or 'none'}")

    def _temperature(self, text: str) -> None:
        try:
            self.temperature = Temperature(greedy=True).convert(text, None, None)
        except click.BadParameter as error:
            raise UserInputError(error.message, next_step="/temperature 0.7") from error
        self.screen.note(f"temperature {self.temperature:g}")

    def _save(self, text: str) -> None:
        if not text:
            raise UserInputError("/save takes the name of a file", next_step="/save chat.json")
        content = {
            "model": self.model.name,
            "checkpoint": self.model.checkpoint,
            "system_prompt": self.model.renderer.system_prompt,
            "temperature": self.temperature,
            "seed": self._seed,
            "turns": [
                {"message": turn.message, "answers": [self._content(*each) for each in turn.answers.items()]}
                for turn in self.turns
            ],
        }
        try:
            path = Path(text).expanduser()
            if path.exists():
                what = f"{path} exists, and nothing is overwritten"
                raise UserInputError(what, next_step="/save chat.json, or another name")
            write_atomically(path, json.dumps(redacted(content), indent=2) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # also ~user without a home, and a name with NUL
            what = f"{text} cannot be written: {getattr(error, 'strerror', None) or error}"
            raise UserInputError(what, next_step="name a file in a folder of yours") from error
        self.screen.note(f"saved the conversation to {shlex.quote(str(path))}")
