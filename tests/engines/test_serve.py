"""`popo-lite serve` on a tiny run: one server for all checks, and what is refused before one starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import torch
from click.testing import CliRunner

from popo_lite.cli import main
from popo_lite.policy.policy import load_trained_policy
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Problem
from runs import finished_run

KEY = "a-key-of-the-tests"
SYSTEM = "Answer with a \\boxed{number}."


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    settings = ("rollout.max_prompt_length=100", f"data.system_prompt={json.dumps(SYSTEM)}")
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

    # The printed line, in a shell. The key is in it by its name alone.
    assert KEY not in found["curl"]
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


@pytest.mark.slow
def test_a_signal_while_it_starts_leaves_nothing(run):
    process = subprocess.Popen(
        [sys.executable, "-m", "popo_lite", "serve", str(run.path), "--port", str(free_port())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "starting vLLM" in line:
            break
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert gone(children)
    assert "Traceback" not in process.stderr.read()


def serve(*arguments):
    done = CliRunner().invoke(main, ["serve", *map(str, arguments)])
    return done.exit_code, " ".join(done.stderr.split())


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = serve(run.path, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen there" in text
    assert "is free" in text
    port = free_port()
    assert "the name of the base model" in serve(run.path, "--port", port, "--name", "base")[1]
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
