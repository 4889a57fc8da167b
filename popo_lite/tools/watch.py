"""`popo-lite watch`: follow a run from its folder. Only reads, so it works beside the process that trains."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import click

from popo_lite.controls import Controls
from popo_lite.formats import checked, reading
from popo_lite.lock import owner_of
from popo_lite.metrics import METRICS, Unit
from popo_lite.recipe import Recipe
from popo_lite.run_folder import RunFolder, checkpoint_folders
from popo_lite.tools.completion import complete_run
from popo_lite.tools.console import words
from popo_lite.tools.console.views import PAUSED, Key, RunState, open_view, view_option

POLL_SECONDS = 0.5
MOST_STEPS = 10**12
"""A step with a larger number is damage."""
SAMPLES_BYTES = 2**20
"""Only the latest step's samples are shown, and the file may have a gigabyte."""
KEYS = {"q": Key("stop", "leave", "leave; the run goes on")}
MESSAGES_BEFORE = 50
"""Lines of log.txt that are shown when watching begins."""

_LOGGED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) (.*)")
_MAPS: tuple[Unit, ...] = ("counts", "ratios", "seconds", "tokens/s")

State = Literal["training", "stopped", "ended"]


class Lines:
    """Read the complete lines of a file that another process appends to, or cuts back and writes again.

    With `last`, only so many bytes at its end: their first line may be half, and is left out.
    """

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        self.path, self.last = path, last
        self._inode, self._end = 0, 0
        self._known: list[int] = []  # hashes of the lines that were returned

    def new(self) -> list[tuple[int, bytes]]:
        """Return number and content of each line that is new, or that stands in the place of another one now.

        A resumed run replaces the file by one without the lines of the steps that come again: what is still the same
        is not returned a second time.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                again = status.st_ino != self._inode or status.st_size < self._end
                start = self._end if not again else 0 if self.last is None else max(0, status.st_size - self.last)
                file.seek(start)
                content = file.read()
        except OSError:  # not there yet, or being replaced
            return []
        if again and start:
            half, newline, content = content.partition(b"\n")
            start += len(half) + len(newline)
        whole, newline, _ = content.rpartition(b"\n")
        if not newline and not again:
            return []
        lines = whole.split(b"\n") if newline else []
        same = 0
        if again:
            self._inode, self._end = status.st_ino, start
            while same < min(len(lines), len(self._known)) and hash(lines[same]) == self._known[same]:
                same += 1
            del self._known[same:]
        first = same if again else len(self._known)
        self._known += map(hash, lines[same:])
        self._end += len(whole) + len(newline)
        return list(enumerate(lines[same:], first + 1))


class Follower:
    """Feed a view what a run's folder says, as the run itself would."""

    def __init__(self, run: RunFolder, view: RunState | Any) -> None:
        self._run, self._view = run, view
        self._metrics, self._samples = Lines(run.metrics_path), Lines(run.samples_path, last=SAMPLES_BYTES)
        self._evaluations, self._log = Lines(run.evaluations_path), Messages(run.log_path)
        self._trained = 0.0
        self._caught_up = False
        if isinstance(view, RunState):
            # Steps that were done before follow each other as they did then.
            view.clock = lambda: time.monotonic() + self._trained
            view.before_the_first_step = "waiting for the first step"

    def feed(self) -> None:
        """Report what is new. Raises CheckpointError for a line that no run writes."""
        for record in _records(self._metrics):
            if not self._caught_up:
                self._trained += words.by_stage(record["seconds"])[1]
            self._view.step(record)
            self._view.stage("training")
        self._show_samples()
        for line, where in _objects(self._evaluations):
            with reading(self._evaluations.path, where):
                known = {"when": str(line["when"]), "step": int(line["step"]), "pass_at_1": float(line["pass_at_1"])}
                self._view.evaluated({**line, **known})
        messages = self._log.new()
        for said, text in messages[0 if self._caught_up else -MESSAGES_BEFORE :]:
            self._view.said = said
            self._view.message(text)
            self._view.said = None
            if text.startswith("paused after"):
                self._view.stage(PAUSED)
            elif text.startswith("continued after"):
                self._view.stage("training")
        self._caught_up = True

    def _show_samples(self) -> None:
        latest: list[dict[str, Any]] = []
        for line, where in _objects(self._samples):
            with reading(self._samples.path, where):
                answers = {bool(a["positive"]): str(a["text"]) for a in reversed(line["answers"])}
                sample = {"step": int(line["step"]), "question": str(line["question"])}
                sample |= {"reference": str(line["reference"]), "right": answers.get(True), "wrong": answers.get(False)}
                latest = [*(latest if latest and latest[0]["step"] == sample["step"] else []), sample]
        if latest:
            self._view.samples(latest)


def _objects(lines: Lines) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in lines.new():
        where = f"line {number}" if lines.last is None else f"line {number} of its end"
        with reading(lines.path, where):
            found = checked(json.loads(line.decode(), parse_float=_finite, parse_constant=_finite), lines.path)
        yield found, where


def _records(lines: Lines) -> Iterator[dict[str, Any]]:
    """Yield the records of steps, with every metric and only values of its type: the file may come from a stranger."""
    for line, where in _objects(lines):
        with reading(lines.path, where):
            if not 0 <= line["step"] < MOST_STEPS:
                raise ValueError(f"a run has no step {line['step']!r}")
            yield {name: _typed(line.get(name), metric.unit) for name, metric in METRICS.items()}


def _finite(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is no finite number")
    return number


def _typed(value: Any, unit: Unit) -> Any:
    if unit in _MAPS and not (unit in ("seconds", "tokens/s") and isinstance(value, int | float)):
        number: Any = int if unit == "counts" else _finite
        return {str(name): number(each) for name, each in dict(value or {}).items() if each is not None}
    if unit == "text":
        return None if value is None else str(value)
    if value is None:
        return None
    number = _finite(value)
    return value if isinstance(value, int) else number


class Messages:
    """Read the messages of a log, without tracebacks: those for the user, not for the developer."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._said: datetime | None = None  # when the message of the latest line was, if it is one for the user

    def new(self) -> list[tuple[datetime, str]]:
        """Return time and text of each line that is new. One of several lines may be read in parts."""
        found: list[tuple[datetime, str]] = []
        for _, line in self._lines.new():
            content = line.decode("utf-8", "replace")
            if begun := _LOGGED.fullmatch(content):
                self._said, content = datetime.fromisoformat(begun[1]) if begun[2] == "INFO" else None, begun[3]
            if self._said is not None:
                found.append((self._said, content))
        return found


def state_of(run: RunFolder) -> State:
    """Return whether a process trains in the folder, or the run has ended, or neither."""
    if owner_of(run.lock_path) is not None:
        return "training"
    return "ended" if run.ended else "stopped"


def present(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """Return where the run stands now."""
    state, records = state_of(run), list(_records(Lines(run.metrics_path)))
    checkpoints = checkpoint_folders(run.checkpoints)
    return {
        "run": str(run.path),
        "state": state,
        "trained_by": owner_of(run.lock_path),
        "steps": recipe.train.steps,
        "steps_done": len({record["step"] for record in records}),
        "latest_step": records[-1] if records else None,
        "evaluations": [line for line, _ in _objects(Lines(run.evaluations_path))],
        "newest_checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "next": next_commands(run, state),
    }


def next_commands(run: RunFolder, state: State) -> list[str]:
    """Return the commands that make sense now."""
    path = shlex.quote(str(run.path))
    if state == "ended":
        return [f"popo-lite {name} {path}" for name in ("report", "chat", "export")]
    return [run.resume_command] if state == "stopped" else [f"popo-lite watch {path}"]


def _facts(run: RunFolder, recipe: Recipe) -> Mapping[str, str]:
    rollouts = f"{recipe.rollout.engine}, {recipe.data.prompts_per_step} x {recipe.rollout.num_generations}"
    return {"model": recipe.model.id, "data": recipe.data.dataset, "rollouts": rollouts, "folder": str(run.path)}


@contextmanager
def _leaving(leave: threading.Event) -> Iterator[None]:
    """Turn signals that would end the process, and leave the terminal as it is, into leaving."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, lambda *_: leave.set())
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@click.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run, metavar="RUN")
@view_option
@click.option("as_json", "--json", is_flag=True, help="Print where the run stands now as JSON, and leave.")
def watch(run: Path, view: str, as_json: bool) -> None:
    """Show RUN, the folder of a run, as the terminal that trains it does, and follow it until it ends.

    Only reads: it can be started and left at any time. A run that has ended, or was stopped, is shown until you leave
    with q, and then what to do next.

    \b
    Example:
      popo-lite watch runs/tiny_cpu-seed0
    """
    from popo_lite.tools.console.output import closing_report, notify

    folder, leave = RunFolder(run), threading.Event()
    if not as_json and not folder.recipe_path.is_file() and (owner := owner_of(folder.lock_path)) is not None:
        notify(f"the run is being prepared: its model is loaded ({owner}); waiting for its first lines")
        while not folder.recipe_path.is_file() and owner_of(folder.lock_path) is not None:
            time.sleep(POLL_SECONDS)
    recipe = folder.recipe()
    if as_json:
        click.echo(json.dumps(present(folder, recipe)))
        return
    state: State = "training"
    with _leaving(leave), open_view(view, keys=KEYS) as screen:  # type: ignore[arg-type]  # click checks the choice
        screen.attach(Controls(leave.set, screen.message))
        screen.start(title=folder.path.name, facts=_facts(folder, recipe), total_steps=recipe.train.steps, first_step=0)
        follower = Follower(folder, screen)
        # What has ended is there to be looked at, if there is a key to leave.
        stays = state_of(folder) != "training" and bool(getattr(screen, "keys", None))
        with suppress(KeyboardInterrupt):
            while not leave.is_set():
                before, state = state, state_of(folder)  # before reading: what a run writes at its end is read, too
                follower.feed()
                if state != before:
                    screen.stage(state)
                if state != "training" and not stays:
                    break
                leave.wait(POLL_SECONDS)
    if state == "ended":
        closing_report(folder.summary(), next_commands(folder, state))
        return
    done = len({record["step"] for record in _records(Lines(folder.metrics_path))})
    where, again = "no process trains here, and the run has not ended", "continue"
    if state == "training":
        where, again = "the run goes on", "look again"
    notify(f"{where}: {done} of {recipe.train.steps} steps are done. To {again}:")
    notify(f"  {next_commands(folder, state)[0]}")
