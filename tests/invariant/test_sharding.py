"""A base that is sharded over ranks (FSDP2) gives the gradients of a whole one. With real processes, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Zamba2Config

from popo_lite.errors import ModelError, UserInputError
from popo_lite.policy.sharding import shard
from popo_lite.recipe_file import load_recipe
from small_models import FAMILIES, write_family

TESTS = Path(__file__).parent.parent
ROUNDING = 2e-6
"""Gradients of float32 passes that are added in another order."""


def launch(folder: Path, what: str, cases: list[dict[str, Any]], *, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         str(TESTS / "sharded_ranks.py"), str(folder), what, json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def found(folder: Path, what: str, cases: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    done = launch(folder, what, cases, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{what}.json").read_text())


NOT_QUANTISED = 'model.quantization="none"'
GRPO = ("objective.algorithm=grpo", "objective.kl_coef=0.1")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "popo": ("tiny", ("objective.entropy_coef=0.05", 'objective.weights_from="trainer"')),
    "popo, checkpoints": ("tiny", ("train.gradient_checkpointing=true", "model.double_quantization=false")),
    "popo, not quantised": ("tiny", (NOT_QUANTISED,)),
    "grpo": ("tiny", GRPO),
    "grpo, one at a time": ("tiny", (*GRPO, "train.packing=false", NOT_QUANTISED)),
    "bfloat16": ("tiny", ('model.dtype="bfloat16"', "train.gradient_checkpointing=true")),
    "dora": ("tiny", ("lora.dora=true",)),
    "conv1d": ("gpt2", ("train.gradient_checkpointing=true",)),
    "experts": ("qwen3_moe", (*GRPO, "train.gradient_checkpointing=true")),
    "hybrid": ("granite4h", ()),
    "one sequence": ("tiny", ()),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    cases = []
    for name, (model, overrides) in CASES.items():
        if model != "tiny":
            overrides = (f'model.id="{folder / model}"', *FAMILIES[model].overrides, *overrides)
            if not (folder / model).exists():
                write_family(FAMILIES[model], folder / model)
        cases.append({"name": name, "overrides": overrides, "one_sequence": name == "one sequence"})
    return found(folder, "compare", cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_base_gives_the_gradients_of_a_whole_one(compared, name):
    case = compared[name]
    assert case["gradient"] > 0
    assert case["over_whole"] <= ROUNDING
    assert case["over_alone"] <= (0.02 if name == "bfloat16" else ROUNDING)
    assert case["same_facts"]


@pytest.mark.slow
def test_a_rank_without_sequences_takes_part(compared):
    assert compared["one sequence"]["sequences"] == [1, 0]
    assert min(compared["popo"]["sequences"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["popo", "popo, not quantised", "experts"])
def test_each_rank_holds_its_part_of_the_layers(compared, name):
    case = compared[name]
    weights, scales = case["bytes_whole"]
    for held, held_scales in case["bytes"]:
        assert held == pytest.approx(weights / 2, rel=0.01)
        assert held_scales == scales < weights / 25  # not divided


@pytest.mark.slow
def test_three_ranks_with_parts_of_unequal_size(tmp_path):
    case = found(tmp_path, "compare", [{"name": "tiny", "overrides": []}], ranks=3)["tiny"]
    assert max(case["over_whole"], case["over_alone"]) <= ROUNDING
    assert sum(held for held, _ in case["bytes"]) == pytest.approx(case["bytes_whole"][0], rel=0.02)


@pytest.mark.slow
def test_a_run_that_is_resumed_trains_the_same_adapter(tmp_path):
    small = ["eval.problems=3", "data.prompts_per_step=3", "rollout.num_generations=2",
             "rollout.max_completion_length=12", "reward.workers=1"]  # fmt: skip
    adaptive = ['objective.entropy_over="all"', "rollout.adaptive.enabled=true"]
    cases = [{"name": "popo", "overrides": [*small, *adaptive]}, {"name": "grpo", "overrides": [*small, *GRPO]}]
    for case in found(tmp_path, "run", cases).values():
        assert case["difference"] <= ROUNDING


@pytest.mark.slow
def test_running_out_of_memory_on_one_rank_ends_all(tmp_path):
    done = launch(tmp_path, "out_of_memory", [])
    assert done.returncode != 0
    heard = json.loads((tmp_path / "out_of_memory.json").read_text())
    assert heard["kind"] == "RankLostError"
    assert "rank 1 stopped: the GPU ran out of memory in the siamese pass of" in heard["what"]
    assert heard["next_step"].startswith("popo-lite plan")
    assert heard["guarded"]


@pytest.mark.parametrize("other", ['rollout.engine="vllm"', 'model.backend="unsloth"'])
def test_what_would_hold_the_whole_base_is_refused(tiny_recipe, other):
    with pytest.raises(UserInputError, match="whole base"):
        tiny_recipe('distributed.strategy="fsdp2"', 'model.dtype="bfloat16"', 'model.id="some/model"', other)


def test_one_process_has_nothing_to_shard(tiny_recipe):
    from popo_lite.policy.policy import load_policy

    policy = load_policy(tiny_recipe('distributed.strategy="fsdp2"'))
    assert policy.sharded_over.size == 1
    assert load_recipe("tiny_cpu").distributed.strategy == "ddp"


def test_layers_that_share_weights_are_refused_with_what_to_do():
    config = Zamba2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        mamba_ngroups=1, n_mamba_heads=2, mamba_d_state=4, layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1, adapter_rank=4,
    )  # fmt: skip
    shared = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="Zamba2Model has layers that share weights, so they cannot") as caught:
        next(shard(shared, torch.device("cpu")))
    assert caught.value.next_step == '--set distributed.strategy="ddp"'
