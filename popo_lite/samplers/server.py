"""Rollouts from vLLM servers, on this machine or others: adapters pass through a shared folder, the rest over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shlex
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from popo_lite.errors import EngineError
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.load import model_source
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Progress, Request, Sampler, SamplingParams, make_completion
from popo_lite.samplers.server_client import Answer, ServerClient, ServerFault
from popo_lite.samplers.vllm import LORA_RANKS
from popo_lite.seeding import stream_seed
from popo_lite.types import Completion

TOKEN_VARIABLE = "POPO_SERVER_TOKEN"  # noqa: S105  # a name, not a token
HEARTBEAT_SECONDS = 0.25
"""How often `finished` is called if nothing ends."""

log = logging.getLogger(__name__)


class ServerSampler(Sampler):
    """Any number of vLLM servers that take the same adapter.

    Which server answers does not change a draw beyond rounding: each has its own seed. A server that fails is set
    aside with a notice and its requests go to the others; every `sync` offers it the current adapter again, and only
    with that is it used. At the start all servers must be in order.
    """

    engine = "server"

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        *,
        text: Callable[[Sequence[int]], str],
        notify: Callable[[str], None] = log.warning,
    ) -> None:
        self._policy, self._recipe, self._text, self._notify = policy, recipe, text, notify
        self.swap_seconds: list[float] = []
        # Prefix caches outlive adapters and know them by name and path, so neither is ever used twice, in no run.
        self._name = f"popo-lite-{uuid.uuid4().hex[:12]}"
        self._numbers = itertools.count(1)
        # The same path must lead there on every machine, so nothing but the home folder is resolved in it.
        self._folder = Path(recipe.rollout.server.shared_dir or ".").expanduser().absolute() / self._name
        token = os.environ.get(TOKEN_VARIABLE, "").strip() or None
        self._servers = [ServerClient(url, token=token) for url in recipe.rollout.server.base_urls]
        self._connected: set[ServerClient] = set()
        self._faults: dict[ServerClient, ServerFault] = {}
        self._runner = asyncio.Runner()
        self._started = self._closed = False
        try:
            self.sync(policy.version)
            if self._faults:
                raise self._unusable()
        except BaseException:
            self.close()
            raise
        self._started = True

    def sync(self, policy_version: int) -> None:
        """Give every server the trainer's current adapter under a new name, also those that are back.

        Raises EngineError if no server has taken it.
        """
        start = time.perf_counter()
        self.policy_version = None  # until all of it is done, no version can be sampled
        name = f"{self._name}-{next(self._numbers)}"
        former = sorted(self._folder.glob("*"))
        try:
            save_adapter(self._policy.model, self._folder / name, base_id=self._recipe.model.id)
        except OSError as error:
            raise EngineError(
                f"no adapter can be written: {error}",
                where=f'rollout.server.shared_dir = "{self._recipe.rollout.server.shared_dir}"',
                next_step="name a folder that trainer and servers see under the same path",
            ) from error
        self._runner.run(self._on_each(self._servers, lambda server: self._offer(server, name)))
        if not self._usable():
            raise self._unusable()
        # A server reads an adapter again when its memory was needed, so only those of earlier versions go.
        for folder in former:
            shutil.rmtree(folder)
        self.policy_version = policy_version
        self.swap_seconds.append(time.perf_counter() - start)

    def _complete(self, requests: Sequence[Request], params: SamplingParams, finished: Progress) -> list[Completion]:
        answers = self._runner.run(self._collect(requests, params, finished))
        return [make_completion(one.token_ids, one.logps, self._policy.stop_ids, self._text) for one in answers]

    def close(self) -> None:
        """Take the adapter off the servers and out of the shared folder. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._on_each(self._usable(), _release))
            self._runner.run(self._on_each(self._servers, ServerClient.aclose))
        finally:
            self.policy_version = None
            shutil.rmtree(self._folder, ignore_errors=True)
            self._runner.close()

    # ------------------------------------------------------------------ requests

    async def _collect(self, requests: Sequence[Request], params: SamplingParams, finished: Progress) -> list[Answer]:
        """Return an answer to every request, in order. However it ends, no request is left under way."""
        found: dict[int, Answer] = {}
        waiting = deque(range(len(requests)))
        running: dict[asyncio.Task[Answer], tuple[int, ServerClient]] = {}
        watches = {asyncio.create_task(server.watch()): server for server in self._usable()}
        try:
            while len(found) < len(requests):
                for index, server in self._dispatch(waiting, running):
                    asked = server.complete(
                        requests[index].prompt.token_ids,
                        params=params,
                        seed=stream_seed(*requests[index].key),
                        stop_ids=self._policy.stop_ids,
                    )
                    running[asyncio.create_task(asked)] = (index, server)
                if not running:
                    raise self._unusable()
                await asyncio.wait([*running, *watches], timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                ended = 0
                for task in [task for task in running if task.done()]:
                    index, server = running.pop(task)
                    if task.cancelled():
                        waiting.append(index)
                        continue
                    try:
                        found[index] = task.result()
                        ended += 1
                    except ServerFault as fault:
                        waiting.append(index)
                        if server in self._connected:  # else its first failure was told
                            self._set_aside(server, fault)
                for watch in [watch for watch in watches if watch.done()]:
                    server = watches.pop(watch)
                    try:
                        watch.result()
                    except ServerFault as fault:
                        if server in self._connected:
                            self._set_aside(server, fault)
                for task, (_, server) in running.items():
                    if server not in self._connected:
                        task.cancel()
                finished(ended)
        finally:
            for leftover in (*running, *watches):
                leftover.cancel()
            await asyncio.gather(*running, *watches, return_exceptions=True)
        return [found[index] for index in range(len(requests))]

    def _dispatch(
        self, waiting: deque[int], running: dict[asyncio.Task[Answer], tuple[int, ServerClient]]
    ) -> list[tuple[int, ServerClient]]:
        """Return requests to send now: up to `rollout.max_num_seqs` at once per usable server, the idlest first."""
        load = dict.fromkeys(self._usable(), 0)
        for _, server in running.values():
            if server in load:
                load[server] += 1
        chosen: list[tuple[int, ServerClient]] = []
        while waiting and load:
            server = min(load, key=load.__getitem__)
            if load[server] >= self._recipe.rollout.max_num_seqs:
                break
            load[server] += 1
            chosen.append((waiting.popleft(), server))
        return chosen

    # ------------------------------------------------------------------ servers

    async def _offer(self, server: ServerClient, name: str) -> None:
        """Load the adapter `name`; check the server first if it is new or was set aside."""
        try:
            if server not in self._connected:
                if server in self._faults:
                    await server.check_health(attempts=1)  # most often it is still gone; a step must not wait for it
                rollout = self._recipe.rollout
                await server.connect(context_tokens=rollout.max_prompt_length + rollout.max_completion_length)
            await server.load(name, self._folder / name)
        except ServerFault as fault:
            self._set_aside(server, fault)
            return
        self._connected.add(server)
        if self._faults.pop(server, None) is not None:
            self._notify(f"server {server.url} is back")

    def _set_aside(self, server: ServerClient, fault: ServerFault) -> None:
        """Stop using `server` until it is back, and say why unless that was said."""
        known = self._faults.get(server)
        if (known is None or str(known) != str(fault)) and self._started:
            self._notify(f"server {server.url} is set aside: {fault}")
        self._connected.discard(server)
        self._faults[server] = fault

    def _usable(self) -> list[ServerClient]:
        return [server for server in self._servers if server in self._connected]

    def _unusable(self) -> EngineError:
        """Return an error that says what is wrong with every server set aside, and what helps the first of them."""
        first, fault = next(iter(self._faults.items()))
        reasons = "; ".join(f"{server.url}: {reason}" for server, reason in self._faults.items())
        return EngineError(
            f"{len(self._faults)} of {len(self._servers)} servers cannot be used: {reasons}",
            where="rollout.server.base_urls",
            next_step=fault.advice or f"start it (docs/servers.md): {serve_command(self._recipe, first.url)}",
        )

    async def _on_each(
        self, servers: Sequence[ServerClient], act: Callable[[ServerClient], Coroutine[Any, Any, None]]
    ) -> None:
        """Run `act` on all `servers` at once. All have ended when the first error is raised."""
        results = await asyncio.gather(*(act(server) for server in servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result


async def _release(server: ServerClient) -> None:
    try:
        await server.release()
    except ServerFault as fault:
        log.info("server %s keeps its adapter: %s", server.url, fault)  # the run is over, nothing depends on it


def serve_command(recipe: Recipe, url: str) -> str:
    """Return the shell command that starts the server that `recipe` expects at `url`."""
    place = urlsplit(url)
    rollout, model = recipe.rollout, recipe.model
    own = model.quantization == "none"
    options = {
        "--host": place.hostname or "127.0.0.1",
        "--port": str(place.port or 80),
        "--dtype": model.dtype,
        "--max-model-len": str(rollout.max_prompt_length + rollout.max_completion_length),
        "--max-num-seqs": str(rollout.max_num_seqs),
        "--max-loras": "1",
        "--max-cpu-loras": "2",
        "--max-lora-rank": str(next((rank for rank in LORA_RANKS if rank >= recipe.lora.rank), recipe.lora.rank)),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    if own and model.revision is not None:
        options["--revision"] = model.revision
    flags = ["--enable-lora", *(["--trust-remote-code"] if model.trust_remote_code else [])]
    command = ["vllm", "serve", model_source(model) if own else "DEQUANTIZED_BASE", *flags]
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join([*command, *itertools.chain(*options.items())])
