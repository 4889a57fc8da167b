"""`popo-lite serve` on a tiny run: one server for all checks, and what is refused before one starts."""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from click.testing import CliRunner

from popo_lite.cli import main
from popo_lite.policy.load import TINY_FOLDER, load_tokenizer
from popo_lite.policy.policy import load_trained_policy
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.chat.model import open_subject
from popo_lite.tools.serve import Probe, _common_options, _prepare
from popo_lite.tools.serve_process import NONCE, OpenAIOnly
from popo_lite.types import Problem
from runs import finished_run

KEY = "a-key-of-the-tests"
SYSTEM = "Answer with a \\boxed{number}."


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = ("rollout.max_prompt_length=100", "rollout.temperature=1.3", f"data.system_prompt={json.dumps(SYSTEM)}")
    return finished_run(tmp_path_factory.mktemp("serve") / "tiny run", *settings, noise=0.1)


@pytest.fixture(scope="module")
def serving(run):
    """The command while it serves, and the JSON object that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "popo_lite", "serve", str(run.path), "--port", str(free_port()), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": KEY},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.stderr.read()
    yield process, json.loads(line)
    process.kill()
    process.wait()


def gone(processes, seconds=60):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.slow
def test_a_run_is_served_as_it_was_trained(run, serving):
    process, found = serving
    assert (found["model"], found["base"]) == ("tiny-run", "base")
    headers = {"Authorization": f"Bearer {KEY}"}
    cards = httpx.get(f"{found['url']}/models", headers=headers, trust_env=False).json()["data"]
    assert {card["id"] for card in cards} == {"base", "tiny-run"}
    assert httpx.get(f"{found['url']}/models", trust_env=False).status_code == 401
    # Nothing else answers: vLLM asks for the key below /v1 alone, and its other routes answer as the base.
    server, ask = found["url"].removesuffix("/v1"), {"messages": [{"role": "user", "content": "1 + 1"}]}
    assert httpx.get(f"{server}/health", trust_env=False).status_code == 200
    for route in ("invocations", "tokenize", "generative_scoring", "scale_elastic_ep", "v1", "/v1/models"):
        assert httpx.post(f"{server}/{route}", json=ask, headers=headers, trust_env=False).status_code == 404, route
    for route in ("metrics", "load", "docs", "openapi.json", "ping", "version"):
        assert httpx.get(f"{server}/{route}", headers=headers, trust_env=False).status_code == 404, route

    # The printed line, in a shell. The key is in it by its name alone, and on no command line: printf is the shell's.
    assert KEY not in found["curl"]
    assert "$VLLM_API_KEY" not in found["curl"].partition("| curl")[2]
    environment = {**os.environ, "VLLM_API_KEY": KEY, "no_proxy": "*"}
    done = subprocess.run(["sh", "-c", found["curl"]], env=environment, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"], done.stdout

    # Greedy answers are those of the trained policy and of its base, with the recipe's system prompt and stop ids.
    recipe = run.recipe()
    policy = load_trained_policy(recipe, run.adapter)
    renderer = Renderer(recipe, policy.tokenizer, stop_ids=policy.stop_ids)
    message = {"role": "user", "content": "What is 3 + 4?"}
    prompt = renderer.render(Problem(id="serve", messages=(message,), answer=""))
    texts = {}
    for name in ("tiny-run", "base"):
        body = {"model": name, "messages": [message], "temperature": 0, "max_tokens": 24}
        reply = httpx.post(f"{found['url']}/chat/completions", json=body, headers=headers, trust_env=False, timeout=120)
        texts[name] = reply.json()["choices"][0]["message"]["content"]
        assert reply.json()["usage"]["prompt_tokens"] == len(prompt.token_ids)
    assert texts["tiny-run"] != texts["base"]
    with torch.no_grad():
        ids = list(prompt.token_ids)
        for _ in range(24):
            hidden = policy.hidden_states(torch.tensor(ids), [(len(ids),)])[-1:]
            ids.append(int(policy.head.logits(hidden).argmax()))
            if ids[-1] in policy.stop_ids:
                break
    assert texts["tiny-run"] == renderer.text(ids[len(prompt.token_ids) :])

    # Even if the command is killed, none of the server's processes stays.
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2  # the server and its engine
    process.kill()
    assert gone(children)


def test_a_signal_while_it_starts_leaves_nothing():
    # Not the whole command: that reads a run before.
    script = """
import os, time
from contextlib import suppress
from popo_lite.tools.serve_process import running_server, stopped_by_signals
with suppress(KeyboardInterrupt), stopped_by_signals(), running_server(["--model", "none"], os.environ):
    print("started", flush=True)
    time.sleep(600)
print("ended")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("ended\n", None)
    assert gone(children)


def test_the_checks_of_a_server_before_it_is_announced(run, tmp_path):
    subject = open_subject(str(run.path), None, None)
    options, probe = _prepare(subject, 90, 0.5, tmp_path)
    assert options["enforce_eager"]
    assert options["max_model_len"] == 90
    assert len(probe.token_ids) < 90
    assert len(probe.served) == len(probe.base) == 16
    assert probe.refusal(probe.served, probe.base) is None
    assert probe.refusal(probe.base, probe.base)
    assert probe.refusal([math.nan] * 16, probe.base)
    # Weights that differ by less than rounding may: only from the base, if that is served as it was trained on.
    near = Probe(token_ids=(1, 2), served=(-1.0,), base=(-1.1,), limit=0.2)
    assert near.refusal([-1.01], [-1.11]) is None
    assert near.refusal([-1.1], [-1.11])
    assert near.refusal([-1.1], [-1.2]) is None  # the base itself is rounded by that much
    same = Probe(token_ids=(1, 2), served=(-1.0,), base=(-1.0,), limit=0.2)
    assert same.refusal([-1.1], [-1.0]) is None
    assert same.refusal([-1.3], [-1.3])

    model = shutil.copytree(TINY_FOLDER, tmp_path / "model")
    options, probe = _prepare(open_subject(str(model), None, None), 90, 0.5, tmp_path)
    assert options["model"] == str(model)
    assert probe.base is None
    assert probe.refusal(probe.served, []) is None
    assert probe.refusal([each - 0.1 for each in probe.served], [])


def test_a_template_writes_the_date_of_training(run, tmp_path):
    template = "{{ strftime_now('%A, %-d %B %Y') }}" + (TINY_FOLDER / "chat_template.jinja").read_text()
    recipe = run.recipe().with_values({"data.chat_template": template, "data.date": date(2024, 2, 3)})
    options = _common_options(recipe, tmp_path, None)
    message = {"role": "user", "content": "What is 3 + 4?"}
    tokenizer = load_tokenizer(recipe.model)
    served = tokenizer.apply_chat_template(
        [message], chat_template=Path(options["chat_template"]).read_text(), add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert tuple(served) == Renderer(recipe, tokenizer).token_ids(Problem(id="1", messages=(message,), answer=""))
    assert "Saturday, 3 February 2024" in tokenizer.decode(served)


def test_another_server_on_the_port_is_not_taken_for_ours(monkeypatch):
    from starlette.responses import PlainTextResponse  # comes with vLLM

    monkeypatch.setenv(NONCE, "ours")
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["path"])
        await PlainTextResponse("ok")(scope, receive, send)

    async def statuses(*paths):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(OpenAIOnly(app)), base_url="http://here") as client:
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses("/ours", "/other", "/v1/models", "/health", "/")) == [200, 404, 200, 200, 404]
    assert seen == ["/health", "/v1/models", "/health"]


def serve(*arguments):
    done = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    return done.exit_code, " ".join(done.stderr.split())


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = serve(run.path, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen there" in text
    assert "is free" in text
    code, text = serve(run.path, "--host", "no.such.host.invalid")
    assert code == 2
    assert "--host 127.0.0.1" in text
    assert "is free" not in text
    port = free_port()
    assert "the name of the base model" in serve(run.path, "--port", port, "--name", "base")[1]
    for name in ("a b", 'x"; import os', "a=/etc", "--enforce-eager", "\u0430"):
        assert "is not a name for a model" in serve(run.path, "--port", port, f"--name={name}")[1]
    assert "the model's context is 1,024 tokens" in serve(run.path, "--port", port, "--max-model-len", 2000)[1]
    assert "there is no checkpoint" in serve(run.path, "--port", port, "--checkpoint", 3)[1]
    assert "holds neither a run" in serve(tmp_path, "--port", port)[1]
    text = serve(tmp_path, "--port", port, "--host", "0.0.0.0")[1]  # noqa: S104
    assert "export VLLM_API_KEY=" in text
    dora = finished_run(tmp_path / "dora", "lora.dora=true")
    code, text = serve(dora.path, "--port", port)
    assert code == 1
    assert "popo-lite chat" in text
    broken = shutil.copytree(run.path, tmp_path / "broken")
    (broken / "adapter" / "adapter_model.safetensors").unlink()
    code, text = serve(broken, "--port", port)  # another process finds it
    assert code == 2
    assert "lacks adapter_model.safetensors" in text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "vLLM is not installed" in serve(run.path, "--port", port)[1]
