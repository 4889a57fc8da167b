"""Rollouts from vLLM servers, on this machine or others: adapters pass through a shared folder, the rest over HTTP."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from popo_lite.errors import EngineError
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.load import model_source
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Answers, Progress, Requests, Sampler, SamplingParams
from popo_lite.samplers.server_client import Answer, ServerClient, ServerError
from popo_lite.samplers.vllm import engine_options

HEARTBEAT_SECONDS = 0.25
"""How often `finished` is called if nothing ends."""


class ServerSampler(Sampler):
    """Any number of vLLM servers that take the same adapter.

    Which server answers does not change a draw beyond rounding: each has its own seed. A server that fails is set
    aside with a notice and its requests go to the others. Every `sync` offers it the current adapter again; it is used
    again once it has that. At the start all servers must work.
    """

    engine = "server"

    def _open(self) -> None:
        server = self._recipe.rollout.server
        # The same path must lead there on every machine, so nothing but the home folder is resolved in it.
        self._folder = Path(server.shared_dir or ".").expanduser().absolute() / _new_name()
        self._servers = [ServerClient(url, allow_http=server.allow_http) for url in server.base_urls]
        self._runner = asyncio.Runner()
        self._closed = False

    def _load(self, version: int) -> None:
        """Give every server, also those that are back, the current adapter under a new name."""
        start, name = time.perf_counter(), f"{_new_name()}-{version}"
        former = sorted(self._folder.glob("*"))
        try:
            save_adapter(self._policy.model, self._folder / name, base_id=self._recipe.model.id)
        except OSError as error:
            where = f'rollout.server.shared_dir = "{self._recipe.rollout.server.shared_dir}"'
            next_step = "name a folder that trainer and servers see under the same path"
            raise EngineError(f"no adapter can be written: {error}", where=where, next_step=next_step) from error
        self._runner.run(_together(self._offer(server, name) for server in self._servers))
        self._usable(needed=1 if self.swap_seconds else len(self._servers))
        # A server reads an adapter again when its memory was needed, so only those of earlier versions go.
        for folder in former:
            shutil.rmtree(folder)
        self.swap_seconds.append(time.perf_counter() - start)

    def close(self) -> None:
        """Take the adapter off the servers and out of the shared folder. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(_together(server.close() for server in self._servers))
        finally:
            self.policy_version = None
            shutil.rmtree(self._folder, ignore_errors=True)
            self._runner.close()

    def _complete(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        return self._runner.run(self._collect(requests, params, finished))

    async def _collect(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        """Return an answer to every request, in order. However it ends, no request is left under way.

        At most `rollout.max_num_seqs` requests at once go to each usable server, the next one to the least loaded.
        """
        answers: dict[int | None, Answer] = {}
        waiting = deque(range(len(requests)))
        # Task -> (index of its request, server). A health check has no request, and ends only by an error.
        running: dict[asyncio.Task[Answer], tuple[int | None, ServerClient]] = {
            asyncio.create_task(server.watch()): (None, server) for server in self._usable()
        }
        try:
            while len(answers) < len(requests):
                usable = self._usable()
                load = Counter(server for index, server in running.values() if index is not None)
                while waiting and load[server := min(usable, key=load.__getitem__)] < self._recipe.rollout.max_num_seqs:
                    load[server] += 1
                    request = requests[following := waiting.popleft()]
                    answer = server.complete(request, params, self._policy.stop_ids)
                    running[asyncio.create_task(answer)] = (following, server)
                before = len(answers)
                done, _ = await asyncio.wait(running, timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, server = running.pop(task)
                    try:
                        answers[index] = task.result()
                    except (ServerError, asyncio.CancelledError) as error:
                        # A server that was set aside has its reason already.
                        if isinstance(error, ServerError) and server.adapter is not None:
                            self._set_aside(server, error)
                        if index is not None:
                            waiting.append(index)
                for task, (_, server) in running.items():
                    if server.adapter is None:
                        task.cancel()
                finished(len(answers) - before)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [(answers[index].token_ids, answers[index].logps) for index in range(len(requests))]

    async def _offer(self, server: ServerClient, name: str) -> None:
        """Load the adapter `name`; check the server first if it is new or was set aside."""
        try:
            if server.adapter is None:
                await server.connect(context_tokens=self._recipe.rollout.sequence_tokens)
            await server.load(name, self._folder / name)
        except ServerError as error:
            self._set_aside(server, error)
            return
        if server.error is not None:
            server.error = None
            self._notify(f"server {server.url} is back")

    def _set_aside(self, server: ServerClient, error: ServerError) -> None:
        """Stop using `server` until it is back, and report a reason that is new. At the start an error reports it."""
        if self.swap_seconds and str(server.error) != str(error):
            self._notify(f"server {server.url} is set aside: {error}")
        server.adapter, server.error = None, error

    def _usable(self, needed: int = 1) -> list[ServerClient]:
        """Return the servers that hold the adapter.

        If fewer than `needed` do, raises EngineError with the reasons of the others and what helps the first of them.
        """
        usable = [server for server in self._servers if server.adapter is not None]
        if len(usable) < needed:
            errors = {server: server.error for server in self._servers if server.error is not None}
            first, error = next(iter(errors.items()))
            reasons = "; ".join(f"{server.url}: {reason}" for server, reason in errors.items())
            what = f"{len(errors)} of {len(self._servers)} servers cannot be used: {reasons}"
            next_step = error.advice or f"start it (docs/servers.md): {serve_command(self._recipe, first.url)}"
            raise EngineError(what, where="rollout.server.base_urls", next_step=next_step)
        return usable


def _new_name() -> str:
    """Return a name that no run has used: prefix caches outlive adapters and know them by name and path."""
    return f"popo-lite-{uuid.uuid4().hex[:12]}"


async def _together(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    for result in await asyncio.gather(*calls, return_exceptions=True):  # all have ended when an error is raised
        if isinstance(result, BaseException):
            raise result


def serve_command(recipe: Recipe, url: str) -> str:
    """Return the shell command that starts the server that `recipe` expects at `url`."""
    place, model = urlsplit(url), recipe.model
    options = engine_options(recipe, recipe.lora.rank) | {
        "host": place.hostname or "127.0.0.1",
        "port": place.port or 80,
    }
    base = "DEQUANTIZED_BASE"
    if model.quantization == "none":
        base = model_source(model)
        options["revision"] = model.revision
    words = ["vllm", "serve", base]
    for name, value in options.items():
        if value:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {shlex.join(words)}"
