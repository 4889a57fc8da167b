"""Test that each sequence of a packed row attends only to itself, as if it were computed alone."""

from __future__ import annotations

import pytest
import torch
import transformers

from popo_lite.policy.activations import _HostCopies
from popo_lite.policy.attention import enable_packing, kernel_of, layout, positions
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.policy.policy import load_policy
from popo_lite.tools.plan.terms import uses_varlen

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES, num_key_value_heads=2),
    "llama": transformers.LlamaConfig(**SIZES, num_key_value_heads=4),
    "mistral, a window of 60": transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=60),
    "phi": transformers.PhiConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32),
    "phi3": transformers.Phi3Config(**SIZES, num_key_value_heads=2),
    "granite": transformers.GraniteConfig(**SIZES, num_key_value_heads=2, attention_multiplier=0.2),
    "olmo2": transformers.Olmo2Config(**SIZES, num_key_value_heads=2),
    "smollm3, a layer without positions": transformers.SmolLM3Config(
        **SIZES, num_key_value_heads=2, no_rope_layers=[1, 0]
    ),
    "starcoder2": transformers.Starcoder2Config(**SIZES, num_key_value_heads=2),
    "cohere": transformers.CohereConfig(**SIZES, num_key_value_heads=2),
}
ROW = ((1,), (9,), (30,), (2, 6), (17,), (5, 3))


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype, attn_implementation="sdpa")
    for parameter in model.parameters():
        parameter.data *= 3
    return model.eval()


def ids_of(row):
    torch.manual_seed(3)
    return torch.randint(5, 300, (sum(map(sum, row)),))


def one_at_a_time(model, ids, row):
    """The states of a row's tokens, each sequence in a pass of its own: its prompt's tokens are its first answer's."""
    states = []
    parts = iter(ids.split([length for block in row for length in block]))
    for block in row:
        prompt, *answers = (next(parts) for _ in block)
        sequences = [torch.cat([prompt, answer]) for answer in answers] or [prompt]
        alone = [model(input_ids=one[None]).last_hidden_state[0] for one in sequences]
        states += [alone[0][: len(prompt)], *(one[len(prompt) :] for one in alone if answers)]
    return torch.cat(states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("row", [ROW, ((12,),), ((7,), (7,), (7,)), ((9, 4, 4, 1, 12), (3,), (1, 5, 2), (6, 7))])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_at_a_time_forward_and_backward(name, row, checkpointing):
    model = build(name)
    # Llama's and Qwen's norms and rotary angles pass through float32 whatever the model's dtype.
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if name == "phi" else {"rtol": 1e-4, "atol": 2e-5}
    ids = ids_of(row)
    alone = one_at_a_time(model.model, ids, row)
    direction = torch.randn(alone.shape, dtype=alone.dtype)
    weights = [p for p in model.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((alone * direction).sum(), weights)
    enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    packed = model.model(
        input_ids=ids[None],
        attention_mask=layout(row),
        position_ids=positions(row, ids.device),
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, **tolerance)
    for found, wanted in zip(torch.autograd.grad((packed * direction).sum(), weights), expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found / scale, wanted / scale, **tolerance)


def test_a_sequence_does_not_see_its_neighbours():
    """To the last bit, whatever comes before and after it."""
    model = build("qwen2", torch.float32)
    enable_packing(model)
    row = ((10,), (12,), (4, 3, 2))
    ids = ids_of(row)
    other = ids.clone()
    other[:10], other[22:] = 7, 9

    def middle(tokens):
        return model.model(
            input_ids=tokens[None], attention_mask=layout(row), position_ids=positions(row, ids.device)
        ).last_hidden_state[0, 10:22]

    assert torch.equal(middle(ids), middle(other))
    other[12] = 11
    assert not torch.allclose(middle(ids), middle(other), atol=1e-2)


def test_without_a_layout_it_is_transformers_sdpa():
    """Left-padded batches, as generation has them, with a cache."""
    plain, packing = build("qwen2", torch.float32), build("qwen2", torch.float32)
    enable_packing(packing)
    ids = ids_of(((24,),)).reshape(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :5] = 0
    for found, expected in zip(*(model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True
    ).logits for model in (packing, plain)), strict=True):  # fmt: skip
        assert torch.equal(found, expected)


def test_the_kernel_fits_device_and_dtype():
    assert kernel_of(torch.device("cpu"), torch.bfloat16, 128) == "sdpa"
    if torch.cuda.is_available():
        assert kernel_of(torch.device("cuda"), torch.float32, 128) == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_expects_the_kernel_that_packed_rows_take(tiny_recipe, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    recipe = tiny_recipe('train.device="cuda"', f"model.dtype={dtype}")
    for width in (4, 8, 100, 128, 256, 264):
        kernel = kernel_of(torch.device("cuda"), getattr(torch, dtype), width)
        assert uses_varlen(recipe, width) == (kernel == "varlen"), width


def test_the_policy_packs_if_it_can(tiny_recipe):
    assert load_policy(tiny_recipe()).packing == "sdpa"
    assert load_policy(tiny_recipe("train.packing=false")).packing == "off"
    assert load_policy(tiny_recipe('model.attn_implementation="eager"')).packing == "off"


def test_a_policy_in_bfloat16_packs_within_its_rounding(tiny_recipe):
    packed, alone = (
        load_policy(tiny_recipe('model.dtype="bfloat16"', f"train.packing={flag}")) for flag in ("true", "false")
    )
    ids = ids_of(ROW)
    found, expected = (policy.hidden_states(ids, ROW).float() for policy in (packed, alone))
    assert float(((found - expected).norm() / expected.norm()).detach()) < 1e-2


@pytest.mark.parametrize("kind", [transformers.MistralConfig, transformers.PhimoeConfig])
def test_a_window_shorter_than_the_sequences_is_not_packed(tiny_recipe, tmp_path, kind):
    """PhiMoE windows by its mask alone, which the layout of a packed row would replace."""
    for window, packing in ((127, "off"), (128, "sdpa")):
        folder = tmp_path / str(window)
        torch.manual_seed(0)
        config = kind(**SIZES, num_key_value_heads=2, sliding_window=window)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
        policy = load_policy(
            tiny_recipe(f'model.id="{folder}"', 'model.quantization="none"', 'lora.target_modules=["q_proj"]')
        )
        assert policy.packing == packing
        assert policy.shared_prefix == (packing != "off")
        row = ((60,), (100, 28), (70,))
        ids = ids_of(row)
        expected = one_at_a_time(policy.trunk, ids, row)
        torch.testing.assert_close(policy.hidden_states(ids, row), expected, rtol=1e-4, atol=1e-4)


def answers_in_one(row):
    return [(block[0], sum(block[1:])) if len(block) > 2 else block for block in row]


LEAKS = {
    "all": lambda row: [(sum(map(sum, row)),)],
    "one token": lambda row: [(row[0][0] - 1,), (row[1][0] + 1, *row[1][1:]), *row[2:]],
    "an answer to the next": answers_in_one,
}


@pytest.mark.parametrize(
    ("dtype", "leak", "key"),
    [
        ("float32", "all", "packing"),
        ("float32", "one token", "packing"),
        ("bfloat16", "all", "packing"),
        ("float32", "an answer to the next", "shared_prefix"),
        ("bfloat16", "an answer to the next", "shared_prefix"),
    ],
)
def test_a_row_that_leaks_is_not_packed_despite_an_outlier_channel(tiny_recipe, monkeypatch, dtype, leak, key):
    """Real models have channels of values so large that a bound by the largest value would accept anything."""
    from popo_lite.policy import policy as module

    load, apart = module.load_base, module.layout

    def with_outlier(*args, **options):
        base = load(*args, **options)
        base.get_input_embeddings().weight.data[:, 3] += 10
        return base

    monkeypatch.setattr(module, "load_base", with_outlier)
    recipe = tiny_recipe(f'model.dtype="{dtype}"', 'model.quantization="none"')
    assert load_policy(recipe).notices == []
    monkeypatch.setattr(module, "layout", lambda row: apart(LEAKS[leak](row)))
    policy = load_policy(recipe)
    assert (policy.packing, policy.shared_prefix) == (("off", False) if key == "packing" else ("sdpa", False))
    [notice] = policy.notices
    assert "Qwen2ForCausalLM cannot keep" in notice
    assert load_policy(recipe.with_values({f"train.{key}": False})).notices == []


def test_a_model_with_a_mask_of_its_own_runs_unpacked(tiny_recipe, tmp_path):
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1, bos_token_id=0
    )
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(tmp_path)
    overrides = (f'model.id="{tmp_path}"', 'model.quantization="none"', 'lora.target_modules=["query_key_value"]')
    policy = load_policy(tiny_recipe(*overrides))
    assert policy.packing == "off"
    assert policy.notices == [
        "sequences run one at a time, because FalconForCausalLM cannot keep those of a packed row apart"
    ]
    row = ((4,), (5, 2))
    ids = ids_of(row)
    assert torch.equal(policy.hidden_states(ids, row), one_at_a_time(policy.trunk, ids, row))
    with pytest.raises(ValueError, match="answers share a prompt"):
        policy.hidden_states(ids, ((4, 5, 2),))


def test_checkpoints_on_the_host_are_the_layers_inputs_and_change_nothing(tiny_recipe, monkeypatch):
    """Counted where they are copied: what each layer is given leaves the device, and nothing from inside a layer."""
    copied, waiting = [], []
    copy = _HostCopies._copy

    def counting(self, source, target):
        copied.append(tuple(source.shape))
        waiting.append(len(self._fetched))
        return copy(self, source, target)

    def gradients(policy):
        policy.model.train()
        policy.hidden_states(ids_of(ROW), ROW).square().sum().backward()
        return [p.grad.clone() for _, p in policy.adapter_parameters()]

    plain = load_policy(tiny_recipe("train.gradient_checkpointing=true"))
    offloaded = load_policy(
        tiny_recipe("train.gradient_checkpointing=true", "train.offload_activations=true", 'train.device="auto"')
    )
    for policy in (plain, offloaded):
        torch.manual_seed(9)
        for _, parameter in policy.adapter_parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    expected = gradients(plain)
    monkeypatch.setattr(_HostCopies, "_copy", counting)
    found = gradients(offloaded)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert set(copied) == {(1, len(ids_of(ROW)), 128)}
    layers = offloaded.trunk.config.num_hidden_layers
    assert 2 * layers <= len(copied) <= 2 * (layers + 3)  # out and back, and what the final norm saves
    assert max(waiting) <= 1  # the next layer's input comes while this one is used
