"""Send metrics, evaluations and samples to trackers, each in a process of its own (`child`)."""

from __future__ import annotations

import importlib.util
import json
import queue
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

from popo_lite.errors import UserInputError
from popo_lite.formats import read_json
from popo_lite.installing import install_extra
from popo_lite.metrics import METRICS, StepRecord
from popo_lite.recipe import Recipe
from popo_lite.redaction import redact, without_home
from popo_lite.run_folder import RunFolder, flat, read_lines, write_json
from popo_lite.tools.console.words import clean, printable
from popo_lite.tools.reporting.child import QUEUED, Child
from popo_lite.tools.reporting.reporter import Reporter

LOGIN_SECONDS = 60.0
VIEWS = {
    "trackio": "trackio show --project {project}",
    "tensorboard": "tensorboard --logdir {runs}",
    "wandb": "the project {project} on your wandb server",
    "wandb offline": "wandb sync {run}/wandb/offline-run-*",
    "wandb disabled": "it is disabled and keeps nothing; to change that: wandb enabled, or WANDB_MODE=online",
}
"""Name of a tracker -> how to see the run in it."""
MODES = {"offline": "wandb offline", "dryrun": "wandb offline", "disabled": "wandb disabled"}
"""Mode of wandb -> its key in VIEWS."""
COLUMNS = ("question", "reference", "right", "wrong")
LONGEST_TEXT = 10_000
"""Characters of a sample's text."""
_clean = lru_cache(clean)
"""For names, which are the same at every step."""


def open_trackers(run: RunFolder, recipe: Recipe) -> list[Reporter]:
    """Return a reporter for each tracker of `output.report_to`.

    Raises UserInputError if a package is missing, or wandb has no login.
    """
    names = tuple(dict.fromkeys(recipe.output.report_to))
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as wandb's own, has no origin
            what = f"the package {name} is not installed"
            raise UserInputError(what, where="output.report_to", next_step=install_extra(name))
    return [Tracker(name, run, recipe, _wandb_view() if name == "wandb" else name) for name in names]


def _wandb_view() -> str:
    """Return the key in VIEWS for wandb's mode. It is asked itself, as it has many places for modes and logins.

    Raises UserInputError if it would ask for a login.
    """
    child = Child("wandb-login")
    child.send("open")
    child.send("check")
    child.end_input()
    child.wait(LOGIN_SECONDS)
    child.kill()
    if (found := child.reply()) is None:
        return "wandb"  # a run must not depend on it; the tracker itself says what is wrong
    view = MODES.get(found["mode"], "wandb")
    if view == "wandb" and not found["has_login"]:
        next_step = "wandb login, or put WANDB_MODE=offline in front of the command to write to the run folder only"
        raise UserInputError("wandb has no login", where="output.report_to", next_step=next_step)
    return view


def _contained(method: Callable[..., None]) -> Callable[..., None]:
    """Let an error of a tracker's `method` end the tracker and not the run."""

    @wraps(method)
    def call(tracker: Tracker, *values: Any, **named: Any) -> None:
        try:
            method(tracker, *values, **named)
        except Exception as error:
            tracker.give_up(f"{type(error).__name__}: {error}")

    return call


class Tracker(Reporter):
    """Pass events on to the process of one tracker. If that fails or falls behind, say so once and send nothing more.

    Steps are numbered as people are shown them: from 1; 0 is before training. `view` is the tracker's key in VIEWS.
    """

    patience = 15.0

    def __init__(self, name: str, run: RunFolder, recipe: Recipe, view: str) -> None:
        super().__init__()
        self.name, self._view = name, view
        self._run, self._recipe = run, recipe
        self._child: Child | None = None
        self._is_ending = False
        self._tokens: dict[int, int] = {}  # step -> tokens of it

    @_contained
    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:  # noqa: ARG002
        if first_step:
            self._tokens = {line["step"]: line["tokens_of_all"] for line in read_lines(self._run.metrics_path)}
        self._child = Child(self.name)
        self._send(
            "open",
            project=self._recipe.output.project,
            name=clean(title),
            id=_run_id(self._run),
            folder=str(self._run.path),
            config=_config(self._recipe),
            first_step=first_step,
        )
        quoted = {
            "project": self._recipe.output.project,
            "runs": str(self._run.path.parent),
            "run": str(self._run.path),
        }
        view = VIEWS[self._view].format(**{name: shlex.quote(text) for name, text in quoted.items()})
        self.say(f"{self.name}: {view}")

    @_contained
    def step(self, record: StepRecord) -> None:
        step = record["step"]
        self._tokens = {past: count for past, count in self._tokens.items() if past < step}  # it may come again
        self._tokens[step] = record["tokens_of_all"]
        self._send("scalars", step=step + 1, values=step_scalars(record, sum(self._tokens.values())))

    @_contained
    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        rows = [[printable(str(view[name] or ""))[:LONGEST_TEXT] for name in COLUMNS] for view in samples]
        if rows:
            self._send("table", step=samples[0]["step"] + 1, name="samples", columns=COLUMNS, rows=rows)

    @_contained
    def evaluated(self, record: Mapping[str, Any]) -> None:
        self._send("scalars", step=record["step"], values=evaluation_scalars(record))

    @_contained
    def finish(self) -> None:
        self._is_ending = True
        self._send("close")
        if self._child is not None:
            self._child.end_input()

    def is_done(self) -> bool:
        return self._child is None or not self._child.is_alive

    def close(self) -> None:
        """Say with what error the process ended, if it did."""
        if self._child is not None:
            self._child.kill()
            if error := self._child.last_error():
                self.give_up(error)
            self._child = None

    def give_up(self, why: str) -> None:
        """Say why this tracker gets nothing more, and end its process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
        if not self._is_ending:
            self.say(f"{self.name} gets nothing more: {clean(why)}; the run goes on, and its folder has everything")
            return
        run = shlex.quote(str(self._run.path))
        rest = f". To send what wandb has: wandb sync {run}/wandb/run-*" if self._view == "wandb" else ""
        self.say(f"{self.name} may lack the end of the run: {clean(why)}; the run's folder has everything{rest}")

    def _send(self, call: str, **values: Any) -> None:
        """Send a call to the process."""
        if self._child is None:
            return
        if not self._child.is_alive:
            self.give_up(self._child.last_error() or "its process ended")
            return
        try:
            self._child.send(call, **values)
        except queue.Full:
            self.give_up(f"{QUEUED:,} events wait to be sent")


def step_scalars(record: StepRecord, num_tokens: int) -> dict[str, float]:
    """Return every number of a step under our name, and under TRL's if it has the same quantity.

    Without the step itself, which is the axis. `num_tokens` are the tokens of all rollouts since the run began.
    """
    values: dict[str, float] = {}
    for name, metric in METRICS.items():
        value = record.get(name)
        if name == "step" or metric.unit == "text" or value is None:
            continue
        figures = {_clean(key): each for key, each in value.items()} if isinstance(value, Mapping) else {"": value}
        values |= {f"{name}/{key}" if key else name: each for key, each in figures.items()}
        if metric.trl is not None and "{}" in metric.trl:
            values |= {f"train/{metric.trl.format(key)}": each for key, each in figures.items()}
        elif metric.trl is not None:
            values[f"train/{metric.trl}"] = sum(figures.values())
    return {**values, "train/num_tokens": num_tokens}


def evaluation_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return every number of an evaluation, and a 95 % interval over problems for each pass@k (Wilson's).

    Several answers to a problem count as one, so the interval is too wide rather than too narrow.
    """
    from popo_lite.tools.sweep.compare import ratio_interval

    values: dict[str, float] = {}
    for k, rate in record["pass_at_k"].items():
        found = ratio_interval(rate, record["problems"])
        values |= {f"eval/pass@{k}": rate, **{f"eval/pass@{k}_{end}": found[end] for end in ("low", "high")}}
    rest = flat({name: value for name, value in record.items() if name not in ("pass_at_k", "pass_at_1", "step")}, "/")
    return values | {f"eval/{_clean(name)}": value for name, value in rest.items() if isinstance(value, int | float)}


def _run_id(run: RunFolder) -> str:
    """Return the run's id in trackers: stored with the run, so that a resumed or moved run keeps it."""
    if not run.trackers_path.is_file():
        write_json(run.trackers_path, {"id": secrets.token_hex(4)})
    return str(read_json(run.trackers_path)["id"])


def _config(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe by key, in the form of model cards: without private settings, secrets and the home folder."""
    from popo_lite.tools.public import public_recipe

    values: dict[str, Any] = json.loads(redact(without_home(json.dumps(public_recipe(recipe).to_dict()))))
    return flat(values)
