"""Ranks started by torchrun, with real vLLM: servers that die and join, and an engine in the process of each rank."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time

import httpx
import pytest

from helpers import json_lines
from popo_lite.policy.load import write_dequantized_base
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from vllm_servers import TOKEN, Server, free_urls

pytestmark = pytest.mark.slow

PROBLEMS, STEPS = 128, 14
SETTINGS = [
    "data.prompts_per_step=16", "rollout.num_generations=8", f"train.steps={STEPS}", "train.save_steps=100",
    f"eval.problems={PROBLEMS}", "optimizer.warmup_ratio=0.0", "rollout.max_num_seqs=128",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Three servers for the base of tiny_cpu."""
    folder, logs = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("logs")
    recipe = load_recipe("tiny_cpu", SETTINGS)
    policy = load_policy(recipe)
    write_dequantized_base(policy, folder)
    policy.tokenizer.save_pretrained(folder)
    three = [Server(recipe, url, folder, logs / f"{n}.log") for n, url in enumerate(free_urls(3))]
    try:
        for server in three:
            server.start()
        for server in three:
            server.wait()
        yield three
    finally:
        for server in three:
            server.kill()


@pytest.fixture
def train(tmp_path):
    """`train(name, recipe, ranks, ...)` starts a run: (process, its folder)."""
    started = []

    def start(name, recipe, ranks, *settings, **environment):
        log = tmp_path / f"{name}.txt"
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "POPO_SERVER_TOKEN": TOKEN, **environment}
        sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        program = [*TORCHRUN, "popo_lite"] if ranks > 1 else [sys.executable, "-m", "popo_lite"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*program, "train", recipe, "--output", name, *sets], stdout=output, stderr=output, cwd=tmp_path,
                env={**os.environ, **own},
            )  # fmt: skip
        started.append(process)
        return process, tmp_path / name, log

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def finished(process, folder, log):
    """Wait for the run's end; return its summary and the lines of its steps."""
    assert process.wait(600) == 0, log.read_text()[-3000:]
    return json.loads((folder / "summary.json").read_text()), json_lines(folder / "metrics.jsonl")


def served(server):
    lines = httpx.get(f"{server.url}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total{"))


def after_step(step, process, folder, log):
    limit = time.monotonic() + 300
    while time.monotonic() < limit and process.poll() is None:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.1)
    pytest.fail(f"step {step} was not reached:\n{log.read_text()[-3000:]}")


def test_ranks_and_servers_that_die_and_join_learn_as_one_rank_with_one_server(servers, train, tmp_path):
    engine = ["rollout.engine=server", f"rollout.server.shared_dir={tmp_path / 'shared'}"]
    urls = tmp_path / "urls.txt"
    urls.write_text(f"{servers[0].url}\n{servers[1].url}  # dies\n")
    alone, alone_steps = finished(
        *train("alone", "tiny_cpu", 1, *engine, f'rollout.server.base_urls=["{servers[0].url}"]')
    )

    run = train("pool", "tiny_cpu", 2, *engine, f"rollout.server.urls_file={urls}")
    after_step(3, *run)
    servers[1].kill()
    after_step(6, *run)
    urls.with_suffix(".new").write_text(urls.read_text() + servers[2].url)
    urls.with_suffix(".new").replace(urls)
    pool, steps = finished(*run)

    said = (run[1] / "log.txt").read_text()
    assert f"server {servers[1].url} is set aside" in said
    assert f"server {servers[2].url} has joined" in said
    assert len(steps) == STEPS
    assert steps[0]["positives"] == alone_steps[0]["positives"]  # the same draws, whoever makes them
    before, one, two = alone["before"]["pass_at_1"], alone["after"]["pass_at_1"], pool["after"]["pass_at_1"]
    assert pool["before"]["pass_at_1"] == before
    error = math.sqrt(2 * one * (1 - one) / PROBLEMS)
    assert one > before + 2 * error, "too few steps: nothing was learned"
    assert abs(two - one) < 3 * error
    for server in (servers[0], servers[2]):
        assert server.adapters() == []
        assert served(server) > 0
    assert not list((tmp_path / "shared").iterdir())


def test_every_rank_has_an_engine_of_its_own(train, tmp_path):
    cache = tmp_path / "hub"
    run = train("vllm", "tiny_vllm", 2, "train.steps=3", "eval.problems=9", HF_HOME=str(cache))
    summary, steps = finished(*run)
    assert len(list(cache.glob("popo-lite/tiny-dequantized-*/config.json"))) == 1  # written once
    assert summary["sampler"]["engine"] == "vllm"
    assert [step["rollouts"] for step in steps] == [128] * 3
    assert max(step["logp_gap_max"] for step in steps) < 1e-4
    assert steps[-1]["loss"] is not None
