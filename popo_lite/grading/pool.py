"""Run grading processes: started when needed, one answer at a time, killed at the deadline.

A thread waits for each process on non-blocking pipes, without signals. Processes are our own and not
`multiprocessing`'s, which would import the user's main script again in every one of them.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from popo_lite.errors import GradingError, UserInputError
from popo_lite.types import Outcome, Reward

STARTUP_SECONDS = 120.0
"""Limit for importing the reward function, which is not charged to any answer."""

STDERR_TAIL_BYTES = 4096
"""How much of what a worker wrote to stderr is kept for the detail of an ERROR."""

_READ_BYTES = 2**16  # the capacity of a pipe

_T = TypeVar("_T")


class WorkerPool:
    """Up to `size` processes that hold the reward function `function`. Usable from any thread, by one at a time."""

    def __init__(self, function: str, size: int, timeout_seconds: float) -> None:
        self._function = function
        self._timeout_seconds = timeout_seconds
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._function_loaded = False
        self._one_caller = threading.Lock()
        self._ending = threading.Lock()
        # The kernel kills a worker when the *thread* that started it ends (see worker.die_with_parent), so
        # these, which start them, live as long as the pool.
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="popo-lite-grading")

    def start(self) -> None:
        """Start one worker. Raises UserInputError if the reward function cannot be loaded."""
        self._run(lambda _: self._idle.append(self._ready_worker()), [b""])

    def grade(self, requests: Sequence[bytes]) -> list[Reward]:
        """Return one reward per request line, in order. Raises like `start`."""
        return self._run(self._grade, requests)

    def close(self) -> None:
        """Kill and reap all workers; may be called again."""
        with self._one_caller:
            self._end_idle()
            self._threads.shutdown()

    def _run(self, work: Callable[[bytes], _T], requests: Sequence[bytes]) -> list[_T]:
        with self._one_caller:
            futures = [self._threads.submit(work, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                # Interrupted, or of no use any more. A thread whose worker is killed may have started another.
                for future in futures:
                    future.cancel()
                while wait(futures, timeout=0.02).not_done:
                    with self._ending:
                        for worker in list(self._alive):
                            worker.kill()
                self._end_idle()
                raise

    def _grade(self, request: bytes) -> Reward:
        for _ in range(2):  # an answer whose worker dies is tried once more
            worker = self._ready_worker()
            try:
                reply = worker.ask(request, self._timeout_seconds)
            except EOFError:
                detail = f"grading this answer ended the worker twice ({self._end(worker)}){worker.stderr_note()}"
                continue
            except TimeoutError:  # not tried again, as it would hang again
                self._end(worker)
                detail = f"no verdict within reward.timeout_seconds = {self._timeout_seconds:g}"
                return Reward(value=0.0, outcome=Outcome.TIMEOUT, detail=detail)
            if reply["leaving"]:
                self._end(worker)
            else:
                self._idle.append(worker)
            reward = Reward(**{**reply["reward"], "outcome": Outcome(reply["reward"]["outcome"])})
            is_error = reward.outcome is Outcome.ERROR
            return replace(reward, detail=reward.detail + worker.stderr_note()) if is_error else reward
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)

    def _ready_worker(self) -> _Worker:
        """Return an idle worker, or a new one that has loaded the reward function."""
        with suppress(IndexError):
            return self._idle.pop()
        worker = _Worker()
        self._alive.add(worker)
        # Workers import what this process would, and the user's functions from the working directory.
        here = str(Path.cwd())
        path = [entry or here for entry in sys.path]
        settings = {"function": self._function, "path": path if here in path else [*path, here]}
        try:
            reply = worker.ask(json.dumps(settings).encode() + b"\n", STARTUP_SECONDS)
        except (EOFError, TimeoutError) as error:
            reason = f"its worker ended while importing it ({self._end(worker)})"
            if isinstance(error, TimeoutError):
                reason = f"importing it took more than {STARTUP_SECONDS:g} seconds"
            # If the function was loaded before, the user's setting is not the cause.
            raise (GradingError if self._function_loaded else UserInputError)(
                f'"{self._function}" cannot be used: {reason}{worker.stderr_note()}',
                where="reward.function",
                next_step="import the module in a Python shell to see what it does; see docs/rewards.md",
            ) from error
        if "refused" in reply:
            self._end(worker)
            raise UserInputError(reply["refused"], where="reward.function", next_step=reply["next_step"])
        self._function_loaded = True
        return worker

    def _end_idle(self) -> None:
        while self._idle:
            self._end(self._idle.pop())

    def _end(self, worker: _Worker) -> str:
        """Kill and reap a worker and whatever it started. Returns how it ended.

        One that was ending by itself when its pipes closed keeps its exit code. The signal comes before the
        reaping, while the process id cannot yet belong to anything else.
        """
        with self._ending:
            worker.kill()
            self._alive.remove(worker)
        return worker.reap()


class _Worker:
    """One process with its pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-u", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # Threads would only fight for the cores; a fixed hash seed makes sympy's order of terms repeatable.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the run; and what a function starts can be killed with it
        )
        pipes = cast("list[IO[bytes]]", [self._process.stdin, self._process.stdout, self._process.stderr])
        self._stdin, self._stdout, self._stderr = (pipe.fileno() for pipe in pipes)
        for pipe in pipes:
            os.set_blocking(pipe.fileno(), False)
        self._stderr_tail = b""

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Return the reply to one line. Raises EOFError if the process ends, TimeoutError if none comes in time."""
        deadline, reply, self._stderr_tail = time.monotonic() + seconds, b"", b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            left = seconds
            while left > 0:
                left = deadline - time.monotonic()  # where that is nothing, what has come by now still counts
                for key, _ in selector.select(max(0, min(left, 60))):  # select() refuses waits of years
                    if key.fd == self._stdin:
                        with suppress(BrokenPipeError):  # it died; the end of its stdout tells
                            request = request[os.write(self._stdin, request) :]
                            if request:
                                continue
                        selector.unregister(self._stdin)
                    elif key.fd == self._stderr:
                        if not self._read_stderr():
                            selector.unregister(self._stderr)
                    elif data := os.read(self._stdout, _READ_BYTES):
                        reply += data
                    else:
                        raise EOFError
                if reply.endswith(b"\n"):
                    self._read_stderr()
                    return cast("dict[str, Any]", json.loads(reply))
        raise TimeoutError

    def _read_stderr(self) -> bool:
        """Keep the tail of the available output. Return False at the end of the stream.

        One read, as it takes all that a pipe holds, and a function that prints without end is not waited for.
        """
        try:
            data = os.read(self._stderr, _READ_BYTES)
        except BlockingIOError:
            return True
        self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
        return bool(data)

    def stderr_note(self) -> str:
        """Return what the worker wrote during its last job, without control characters, or an empty string."""
        text = self._stderr_tail.decode(errors="replace").strip()
        text = "".join(character if character.isprintable() or character == "\n" else " " for character in text)
        return f"; the worker wrote:\n{text}" if text else ""

    def kill(self) -> None:
        """End the process and its group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> str:
        """Wait for the end of the process. Returns how it ended."""
        with self._process:  # which closes its pipes
            code = self._process.wait()
            self._read_stderr()
        return f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
