"""Test what the matrix cannot see: what is chosen, what is refused before a model is loaded, and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from popo_lite.errors import ModelError
from popo_lite.policy import policy as module
from popo_lite.policy.attention import Row
from popo_lite.policy.load import load_base, write_dequantized_base
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import ModelRecipe
from popo_lite.samplers import SamplingParams
from popo_lite.samplers.hf import HFSampler
from popo_lite.tools.bench.synthetic import random_base
from popo_lite.types import Problem, Prompt
from small_models import FAMILIES, WINDOW, write_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    root, written = tmp_path_factory.mktemp("families"), set[str]()

    def folder(name: str) -> Path:
        if name not in written:
            write_family(FAMILIES[name], root / name)
            written.add(name)
        return root / name

    return folder


@pytest.fixture
def load(folder_of, tiny_recipe) -> Callable[..., Policy]:
    def loaded(name: str, *overrides: str) -> Policy:
        return load_policy(tiny_recipe(f"model.id={folder_of(name)}", "lora.rank=4", *overrides))

    return loaded


def states(policy: Policy, tokens: int, row: Row | None = None) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return policy.hidden_states(torch.randint(5, 300, (tokens,)), row or [(tokens,)])


# ---------------------------------------------------------------------- attention


def test_soft_capping_is_not_lost(load, folder_of):
    policy = load("gemma2", 'model.quantization="none"')
    assert policy.notices == ["attention is eager, not sdpa, because sdpa leaves out what this model's attention needs"]
    plain = AutoModelForCausalLM.from_pretrained(folder_of("gemma2"), attn_implementation="eager").eval()
    dropping = AutoModelForCausalLM.from_pretrained(folder_of("gemma2"), attn_implementation="sdpa").eval()
    torch.manual_seed(3)
    ids = torch.randint(5, 300, (1, 60))
    with torch.no_grad():
        torch.testing.assert_close(states(policy, 60), plain.model(ids).last_hidden_state[0], rtol=1e-4, atol=1e-4)
        assert (dropping(ids).logits.log_softmax(-1) - plain(ids).logits.log_softmax(-1)).abs().max() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_setting_that_sdpa_drops_unknown_to_us_is_noticed_by_comparison(load, monkeypatch, dtype):
    monkeypatch.setattr("popo_lite.policy.load.attention_of", lambda recipe, _: recipe.attn_implementation)
    policy = load("gemma2", f'model.dtype="{dtype}"')
    assert policy.notices == ["attention is eager: with sdpa Gemma2ForCausalLM computes something else"]
    assert policy.packing == "off"
    assert policy.model.get_base_model().config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "cohere2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_comparison_is_longer_than_the_window_and_keeps_sdpa(load, monkeypatch, name, dtype):
    asked = []
    compare = module._distance
    monkeypatch.setattr(module, "_distance", lambda one, other: asked.append(len(one)) or compare(one, other))
    policy = load(name, f'model.dtype="{dtype}"')
    assert asked[0] == (40 if name == "llama" else WINDOW + 8)
    assert policy.model.get_base_model().config._attn_implementation != "eager"


def test_the_window_of_a_text_model_inside_another_counts(load):
    short = ("rollout.max_prompt_length=12", "rollout.max_completion_length=12")
    for overrides, packing in ((short, "sdpa"), ((), "off")):
        policy = load("gemma3_hub", *overrides)
        assert policy.packing == packing


def test_the_context_of_a_text_model_inside_another_counts(load):
    with pytest.raises(Exception, match="the context of .* is 512"):
        load("gemma3_hub", "rollout.max_completion_length=600")


def test_longrope_depends_on_no_neighbour_and_on_no_time(load, tiny_recipe):
    policy = load("phi3_longrope")
    assert policy.packing == "sdpa"
    row = [(10,), (90,), (12,)]
    together = states(policy, 112, row)
    torch.manual_seed(3)
    ids = torch.randint(5, 300, (112,))
    with torch.no_grad():
        alone = torch.cat([policy.hidden_states(part, [(len(part),)]) for part in ids.split([10, 90, 12])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    # Sampled past the switch, at 64 tokens, with cached keys from before it.
    recipe = tiny_recipe("model.id=x")
    prompt = Prompt(problem=Problem(id="a", messages=(), answer=""), token_ids=tuple(range(5, 60)))
    policy.stop_ids = frozenset()
    sampler = HFSampler(policy, recipe, text=lambda _: "")
    params = SamplingParams(temperature=1.0, max_completion_length=30)
    [[answer]] = sampler.sample([prompt], count=1, params=params, policy_version=0, stream=("x",))
    tokens = torch.tensor(prompt.token_ids + answer.token_ids)
    with torch.no_grad():
        logits = policy.head.logits(policy.hidden_states(tokens, [(len(tokens),)])[54:-1])
    scored = logits.log_softmax(-1).gather(1, tokens[55:, None])[:, 0]
    torch.testing.assert_close(scored, torch.tensor(answer.sampler_logps), rtol=0, atol=1e-4)


def test_within_the_original_context_longrope_is_as_it_was(load):
    policy = load("phi3_longrope", "rollout.max_prompt_length=32", "rollout.max_completion_length=32")
    assert policy.notices == []
    short = 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(policy.trunk.rotary_emb.inv_freq, short)


# ---------------------------------------------------------------------- experts in 4 bit


MIXTURES = ["qwen3_moe", "granite4h", "lfm2_moe", "gpt_oss", "gemma4_moe", "deepseek_v3"]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_quantised_and_written_as_they_compute(load, name, tmp_path):
    policy = load(name)
    in_16_bit = sum(p.numel() for key, p in policy.model.named_parameters() if p.ndim == 3 and "conv" not in key)
    assert in_16_bit == 0
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(policy.tokenizer.name_or_path).parameters())
    linear = policy.quantized_share * whole
    assert linear == pytest.approx(round(linear), abs=1e-3)
    assert policy.quantized_share > 0.7
    write_dequantized_base(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.manual_seed(3)
    ids = torch.randint(5, 300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(states(policy, 20), plain.base_model(ids).last_hidden_state[0], rtol=1e-3, atol=1e-3)


def test_all_that_is_not_a_weight_is_written_too(load, tmp_path):
    """DeepSeek's routers have a bias that is a buffer."""
    policy = load("deepseek_v3")
    bias = policy.trunk.layers[1].mlp.gate.e_score_correction_bias
    bias += torch.tensor([3.0, -2.0, 1.0, 0.0])
    write_dequantized_base(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_gpt2_is_written_the_way_round_that_it_has(load, tmp_path):
    policy = load("gpt2")
    write_dequantized_base(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.manual_seed(3)
    ids = torch.randint(5, 300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            states(policy, 20), plain.transformer(ids).last_hidden_state[0], rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3_hub"])
def test_a_random_base_has_the_same_parts(folder_of, name):
    recipe = ModelRecipe(id=str(folder_of(name)), dtype="float32")

    def parts(base: Any) -> dict[str, tuple[str, torch.Size, torch.dtype]]:
        return {key: (type(p).__name__, p.shape, p.dtype) for key, p in base.named_parameters()}

    assert parts(random_base(recipe, CPU)) == parts(load_base(recipe, CPU))


# ---------------------------------------------------------------------- adapters


def adapted(policy: Policy) -> set[str]:
    return {key.partition(".lora_A")[0] for key, _ in policy.adapter_parameters() if ".lora_A." in key}


def test_all_linear_leaves_routers_and_experts_and_says_so(load):
    policy = load("qwen3_moe")
    assert {name.split(".")[-1] for name in adapted(policy)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert policy.notices == ["all-linear leaves out experts: 52% of the weights, which get no adapters"]


@pytest.mark.parametrize("targets", ['"all-linear"', '["q_proj", "v_proj"]'])
def test_what_sees_images_gets_no_adapters(load, targets):
    policy = load("gemma3_hub", f"lora.target_modules={targets}")
    assert adapted(policy)
    assert all(".language_model.layers." in name for name in adapted(policy))


@pytest.mark.parametrize(
    ("name", "target", "what"),
    [
        ("smollm3", "embed_tokens", "model.embed_tokens is the LM head too"),
        ("llama", "q_porj", "the text model has no q_porj"),
        ("llama", "mlp", "model.layers.0.mlp is a LlamaMLP, and adapters are for linear layers"),
        ("qwen3_moe", "down_proj", "the text model has no down_proj"),
        ("deepseek_v3", "down_proj", "PEFT takes down_proj for the experts of a deepseek_v3 model"),
        ("gemma3_hub", "multi_modal_projector", "the text model has no multi_modal_projector"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_the_model_is_loaded(load, monkeypatch, name, target, what):
    monkeypatch.setattr(module, "load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ModelError, match=what) as caught:
        load(name, f'lora.target_modules=["o_proj", "{target}"]')
    assert caught.value.where == "lora.target_modules"
    assert "o_proj" in caught.value.next_step
    assert "base_layer" not in caught.value.next_step
    if target == "q_porj":
        assert caught.value.next_step.startswith('did you mean "q_proj"? ')


def test_embeddings_of_their_own_can_be_trained(load):
    policy = load("llama", 'lora.target_modules=["embed_tokens", "q_proj"]')
    assert any(".lora_embedding_A" in key for key, _ in policy.adapter_parameters())
