"""Run grading processes: started when needed, one answer at a time, killed at the deadline.

Everything runs in the calling thread on non-blocking pipes, without signals. Processes are our own and not
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
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from popo_lite.errors import GradingError, PopoError, UserInputError
from popo_lite.types import Outcome, Reward

STARTUP_SECONDS = 120.0
"""Limit for importing the reward function, which is not charged to any answer."""

STDERR_TAIL_BYTES = 4096
"""How much of what a worker wrote to stderr is kept for the detail of an ERROR."""

_LONGEST_WAIT_SECONDS = 60.0  # select() refuses waits of years
_READ_BYTES = 2**16  # the capacity of a pipe


class WorkerPool:
    """Up to `size` processes that hold the reward function `function`. Usable from any thread, by one at a time."""

    def __init__(self, function: str, size: int, timeout_seconds: float) -> None:
        self._function = function
        self._size = size
        self._timeout_seconds = timeout_seconds
        self._workers: list[_Worker] = []
        self._function_loaded = False
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        # The kernel kills a worker when the *thread* that started it ends (see worker.die_with_parent), so
        # they are all started by one that lives as long as the pool, whoever calls.
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="popo-lite-grading")

    def start(self) -> None:
        """Start one worker. Raises UserInputError if the reward function cannot be loaded."""
        with self._undisturbed():
            while not any(worker.ready for worker in self._workers):
                self._turn(_Batch([]), wanted=1)

    def grade(self, requests: Sequence[bytes]) -> list[Reward]:
        """Return one reward per request line, in order. Raises like `start`."""
        batch = _Batch(requests)
        with self._undisturbed():
            while batch.unfinished:
                self._turn(batch, wanted=min(self._size, batch.unfinished))
        return [batch.rewards[job] for job in range(len(requests))]

    def close(self) -> None:
        """Kill and reap all workers; may be called again."""
        with self._lock:
            self._kill_all()
            self._starter.shutdown()
            self._selector.close()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except BaseException:
                # Interrupted: a late verdict must not be taken for one on the next batch.
                self._kill_all()
                raise

    def _turn(self, batch: _Batch, wanted: int) -> None:
        """Assign requests, then handle the next worker output or deadline."""
        while len(self._workers) < wanted:
            self._start_worker()
        for worker in self._workers:
            if worker.idle and batch.waiting:
                job = batch.waiting.popleft()
                worker.take(job, batch.requests[job], deadline=time.monotonic() + self._timeout_seconds)
            self._watch_stdin(worker)
        for key, _ in self._selector.select(self._seconds_to_deadline()):
            worker = key.data
            if worker not in self._workers:
                continue  # an earlier event of this turn was its end
            if key.fileobj is worker.stdin:
                worker.write()
            elif key.fileobj is worker.stderr:
                if not worker.read_stderr():
                    self._selector.unregister(worker.stderr)
            else:
                self._read_replies(worker, batch)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline <= now]:
            self._end_overdue(worker, batch)

    def _start_worker(self) -> None:
        # Workers that import what this process would, and the user's functions from the working directory.
        here = str(Path.cwd())
        path = [entry or here for entry in sys.path]
        settings = {"function": self._function, "path": path if here in path else [*path, here]}
        process = self._starter.submit(
            subprocess.Popen,
            [sys.executable, "-P", "-u", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # Threads would only fight for the cores; a fixed hash seed makes sympy's order of terms repeatable.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is for the run; and what a function starts can be killed with it
        ).result()
        worker = _Worker(process, greeting=_line(settings), deadline=time.monotonic() + STARTUP_SECONDS)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._selector.register(worker.stderr, selectors.EVENT_READ, worker)

    def _watch_stdin(self, worker: _Worker) -> None:
        watched = worker.stdin in self._selector.get_map()
        if worker.unsent and not watched:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif watched and not worker.unsent:
            self._selector.unregister(worker.stdin)

    def _seconds_to_deadline(self) -> float:
        earliest = min((worker.deadline for worker in self._workers), default=0.0)
        return min(max(0.0, earliest - time.monotonic()), _LONGEST_WAIT_SECONDS)

    def _read_replies(self, worker: _Worker, batch: _Batch) -> None:
        replies, open_still = worker.read_replies()
        for reply in replies:
            if "refused" in reply:
                raise UserInputError(reply["refused"], where="reward.function", next_step=reply["next_step"])
            if not worker.ready:
                worker.ready = self._function_loaded = True
                worker.rest()
            elif worker.job is not None:
                reward = Reward(**{**reply["reward"], "outcome": Outcome(reply["reward"]["outcome"])})
                if reward.outcome is Outcome.ERROR:
                    worker.read_stderr()
                    reward = _error(reward.detail, worker)
                batch.rewards[worker.job] = reward
                worker.rest()
                if reply["leaving"]:
                    self._end(worker)
                    return
        if not open_still:
            self._end_dead(worker, batch)

    def _end_dead(self, worker: _Worker, batch: _Batch) -> None:
        """Remove a worker that died and retry its answer once."""
        ended = self._end(worker)
        if not worker.ready:
            raise self._startup_error(f"its worker ended while importing it ({ended})", worker)
        if worker.job is None:
            return
        if worker.job in batch.retried:
            batch.rewards[worker.job] = _error(f"grading this answer ended the worker twice ({ended})", worker)
        else:
            batch.retried.add(worker.job)
            batch.waiting.appendleft(worker.job)

    def _end_overdue(self, worker: _Worker, batch: _Batch) -> None:
        """Kill a worker past its deadline without a retry, as the answer would hang again."""
        self._end(worker)
        if not worker.ready:
            raise self._startup_error(f"importing it took more than {STARTUP_SECONDS:g} seconds", worker)
        if worker.job is not None:
            detail = f"no verdict within reward.timeout_seconds = {self._timeout_seconds:g}"
            batch.rewards[worker.job] = Reward(value=0.0, outcome=Outcome.TIMEOUT, detail=detail)

    def _startup_error(self, reason: str, worker: _Worker) -> PopoError:
        # If the function was loaded before, the user's setting is not the cause.
        kind = GradingError if self._function_loaded else UserInputError
        return kind(
            f'"{self._function}" cannot be used: {reason}{worker.stderr_note()}',
            where="reward.function",
            next_step="import the module in a Python shell to see what it does; see docs/rewards.md",
        )

    def _kill_all(self) -> None:
        for worker in list(self._workers):
            self._end(worker)

    def _end(self, worker: _Worker) -> str:
        """Kill and reap a worker and whatever it started. Returns how it ended."""
        self._workers.remove(worker)
        for stream in (worker.stdin, worker.stdout, worker.stderr):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        return worker.kill()


class _Batch:
    """The requests of one call: those waiting, those already retried, and the rewards so far."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.requests = requests
        self.waiting = deque(range(len(requests)))
        self.retried: set[int] = set()
        self.rewards: dict[int, Reward] = {}

    @property
    def unfinished(self) -> int:
        return len(self.requests) - len(self.rewards)


class _Worker:
    """One process with its pipes. `job` is the index of the request it works on, `deadline` a monotonic time."""

    def __init__(self, process: subprocess.Popen[bytes], greeting: bytes, deadline: float) -> None:
        self._process = process
        self.stdin = cast(IO[bytes], process.stdin)
        self.stdout = cast(IO[bytes], process.stdout)
        self.stderr = cast(IO[bytes], process.stderr)
        for stream in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(stream.fileno(), False)
        self.ready = False
        self.job: int | None = None
        self.deadline = deadline
        self.unsent = greeting
        self._received = b""
        self._stderr_tail = b""

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    def take(self, job: int, request: bytes, deadline: float) -> None:
        self.job, self.unsent, self.deadline = job, request, deadline
        self._stderr_tail = b""
        self.write()

    def rest(self) -> None:
        self.job, self.deadline = None, float("inf")

    def write(self) -> None:
        """Send as much as the pipe takes."""
        try:
            self.unsent = self.unsent[os.write(self.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = b""  # it died; the end of its stdout is handled by the reader

    def read_replies(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the complete replies, and whether more may follow."""
        data = _read(self.stdout)
        if data is None:
            return [], True
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines], bool(data)

    def read_stderr(self) -> bool:
        """Keep the tail of the available output. Return False at the end of the stream.

        One read, as it takes all that a pipe holds, and a function that prints without end is not waited for.
        """
        data = _read(self.stderr)
        self._stderr_tail = (self._stderr_tail + (data or b""))[-STDERR_TAIL_BYTES:]
        return data != b""

    def stderr_note(self) -> str:
        """Return what the worker wrote during its last job, without control characters, or an empty string."""
        text = self._stderr_tail.decode(errors="replace").strip()
        text = "".join(character if character.isprintable() or character == "\n" else " " for character in text)
        return f"; the worker wrote:\n{text}" if text else ""

    def kill(self) -> str:
        """End the process and its group, and reap it. Returns how it ended.

        One that was ending by itself when its pipes closed keeps its exit code. The signal comes before the
        reaping, while the process id cannot yet belong to anything else.
        """
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self.read_stderr()
        for stream in (self.stdin, self.stdout, self.stderr):
            stream.close()
        return f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def _read(stream: IO[bytes]) -> bytes | None:
    """Read what is available: empty at the end of the stream, None if there is nothing yet."""
    try:
        return os.read(stream.fileno(), _READ_BYTES)
    except BlockingIOError:
        return None


def _error(detail: str, worker: _Worker) -> Reward:
    return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail + worker.stderr_note())


def _line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"
