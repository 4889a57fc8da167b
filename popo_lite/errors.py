"""Define the errors. Each says what is wrong, where, and what to do next.

The command line prints a `PopoError` without a traceback and exits with its `exit_code`. Any other exception is a bug
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C, as in shells."""


class PopoError(Exception):
    """Report a failure that the user can act on.

    `what` is one sentence with the wrong value; `where` names file and key, problem or step; `next_step` is a command
    or an edit.
    """

    exit_code = 1
    doubt: str | None = None
    """What of a run cannot be trusted by this error, for its checkpoints and summary."""

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.next_step = what, where, next_step

    def within(self, place: str) -> PopoError:
        """Return the same error with `place`, such as a file, in front of `where`."""
        return type(self)(self.what, where=f"{place}: {self.where}" if self.where else place, next_step=self.next_step)

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n  next: {self.next_step}" if self.next_step else message


class UserInputError(PopoError):
    """Raised if the recipe, the command line or the data asks for something that cannot be done."""

    exit_code = 2


class RecipeError(UserInputError):
    """Raised if a recipe is invalid; `what` has one line for each of its errors."""


class DataError(UserInputError):
    """Raised if a dataset is missing, lacks a column, or holds rows that cannot be used."""


class ModelError(UserInputError):
    """Raised if a model cannot be loaded, or cannot be trained as the recipe asks."""


class EngineError(PopoError):
    """Raised if a rollout engine is unavailable, or fails while sampling."""


class StalePolicyError(EngineError):
    """Raised if the sampler holds another version of the adapter than the policy."""


class EngineFailedError(EngineError):
    """Raised if a running engine fails for no known reason: it may go on once it is opened again."""


class NotFiniteError(EngineError):
    """Raised if log-probs, gradients or weights are not finite, or if gradients explode."""


class BadGradientsError(NotFiniteError):
    """Raised after several updates in a row that were skipped for their gradient: by all ranks, in the same step."""


class GradingError(PopoError):
    """Raised if more answers than allowed could not be graded."""


class CheckpointError(PopoError):
    """Raised if a run folder or checkpoint is missing, incomplete, or belongs to another recipe."""

    exit_code = 2


class ExportError(PopoError):
    """Raised if merging, verifying or uploading a model fails."""


class StopRequested(Exception):  # noqa: N818  # a request, not an error
    """Ctrl-C came twice: abandon the step in progress."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that is most similar to `name`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)
