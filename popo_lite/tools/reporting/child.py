"""Start the processes that send a run's events elsewhere, and talk to them.

A library that sends may raise, hang in the network, print, hold the interpreter's lock, or leave threads that Python
waits for at exit. In another process none of it reaches the run, which can kill it at any time.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MAIN = Path(__file__).with_name("child_main.py")
QUEUED = 1_000
"""Most calls that wait to be written."""
LAST_SECONDS = 60.0
"""Time to send the rest after the run was killed, before the process ends itself."""


class Child:
    """A process that does what it is sent, one call after the other. Nothing here blocks, except `wait`."""

    def __init__(self, task: str, **environment: str) -> None:
        """Start a process for one of `child_main.TASKS`; its secrets go into its environment."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process is
        self._lines: queue.Queue[str | None] = queue.Queue(QUEUED)
        self._replies: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(MAIN), task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,  # Ctrl-C is for the run, which finishes its step and then ends this
        )
        here = str(Path.cwd())  # it imports from the same places as this process
        path = [entry or here for entry in sys.path]
        self._lines.put(json.dumps({"path": path, "parent": os.getpid(), "last_seconds": LAST_SECONDS}))
        self._reader = threading.Thread(target=self._read, name=f"{task} replies", daemon=True)
        self._reader.start()
        threading.Thread(target=self._write, name=f"{task} calls", daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """False once the process is gone and all of its replies are there."""
        return self._reader.is_alive()

    def send(self, call: str, **values: Any) -> None:
        """Ask for a call. Raises queue.Full if too many wait."""
        self._lines.put_nowait(json.dumps([call, values]))

    def end_input(self) -> None:
        """Let the process end when it has done what was sent. Raises queue.Full if too many calls wait."""
        self._lines.put_nowait(None)

    def reply(self) -> Mapping[str, Any] | None:
        """Return the next reply, or None if there is none yet."""
        with suppress(queue.Empty):
            return self._replies.get_nowait()
        return None

    def wait(self, seconds: float) -> None:
        """Wait for the end of the process, at most this long."""
        self._reader.join(seconds)

    def kill(self) -> None:
        """End the process now. May be called twice."""
        self._process.kill()
        self._process.wait()

    def last_error(self) -> str:
        """Return the last line that the process, which has ended, wrote to its standard error: that of a traceback."""
        self._errors.seek(0)
        lines = self._errors.read()[-4_000:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    # A pipe blocks if the other side does not read or write, so each has a thread.

    def _write(self) -> None:
        assert self._process.stdin is not None  # noqa: S101
        with suppress(OSError), self._process.stdin as pipe:  # it has ended
            while (line := self._lines.get()) is not None:
                print(line, file=pipe, flush=True)

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        for line in self._process.stdout:
            self._replies.put(json.loads(line))
