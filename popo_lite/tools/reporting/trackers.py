"""Send metrics, evaluations and samples to trackers, each in a process of its own (`tracker_process`).

A tracker may raise, hang in the network, print, or hold the interpreter's lock. In another process none of it reaches
the run, which only puts lines into a queue.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from popo_lite.callbacks import Callback
from popo_lite.controls import Controls
from popo_lite.errors import UserInputError
from popo_lite.formats import read_json
from popo_lite.installing import install_extra
from popo_lite.metrics import METRICS, StepRecord
from popo_lite.recipe import Recipe
from popo_lite.redaction import redact, without_home
from popo_lite.run_folder import RunFolder, flat, read_lines, write_json
from popo_lite.tools.console.words import clean, printable

PROCESS = Path(__file__).with_name("tracker_process.py")
QUEUED = 1_000
"""Events that wait for a slow tracker; one that is further behind gets nothing more."""
CLOSE_SECONDS = 15.0
"""At the end, wait this long for a tracker to send the rest."""
VIEWS = {
    "trackio": "trackio show --project {project}",
    "tensorboard": "tensorboard --logdir {runs}",
    "wandb": "the project {project} on your wandb server",
    "wandb offline": "wandb sync {run}/wandb/offline-run-*",
}
"""Name of a tracker -> how to see the run in it."""
COLUMNS = ("question", "reference", "right", "wrong")
LONGEST_TEXT = 10_000
"""Characters of a sample's text."""
_clean = lru_cache(clean)
"""For names, which are the same at every step."""


def open_trackers(run: RunFolder, recipe: Recipe) -> list[Callback]:
    """Return a callback for each tracker of `output.report_to`.

    Raises UserInputError if a package is missing, or wandb has no login.
    """
    names = tuple(dict.fromkeys(recipe.output.report_to))
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of this name, such as wandb's own, has no origin
            what = f"the package {name} is not installed"
            raise UserInputError(what, where="output.report_to", next_step=install_extra(name))
    if "wandb" in names:
        _check_login()
    return [Tracker(name, run, recipe) for name in names]


def _check_login() -> None:
    """Raise UserInputError if wandb would ask for a login. It is asked itself, as it has many places for a login."""
    command = [sys.executable, "-P", str(PROCESS), "wandb-login"]
    try:
        done = subprocess.run(command, input=_import_path(), capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return  # a run must not depend on it; the tracker itself says what is wrong
    if done.stdout.strip() == "no login":
        next_step = "wandb login, or put WANDB_MODE=offline in front of the command to write to the run folder only"
        raise UserInputError("wandb has no login", where="output.report_to", next_step=next_step)


def _import_path() -> str:
    """Return the first line for the process: where it imports from, as this one does."""
    here = str(Path.cwd())
    return json.dumps([entry or here for entry in sys.path]) + "\n"


def _contained(method: Callable[..., None]) -> Callable[..., None]:
    """Let an error of a tracker's `method` end the tracker and not the run."""

    @wraps(method)
    def call(tracker: Tracker, *values: Any, **named: Any) -> None:
        try:
            method(tracker, *values, **named)
        except Exception as error:
            tracker.give_up(f"{type(error).__name__}: {error}")

    return call


class Tracker(Callback):
    """Pass events on to the process of one tracker. If that fails or falls behind, say so once and send nothing more.

    Steps are numbered as people are shown them: from 1; 0 is before training.
    """

    def __init__(self, name: str, run: RunFolder, recipe: Recipe) -> None:
        self.name = name
        self._run, self._recipe = run, recipe
        self._say: Callable[[str], None] = lambda _: None
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED)
        self._process: subprocess.Popen[str] | None = None
        self._gone = threading.Event()  # the process takes nothing more
        self._tokens: dict[int, int] = {}  # step -> tokens of it

    def attach(self, controls: Controls) -> None:  # noqa: D102
        self._say = controls.say

    @_contained
    def start(self, *, title: str, facts: Mapping[str, str], total_steps: int, first_step: int) -> None:  # noqa: ARG002, D102
        if first_step:
            self._tokens = {line["step"]: line["tokens_of_all"] for line in read_lines(self._run.metrics_path)}
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        self._errors = errors
        process = subprocess.Popen(
            [sys.executable, "-P", str(PROCESS), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step and then ends this
        )
        self._process = process
        threading.Thread(target=self._write, args=(process,), name=f"tracker {self.name}", daemon=True).start()
        self._lines.put(_import_path().rstrip())
        self._send(
            "open",
            project=self._recipe.output.project,
            name=clean(title),
            id=_run_id(self._run),
            folder=str(self._run.path),
            config=_config(self._recipe),
            first_step=first_step,
        )
        offline = self.name == "wandb" and os.environ.get("WANDB_MODE") == "offline"
        quoted = {
            "project": self._recipe.output.project,
            "runs": str(self._run.path.parent),
            "run": str(self._run.path),
        }
        view = VIEWS["wandb offline" if offline else self.name]
        self._say(f"{self.name}: {view.format(**{name: shlex.quote(text) for name, text in quoted.items()})}")

    @_contained
    def step(self, record: StepRecord) -> None:  # noqa: D102
        step = record["step"]
        self._tokens = {past: count for past, count in self._tokens.items() if past < step}  # it may come again
        self._tokens[step] = record["tokens_of_all"]
        self._send("scalars", step=step + 1, values=step_scalars(record, sum(self._tokens.values())))

    @_contained
    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:  # noqa: D102
        rows = [[printable(str(view[name] or ""))[:LONGEST_TEXT] for name in COLUMNS] for view in samples]
        if rows:
            self._send("table", step=samples[0]["step"] + 1, name="samples", columns=COLUMNS, rows=rows)

    @_contained
    def evaluated(self, record: Mapping[str, Any]) -> None:  # noqa: D102
        self._send("scalars", step=record["step"], values=evaluation_scalars(record))

    def close(self) -> None:  # noqa: D102
        process = self._process
        if process is None:
            return
        try:
            self._send("close")
            with suppress(queue.Full):
                self._lines.put_nowait(None)
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.give_up(f"it needs more than {CLOSE_SECONDS:g} s to send the rest")
        finally:  # also after Ctrl-C
            process.kill()
        process.wait()
        if self._process is not None and (text := self._last_error()):
            self.give_up(text)
        self._process = None

    def give_up(self, why: str) -> None:
        """Say why this tracker gets nothing more, and end its process."""
        process, self._process = self._process, None
        self._gone.set()
        if process is not None:
            process.kill()
        self._say(f"{self.name} gets nothing more: {clean(why)}; the run goes on, and its folder has everything")

    def _send(self, call: str, **values: Any) -> None:
        """Put a call into the queue."""
        if self._process is None:
            return
        if self._gone.is_set():
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self.give_up(self._last_error() or "its process ended")
            return
        try:
            self._lines.put_nowait(json.dumps([call, values]))
        except queue.Full:
            self.give_up(f"{QUEUED:,} events wait to be sent")

    def _write(self, process: subprocess.Popen[str]) -> None:
        """Write the queued lines to the process. Runs in a thread, because a pipe blocks if nothing reads it."""
        assert process.stdin is not None  # noqa: S101
        try:
            while (line := self._lines.get()) is not None:
                print(line, file=process.stdin, flush=True)
            process.stdin.close()
        except OSError:
            self._gone.set()

    def _last_error(self) -> str:
        """Return the last line that the process wrote to its standard error: that of a traceback says what failed."""
        self._errors.seek(0)
        lines = self._errors.read()[-4_000:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def step_scalars(record: StepRecord, num_tokens: int) -> dict[str, float]:
    """Return every number of a step under our name, and under TRL's if it has the same quantity.

    Without the step itself, which is the axis. `num_tokens` are the tokens of all rollouts since the run began.
    """
    values: dict[str, float] = {}
    for name, metric in METRICS.items():
        value = record.get(name)
        if name == "step" or metric.unit == "text" or value is None:
            continue
        values |= (
            {f"{name}/{_clean(key)}": each for key, each in value.items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
        if metric.trl is None:
            continue
        if isinstance(value, Mapping) and "{}" in metric.trl:
            values |= {f"train/{metric.trl.format(_clean(key))}": each for key, each in value.items()}
        else:
            values[f"train/{metric.trl}"] = sum(value.values()) if isinstance(value, Mapping) else value
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
