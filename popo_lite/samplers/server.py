"""Rollouts from vLLM servers, on this machine or others: adapters pass through a shared folder, the rest over HTTP."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError

from popo_lite.errors import EngineError, PopoError, UserInputError
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.load import model_source
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import read_server_urls
from popo_lite.samplers.base import Answers, Progress, Requests, Sampler, SamplingParams
from popo_lite.samplers.server_client import Answer, ServerClient, ServerError, base_of
from popo_lite.samplers.vllm import command_line, engine_options

HEARTBEAT_SECONDS = 0.25
"""How often `finished` is called if nothing ends."""


Offered = list[tuple[str, str | None, ServerError | None]]
"""Each server's URL, the adapter that it holds, and why it holds none."""


class ServerSampler(Sampler):
    """Any number of vLLM servers that take the same adapter, for any number of ranks.

    Which server answers does not change a draw beyond rounding: each has its own seed. A server that fails is set
    aside with a notice and its requests go to the others. Every `sync` offers it the current adapter again; it is used
    again once it has that. At the start all of `rollout.server.base_urls` must work, and one server at least.

    Rank 0 writes the adapter, offers it to all servers, and tells the other ranks which of them hold it. Every rank
    sends its own requests to these, and sets aside those that fail it.
    """

    engine = "server"

    def _open(self) -> None:
        server = self._recipe.rollout.server
        # The same path must lead there on every machine, so nothing but the home folder is resolved in it.
        self._folder = Path(server.shared_dir or ".").expanduser().absolute() / _new_name()
        self._servers: dict[str, ServerClient] = {}
        self._wrong: list[str] = []  # what was wrong with the file of URLs at the last sync
        self._failed: dict[str, ServerError] = {}  # servers that this rank has set aside, until it finds them healthy
        self._lost: set[tuple[str, int]] = set()  # (server, rank that has set it aside), as rank 0 knows it
        self._runner = asyncio.Runner()
        self._closed = False

    def _load(self, version: int) -> None:
        """Give every server, also those that are new or back, the current adapter under a new name. A collective.

        Every rank raises an error of the offer, so all go on in the same way.
        """
        start = time.perf_counter()
        reported = self.ranks.gather(self._failed)
        offered: Offered | PopoError = []
        if self.ranks.first:
            self._failed = {}  # the offer checks them
            try:
                for rank, servers in enumerate(reported):
                    for url, failure in servers.items():
                        if (url, rank) not in self._lost:
                            self._set_aside(self._servers[url], failure, by=f" by rank {rank}" if rank else "")
                self._lost = _by_others(reported)
                offered = self._offer_to_all(f"{_new_name()}-{version}")
            except PopoError as error:
                offered = error
        offered = self.ranks.from_first(offered)
        if isinstance(offered, PopoError):
            raise offered
        if not self.ranks.first:
            self._runner.run(self._take(offered))
        if any(reported):
            former, self._lost = self._lost, _by_others(self.ranks.gather(self._failed))
            for url in sorted({url for url, _ in former} - {url for url, _ in self._lost}):
                if url in self._servers and self._servers[url].adapter is not None:
                    self._notify(f"server {url} is back")
        self.swap_seconds.append(time.perf_counter() - start)

    def close(self) -> None:
        """Take the adapter off the servers and out of the shared folder. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(_together(server.close() for server in self._servers.values()))
        finally:
            self.policy_version = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _complete(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        return self._runner.run(self._collect(requests, params, finished))

    async def _collect(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        """Return an answer to every request, in order. However it ends, no request is left under way.

        At most `rollout.max_num_seqs` requests at once go to each usable server from all ranks, the next one to that
        with the fewest from this rank. Of equal ones every rank begins with another.
        """
        most = -(-self._recipe.rollout.max_num_seqs // self.ranks.size)
        answers: dict[int | None, Answer] = {}
        waiting = deque(range(len(requests)))
        # Task -> (index of its request, server). A health check has no request, and ends only by an error.
        running: dict[asyncio.Task[Answer], tuple[int | None, ServerClient]] = {
            asyncio.create_task(server.watch()): (None, server) for server in self._usable()
        }
        try:
            while len(answers) < len(requests):
                usable = self._usable()
                start = self.ranks.rank * len(usable) // self.ranks.size
                usable = [*usable[start:], *usable[:start]]
                load = Counter(server for index, server in running.values() if index is not None)
                while waiting and load[server := min(usable, key=load.__getitem__)] < most:
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
                            self._failed[server.url] = error
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

    # ---------------------------------------------------------------- the servers

    def _offer_to_all(self, name: str) -> Offered:
        """Write the adapter, and load it as `name` into all servers that are listed now."""
        starting, required, left = not self.swap_seconds, self._recipe.rollout.server.base_urls, self._follow_file()
        former = sorted(self._folder.glob("*"))
        try:
            save_adapter(self._policy.model, self._folder / name, base_id=self._recipe.model.id)
        except (OSError, SafetensorError) as error:
            where = f'rollout.server.shared_dir = "{self._recipe.rollout.server.shared_dir}"'
            next_step = "name a folder that trainer and servers see under the same path"
            raise EngineError(f"no adapter can be written: {error}", where=where, next_step=next_step) from error
        offers = (self._offer(server, name) for server in self._servers.values())
        self._runner.run(_together([*offers, *(server.close() for server in left)]))
        self._usable([self._servers[base_of(url)] for url in required] if starting else [])
        for server in self._servers.values() if starting else ():
            if server.error is not None:
                self._notify(f"server {server.url} is set aside: {server.error}")
        # A server reads an adapter again when its memory was needed, so only those of earlier versions go.
        for folder in former:
            shutil.rmtree(folder)
        return [(server.url, server.adapter, server.error) for server in self._servers.values()]

    def _follow_file(self) -> list[ServerClient]:
        """Take in the servers that are listed now; return those that are not any more.

        Raises UserInputError for what is wrong in `rollout.server.urls_file` when the sampler is opened. Later that is
        a notice, and a file that cannot be read or names no server changes nothing: it may be half written.
        """
        server, wrong = self._recipe.rollout.server, list[str]()
        try:
            urls = listed_urls(self._recipe, wrong.append if self.swap_seconds else None)
        except UserInputError as error:
            if not self.swap_seconds:
                raise
            urls = list(self._servers)
            wrong.append(f"{error.what}: the servers stay as they are")
        for message in wrong:
            if message not in self._wrong:
                self._notify(message)
        former, self._wrong = self._servers, wrong
        self._servers = {
            url: former.get(url) or ServerClient(url, allow_http=server.allow_http) for url in map(base_of, urls)
        }
        left = [one for url, one in former.items() if url not in self._servers]
        for one in left:
            self._notify(f"server {one.url} has left: {server.urls_file} does not name it any more")
        return left

    async def _offer(self, server: ServerClient, name: str) -> None:
        """Load the adapter `name`; check the server first if it is new or was set aside."""
        in_use = server.adapter is not None
        try:
            if not in_use:
                await server.connect(context_tokens=self._recipe.rollout.sequence_tokens)
            await server.load(name, self._folder / name)
            if not in_use:
                await server.check_adapter()
        except ServerError as error:
            self._set_aside(server, error)
            return
        # A server that another rank has set aside is back when that rank says so.
        if self.swap_seconds and not in_use and server.url not in {url for url, _ in self._lost}:
            self._notify(f"server {server.url} {'has joined' if server.error is None else 'is back'}")
        server.error = None

    async def _take(self, offered: Offered) -> None:
        """Use the servers that rank 0 has offered the adapter, if they hold it, and no others.

        Those that failed this rank must be healthy first: they may work for rank 0 alone.
        """
        former, self._servers = self._servers, {}
        for url, adapter, error in offered:
            server = former.pop(url, None) or ServerClient(url, allow_http=self._recipe.rollout.server.allow_http)
            server.adapter, server.error = adapter, error
            self._servers[url] = server
        self._failed = {url: error for url, error in self._failed.items() if url in self._servers}
        checks = [self._check_health(self._servers[url], error) for url, error in self._failed.items()]
        await _together([*checks, *(server.close() for server in former.values())])

    async def _check_health(self, server: ServerClient, failure: ServerError) -> None:
        if server.adapter is None:
            return
        try:
            await server.check_health(attempts=1)
        except ServerError:
            server.adapter, server.error = None, failure
        else:
            del self._failed[server.url]

    def _set_aside(self, server: ServerClient, error: ServerError, *, by: str = "") -> None:
        """Stop using `server` until it is back, and report a reason that is new. At the start an error reports it."""
        if self.swap_seconds and str(server.error) != str(error):
            self._notify(f"server {server.url} is set aside{by}: {error}")
        server.adapter, server.error = None, error

    def _usable(self, required: Iterable[ServerClient] = ()) -> list[ServerClient]:
        """Return the servers that hold the adapter.

        If there is none, or one of `required` does not, raises EngineError with the reasons of those that do not and
        what helps the first of them.
        """
        usable = [server for server in self._servers.values() if server.adapter is not None]
        if not usable or any(server.adapter is None for server in required):
            errors = {server: server.error for server in self._servers.values() if server.error is not None}
            first, error = next(iter(errors.items()))
            reasons = "; ".join(f"{server.url}: {reason}" for server, reason in errors.items())
            what = f"{len(errors)} of {len(self._servers)} servers cannot be used: {reasons}"
            where = "rollout.server.base_urls" if self._recipe.rollout.server.base_urls else "rollout.server.urls_file"
            next_step = error.advice or f"start it (docs/servers.md): {serve_command(self._recipe, first.url)}"
            raise EngineError(what, where=where, next_step=next_step)
        return usable


def listed_urls(recipe: Recipe, notify: Callable[[str], None] | None = None) -> list[str]:
    """Return the URLs of `rollout.server.base_urls` and `rollout.server.urls_file`.

    `notify` takes a message for each line of the file that is wrong and left out. Raises UserInputError if there is
    such a line without `notify`, the file cannot be read, or no server is named.
    """
    server, where = recipe.rollout.server, "rollout.server.urls_file"
    if server.urls_file is None:
        return list(server.base_urls)
    path, example = Path(server.urls_file).expanduser(), "write one URL a line, such as http://127.0.0.1:8000"
    try:
        urls, wrong = read_server_urls(path, allow_http=server.allow_http)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserInputError(f"{path} cannot be read: {reason}", where=where, next_step=example) from error
    for message in wrong:
        if notify is None:
            raise UserInputError("\n".join(wrong), where=where, next_step="correct or remove these lines")
        notify(f"{message} (this line is left out)")
    if not (urls := [*server.base_urls, *urls]):
        raise UserInputError(f"{path} names no server", where=where, next_step=example)
    return urls


def _new_name() -> str:
    """Return a name that no run has used: prefix caches outlive adapters and know them by name and path."""
    return f"popo-lite-{uuid.uuid4().hex[:12]}"


def _by_others(reported: Sequence[dict[str, ServerError]]) -> set[tuple[str, int]]:
    """Return (server, rank) for what ranks above 0 have set aside."""
    return {(url, rank) for rank, servers in enumerate(reported) if rank for url in servers}


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
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {shlex.join(['vllm', 'serve', base, *command_line(options)])}"
