"""What ranks tell each other beside their collectives."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from popo_lite import distributed
from popo_lite.distributed import ProcessGroup, RankLostError, Watch
from popo_lite.errors import UserInputError


@pytest.fixture
def ranks(monkeypatch):
    """Two ranks of one process."""
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(distributed, "LOST_SECONDS", 1.0)
    store = torch.distributed.HashStore()
    return [ProcessGroup(Watch(store, rank, 2, {}), store) for rank in range(2)]


def test_a_rank_that_dies_is_noticed_at_once_by_all():
    store, lines = torch.distributed.HashStore(), [socket.socketpair() for _ in range(2)]
    ends = [{lines[0][0]: 1, lines[1][0]: 2}, {lines[0][1]: 0}, {lines[1][1]: 0}]
    first, dying, other = [Watch(store, rank, 3, ends[rank]) for rank in range(3)]
    first.check()
    dying._closed.set()
    dying._thread.join()
    next(iter(dying._lines)).close()  # as the system does
    start = time.monotonic()
    for watch in (first, other):
        until(lambda watch=watch: 1 in watch._ended)
        with pytest.raises(RankLostError, match="rank 1 is gone"):
            watch.check()
    assert time.monotonic() - start < distributed.LOST_SECONDS / 2
    assert first.reports
    assert not other.reports


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_ranks_end_after_rank_0(ranks):
    """torchrun kills rank 0, which may still be saving, 30 seconds after another rank has ended."""
    first, other = ranks
    ending = threading.Thread(target=other.__exit__)
    ending.start()
    first.leave(None)  # it says so before it saves
    ending.join(0.5)
    assert ending.is_alive()
    first.__exit__()
    ending.join(20)
    assert not ending.is_alive()


def test_other_ranks_do_not_wait_for_a_rank_0_that_is_gone(ranks):
    first, other = ranks
    first._watch._closed.set()  # it beats no more, and has not said that it is through
    ending = threading.Thread(target=other.__exit__)
    ending.start()
    ending.join(20)
    assert not ending.is_alive()


def test_a_rank_tells_why_it_ends_and_says_that_it_is_alive_until_it_is_through(ranks):
    first, other = ranks
    first.check()
    other.leave(UserInputError("no such column", where="data.dataset"))
    until(lambda: 1 in first._watch._ended)
    with pytest.raises(RankLostError, match="rank 1 stopped: no such column"):
        first.check()
    time.sleep(1.5)  # longer than a rank may be silent
    with pytest.raises(RankLostError, match="no such column"):
        first.check()
    first.__exit__()
    other.__exit__()


def test_the_cause_comes_before_those_that_ended_because_of_it():
    store = torch.distributed.HashStore()
    first, follower, cause = [Watch(store, rank, 3, {}) for rank in range(3)]
    error = UserInputError("no such column")
    error.doubt = "steps 1 to 4 are in doubt"
    follower.leave(RankLostError("rank 2 stopped: no such column"))
    cause.leave(error)
    until(lambda: len(first._ended) == 2)
    with pytest.raises(RankLostError, match="^rank 2 stopped: no such column") as caught:
        first.check()
    assert caught.value.doubt == error.doubt
    for watch in (first, follower, cause):
        watch._closed.set()


def test_what_waits_is_ended_if_the_store_goes_with_a_rank(monkeypatch):
    monkeypatch.setattr(distributed, "BEAT_SECONDS", 0.02)
    store, called = torch.distributed.HashStore(), threading.Event()
    Watch(store, 0, 2, {})._closed.set()

    class Store:
        """A store whose machine can go."""

        gone = False

        def __getattr__(self, name):
            if self.gone:
                raise RuntimeError("failed to recv, got 0 bytes")
            return getattr(store, name)

    mine = Store()
    watch = Watch(mine, 1, 2, {}, called.set)
    watch.check()
    mine.gone = True
    assert called.wait(20)
    with pytest.raises(RankLostError, match="rank 0 is gone"):
        watch.check()


@pytest.fixture
def start():
    """Start ranks that run a program."""
    started = []

    def start(size: int, program: str) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        place = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(size):
            environment = {**place, "RANK": str(rank)}
            command = [sys.executable, "-c", program]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


MEET = """
import sys, time
from popo_lite import distributed

with distributed.join() as ranks:
    for number in range(60):
        time.sleep(0.05 * ((number + ranks.rank) % 4 == 0))  # the others wait for this one
        assert ranks.from_first(ranks.rank + number) == number
        assert ranks.from_first((ranks.rank, number)) == (0, number)
    print("met")
"""


def test_a_rank_may_be_at_the_next_meeting_already(start):
    """`from_first` is no barrier: of four ranks some go on while others have not seen that all were there."""
    for process in start(4, MEET):
        assert process.communicate(timeout=120)[0] == "met\n"


FREEZE = """
import datetime, os, signal
from popo_lite import distributed

distributed.LOST_SECONDS, distributed.COLLECTIVE_LIMIT = 3.0, datetime.timedelta(seconds=6)
with distributed.join() as ranks:
    ranks.gather(0)
    if ranks.rank == 1:
        torch = distributed.distributed
        torch.all_gather = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    try:
        ranks.gather(0)
    except distributed.RankLostError as error:
        print(error, flush=True)
"""
posix = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="there is no such signal here")


@posix
def test_a_rank_that_freezes_after_the_meeting_is_lost(start):
    first, _ = start(2, FREEZE)
    assert "rank 1 is gone" in first.communicate(timeout=60)[0]
    assert first.returncode == 0


STAND_STILL = """
import time
from popo_lite import distributed

distributed.LOST_SECONDS = 5.0
with distributed.join() as ranks:
    time.sleep(2.5)  # till they have heard of each other
    print("begun", flush=True)
    for number in range(20):
        time.sleep(0.2)
        ranks.gather(number)
    print("done", flush=True)
"""


@posix
def test_ranks_that_stood_still_together_go_on(start):
    """Such as in a container that was paused. (Ctrl-Z stops torchrun alone.)"""
    processes = start(2, STAND_STILL)
    for process in processes:
        assert process.stdout.readline() == "begun\n"
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for process in processes:
        process.send_signal(signal.SIGCONT)
        time.sleep(1)
    assert [process.communicate(timeout=60)[0] for process in processes] == ["done\n"] * 2


IN_PIECES = """
from popo_lite import distributed

distributed.PIECE_BYTES, largest = 1000, 0

def measured(collective):
    def call(tensors, *arguments, **options):
        global largest
        largest = max(largest, *(each.nbytes for each in (tensors if isinstance(tensors, list) else [tensors])), 0)
        return collective(tensors, *arguments, **options)
    return call

for name in ("all_gather", "broadcast"):
    setattr(distributed.distributed, name, measured(getattr(distributed.distributed, name)))
with distributed.join() as ranks:
    for size in (0, 900, 5000, 12345):
        mine = bytes((ranks.rank + index) % 256 for index in range(size * (1 + ranks.rank)))
        theirs = [bytes((rank + index) % 256 for index in range(size * (1 + rank))) for rank in range(2)]
        assert ranks.gather(mine) == theirs
        assert ranks.from_first(mine) == theirs[0]
    print(largest)
"""


def test_large_objects_are_sent_in_pieces(start):
    """The time limit of a collective is one for its data: a checkpoint may take minutes."""
    for process in start(2, IN_PIECES):
        assert process.communicate(timeout=60)[0] == "1000\n"


JOIN_AGAIN = """
import datetime, time
from popo_lite import distributed

distributed.COLLECTIVE_LIMIT = datetime.timedelta(seconds=2)
for training in range(2):
    with distributed.join() as ranks:
        assert ranks.gather(ranks.rank) == [0, 1]
    time.sleep(4 * ranks.first * (training == 0))
print("done")
"""


def test_rank_0_may_be_late_for_a_second_training(start):
    """It evaluates the first one, for instance."""
    for process in start(2, JOIN_AGAIN):
        assert process.communicate(timeout=60)[0] == "done\n"


JOIN = """
import os
from popo_lite import distributed
from popo_lite.errors import EngineError

known, other = distributed.metadata.version, "transformers" if os.environ["RANK"] == "1" else None
distributed.metadata.version = lambda package: "0.1" if package == other else known(package)
try:
    with distributed.join() as ranks:
        try:
            distributed.refuse_other_versions(ranks)
        except EngineError as error:
            print(error, flush=True)
            raise
except SystemExit:
    pass  # rank 0 reports the error of the others
except EngineError:
    pass
"""


def test_ranks_of_different_versions_are_refused(start):
    """Each rank might train in another way, and the run would be neither's."""
    for process in start(2, JOIN):
        shown, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert re.search(r"rank 1 runs .*'transformers': '0\.1'.*, and rank 0 .*'transformers'", shown)
        assert "install the same versions on all machines" in shown
