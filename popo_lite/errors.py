"""Define the errors. Each says what is wrong, where, and what to do next.

The command line prints a `PopoError` without a traceback and exits with its `exit_code`. Any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PopoError(Exception):
    """A failure that the user can act on.

    `what` is one sentence with the wrong value; `where` names file and key, problem or step; `next_step` is a command
    or an edit.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.next_step = what, where, next_step

    def within(self, place: str) -> PopoError:
        """Return the same error with `place`, such as a file, in front of `where`."""
        where = f"{place}: {self.where}" if self.where else place
        return type(self)(self.what, where=where, next_step=self.next_step)

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n  next: {self.next_step}" if self.next_step else message


class UserInputError(PopoError):
    """The recipe, the command line or the data asks for something that cannot be done."""

    exit_code = 2


class RecipeError(UserInputError):
    """A recipe that does not validate; `what` has one line for each of its errors."""


class DataError(UserInputError):
    """A dataset that is missing, lacks a column, or holds rows that cannot be used."""


class ModelError(UserInputError):
    """A model that cannot be loaded, or cannot be trained the way the recipe asks."""


class EngineError(PopoError):
    """A rollout engine that is unavailable, or failed while sampling."""


class StalePolicyError(EngineError):
    """The sampler holds another version of the adapter than the policy; sampling is refused."""


class GradingError(PopoError):
    """More answers than allowed could not be graded."""


class CheckpointError(PopoError):
    """A run folder or checkpoint that is missing, incomplete, or belongs to another recipe."""

    exit_code = 2


class ExportError(PopoError):
    """Merging, verifying or uploading a model failed."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that is most similar to `name`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)
