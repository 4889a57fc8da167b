"""Test what the guard of the sampler warns of, stops at, and gives as the reason; and dropout, which is no gap."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import json_lines
from popo_lite.errors import EngineError
from popo_lite.run_folder import RunFolder
from popo_lite.samplers.probe import SamplerGuard
from popo_lite.tools.tiny_model import build_tokenizer
from updates import trainer_of


class Guarded:
    """A guard over a policy that scores as it is told: `gaps` are those with and without packing."""

    def __init__(self, recipe, *, engine="vllm", gaps=(0.0, 0.0)):
        dtype = getattr(torch, recipe.model.dtype)
        policy = SimpleNamespace(
            head=SimpleNamespace(weight=torch.zeros(1, dtype=dtype)), packing="sdpa", quantized_modules=14
        )
        self.told: list[str] = []
        self.guard = SamplerGuard(recipe, policy, SimpleNamespace(engine=engine), self.told.append)
        self.guard._gap = lambda *_: gaps[policy.packing == "off"]

    def check(self, gap, step=0):
        self.guard.check(step, gap, [])


@pytest.mark.parametrize(
    ("dtype", "options", "usual", "odd", "wrong"),
    [
        ("float64", (), 1e-12, 5e-9, 2e-8),
        ("float32", (), 5e-6, 1e-4, 3e-4),
        ("float16", (), 3e-3, 2e-2, 0.06),
        ("bfloat16", (), 1.9e-2, 8e-2, 0.25),
        ("float32", ("rollout.vllm.kv_cache_dtype=fp8",), 3e-2, 8e-2, 0.25),
        ("bfloat16", ("rollout.max_gap=0.4",), 8e-2, 0.2, 0.5),
    ],
)
def test_rounding_passes_an_odd_gap_warns_and_a_wrong_one_stops(tiny_recipe, dtype, options, usual, odd, wrong):
    quantization = "none" if dtype == "float64" else "nf4"
    guarded = Guarded(tiny_recipe(f"model.dtype={dtype}", f"model.quantization={quantization}", *options))
    for step in range(4):
        guarded.check(usual, step)
    assert guarded.told == []
    guarded.check(odd, 4)
    guarded.check(1.5 * odd, 5)  # said once, until it has doubled
    [text] = guarded.told
    assert text.startswith("step 4: ")
    assert dtype in text
    assert "rollout.max_gap" in text
    for gap in (wrong, math.nan):
        with pytest.raises(EngineError, match="sampler and of the trainer differ by"):
            guarded.check(gap, 6)


def test_a_model_that_rounds_more_than_others_sets_its_own_limit(tiny_recipe):
    for options, stops in (((), False), (("rollout.max_gap=0.2",), True)):
        guarded = Guarded(tiny_recipe("model.dtype=bfloat16", *options))
        for step in range(4):
            guarded.check(0.15, step)
        if stops:
            with pytest.raises(EngineError, match=r"0.2 is the most in bfloat16"):
                guarded.check(0.4, 4)
        else:
            guarded.check(0.4, 4)
            with pytest.raises(EngineError):
                guarded.check(0.5, 5)


@pytest.mark.parametrize(
    ("options", "engine", "gaps", "cause", "next_step"),
    [
        ((), "hf", (1.0, 0.0), "packed rows", "train.packing=false"),
        ((), "vllm", (1.0, 0.0), "packed rows", "train.packing=false"),
        ((), "hf", (1.0, 1.0), "with its cache", "attn_implementation=eager"),
        ((), "vllm", (1.0, 1.0), "the engine's adapter, base, cache or attention", "rollout.engine=hf"),
        ((), "server", (1.0, 1.0), "the engine's adapter, base, cache or attention", "servers must serve"),
        (("rollout.vllm.kv_cache_dtype=fp8",), "vllm", (1.0, 1.0), "fp8", "kv_cache_dtype"),
        (("rollout.vllm.base=bf16",), "vllm", (1.0, 1.0), "another base", "dequantized"),
        ((), "hf", (math.nan, math.nan), "not finite", "learning_rate"),
    ],
)
def test_the_reason_is_found_and_not_guessed(tiny_recipe, options, engine, gaps, cause, next_step):
    guarded = Guarded(tiny_recipe(*options), engine=engine, gaps=gaps)
    with pytest.raises(EngineError, match=cause) as caught:
        guarded.check(1.0)
    assert next_step in caught.value.next_step


# ---------------------------------------------------------------------- dropout

WITH_DROPOUT = {
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 1024},  # 0.1 in three places by default
    "phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1},
    "llama": {"attention_dropout": 0.1},
}


@pytest.mark.parametrize("kind", WITH_DROPOUT)
def test_the_bases_own_dropout_is_off(tiny_recipe, tmp_path, kind, monkeypatch):
    tokenizer = build_tokenizer()
    sizes = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | WITH_DROPOUT[kind])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "even_rewards.py").write_text("def even(text, problem):\n    return float(len(text) % 2 == 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tiny_recipe(
        f"model.id={tmp_path / 'model'}", "train.steps=1", "data.prompts_per_step=3", "eval.problems=0",
        "reward.functions=even_rewards:even", "rollout.max_completion_length=24",
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    with trainer_of(recipe) as trainer:
        assert trainer.run(RunFolder(tmp_path / "run")).summary is not None
        assert {name: getattr(trainer.policy.model.config, name) for name in WITH_DROPOUT[kind]} == WITH_DROPOUT[kind]
    [line] = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert line["logp_gap_max"] < 1e-4
    assert line["grad_norm"] > 0


def test_dropout_of_the_adapters_is_no_gap(tiny_recipe, tmp_path):
    recipe = tiny_recipe("lora.dropout=0.3", "train.steps=3", "data.prompts_per_step=8", "eval.problems=0",
                         "optimizer.warmup_ratio=0.0")  # fmt: skip
    with trainer_of(recipe) as trainer:
        assert trainer.run(RunFolder(tmp_path)).summary is not None
    assert json_lines(tmp_path / "metrics.jsonl")[-1]["logp_gap_mean"] > 1e-3  # or nothing was tried
