"""The server engine's dealings with servers that misbehave, over real HTTP and without vLLM."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from fake_vllm import END, Script, completion, error, sampling
from popo_lite.errors import EngineError, PopoError, StalePolicyError
from popo_lite.policy.policy import load_policy
from popo_lite.samplers import SamplingParams, server_client
from popo_lite.samplers.server import ServerSampler, serve_command
from popo_lite.seeding import stream_seed
from popo_lite.types import Problem, Prompt

PARAMS = SamplingParams(temperature=1.0, max_completion_length=8)
PROMPTS = [
    Prompt(problem=Problem(id=f"p{n}", messages=({"role": "user", "content": "?"},), answer="0"), token_ids=(5, 6, 7))
    for n in range(5)
]


def was_closed(connection):
    """Whether the other side ended `connection`; waits a moment for it."""
    connection.settimeout(0.5)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except TimeoutError:
        return False


@pytest.fixture(scope="module")
def policy():
    from popo_lite.recipe_file import load_recipe

    policy = load_policy(load_recipe("tiny_cpu", ["model.quantization=none"]))
    assert END in policy.stop_ids
    return policy


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.delenv("POPO_SERVER_TOKEN", raising=False)


@pytest.fixture
def servers():
    both = [Script(), Script()]
    yield both
    for server in both:
        server.close()


@pytest.fixture
def start(tiny_recipe, tmp_path, policy):
    """`start(url, ...)`: (sampler, notices). Everything is closed and no file is left at the end."""
    opened, shared = [], tmp_path / "shared"

    def make(*urls, **changes):
        recipe = tiny_recipe(
            'rollout.engine="server"', f"rollout.server.base_urls={list(urls)}",
            f'rollout.server.shared_dir="{shared}"',
            "model.quantization=none", "rollout.max_num_seqs=4",
            *(f"{key.replace('__', '.')}={value}" for key, value in changes.items()),
        )  # fmt: skip
        notices = []
        sampler = ServerSampler(policy, recipe, text=str, notify=notices.append)
        opened.append(sampler)
        return sampler, notices

    yield make
    for sampler in opened:
        sampler.close()
        sampler.close()  # a second call does nothing
    assert not shared.exists() or not list(shared.iterdir())


def sample(sampler, *, count=4, version=0, finished=None, **options):
    return sampler.sample(
        PROMPTS, count=count, params=PARAMS, policy_version=version, stream=("t", 0), finished=finished, **options
    )


def test_requests_are_spread_bounded_and_seeded_one_by_one(start, servers):
    full = threading.Event()

    def hold(body):
        if sum(server.in_flight for server in servers) == 8:
            full.set()
        assert full.wait(20)

    for server in servers:
        server.answer = sampling(hold)
    sampler, notices = start(*(server.url for server in servers))
    told = []
    groups = sample(sampler, finished=told.append, first_index=3)
    assert [len(group) for group in groups] == [4] * 5
    assert groups[0][0].token_ids == (2, 3, END)
    assert groups[0][0].sampler_logps == (-0.5, -0.25, -0.125)
    assert sum(told) == 20
    seeds = [seed for server in servers for seed in server.seeds if seed != 0]
    assert sorted(seeds) == sorted(stream_seed("t", 0, f"p{n}", index) for n in range(5) for index in range(3, 7))
    assert [server.most_in_flight for server in servers] == [4, 4]
    assert notices == []


def test_one_adapter_is_held_and_none_after_close(start, servers):
    sampler, _ = start(*(server.url for server in servers))
    first = set(servers[0].adapters)
    sampler.sync(7)
    (name,) = servers[0].adapters
    assert servers[1].adapters.keys() == {name} != first
    folder = Path(servers[0].adapters[name])
    assert (folder / "adapter_model.safetensors").is_file()
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
    assert sampler.policy_version == 7
    with pytest.raises(StalePolicyError, match="holds policy version 7"):
        sample(sampler, version=0)
    sampler.close()
    assert [server.adapters for server in servers] == [{}, {}]
    assert not folder.parent.exists()


def test_servers_that_are_not_there_are_named_with_the_command_that_starts_them(start, servers):
    gone = Script()
    gone.close()
    with pytest.raises(EngineError) as caught:
        start(servers[0].url, gone.url)
    assert gone.url in caught.value.what
    assert servers[0].url not in caught.value.what
    assert f"vllm serve {Path('popo_lite/policy/tiny').resolve()} --enable-lora" in caught.value.next_step
    assert f"--port {gone.server_port}" in caught.value.next_step
    assert "--max-lora-rank 16 --logprobs-mode processed_logprobs" in caught.value.next_step
    assert servers[0].adapters == {}


@pytest.mark.parametrize(
    ("change", "what", "next_step"),
    [
        ({"room": 100}, "context is 100 tokens, and prompt and answer may take 128", "--max-model-len 128"),
        ({"processed": False}, "without --logprobs-mode processed_logprobs", "--logprobs-mode processed_logprobs"),
        ({"token": "right"}, "refuses the token with 401", "POPO_SERVER_TOKEN"),
        ({"answer": lambda path, body: (404, '{"detail":"Not Found"}') if "lora" in path else None},
         "takes no adapters", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"),
        ({"answer": lambda path, body: (500, error("LoRA rank 16 is greater than max_lora_rank 8"))
          if "load" in path else None}, "rank 16 is greater than max_lora_rank 8", "--max-lora-rank 16"),
        ({"answer": lambda path, body: (404, error("failed: No adapter found for <path>")) if "lora" in path else None},
         "finds no adapter", "rollout.server.shared_dir"),
        ({"answer": lambda path, body: (404, "") if path == "/health" else None}, "404 to GET /health", "vllm serve"),
        ({"answer": lambda path, body: (200, "<html>") if path == "/v1/models" else None}, "models is", "vllm serve"),
        ({"answer": lambda path, body: (200, "[]") if path == "/v1/models" else None}, "list of models", "vllm serve"),
    ],
)  # fmt: skip
def test_what_is_wrong_at_the_start_is_said_with_what_helps(start, servers, monkeypatch, change, what, next_step):
    monkeypatch.setenv("POPO_SERVER_TOKEN", "a-secret")
    for name, value in change.items():
        setattr(servers[1], name, value)
    with pytest.raises(EngineError) as caught:
        start(*(server.url for server in servers))
    assert f"1 of 2 servers cannot be used: {servers[1].url}: " in caught.value.what
    assert what in caught.value.what
    assert next_step in caught.value.next_step
    assert "a-secret" not in str(caught.value)


def test_the_token_is_sent(start, servers, monkeypatch):
    servers[0].token = "right"
    monkeypatch.setenv("POPO_SERVER_TOKEN", "right")
    sampler, _ = start(f"{servers[0].url}/v1/")
    assert len(sample(sampler)) == 5


def test_no_header_of_another_service_is_sent(start, servers, monkeypatch):
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "authorization: Bearer wrong\nX-Gateway-Key: secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "mine")
    monkeypatch.setenv("POPO_SERVER_TOKEN", "right")
    start(servers[0].url)
    monkeypatch.delenv("POPO_SERVER_TOKEN")
    start(servers[1].url)
    assert {headers["authorization"] for headers in servers[0].headers} == {"Bearer right"}
    assert not any("authorization" in headers for headers in servers[1].headers)
    for headers in (*servers[0].headers, *servers[1].headers):
        assert not {"x-gateway-key", "openai-organization"} & headers.keys()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(start, servers, monkeypatch, status):
    """Not even to the same host: the token would go along."""
    monkeypatch.setenv("POPO_SERVER_TOKEN", "a-secret")
    servers[0].location = f"{servers[1].url}/v1/models"
    servers[0].answer = lambda path, body: (status, "") if path == "/v1/models" else None
    with pytest.raises(EngineError, match=f"{status} to GET /v1/models"):
        start(servers[0].url)
    assert servers[0].headers[0]["authorization"] == "Bearer a-secret"
    assert servers[1].headers == []


def test_no_proxy_gets_prompts_and_token(start, servers, monkeypatch, tmp_path):
    monkeypatch.setenv("POPO_SERVER_TOKEN", "a-secret")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, servers[1].url)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password another-secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    start(servers[0].url)
    assert {headers["authorization"] for headers in servers[0].headers} == {"Bearer a-secret"}
    assert servers[1].headers == []


def test_what_is_no_url_is_an_error(start):
    for url in ("http://127.0.0.1:port", "http://127.0.0.1:99999", "http://127.0.0.1:-1", "127.0.0.1:8000"):
        with pytest.raises(PopoError, match="is no URL"):
            start(url)


def test_a_passing_failure_is_retried_unnoticed(start, servers):
    failures = iter([500, 503, 429])

    def fail(body):
        status = next(failures, None)
        return None if status is None else (status, error("busy"))

    servers[0].answer = sampling(fail)
    sampler, notices = start(servers[0].url)
    asked = servers[0].asked["/v1/completions"]
    assert len(sample(sampler, count=1)) == 5
    assert servers[0].asked["/v1/completions"] == asked + 5 + 3
    assert notices == []


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ((500, error("EngineCore died")), "500 to POST /v1/completions: EngineCore died"),
        ((400, error("too long")), "400 to POST /v1/completions: too long"),
        ((404, error("The model `x` does not exist.")), "lost its adapter"),
        ((200, "<html>"), "Invalid JSON"),
        ((200, '{"choices": []}'), "choices.0.token_ids: Field required"),
        ((200, '{"choices": [{"finish_reason": "stop"}]}'), "choices.0.token_ids: Field required"),
        ((200, completion([2, 1], [-1.0])), "2 tokens came with 1 log-probs"),
        ((200, completion([], [])), "0 tokens came with 0 log-probs"),
        ((200, completion([2, 1], [-1.0, None])), "token_logprobs.1: Input should be a valid number"),
        ((200, completion([2, 3], [-1.0, -1.0], reason="abort")), 'broke off an answer ("abort")'),
        ((200, completion([2, 3], [-1.0, -1.0])), "another idea of where they end"),
        ((200, completion([1, 3, 1], [-1.0] * 3)), "another idea of where they end"),
        ((200, completion([2] * 9, [-1.0] * 9, reason="length")), "another idea of where they end"),
    ],
)
def test_a_server_that_fails_is_set_aside_with_its_reason_until_none_is_left(start, servers, answer, what):
    servers[0].answer = sampling(lambda body: answer)
    sampler, notices = start(*(server.url for server in servers))
    assert [len(group) for group in sample(sampler)] == [4] * 5
    (notice,) = notices
    assert notice.startswith(f"server {servers[0].url} is set aside: ")
    assert what in notice
    servers[1].answer = servers[0].answer
    with pytest.raises(EngineError, match="2 of 2 servers cannot be used") as caught:
        sample(sampler)
    assert caught.value.what.count(what) == 2


@pytest.mark.parametrize("logp", [-9999.0, float("nan"), float("-inf")])
def test_log_probs_that_are_not_finite_end_the_run(start, servers, logp):
    servers[0].answer = sampling(lambda body: (200, completion([2, END], [-1.0, logp])))
    sampler, _ = start(servers[0].url)
    with pytest.raises(EngineError, match="not finite") as caught:
        sample(sampler)
    assert caught.value.where == servers[0].url


def test_a_server_that_is_back_gets_the_current_adapter_first(start, servers):
    sampler, notices = start(*(server.url for server in servers))
    port = servers[1].server_port
    servers[1].answer = sampling(lambda body: (500, error("dying")))
    sample(sampler)
    servers[1].close()
    sampler.sync(1)
    assert len(sample(sampler, version=1)) == 5
    servers[1] = Script(port)
    assert len(sample(sampler, version=1)) == 5
    assert servers[1].asked["/v1/completions"] == 0
    sampler.sync(2)
    assert servers[1].adapters == servers[0].adapters
    assert notices[-1] == f"server {servers[1].url} is back"
    before = servers[1].asked["/v1/completions"]
    sample(sampler, version=2)
    assert servers[1].asked["/v1/completions"] > before


def test_no_server_is_left_at_a_sync(start, servers):
    sampler, _ = start(servers[0].url)
    servers[0].close()
    with pytest.raises(EngineError, match="1 of 1 servers cannot be used"):
        sampler.sync(1)
    with pytest.raises(StalePolicyError, match="holds no policy"):
        sample(sampler, version=1)


def test_a_host_that_falls_silent_is_found_by_its_health(start, servers, monkeypatch):
    monkeypatch.setattr(server_client, "HEALTH_EVERY_SECONDS", 0.1)
    silent = threading.Event()
    sampler, notices = start(*(server.url for server in servers))
    sick = sampling(lambda body: silent.wait(20) and None)
    servers[1].answer = lambda path, body: (503, error("gone")) if path == "/health" else sick(path, body)
    start_seconds = time.monotonic()
    assert [len(group) for group in sample(sampler)] == [4] * 5
    assert time.monotonic() - start_seconds < 10
    assert "503 to GET /health" in notices[0]
    silent.set()


def test_an_interrupt_ends_every_request(start, servers):
    hold = threading.Event()
    for server in servers:
        server.answer = sampling(lambda body: hold.wait(20) and None)
    sampler, _ = start(*(server.url for server in servers))
    calls = []

    def stop(ended):
        calls.append(ended)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(sampler, finished=stop)
    assert calls == [0, 0, 0]
    assert [sum(map(was_closed, server.connections)) for server in servers] == [4, 4]
    hold.set()
    assert len(sample(sampler)) == 5


def test_the_command_names_what_the_recipe_needs(tiny_recipe):
    recipe = tiny_recipe("lora.rank=20", "lora.alpha=20.0", "model.trust_remote_code=true", "rollout.max_num_seqs=7")
    command = serve_command(recipe, "http://node7:8001")
    assert command.startswith("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve DEQUANTIZED_BASE --enable-lora")
    for part in ("--host node7 --port 8001", "--dtype float32", "--max-model-len 128", "--max-num-seqs 7",
                 "--max-lora-rank 32", "--trust-remote-code", "--generation-config vllm",
                 "--no-enable-chunked-prefill --max-num-batched-tokens 4096"):  # fmt: skip
        assert part in command


def test_the_command_lets_vllm_split_prompts_if_there_is_a_gpu(tiny_recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "prefill" not in serve_command(tiny_recipe("train.device=auto"), "http://node7:8001")
    assert "prefill" in serve_command(tiny_recipe("train.device=cpu"), "http://node7:8001")
