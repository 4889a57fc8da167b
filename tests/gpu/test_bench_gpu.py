"""Random bases, the memory cap and the bench on a CUDA GPU: `pytest -m gpu`."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch

from popo_lite.recipe import ModelRecipe
from popo_lite.tools.bench.synthetic import Meter, random_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GIB = 2**30


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B"])
def test_a_random_base_is_built_without_a_second_16_bit_layer(name):
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    base = random_base(ModelRecipe(id=name), device)
    kept = torch.cuda.memory_allocated(device) - before
    layer = max(m.in_features * m.out_features for m in base.modules() if isinstance(m, bnb.nn.Linear4bit))
    # The layer in 16 bit, its packed values, and statistics in 32 bit for blocks of 64.
    assert torch.cuda.max_memory_allocated(device) - before - kept <= layer * (2 + 0.5 + 8 / 64) + 64 * 2**20
    linears = sum(m.in_features * m.out_features for m in base.modules() if isinstance(m, bnb.nn.Linear4bit))
    tables = 2 * base.config.vocab_size * base.config.hidden_size * (1 if base.config.tie_word_embeddings else 2)
    assert kept == pytest.approx(0.516 * linears + tables, rel=0.01)
    with torch.no_grad():
        logits = base(torch.randint(1000, (1, 64), device=device)).logits.float()
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


def test_a_meter_sees_peaks():
    meter = Meter(torch.device("cuda"))
    meter.stage("update")
    held = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    del held
    meter.stage("optimizer")
    assert 2**28 <= meter.peaks["update"][0] <= meter.peaks["update"][1]


# Each in a process of its own: a cap cannot be taken back, and it must be the first thing that touches the GPU.


def test_bench_under_a_cap_stays_below_it_and_near_the_plan(command):
    done = command(
        "bench", "qwen_1_5b_lora", "--memory-cap", "12GiB", "--prompts", "1", "--completion-tokens", "64",
        "--positives", "8", "--steps", "1", "--set", "rollout.engine=hf", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {phase["phase"] for phase in found["memory"]} == {"load", "rollout", "siamese", "update", "step", "swap"}
    for phase in found["memory"]:
        assert phase["tensor_bytes"] <= phase["card_bytes"] <= 12 * GIB
    load = found["memory"][0]
    assert load["tensor_bytes"] == pytest.approx(load["planned_tensor_bytes"], rel=0.1)


def test_bench_that_runs_out_of_memory_says_where(command):
    done = command(
        "bench", "qwen_1_5b_lora", "--memory-cap", "2GiB", "--prompts", "1", "--completion-tokens", "3584",
        "--steps", "1", "--set", "rollout.engine=hf",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "out of memory in" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_cap_larger_than_the_card_is_refused(command):
    done = command("bench", "qwen_1_5b_lora", "--memory-cap", "9999GiB", "--set", "rollout.engine=hf")
    assert done.returncode == 2
    assert "--memory-cap: the GPU has" in done.stderr
