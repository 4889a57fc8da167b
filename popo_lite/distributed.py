"""The processes of a run on several GPUs or machines, one rank each, started by torchrun or `accelerate launch`.

Every rank runs the same program. Rollouts are gathered, so all ranks hold the same groups, plans and cursor; only
gradients are summed. What is not the same, such as times, decides nothing. Rank 0 writes the run's files and shows it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pickle
import re
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from popo_lite.errors import EngineError, PopoError, StopRequested
from popo_lite.launch import processes_of_run

T = TypeVar("T")

BEAT_SECONDS = 1.0
"""Seconds between two heartbeats of a rank."""
LOST_SECONDS = 20.0
"""A rank that has said nothing for so long is lost."""
COLLECTIVE_LIMIT = datetime.timedelta(seconds=30)
"""Longest time of one of gloo's collectives after the meeting: a rank may freeze in it, and it cannot be stopped."""
PIECE_BYTES = 2**24
"""Most bytes in one collective, apart from gradients: then the limit holds for slow networks, too."""
PASS_LIMIT = datetime.timedelta(minutes=10)
"""Longest time that a rank may wait for another to join, or within `together`."""
CLOSED = "closed"
"""Last beat of a rank."""
FAREWELL_SECONDS = 5.0
"""Longest time that rank 0 waits for the others at its end."""
End = dict[str, str | None]
GONE: End = {
    "what": "is gone: it was killed, or its machine or network failed", "where": None, "next_step": None, "doubt": None
}  # fmt: skip
"""The end of a rank that says nothing any more."""


class RankLostError(EngineError):
    """Raised if another rank has ended, or says nothing any more."""


class Ranks(AbstractContextManager["Ranks"]):
    """This process, `rank` of `size`. By default it is alone, and every method returns at once.

    What is called a collective must be called by all ranks in the same order. A collective raises RankLostError if
    another rank ends meanwhile, and StopRequested if that one abandons the step.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """True for the rank that writes and shows."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's part of `items`: every `size`-th one."""
        return list(items[self.rank :: self.size])

    def merge(self, mine: Sequence[T]) -> list[T]:
        """Return the results of all ranks, one for each item, in the order of the items of `share`. A collective."""
        parts = self.gather(mine)
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks. A collective."""
        return [value]

    def from_first(self, value: T) -> T:
        """Return the value of rank 0. A collective."""
        return value

    def sum_gradients(self, _parameters: Sequence[Tensor]) -> int:
        """Replace each gradient by its sum over ranks; None counts as 0. Return the bytes reduced. A collective."""
        return 0

    def check(self) -> None:
        """Raise RankLostError or StopRequested if another rank has ended. Not a collective."""

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which torch does collectives itself. A collective: it begins when all ranks are here."""
        return nullcontext()

    def another(self) -> Ranks:
        """Return the same ranks for collectives of another thread. A collective."""
        return self

    def leave(self, error: BaseException | None) -> None:
        """Tell the other ranks why this one ends. A second call does nothing."""

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _trace: object = None, /) -> None:
        """Leave the other ranks."""


class ProcessGroup(Ranks):
    """The ranks of torch.distributed: gloo for objects and on CPUs, NCCL for gradients on GPUs.

    Every collective begins with a meeting through the store. So gloo and NCCL wait only for a rank that has come: they
    cannot be stopped.
    """

    def __init__(self, watch: Watch, store: Any, group: Any = None) -> None:
        self.rank, self.size = watch.rank, watch.size
        self._watch, self._store, self._group = watch, store, group
        self._meetings, self._groups, self._together = Counter[str](), 0, False

    def gather(self, value: T) -> list[T]:  # noqa: D102
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._meeting("gather"):
            distributed.all_gather(sizes, torch.tensor([data.numel()]), group=self._group)
            longest = max(int(size) for size in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
            for mine, *theirs in zip(*(each.split(PIECE_BYTES) for each in (padded, *parts)), strict=True):
                distributed.all_gather(theirs, mine, group=self._group)
        # Pickles of ranks of the same run, which may run any code anyway.
        return [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]  # noqa: S301

    def from_first(self, value: T) -> T:  # noqa: D102
        data = torch.frombuffer(bytearray(pickle.dumps(value) if self.first else b"\0"), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        with self._meeting("from_first"):
            distributed.broadcast(size, 0, group=self._group)
            if not self.first:
                data = torch.empty(int(size), dtype=torch.uint8)
            for piece in data.split(PIECE_BYTES):
                distributed.broadcast(piece, 0, group=self._group)
        received: T = pickle.loads(data.numpy().tobytes())  # noqa: S301
        return received

    def sum_gradients(self, parameters: Sequence[Tensor]) -> int:  # noqa: D102
        has_gradient = [parameter.grad is not None for parameter in parameters]
        anywhere = [any(each) for each in zip(*self.gather(has_gradient), strict=True)]
        taking = [parameter for parameter, some in zip(parameters, anywhere, strict=True) if some]
        if not taking:
            return 0
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in taking]
        bucket = torch._utils._flatten_dense_tensors(gradients)
        with self._meeting("sum_gradients"):
            distributed.all_reduce(bucket, group=self._group)
        for parameter, gradient in zip(taking, torch._utils._unflatten_dense_tensors(bucket, gradients), strict=True):
            parameter.grad = gradient
        return int(bucket.nbytes)

    def check(self) -> None:  # noqa: D102
        self._watch.check()

    @contextmanager
    def together(self) -> Iterator[None]:  # noqa: D102
        with self._meeting("together"):
            pass
        self._together = True
        try:
            yield
        except RuntimeError as error:
            if not re.search("gloo|NCCL", str(error)):
                raise
            raise self._watch.reason_of(error) from error
        self._together = False  # not after an error: then the others wait in the middle of what was done together

    def another(self) -> Ranks:  # noqa: D102
        self._groups += 1
        store = PrefixStore(f"group-{self._groups}", self._store)
        with self._meeting("another"):
            return ProcessGroup(self._watch, store, distributed.new_group(backend="gloo", timeout=COLLECTIVE_LIMIT))

    def leave(self, error: BaseException | None) -> None:  # noqa: D102
        self._watch.leave(error)

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _trace: object = None, /) -> None:
        """Leave the others. Rank 0 reports a PopoError for all ranks; another rank only exits with its code.

        The others end after rank 0, which may be saving: torchrun kills what still runs 30 seconds after the first
        process that has failed. But rank 0 may wait for one that fails in the middle of what they do together, until
        that one ends.
        """
        self.leave(error)
        if not self.first and not self._together:
            self._watch.wait_for_first()
        self._watch.close()
        if isinstance(error, PopoError) and not self._watch.reports:
            raise SystemExit(error.exit_code) from error

    @contextmanager
    def _meeting(self, name: str) -> Iterator[None]:
        """Wait until all ranks are here, then run the block. Raises RankLostError if that cannot be or fails."""
        self._meetings[name] += 1
        try:
            needed, pause = self._meetings.total() * self.size, 1e-4  # none can be a meeting ahead
            self._store.add(name, 1)
            arrived = self._store.add("arrived", 1)
            while arrived < needed:
                self._watch.check()
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
                left = self._watch.left()  # before the count: a rank may come to this meeting, and then end
                arrived = self._store.add("arrived", 0)
                if left is not None and arrived < needed:
                    raise RankLostError(f"rank {left} has ended the run, and this one has not")
            # A rank may be at its next meeting of the same name already, so the count may be larger.
            if self._store.add(name, 0) < self._meetings[name] * self.size:
                raise RankLostError(f'other ranks do something else than "{name}"', next_step="please report this bug")
            yield
        except RuntimeError as error:  # a connection broke
            raise self._watch.reason_of(error) from error


def open_lines(store: Any, rank: int, size: int) -> dict[socket.socket, int]:
    """Return connections between rank 0 and the others, with the rank at the other end.

    Nothing is sent over them: the system closes those of a process that dies, however it does.
    """
    if rank:
        line = socket.create_connection((os.environ["MASTER_ADDR"], int(store.get("port"))), timeout=60)
        line.sendall(rank.to_bytes(4, "big"))
        return {line: 0}
    lines: dict[int, socket.socket] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=size) as server:
        server.settimeout(60)
        store.set("port", str(server.getsockname()[1]))
        while len(lines) < size - 1:
            line, _ = server.accept()
            line.settimeout(5)
            with suppress(OSError):  # of a stranger, such as a scan of ports
                lines.setdefault(int.from_bytes(line.recv(4, socket.MSG_WAITALL), "big"), line)
                lines = {other: line for other, line in lines.items() if 0 < other < size}
    return {line: other for other, line in lines.items()}


class Watch:
    """Tells the other ranks that this one is alive, or why it ends, and hears the same of them, in a thread."""

    def __init__(
        self, store: Any, rank: int, size: int, lines: dict[socket.socket, int], lost: Callable[[], None] = lambda: None
    ) -> None:
        """Begin. `lost` is called, outside the main thread, when a rank has ended before its time."""
        self.rank, self.size, self._store, self._lines, self._lost = rank, size, store, lines, lost
        self._others = [other for other in range(size) if other != rank]
        self._heard = dict.fromkeys(self._others, ("", 0))  # newest beat, and the own beat at which it was new
        self._ended: dict[int, End] = {}
        self._left, self._closed, self._beats, self._round = False, threading.Event(), 0, time.monotonic()
        self._saying, self._through = threading.Lock(), False
        store.multi_set([f"end/{rank}", f"beat/{rank}"], ["", "0"])
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()
        threading.Thread(target=self._end_without_store, name="ranks' store", daemon=True).start()

    def check(self) -> None:
        """Raise RankLostError or StopRequested if another rank has ended before its time."""
        # The cause first, before those that ended because of it.
        for rank, end in sorted(self._ended.items(), key=lambda item: (item[1].get("kind") == "followed", item[0])):
            if end.get("kind") == "abandoned":
                raise StopRequested
            if end.get("kind") != "ended":
                lost = RankLostError(f"rank {rank} {end['what']}", where=end["where"], next_step=end["next_step"])
                lost.doubt = end["doubt"]
                raise lost

    def left(self) -> int | None:
        """Return a rank that has ended with the run, if there is one."""
        return next((rank for rank, end in list(self._ended.items()) if end.get("kind") == "ended"), None)

    @property
    def reports(self) -> bool:
        """True for the rank that reports errors: the first that has not gone without a word."""
        return all(self._ended.get(rank) == GONE for rank in range(self.rank))

    def reason_of(self, error: Exception) -> Exception:
        """Return why a connection broke: the end that a rank has reported, or which ranks are silent."""
        broken, until = self._beats, time.monotonic() + 4 * BEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 4)
            try:
                self.check()
            except (RankLostError, StopRequested) as reason:
                return reason
        silent = [rank for rank, (_, heard) in self._heard.items() if heard <= broken + 1]
        self._ended |= dict.fromkeys(silent, GONE)
        try:
            self.check()
        except RankLostError as reason:
            return reason
        return RankLostError(f"the connection to another rank broke: {error}")

    def leave(self, error: BaseException | None) -> None:
        """Tell the other ranks that this one ends, and why."""
        if self._left:
            return
        self._left = True
        end: End = {"kind": "ended"}
        if isinstance(error, (StopRequested, KeyboardInterrupt)):
            end = {"kind": "abandoned"}
        elif isinstance(error, PopoError):
            advice = {name: getattr(error, name) for name in ("where", "next_step", "doubt")}
            end = {"what": f"stopped: {error.what}", **advice}
            if isinstance(error, RankLostError):
                end = {**end, "kind": "followed"}
        elif error is not None and not isinstance(error, SystemExit):  # that is how a stopped run ends
            end = {**GONE, "what": f"stopped: {type(error).__name__}: {error}"}
        with suppress(RuntimeError):  # of a store that has gone with another rank
            self._store.set(f"end/{self.rank}", json.dumps(end))

    def wait_for_first(self) -> None:
        """Return when rank 0 is through with all that it has to do, or is gone."""
        self._wait_for([0], math.inf)

    def close(self) -> None:
        """Say nothing any more. Rank 0, which may have the store, first lets the others hear of its end."""
        with suppress(RuntimeError):
            self._say(CLOSED)
        if self.rank == 0:
            self._wait_for(self._others, FAREWELL_SECONDS)
        self._closed.set()
        self._thread.join(2 * BEAT_SECONDS)  # it may wait for a store that is gone
        for line in list(self._lines):
            line.close()

    def _wait_for(self, ranks: Sequence[int], seconds: float) -> None:
        """Wait until these ranks are through, gone or silent, at most so long."""

        def through(rank: int) -> bool:
            beat, heard = self._heard[rank]
            return beat == CLOSED or self._ended.get(rank) == GONE or self._silent(heard)

        limit = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < limit and not all(map(through, ranks)):
            time.sleep(BEAT_SECONDS / 4)

    def _say(self, beat: str) -> None:
        """Tell the others that this rank is alive, or `CLOSED`, after which nothing else is said."""
        with self._saying:
            if not self._through:
                self._through = beat == CLOSED
                self._store.set(f"beat/{self.rank}", beat)

    def _silent(self, heard: int) -> bool:
        """Return whether a rank last heard at this beat is lost. Not by the clock: a run may be stopped, and go on."""
        return (self._beats - heard) * BEAT_SECONDS > LOST_SECONDS

    def _run(self) -> None:
        keys = [f"{kind}/{other}" for kind in ("end", "beat") for other in self._others]
        called = False
        try:
            while not self._closed.is_set():
                for line in select.select(list(self._lines), [], [], BEAT_SECONDS)[0]:
                    rank = self._lines.pop(line)
                    line.close()
                    if not self._store.get(f"end/{rank}"):
                        self._ended[rank] = GONE
                        if self.rank == 0:  # the others have no line to it
                            self._store.set(f"end/{rank}", json.dumps(GONE))
                self._beats, self._round = self._beats + 1, time.monotonic()
                self._say(str(self._beats))
                values = [value.decode() for value in self._store.multi_get(keys)]  # waits for those that start
                self._round = time.monotonic()
                for rank, end, beat in zip(self._others, values, values[len(self._others) :], strict=False):
                    if beat != self._heard[rank][0]:
                        self._heard[rank] = beat, self._beats
                    if end:
                        self._ended[rank] = json.loads(end)
                    elif self._silent(self._heard[rank][1]):
                        self._ended[rank] = GONE
                if not called and any(end.get("kind") != "ended" for end in self._ended.values()):
                    called = True
                    threading.Thread(target=self._lost, name="ranks' end", daemon=True).start()
        except (RuntimeError, OSError, ValueError):  # rank 0, or torchrun on its machine, has the store
            if not self._left:
                self._ended.setdefault(0, GONE)
                self._lost()

    def _end_without_store(self) -> None:
        """End the process if the store's machine is gone: then nothing that asks the store ever returns."""
        late = 0
        while not self._closed.wait(BEAT_SECONDS):
            # Several times: this process, and not the store, may have stood still.
            late = late + 1 if time.monotonic() > self._round + LOST_SECONDS else 0
            if self._thread.is_alive() and late > 5:
                where = "the machine of rank 0, or of torchrun's rendezvous, is gone"
                sys.stderr.write(f"error  rank {self.rank}: {where}: resume from the newest checkpoint\n")
                sys.stderr.flush()
                os._exit(1)


_joined = 0
"""How often this process has joined ranks: a program may train several times."""


def join() -> Ranks:
    """Return the ranks of this run: alone, unless torchrun or `accelerate launch` has started this process.

    Raises EngineError if the processes do not find each other.
    """
    global _joined
    if processes_of_run() == 1:
        return Ranks()
    if on_gpu := torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= gpus:
            what = f"process {here + 1} on this machine has no GPU: there are {gpus}"
            next_step = f"torchrun --nproc-per-node {gpus}; or train on the CPU with CUDA_VISIBLE_DEVICES= in front"
            raise EngineError(what, next_step=next_step)
        torch.cuda.set_device(here)
    # NCCL's own thread would end the process of a rank that still has to save.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # torchrun has set it to 1
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        if not distributed.is_initialized():
            store, rank, size = next(iter(rendezvous("env://", timeout=datetime.timedelta(minutes=5))))
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PASS_LIMIT)
        _joined += 1
        rank, size = distributed.get_rank(), distributed.get_world_size()
        store = PrefixStore(f"popo-lite-{_joined}", distributed.distributed_c10d._get_default_store())
        # Before a second training rank 0 may evaluate or export the first, while the others are here.
        store.set(f"here/{rank}", "")
        store.wait([f"here/{each}" for each in range(size)], PASS_LIMIT)
        group = distributed.new_group(backend=backend, timeout=COLLECTIVE_LIMIT)
        lines = open_lines(store, rank, size)
    except (RuntimeError, ValueError, OSError) as error:
        next_step = "docs/scaling.md has the commands and network settings; for one process unset WORLD_SIZE"
        raise EngineError(f"the ranks do not find each other: {error}", next_step=next_step) from error

    def end_what_waits() -> None:
        if on_gpu:  # for a kernel of NCCL that waits for another rank Python would wait, too
            for each in {group, distributed.group.WORLD}:
                with suppress(Exception):
                    each._get_backend(torch.device("cuda")).abort()

    return ProcessGroup(Watch(store, rank, size, lines, end_what_waits), store, group)


def refuse_other_versions(ranks: Ranks) -> None:
    """Raise EngineError if a rank runs other versions than rank 0. A collective."""
    versions = ranks.gather({package: metadata.version(package) for package in ("popo-lite", "torch", "transformers")})
    if different := [rank for rank in range(ranks.size) if versions[rank] != versions[0]]:
        what = f"rank {different[0]} runs {versions[different[0]]}, and rank 0 {versions[0]}"
        raise EngineError(what, next_step="install the same versions on all machines")
