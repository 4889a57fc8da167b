"""Grade texts in processes that can be killed, and stop the run if too many cannot be graded.

A worker grades one answer at a time and is killed at the deadline. One thread with an asyncio loop serves all
workers, whichever thread calls, without signals. Workers are our own processes and not `multiprocessing`'s,
which would import the user's main script again in every one of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from io import FileIO
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar, cast

from popo_lite.errors import GradingError, UserInputError
from popo_lite.grading.functions import combine
from popo_lite.grading.math import decide_exactly, final_answer, thinking_open_at
from popo_lite.recipe import EnvironmentFunction, MathFunction, OwnFunction, RewardRecipe
from popo_lite.types import Outcome, Problem, Reward, count_outcomes

STARTUP_SECONDS = 120.0  # for importing the reward functions; not charged to any answer
TRIED_PROBLEMS = 3  # of the first training rows, with the answers below
TRIED_ANSWERS = ("{}", "no idea", "<think>\nIt is {0}.\n</think>\nThe answer is \\boxed{{{0}}}. Right?")
CHECKED_AT_ONCE = 10  # references in one request
STDERR_TAIL_BYTES = 4096  # of what a worker wrote to stderr, for the detail of an ERROR
READ_BYTES = 2**16  # the capacity of a pipe
POSIX = os.name == "posix"
"""Windows has neither sessions to kill nor pipes that can be waited for: there, what workers write is lost."""

S = TypeVar("S")
T = TypeVar("T")


class Grader(AbstractContextManager["Grader"]):
    """Grade answers with the recipe's reward functions. A context manager; leaving it ends all processes.

    `thinking_open` says whether prompts end with the opening thinking tag. Processes are started when an answer needs
    one. An answer that hangs is a TIMEOUT. An answer that ends its process twice is an ERROR, never a silent 0. May be
    used from any thread.
    """

    def __init__(self, reward: RewardRecipe, *, thinking_open: bool = False) -> None:
        if reward.functions is None:
            reward = reward.with_values({"functions": (MathFunction(),)})
        self._reward, self._thinking_open = reward, thinking_open
        self._own = any(isinstance(one, OwnFunction | EnvironmentFunction) for one in reward.functions or ())
        self._names = ", ".join(f'"{function.key}"' for function in reward.functions or ())
        self._workers: dict[int, _Worker] = {}
        self._functions_loaded = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        # The kernel kills a worker when the *thread* that started it ends (see worker.py), so they are all
        # started by one that lives as long as the grader.
        self._thread = threading.Thread(target=self._loop.run_forever, name="popo-lite-grading", daemon=True)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check(self, problems: Sequence[Problem] = ()) -> None:
        """Load the reward functions in one worker, and call them with answers to the first of `problems`.

        Raises UserInputError if loading fails, a function raises or returns no reward, or one of the user's own, or the
        environment, hangs.
        """
        self._run(self._check, problems[:TRIED_PROBLEMS])

    def grade(
        self,
        answers: Sequence[tuple[str, Problem]],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        conversations: Sequence[Sequence[Mapping[str, str]]] | None = None,
        trainer_state: Mapping[str, int] | None = None,
    ) -> list[Reward]:
        """Return one reward per answer, a completion's text and its problem, in order.

        TRL's functions may ask for the token ids of each answer and for `trainer_state`: `global_step`, `max_steps`.
        `conversations` are the messages that ended with each text.

        Raises UserInputError if a reward function cannot be loaded, GradingError if it no longer can.
        """
        wanted = []
        for index, (text, problem) in enumerate(answers):
            more: dict[str, Any] = {"trainer_state": dict(trainer_state or {})}
            more |= {"completion_ids": list(completion_ids[index])} if completion_ids else {}
            more |= {"conversation": list(map(dict, conversations[index]))} if conversations else {}
            wanted.append((text, problem, more))
        return self._run(self._for_all, wanted, self._grade)

    def observe(
        self, conversations: Sequence[tuple[Sequence[Mapping[str, str]], Problem]]
    ) -> list[str | Reward | None]:
        """Return what the environment says to each conversation, None if it is over.

        A reward without a verdict stands for an environment that raised, hung or ended its process.
        """
        return self._run(self._for_all, conversations, self._observe)

    def unreadable(self, problems: Sequence[Problem]) -> dict[str, str]:
        """Return problem id -> why a reward function cannot read its reference, for each that cannot be read.

        Workers check in parallel. A check that takes longer than `timeout_seconds` counts as unreadable.
        """
        parts = [problems[start : start + CHECKED_AT_ONCE] for start in range(0, len(problems), CHECKED_AT_ONCE)]
        reasons = chain.from_iterable(self._run(self._for_all, parts, self._unreadable))
        return {problem.id: why for problem, why in zip(problems, reasons, strict=True) if why}

    def close(self) -> None:
        """End all grading processes; may be called again."""
        with self._lock:
            if not self._loop.is_closed():
                asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _run(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        """Run an async `function` in the grading thread, one at a time."""
        with self._lock:
            if self._loop.is_closed():
                raise RuntimeError("the grader is closed")
            try:
                return asyncio.run_coroutine_threadsafe(function(*arguments), self._loop).result()
            except BaseException:
                # After an error or an interrupt, a late verdict must not be taken for one on the next batch.
                asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
                raise

    async def _stop(self) -> None:
        """Cancel what is running, and kill all workers."""
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        while self._workers:
            self._workers.popitem()[1].kill()

    async def _check(self, problems: Sequence[Problem]) -> None:
        await self._ready_worker(0)
        forms: dict[str, str | None] = {}
        for problem, form in product(problems, TRIED_ANSWERS):
            text = form.format(problem.answer)
            line = _line("try", [text, self._content(problem) | {"completion_ids": [0] * len(text.split())}])
            reply = await self._ask(0, line, attempts=1)
            if isinstance(reply, Reward):
                if self._own:
                    what = f"{self._names}: the answer {text!r:.60} to problem {problem.id}: {reply.detail}"
                    next_step = "correct the function, or raise reward.timeout_seconds"
                    raise UserInputError(what, where="reward.functions", next_step=next_step)
            elif "refused" in reply:
                what = reply["refused"] + self._workers[0].stderr_note()
                raise UserInputError(what, where="reward.functions", next_step=reply["next_step"])
            else:
                forms = reply["forms"]
        if forms:
            # A function that gave the same values in both forms is called once from now on: in the next worker.
            functions = tuple(
                one.with_values({"completions": forms[one.key] or "conversational"}) if one.key in forms else one
                for one in self._reward.functions or ()
            )
            self._reward = self._reward.with_values({"functions": functions})
        if None in forms.values():
            self._workers.pop(0).kill()

    async def _for_all(self, items: Sequence[S], do: Callable[[int, S], Coroutine[Any, Any, T]]) -> list[T]:
        """Return `do(slot, item)` for all items, in order. Each of `reward.workers` takes the next when it is free."""
        waiting, results = iter(enumerate(items)), dict[int, T]()

        async def work(slot: int) -> None:
            for index, item in waiting:
                results[index] = await do(slot, item)

        await asyncio.gather(*map(work, range(min(self._reward.workers, len(items)))))
        return [results[index] for index in range(len(items))]

    async def _unreadable(self, slot: int, problems: Sequence[Problem]) -> list[str]:
        """Return for each problem why its reference cannot be read, or an empty string."""
        reply = await self._ask(slot, _line("check", list(map(self._content, problems))))
        if not isinstance(reply, Reward):
            return list(reply["reasons"])
        if len(problems) == 1:
            return ["checking it hung or ended its process"]
        return [(await self._unreadable(slot, [problem]))[0] for problem in problems]

    async def _observe(
        self, slot: int, conversation: tuple[Sequence[Mapping[str, str]], Problem]
    ) -> str | Reward | None:
        messages, problem = conversation
        content = self._content(problem) | {"conversation": list(map(dict, messages))}
        reply = await self._ask(slot, _line("observe", content))
        return reply if isinstance(reply, Reward) else reply["observation"]

    def _content(self, problem: Problem) -> dict[str, Any]:
        """Return a problem as reward functions get it: see `functions.KEYS`. Mathematics needs no more than two."""
        content: dict[str, Any] = {"id": problem.id, "answer": problem.answer}
        if all(isinstance(function, MathFunction) for function in self._reward.functions or ()):
            return content
        messages = [dict(message) for message in problem.messages]
        return content | {"question": problem.question, "messages": messages, "meta": dict(problem.meta)}

    async def _grade(self, slot: int, answer: tuple[str, Problem, dict[str, Any]]) -> Reward:
        text, problem, more = answer
        functions, tags = self._reward.functions or (), self._reward.thinking_tags
        start = max(len(text) - self._reward.max_answer_characters, 0)
        opened, text = thinking_open_at(start, text, tags, self._thinking_open), text[start:]
        if (
            len(functions) == 1
            and isinstance(functions[0], MathFunction)
            and (decided := decide_exactly(text, problem, thinking_tags=tags, thinking_open=opened))
        ):
            return combine({functions[0].key: decided}, self._reward)
        content = self._content(problem) | (more if self._own else {}) | {"thinking_open": opened}
        try:
            line = _line("grade", [text, content])
        except (TypeError, ValueError) as error:
            detail = f"problem {problem.id!r} has a meta value that JSON cannot hold: {error}"
            return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)
        reward = cast("Reward", await self._ask(slot, line))
        return reward if reward.answer is not None else replace(reward, answer=final_answer(text))

    async def _ask(self, slot: int, line: bytes, attempts: int = 2) -> dict[str, Any] | Reward:
        """Send one request; retry it if its worker dies, but not if it hangs, as it would hang again.

        Return the reply, or the reward that it holds; one without a verdict if there is no reply.
        """
        for _ in range(attempts):
            worker = await self._ready_worker(slot)
            try:
                reply = await worker.ask(line, self._reward.timeout_seconds)
            except TimeoutError:
                self._workers.pop(slot).kill()
                detail = f"no verdict within reward.timeout_seconds = {self._reward.timeout_seconds:g}"
                detail += worker.stderr_note()
                return Reward(value=0.0, outcome=Outcome.TIMEOUT, detail=detail)
            if reply is None or reply.get("leaving"):
                how = self._workers.pop(slot).kill()
            if reply is not None:
                if "reward" not in reply:
                    return reply
                verdict = reply["reward"]
                if verdict["outcome"] == Outcome.ERROR:
                    verdict["detail"] += worker.stderr_note()
                return Reward(**verdict | {"outcome": Outcome(verdict["outcome"])})
        times = " twice" if attempts == 2 else ""
        detail = f"grading this answer ended the worker{times} ({how}){worker.stderr_note()}"
        return Reward(value=0.0, outcome=Outcome.ERROR, detail=detail)

    async def _ready_worker(self, slot: int) -> _Worker:
        """Return the worker of `slot`; if there is none, start one and wait until it has loaded the functions."""
        if slot in self._workers:
            return self._workers[slot]
        worker, here = _Worker(), str(Path.cwd())
        self._workers[slot] = worker
        settings = {
            "reward": self._reward.model_dump(mode="json"),
            "thinking_open": self._thinking_open,
            "path": [entry or here for entry in sys.path],
        }
        try:
            reply = await worker.ask(json.dumps(settings).encode() + b"\n", STARTUP_SECONDS)
            reason = None if reply else f"its worker ended while importing it ({self._workers.pop(slot).kill()})"
        except TimeoutError:
            reply, reason = None, f"importing it took more than {STARTUP_SECONDS:g} seconds"
        if reply is None:
            # If the functions were loaded before, the user's setting is not the cause.
            raise (GradingError if self._functions_loaded else UserInputError)(
                f"{self._names} cannot be used: {reason}{worker.stderr_note()}",
                where="reward.functions",
                next_step="import the module in a Python shell to see what it does; see docs/rewards.md",
            )
        if "refused" in reply:
            raise UserInputError(reply["refused"], where="reward.functions", next_step=reply["next_step"])
        self._functions_loaded = True
        return worker


def _line(kind: str, content: object) -> bytes:
    """Return a request to a worker."""
    return json.dumps({kind: content}).encode() + b"\n"


class _Worker:
    """A grading process, the socket to it, and the end of what it wrote to stderr during its last job."""

    def __init__(self) -> None:
        self._socket, its_end = socket.socketpair()
        self._socket.setblocking(False)
        its_end.set_inheritable(True)
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", str(Path(__file__).with_name("worker.py")), str(its_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if POSIX else subprocess.DEVNULL,
                bufsize=0,
                # Threads would only fight for the cores; a fixed hash seed makes sympy's order of terms repeatable.
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
                # Ctrl-C is for the run; and what a function starts can be killed with its session.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                close_fds=POSIX,  # Windows has no other way to inherit a socket
                pass_fds=(its_end.fileno(),) if POSIX else (),
            )
        self._stderr = cast("FileIO | None", self._process.stderr)
        self._stderr_tail = b""
        self._loop = asyncio.get_running_loop()
        if self._stderr is not None:
            os.set_blocking(self._stderr.fileno(), False)
            self._loop.add_reader(self._stderr, self._read_stderr)

    async def ask(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Return the reply to `line`, or None if the process ended. Raises TimeoutError after `seconds`."""
        self._stderr_tail = b""
        reply = asyncio.ensure_future(self._exchange(line))
        # Unlike wait_for(), this does not lose a reply that came while this process was suspended.
        await asyncio.wait([reply], timeout=seconds)
        if not reply.done():
            reply.cancel()
            await asyncio.wait([reply])
            raise TimeoutError
        return reply.result()

    async def _exchange(self, line: bytes) -> dict[str, Any] | None:
        received = b""
        try:
            await self._loop.sock_sendall(self._socket, line)
            while not received.endswith(b"\n"):
                data = await self._loop.sock_recv(self._socket, READ_BYTES)
                if not data:
                    return None
                received += data
        except ConnectionError:
            return None
        self._read_stderr()  # what it wrote before the reply
        return cast("dict[str, Any]", json.loads(received))

    def _read_stderr(self) -> None:
        """Keep the tail of the available output, by one read: a function may print without end."""
        if self._stderr is None:
            return
        data = self._stderr.read(READ_BYTES)
        self._stderr_tail = (self._stderr_tail + (data or b""))[-STDERR_TAIL_BYTES:]
        if data == b"":
            self._loop.remove_reader(self._stderr)

    def stderr_note(self) -> str:
        """Return what the worker wrote during its last job, without control characters, or an empty string."""
        text = self._stderr_tail.decode(errors="replace").strip()
        text = "".join(character if character.isprintable() or character == "\n" else " " for character in text)
        return f"; the worker wrote:\n{text}" if text else ""

    def kill(self) -> str:
        """End the process and all that it started. Returns how it ended: one that had already exited, by itself."""
        if POSIX:
            # Before reaping, while the id cannot belong to another process. macOS refuses to signal a dead one.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        code = self._process.wait()
        if self._stderr is not None:
            self._read_stderr()
            self._loop.remove_reader(self._stderr)
            self._stderr.close()
        self._socket.close()
        return f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"


def ungraded_ratio(rewards: Sequence[Reward]) -> float:
    """Return the share of `rewards`, in [0, 1], without a verdict; 0 if there are no rewards."""
    return sum(not reward.outcome.is_graded for reward in rewards) / len(rewards) if rewards else 0.0


def refuse_ungraded(rewards: Sequence[Reward], limit: float, where: str) -> None:
    """Raise GradingError if more than the share `limit` of `rewards` has no verdict. `where` names their source.

    To a positive-only objective a broken grader looks like a hard task; training on would hide it.
    """
    if ungraded_ratio(rewards) <= limit:
        return
    details = [textwrap.shorten(reward.detail, 300) for reward in rewards if not reward.outcome.is_graded]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in count_outcomes(rewards).items() if count)
    raise GradingError(
        f"{len(details)} of {len(rewards)} answers could not be graded ({counts}), more than "
        f"reward.max_ungraded_ratio = {limit:g} allows; the first: {' | '.join(details[:2])}",
        where=where,
        next_step="for timeouts raise reward.timeout_seconds or lower reward.max_answer_characters; "
        "for errors correct the functions or the data",
    )
