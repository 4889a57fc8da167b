"""Servers and ranks, many to many: one adapter for all, and servers that join and leave. Over HTTP, without vLLM."""

from __future__ import annotations

import contextlib
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors import SafetensorError

from fake_vllm import END, Script, completion, error, sampling
from popo_lite.distributed import Ranks
from popo_lite.errors import EngineError, RecipeError, UserInputError
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.samplers import SamplingParams, pick_engine
from popo_lite.samplers.server import ServerSampler
from popo_lite.samplers.server_client import ServerError
from popo_lite.types import Problem, Prompt

PARAMS = SamplingParams(temperature=1.0, max_completion_length=8)
PROMPTS = [
    Prompt(problem=Problem(id=f"p{n}", messages=({"role": "user", "content": "?"},), answer="0"), token_ids=(5, 6, 7))
    for n in range(5)
]


class Thread(Ranks):
    """A rank that is a thread of this process. A collective that not all of them reach fails after 20 seconds."""

    def __init__(self, rank, values, barrier):
        self.rank, self.size, self._values, self._barrier = rank, len(values), values, barrier

    def gather(self, value):
        self._values[self.rank] = pickle.dumps(value)
        self._barrier.wait(20)
        values = [pickle.loads(each) for each in self._values]  # noqa: S301
        self._barrier.wait(20)
        return values

    def from_first(self, value):
        return self.gather(value)[0]


@pytest.fixture(scope="module")
def policy():
    policy = load_policy(load_recipe("tiny_cpu", ["model.quantization=none"]))
    assert END in policy.stop_ids
    return policy


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("POPO_SERVER_TOKEN", raising=False)


@pytest.fixture
def servers():
    three = [Script() for _ in range(3)]
    yield three
    for server in three:
        with contextlib.suppress(OSError):
            server.close()


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def make(*urls, file=None):
        return tiny_recipe(
            'rollout.engine="server"', f"rollout.server.base_urls={[server.url for server in urls]}",
            f'rollout.server.shared_dir="{tmp_path / "shared"}"', "model.quantization=none", "rollout.max_num_seqs=5",
            *([] if file is None else [f'rollout.server.urls_file="{file}"']),
        )  # fmt: skip

    return make


class Pool:
    """The samplers of several ranks. `do(action)` has every rank do `action(sampler)` at the same time."""

    def __init__(self, policy, recipe, size):
        values, barrier = [b""] * size, threading.Barrier(size)
        self.notices = [[] for _ in range(size)]
        self._threads = ThreadPoolExecutor(size)
        self.samplers = []

        def open_one(rank):
            ranks = Thread(rank, values, barrier)
            return ServerSampler(policy, recipe, text=str, notify=self.notices[rank].append, ranks=ranks)

        self.samplers = self._all(open_one, range(size))

    def _all(self, action, items):
        return [future.result() for future in [self._threads.submit(action, item) for item in items]]

    def do(self, action):
        return self._all(action, self.samplers)

    def close(self):
        self.do(ServerSampler.close)


@pytest.fixture
def start(policy, tmp_path):
    opened = []

    def make(recipe, size=2):
        opened.append(Pool(policy, recipe, size))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()
    shared = tmp_path / "shared"
    assert not shared.exists() or not list(shared.iterdir())


def sample(sampler, *, prompts=PROMPTS, count=4, version=0):
    stream = ("t", sampler.ranks.rank)
    groups = sampler.sample(prompts, count=count, params=PARAMS, policy_version=version, stream=stream)
    assert [len(group) for group in groups] == [count] * len(prompts)


def sync(version):
    return lambda sampler: sampler.sync(version)


# ---------------------------------------------------------------------- ranks


def test_the_adapter_is_offered_once_and_every_rank_asks_all_servers(start, servers, recipe, tmp_path):
    pool = start(recipe(*servers[:2]))
    pool.do(sync(1))
    pool.do(sync(2))
    assert [server.asked["/v1/load_lora_adapter"] for server in servers[:2]] == [3, 3]
    assert servers[0].adapters == servers[1].adapters
    assert len(servers[0].adapters) == 1
    before = [server.asked["/v1/completions"] for server in servers]
    pool.do(lambda sampler: sample(sampler, version=2))
    asked = [server.asked["/v1/completions"] - start for server, start in zip(servers, before, strict=True)]
    assert sum(asked) == 40
    assert min(asked[:2]) >= 10
    assert max(server.most_in_flight for server in servers) <= 6  # half of rollout.max_num_seqs, rounded up, by each
    pool.close()
    assert [server.adapters for server in servers] == [{}, {}, {}]
    assert pool.notices == [[], []]
    assert not list((tmp_path / "shared").iterdir())


def test_ranks_do_not_begin_with_the_same_server(start, servers, recipe):
    used = []
    for number, server in enumerate(servers[:2]):
        server.answer = sampling(lambda body, number=number: used.append((body["seed"], number)))
    pool = start(recipe(*servers[:2]))
    for rank in range(2):
        sample(pool.samplers[rank], prompts=PROMPTS[:1], count=1)
    assert [number for _, number in used] == [0, 1]


def test_an_error_of_the_offer_reaches_all_ranks(start, servers, recipe, tmp_path):
    pool = start(recipe(servers[0]))
    servers[0].close()

    def fails(sampler):
        with pytest.raises(EngineError, match="1 of 1 servers cannot be used: http") as caught:
            sampler.sync(1)
        return str(caught.value), sampler.policy_version

    (first, held), other = pool.do(fails)
    assert (first, held) == other
    assert held is None
    assert "vllm serve" in first
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="no adapter can be written"):
        start(recipe(servers[1]).with_values({"rollout.server.shared_dir": str(tmp_path / "file")}))


def test_a_full_disk_is_named(start, servers, recipe, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    pool = start(recipe(servers[0]))
    monkeypatch.setattr("popo_lite.samplers.server.save_adapter", full)

    def fails(sampler):
        with pytest.raises(EngineError, match="no adapter can be written: I/O error: No space left") as caught:
            sampler.sync(1)
        assert caught.value.where.startswith("rollout.server.shared_dir")

    pool.do(fails)


def test_a_rank_sets_aside_what_fails_it_until_the_next_sync(start, servers, recipe):
    sick = threading.Event()
    sick.set()
    second_rank = PROMPTS[4:]
    pool = start(recipe(*servers[:2]))

    def fail_some(body):
        return (500, error("cannot")) if sick.is_set() and body["prompt"] == [9] else None

    servers[1].answer = sampling(fail_some)
    marked = [Prompt(problem=prompt.problem, token_ids=(9,)) for prompt in second_rank]
    pool.do(lambda sampler: sample(sampler, prompts=marked if sampler.ranks.rank else PROMPTS))
    before = servers[1].asked["/v1/completions"]
    sample(pool.samplers[1], prompts=marked)
    assert servers[1].asked["/v1/completions"] == before
    sample(pool.samplers[0])
    assert servers[1].asked["/v1/completions"] > before
    assert pool.notices[0] == []
    sick.clear()
    pool.do(sync(1))
    aside, back = pool.notices[0]
    assert aside.startswith(f"server {servers[1].url} is set aside by rank 1: ")
    assert "cannot" in aside
    assert back == f"server {servers[1].url} is back"
    before = servers[1].asked["/v1/completions"]
    sample(pool.samplers[1], prompts=marked, version=1)
    assert servers[1].asked["/v1/completions"] > before


def test_a_server_that_works_for_rank_0_alone_stays_aside(start, servers, recipe):
    pool = start(recipe(*servers[:2]))
    sampler, url = pool.samplers[1], servers[1].url

    async def unreachable(**_):
        raise ServerError("no connection (from here)")

    sampler._failed[url] = ServerError("no connection (from here)")
    sampler._servers[url].check_health = unreachable
    aside = f"server {url} is set aside by rank 1: no connection (from here)"
    for version, notices in ((1, [aside]), (2, []), (3, [])):
        pool.do(sync(version))
        before = servers[1].asked["/v1/completions"]
        sample(sampler, version=version)
        assert servers[1].asked["/v1/completions"] == before
        assert pool.notices[0] == notices
        pool.notices[0].clear()
    assert servers[1].asked["/v1/models"] == 2 * 9  # rank 0 has checked it again once
    del sampler._servers[url].check_health
    for version, notices in ((4, [f"server {url} is back"]), (5, [])):
        pool.do(sync(version))
        before = servers[1].asked["/v1/completions"]
        sample(sampler, version=version)
        assert servers[1].asked["/v1/completions"] > before
        assert pool.notices[0] == notices
        pool.notices[0].clear()


def test_a_rank_without_any_server_stops(start, servers, recipe):
    pool = start(recipe(servers[0]))
    servers[0].answer = sampling(lambda body: (500, error("gone")) if body["prompt"] == [9] else None)
    marked = [Prompt(problem=PROMPTS[0].problem, token_ids=(9,))]
    with pytest.raises(EngineError, match="1 of 1 servers cannot be used"):
        sample(pool.samplers[1], prompts=marked)
    sample(pool.samplers[0])


# ---------------------------------------------------------------------- servers that join and leave


def test_servers_join_and_leave_at_every_sync(start, servers, recipe, tmp_path):
    file = tmp_path / "urls.txt"
    file.write_text(f"# the pool\n{servers[0].url}/v1/\n\n{servers[0].url}  # twice\n")
    pool = start(recipe(file=file))
    assert servers[0].asked["/v1/load_lora_adapter"] == 1
    file.write_text(f"{servers[0].url}\n  {servers[1].url}  # new\n")
    pool.do(sync(1))
    assert pool.notices[0] == [f"server {servers[1].url} has joined"]
    assert servers[1].adapters == servers[0].adapters
    pool.do(lambda sampler: sample(sampler, version=1))
    assert all("/v1/completions" in server.asked for server in servers[:2])
    file.write_text(servers[1].url)
    pool.do(sync(2))
    assert pool.notices[0][1:] == [f"server {servers[0].url} has left: {file} does not name it any more"]
    assert servers[0].adapters == {}
    before = servers[0].asked.copy()
    pool.do(lambda sampler: sample(sampler, version=2))
    assert servers[0].asked == before
    servers[1].close()
    file.write_text(f"{servers[1].url}\n{servers[0].url}\n")
    pool.do(sync(3))  # at the same time one fails, and one is back
    pool.do(lambda sampler: sample(sampler, version=3))
    assert any("has joined" in notice for notice in pool.notices[0][2:])
    assert any(f"{servers[1].url} is set aside" in notice for notice in pool.notices[0][2:])
    assert pool.notices[1] == []


def test_a_server_that_joins_before_it_works_is_tried_again(start, servers, recipe, tmp_path):
    file, late = tmp_path / "urls.txt", servers[1]
    file.write_text(f"{late.url}\n")
    late.answer = lambda path, body: (503, error("starting")) if path == "/health" else None
    pool = start(recipe(servers[0], file=file))
    [aside] = pool.notices[0]
    assert aside.startswith(f"server {late.url} is set aside: it answers 503 to GET /health")
    pool.do(sync(1))
    assert pool.notices[0] == [aside]
    late.answer = lambda path, body: None
    pool.do(sync(2))
    assert pool.notices[0][1:] == [f"server {late.url} is back"]
    assert late.adapters == servers[0].adapters


def test_those_of_the_recipe_must_work_at_the_start(start, servers, recipe, tmp_path):
    file = tmp_path / "urls.txt"
    file.write_text(servers[0].url)
    servers[1].close()
    with pytest.raises(EngineError, match=f"1 of 2 servers cannot be used: {servers[1].url}"):
        start(recipe(servers[1], file=file))
    file.write_text(servers[1].url)
    with pytest.raises(EngineError, match="1 of 1 servers cannot be used") as caught:
        start(recipe(file=file))
    assert caught.value.where == "rollout.server.urls_file"


def test_what_is_wrong_in_the_file_is_an_error_at_the_start_and_later_a_notice(start, servers, recipe, tmp_path):
    file = tmp_path / "urls.txt"
    here = recipe(file=file)
    for text, what in (
        (None, "cannot be read: No such file"),
        (b"\xff", "cannot be read: it is not UTF-8 text"),
        (b"# none\n", "names no server"),
        (b"\nhttp//x\n", "line 2: 'http//x' is no URL of a server; write it as"),
        (b"http://me:planted@10.0.0.1:8000", "holds a login"),
        (b"http://10.0.0.1:8000", "plain text; use https://"),
        (b"http://127.0.0.1:99999", "is no URL"),
        (b"http://10.0.0.999", "is no URL"),
        (b"http://[::1::]:80", "is no URL"),
    ):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(UserInputError, match=what) as caught:
            pick_engine(here)
        assert str(file) in caught.value.what
        assert caught.value.next_step
        assert "planted" not in str(caught.value)
    file.write_text(servers[0].url)
    assert pick_engine(here)[0] == "server"
    pool = start(here)
    file.write_text(f"{servers[0].url}\nhttp://me:planted@x\n")
    for version in (1, 2):
        pool.do(sync(version))
    [notice] = pool.notices[0]
    assert notice.startswith(f"{file}, line 2: 'http://***@x' holds a login")
    assert notice.endswith("(this line is left out)")
    file.write_text("")
    pool.do(sync(3))
    file.unlink()
    pool.do(sync(4))
    assert pool.notices[0][1:] == [
        f"{file} names no server: the servers stay as they are",
        f"{file} cannot be read: No such file or directory: the servers stay as they are",
    ]
    pool.do(lambda sampler: sample(sampler, version=4))


def test_servers_are_named_in_the_recipe_or_in_the_file():
    here = ("rollout.engine=server", "rollout.server.shared_dir=s")
    assert load_recipe("tiny_cpu", [*here, "rollout.server.urls_file=u"]).rollout.server.base_urls == ()
    with pytest.raises(RecipeError, match=r"base_urls = \[\]: or rollout.server.urls_file is required"):
        load_recipe("tiny_cpu", here)
    with pytest.raises(RecipeError, match="urls_file = .*is used only with rollout.engine"):
        load_recipe("tiny_cpu", ["rollout.server.urls_file=u"])


def test_with_auto_all_ranks_use_the_same_engine(tiny_recipe, monkeypatch):
    values, barrier = [b""] * 2, threading.Barrier(2)
    reasons = {"first": None, "second": "vLLM is not installed: pip install it"}
    monkeypatch.setattr("popo_lite.samplers.vllm.why_not", lambda _: reasons[threading.current_thread().name])
    picked = {}

    def pick(rank):
        picked[rank] = pick_engine(tiny_recipe("rollout.engine=auto"), Thread(rank, values, barrier))

    threads = [threading.Thread(target=pick, args=(rank,), name=name) for rank, name in enumerate(reasons)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert picked == dict.fromkeys(range(2), ("hf", "hf (vLLM is not installed)"))


def test_a_load_balancer_is_refused(start, servers, recipe):
    """Its servers answer in turn, and each adapter reaches one of them."""
    turn = iter(range(1000))

    def balance(path, body):
        if next(turn) % 2 and path == "/v1/models":
            return 200, '{"data": [{"id": "base", "max_model_len": 512}]}'
        return None

    servers[0].answer = balance
    with pytest.raises(EngineError, match="several servers answer at this URL") as caught:
        start(recipe(servers[0]))
    assert "the URL of each" in caught.value.next_step


def test_log_probs_that_are_not_finite_end_the_run_of_one_rank(start, servers, recipe):
    pool = start(recipe(servers[0]))
    servers[0].answer = sampling(lambda body: (200, completion([2, END], [-1.0, float("nan")])))
    with pytest.raises(EngineError, match="not finite"):
        sample(pool.samplers[1])
