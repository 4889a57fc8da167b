"""Models that vLLM runs by transformers' code or does not take, and dtypes other than the trainer's tests use."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from popo_lite.errors import EngineError
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.tools.tiny_model import build_tokenizer
from updates import trainer_of


def write(folder, kind, **sizes):
    """Write a small model of this kind with random weights, and return options for it."""
    tokenizer = build_tokenizer()
    sizes = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **sizes,
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model.id={folder}", "rollout.max_num_seqs=16"]


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """`steps(*overrides)`: train two steps of tiny_vllm with random rewards; (engine, lines of metrics.jsonl)."""
    (tmp_path / "even_rewards.py").write_text("def even(text, problem):\n    return float(len(text) % 2 == 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run").mkdir()

    def train(*overrides):
        recipe = load_recipe(
            "tiny_vllm",
            ["reward.functions=even_rewards:even", "data.prompts_per_step=4", "train.steps=2", "eval.problems=0",
             "rollout.max_completion_length=24", "optimizer.warmup_ratio=0.0", *overrides],
        )  # fmt: skip
        with trainer_of(recipe) as trainer:
            assert trainer.run(RunFolder(tmp_path / "run")).summary is not None
            return trainer.sampler.engine, read_lines(tmp_path / "run" / "metrics.jsonl")

    return train


def test_a_model_that_vllm_runs_by_transformers_leaves_the_trainers_own_alone(steps, tmp_path):
    options = write(tmp_path / "smollm3", "smollm3")
    engine, lines = steps(*options)
    assert engine == "vllm"
    assert max(line["logp_gap_max"] for line in lines) < 1e-4
    load_policy(load_recipe("tiny_cpu", options))  # the class is as it was, too


def test_a_layer_that_vllm_splits_is_sampled_by_the_trainers_model(steps, tmp_path):
    options = write(tmp_path / "glm4", "glm4", head_dim=32)
    with pytest.raises(EngineError, match="could not be handed to the vLLM engine: .*gate_up_proj"):
        steps(*options)
    engine, lines = steps(*options, "rollout.engine=auto")
    assert engine == "hf"
    assert max(line["logp_gap_max"] for line in lines) < 1e-4


def test_a_model_whose_kernels_fail_at_the_first_token_is_sampled_by_the_trainers_model(steps, tmp_path):
    """vLLM starts with heads of 16 numbers on a CPU, and then has no attention kernel for them."""
    options = write(tmp_path / "qwen2", "qwen2", num_attention_heads=8)
    with pytest.raises(EngineError, match="the vLLM engine failed: .*head_dim=16"):
        steps(*options)
    engine, _ = steps(*options, "rollout.engine=auto")
    assert engine == "hf"


@pytest.mark.parametrize("option", ["model.dtype=float16", "rollout.vllm.kv_cache_dtype=fp8"])
def test_coarser_numbers_than_the_trainers_are_no_wrong_adapter(steps, option):
    engine, lines = steps(option)
    assert engine == "vllm"
    assert [line["skipped_reason"] for line in lines] == [None, None]
    assert 1e-5 < max(line["logp_gap_mean"] for line in lines) < 0.05
