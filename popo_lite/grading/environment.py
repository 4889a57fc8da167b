"""Let environments answer and judge conversations. Workers replay a conversation at every request.

So they hold no state between requests: a worker that hung or died costs one request, and any worker can go on.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from popo_lite.trust import find_module


class Environment(Protocol):
    """A class that `rollout.environment.name` names.

    The same problem and texts must always lead to the same observations.
    """

    def reset(self, problem: Mapping[str, Any]) -> None:
        """Begin a conversation. `problem` has "id", "question", "messages", "answer" and "meta"."""

    def step(self, text: str) -> tuple[str, bool]:
        """Take an answer of the model; return what to say to it, and True if the conversation is over."""

    def reward(self) -> float | bool | None:
        """Return the reward of the conversation so far, in [0, 1]; None for no answer in it."""


def import_own(name: str) -> ModuleType:
    """Import a module of the user's, if need be from the working folder, which stays the last on the path."""
    _, needs_folder = find_module(name.partition(".")[0])
    if needs_folder and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return importlib.import_module(name)


def prepare_environment(environment: str, options: Mapping[str, Any], **_: object) -> dict[str, Any]:
    """Return {"make": makes an environment}. Raises ValueError if there is no such class or it lacks a method."""
    module, kind = environment.split(":")
    try:
        make = partial(getattr(import_own(module), kind), **options)
        made = make()
        for method in ("reset", "step", "reward"):
            getattr(made, method)
    except (Exception, SystemExit) as error:
        raise ValueError(f'rollout.environment.name = "{environment}": {type(error).__name__}: {error}') from error
    return {"make": make}


def play(
    make: Callable[[], Environment], problem: Mapping[str, Any], messages: Sequence[Mapping[str, str]]
) -> tuple[Environment, str, bool]:
    """Replay a conversation; return the environment, its last observation, and whether it is done."""
    environment, observation, done = make(), "", False
    environment.reset(problem)
    for message in messages:
        if message["role"] == "assistant":
            observation, done = environment.step(message["content"])
            if not isinstance(observation, str):
                raise TypeError(f"step returned {observation!r:.80} for the observation, which must be text")
    return environment, observation, bool(done)


def grade_environment(text: str, problem: Mapping[str, Any], *, make: Callable[[], Environment]) -> float | bool | None:
    """Return the environment's reward. Without a conversation, `text` is all that the model said."""
    messages = problem.get("conversation") or [{"role": "assistant", "content": text}]
    return play(make, problem, messages)[0].reward()
