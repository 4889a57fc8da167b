"""One family of errors. Each says what was wrong, where, and what to do next.

The command line prints a `PopoError` without a traceback and leaves with its `exit_code`; any other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PopoError(Exception):
    """A failure that its reader can act on.

    `what` is one sentence with the value that was found; `where` names file and key, problem or step;
    `next_step` is a command or an edit.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step

    def within(self, place: str) -> PopoError:
        """The same error with `place`, a file for instance, in front of where it happened."""
        where = f"{place}: {self.where}" if self.where else place
        return type(self)(self.what, where=where, next_step=self.next_step)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.next_step:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


class UserInputError(PopoError):
    """The recipe, the command line or the data asks for something that cannot be done."""

    exit_code = 2


class RecipeError(UserInputError):
    """A recipe that does not validate; `what` lists every fault of it."""


class DataError(UserInputError):
    """A dataset that is missing, lacks a column, or holds rows that cannot be used."""


class ModelError(UserInputError):
    """A model that cannot be loaded, or cannot be trained the way the recipe asks."""


class EngineError(PopoError):
    """A rollout engine that is unavailable, or failed while sampling."""


class StalePolicyError(EngineError):
    """The sampler holds another version of the adapter than the policy; sampling is refused."""


class GradingError(PopoError):
    """Too many answers of a step could not be graded for the step to mean anything."""


class CheckpointError(PopoError):
    """A run folder or checkpoint that is missing, incomplete, or belongs to another recipe."""

    exit_code = 2


class ExportError(PopoError):
    """Merging, verifying or uploading a model failed."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was most likely meant to be, or None."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return found[0] if found else None
