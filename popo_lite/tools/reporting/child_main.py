"""Run one tracker, or the uploads to the Hub: calls from standard input, a line of JSON each, until `close`.

`child` runs this file as it is, and sends the path to import from in the first line; see grading/worker.py. An error
ends the process; the last line of its traceback tells the run why. The end of the input without `close` is that of a
killed run: what it sent is kept.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

STEP = "train/global_step"
"""Name of the axis in wandb, as that of transformers' Trainer, so that runs of both can be drawn together."""

Settings = dict[str, Any]


class Trackio:
    """Write to trackio's local database, or send to the Space or server that its environment variables name.

    It resumes a run by its name alone, so the name ends with the id. It warns of errors and goes on: standard error
    has them.
    """

    def __init__(self, settings: Settings) -> None:
        import trackio

        warnings.filterwarnings("default", category=UserWarning, module=r"trackio\.")
        self._trackio = trackio
        name = f"{settings['name']}-{settings['id']}"
        self._run = trackio.init(settings["project"], name, config=settings["config"], resume="allow", embed=False)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step."""
        self._run.log(values, step=step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        """Record a table of texts."""
        self._run.log({name: self._trackio.Table(columns=columns, data=rows)}, step=step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        """Write what is left."""
        self._run.finish()


class Wandb:
    """Send to Weights & Biases, or write to `RUN/wandb` if WANDB_MODE is offline.

    Nothing about the machine but its load is sent: no paths, names, code or packages. Steps are a metric, not wandb's
    own counter, which drops steps that come again after a rollback.
    """

    def __init__(self, settings: Settings) -> None:
        import wandb

        self._wandb = wandb
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True,
            x_disable_machine_info=True, x_save_requirements=False,
        )  # fmt: skip
        self._run = wandb.init(
            project=settings["project"], id=settings["id"], name=settings["name"], config=settings["config"],
            dir=settings["folder"], resume="allow", allow_val_change=True, settings=quiet,
        )  # fmt: skip
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step."""
        self._run.log({**values, STEP: step})

    def table(self, step: int, name: str, columns: list[Any], rows: list[list[str]]) -> None:
        """Record a table of texts."""
        self._run.log({name: self._wandb.Table(columns=columns, data=rows), STEP: step})

    def close(self, *, finished: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=0 if finished else 1)


class TensorBoard:
    """Write event files to `RUN/tensorboard`. Steps that come again replace those before."""

    def __init__(self, settings: Settings) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary, self._text = Event, SessionLog, Summary, text_pb
        self._writer = EventFileWriter(str(Path(settings["folder"], "tensorboard")), flush_secs=5)
        self._done = int(settings["first_step"])
        if self._done:
            self._restart(self._done + 1)
        lines = "\n".join(f"    {key} = {value!r}" for key, value in settings["config"].items())
        self._add(self._text("recipe", lines), self._done)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step."""
        self._add(self._summary(value=[{"tag": tag, "simple_value": value} for tag, value in values.items()]), step)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[str]]) -> None:
        """Record a table of texts, each as a block of code: TensorBoard renders Markdown, and models write it."""
        parts = []
        for row in rows:
            for column, text in zip(columns, row, strict=True):
                parts += [f"**{column}**", "", *(f"    {line}" for line in text.split("\n")), ""]
        self._add(self._text(name, "\n".join(parts)), step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        """Write what is left."""
        self._writer.close()

    def _add(self, summary: Any, step: int) -> None:
        if step < self._done:
            self._restart(step)
        self._done = step
        self._write(step=step, summary=summary)

    def _restart(self, step: int) -> None:
        """Mark the events from `step` on as void: TensorBoard drops them."""
        self._write(step=step, session_log=self._session(status=self._session.START))

    def _write(self, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), **content))


def uploads(settings: Settings) -> Any:
    """Return what uploads checkpoints. It needs seconds to be imported."""
    from popo_lite.tools.reporting.uploader import Uploader

    return Uploader(settings)


class WandbLogin:
    """Tell how wandb is set up."""

    def __init__(self, _: Settings) -> None:
        import wandb

        self._mode = wandb.setup().settings.mode
        self._key = os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key

    def check(self) -> Settings:
        """Return wandb's mode, and whether it knows an API key or an identity token."""
        return {"mode": self._mode, "has_login": bool(self._key)}

    def close(self, *, finished: bool) -> None:
        """Leave nothing."""


TASKS: dict[str, Any] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "wandb-login": WandbLogin,
    "uploads": uploads,
}


def main() -> None:
    """Do what is asked until `close`, or the end of the input. What a call returns is a reply, a line of JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first = json.loads(sys.stdin.readline())
    threading.Thread(target=end_after, args=(first["parent"], first["last_seconds"]), daemon=True).start()
    sys.path[:] = first["path"]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply
    warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    task: Any = None
    finished = False
    for line in sys.stdin:
        call, values = json.loads(line)
        if task is None:
            task = TASKS[sys.argv[1]](values)
        elif call == "close":
            finished = True
            break
        elif (reply := getattr(task, call)(**values)) is not None:
            print(json.dumps(reply), file=replies, flush=True)
    if task is not None:
        task.close(finished=finished)


def end_after(parent: int, seconds: float) -> None:
    """End this process so many seconds after the run's, whatever hangs here."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(seconds)
    os._exit(1)


if __name__ == "__main__":
    main()
