"""Test base, adapters, predictor head and siamese on the tiny model, in real NF4."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch

from popo_lite.errors import ModelError, PopoError, UserInputError
from popo_lite.fused import fused_loss
from popo_lite.policy.adapters import adapter_folder, load_adapter_weights, save_adapter
from popo_lite.policy.device import pick_device
from popo_lite.policy.load import import_unsloth, load_base
from popo_lite.policy.policy import check_logits, load_policy, load_trained_policy
from popo_lite.policy.siamese import Siamese
from popo_lite.policy.tokens import stop_ids_of


@pytest.fixture
def policy(tiny_recipe):
    return load_policy(tiny_recipe())


def ids(batch=4, width=12):
    torch.manual_seed(5)
    return torch.randint(5, 300, (batch, width))


def states(policy, tokens):
    """[B, T, D] of sequences that are all T long."""
    return policy.hidden_states(tokens.flatten(), [[tokens.shape[1]]] * len(tokens)).unflatten(0, tokens.shape)


def loss_gradients(policy):
    policy.model.train()
    tokens = ids()
    hidden, targets = states(policy, tokens)[:, :-1].reshape(-1, 128), tokens[:, 1:].reshape(-1)
    output = fused_loss(hidden, targets, policy.head, lambda logps, entropies, _: (logps + entropies).sum())
    (output.loss / len(targets)).backward()
    found = {name: p.grad.clone() for name, p in policy.adapter_parameters()}
    policy.model.zero_grad(set_to_none=True)
    return found


def disturb(policy, scale=0.02):
    torch.manual_seed(9)
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def test_the_base_is_nf4_and_frozen(policy):
    layers = [module for module in policy.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == policy.quantized_modules == 14
    assert all(layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.model.named_parameters())
    assert {p.dtype for _, p in policy.trainable_parameters()} == {torch.float32}


def test_a_fresh_adapter_changes_nothing(policy):
    tokens = ids()
    with torch.no_grad():
        adapted = states(policy, tokens)
        with policy.model.disable_adapter():
            base = states(policy, tokens)
        assert torch.equal(adapted, base)
        disturb(policy)
        assert not torch.allclose(states(policy, tokens), base, atol=1e-2)


def test_gradients_survive_rollouts(policy):
    """On AVX512-BF16 machines bitsandbytes repacks weights in an eval forward, and gradients would be lost."""
    layers = [module for module in policy.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # on other machines nothing else can show it
    disturb(policy)
    before = loss_gradients(policy)
    weight = policy.trunk.layers[0].mlp.down_proj.base_layer.weight
    dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).clone()
    policy.model.eval()
    with torch.no_grad():
        policy.model(input_ids=ids(1, 1))  # one token: the shape that takes the repacked kernel
        policy.model(input_ids=ids())
    after = loss_gradients(policy)
    weight = policy.trunk.layers[0].mlp.down_proj.base_layer.weight
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), dense)
    assert all(gradient.abs().max() > 0 for gradient in before.values())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0)


def test_train_and_eval_agree(policy):
    disturb(policy)
    tokens = ids()
    with torch.no_grad():
        outputs = [policy.model.train(mode)(input_ids=tokens).logits for mode in (True, False, True)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_gradient_checkpointing_changes_no_gradient(tiny_recipe):
    plain, checkpointed = (
        load_policy(tiny_recipe(f"train.gradient_checkpointing={flag}")) for flag in ("false", "true")
    )
    for policy in (plain, checkpointed):
        disturb(policy)
    assert checkpointed.trunk.gradient_checkpointing
    found = loss_gradients(checkpointed)
    for name, gradient in loss_gradients(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_siamese_adds_adapter_and_head_bytes_and_no_more(tiny_recipe):
    policy = load_policy(tiny_recipe())
    trained = sum(p.numel() * p.element_size() for _, p in policy.trainable_parameters())
    base = sum(p.numel() * p.element_size() for p in policy.model.parameters() if not p.requires_grad)

    def live_bytes():
        import gc

        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):  # a compiler's stand-ins hold no bytes
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    before = live_bytes()
    siamese = Siamese(policy.trainable_parameters(), 0.9)
    added = live_bytes() - before
    assert siamese.extra_bytes == trained
    assert added == trained
    assert base > trained / 2  # or the figure would say nothing


def test_swapping_exchanges_pointers_and_is_undone_by_exceptions(policy):
    siamese = Siamese(policy.trainable_parameters(), 0.5)
    disturb(policy)
    names = [name for name, _ in policy.trainable_parameters()]
    live = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.trainable_parameters()}
    averages = {name: tensor.data_ptr() for name, tensor in siamese.average.items()}

    def check_inside():
        for name, parameter in policy.trainable_parameters():
            assert parameter.data_ptr() == averages[name]

    with siamese.swapped():
        check_inside()
        with pytest.raises(PopoError, match="already"), siamese.swapped():
            pass
        with pytest.raises(PopoError, match="swapped in"):
            siamese.update(1.0)
    with pytest.raises(RuntimeError, match="boom"), siamese.swapped():
        check_inside()
        raise RuntimeError("boom")
    assert names == [name for name, _ in policy.trainable_parameters()]
    for name, parameter in policy.trainable_parameters():
        assert parameter.data_ptr() == live[name][0]
        assert torch.equal(parameter.detach(), live[name][1])


def test_narrow_weights_are_not_averaged():
    with pytest.raises(PopoError, match="float32"):
        Siamese([("w", torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))], 0.9)


def test_adapters_are_float32_in_a_16_bit_model(tiny_recipe):
    policy = load_policy(tiny_recipe('model.dtype="bfloat16"'))
    assert {p.dtype for _, p in policy.trainable_parameters()} == {torch.float32}
    assert policy.head.weight.dtype is torch.bfloat16
    disturb(policy)
    gradients = loss_gradients(policy)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_adapter_round_trip(policy, tiny_recipe, tmp_path):
    disturb(policy)
    save_adapter(policy.model, tmp_path / "adapter", base_id="tiny")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["target_modules"] == sorted(config["target_modules"])  # not in a set's order
    other = load_policy(tiny_recipe())
    load_adapter_weights(other.model, tmp_path / "adapter")
    for (_, ours), (_, theirs) in zip(policy.adapter_parameters(), other.adapter_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    warm = load_policy(tiny_recipe(f'lora.init_from="{tmp_path / "adapter"}"'))
    assert {p.requires_grad for name, p in warm.model.named_parameters() if "lora_" in name} == {True}
    for (_, ours), (_, theirs) in zip(policy.adapter_parameters(), warm.adapter_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ModelError, match="made with r = 16"):
        load_policy(tiny_recipe(f'lora.init_from="{tmp_path / "adapter"}"', "lora.rank=8"))
    for override, wrong in (
        ("lora.dropout=0.1", "lora_dropout = 0.0"),
        ('lora.target_modules=["q_proj"]', "was made with target_modules"),
    ):
        with pytest.raises(ModelError, match=wrong):
            load_policy(tiny_recipe(f'lora.init_from="{tmp_path / "adapter"}"', override))
    with pytest.raises(ModelError, match="cannot be loaded on this base: 0 tensors missing, "):
        load_adapter_weights(load_policy(tiny_recipe('lora.target_modules=["q_proj"]')).model, tmp_path / "adapter")


def test_adapters_in_pickle_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="lacks adapter_model.safetensors"):
        adapter_folder(tmp_path, key="lora.init_from")


def test_models_in_pickle_are_refused(tiny_recipe, tmp_path):
    base = load_base(tiny_recipe('model.quantization="none"').model, torch.device("cpu"))
    base.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no \*\.safetensors"):
        load_base(tiny_recipe(f'model.id="{tmp_path}"').model, torch.device("cpu"))


def test_unknown_targets_name_the_nearest_layer(tiny_recipe):
    with pytest.raises(ModelError, match='did you mean "q_proj"'):
        load_policy(tiny_recipe('lora.target_modules=["q_prj"]'))


def test_beyond_the_context_is_refused(tiny_recipe):
    with pytest.raises(UserInputError, match="the context of tiny is 1024"):
        load_policy(tiny_recipe("rollout.max_prompt_length=1000"))


def test_an_unknown_model_is_one_clear_error(tiny_recipe):
    with pytest.raises(ModelError, match="no/such-model is not in the Hub's cache"):
        load_policy(tiny_recipe('model.id="no/such-model"'))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for machines without a GPU")
def test_unsloth_says_why_it_cannot():
    with pytest.raises(ModelError, match="unsloth needs a CUDA GPU"):
        import_unsloth()


@pytest.mark.parametrize(("kind", "count"), [("dora", 1), ("rslora", 0)])
def test_lora_variants_train(tiny_recipe, kind, count):
    policy = load_policy(tiny_recipe(f"lora.{kind}=true"))
    magnitudes = [name for name, _ in policy.adapter_parameters() if "magnitude" in name]
    assert (len(magnitudes) > 0) == bool(count)
    disturb(policy)
    assert all(gradient.abs().max() > 0 for gradient in loss_gradients(policy).values())


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16, "query_pre_attn_scalar": 16}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Phi", {}),
    ],
)
def test_heads_of_other_architectures(tiny_recipe, tmp_path, architecture, extra):
    """Scaling, soft-capping and a head bias are taken from the model; `load_policy` compares logits and refuses
    what it does not know, which the last lines show."""
    import transformers

    from popo_lite.policy.load import TINY_FOLDER

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=2, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data *= 3
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(tmp_path)
    policy = load_policy(tiny_recipe(f'model.id="{tmp_path}"', 'model.quantization="none"'))
    assert policy.head.softcap == extra.get("final_logit_softcapping")
    assert policy.head.scale == pytest.approx(extra.get("logit_scale", 1 / extra.get("logits_scaling", 1.0)))
    assert (policy.head.bias is not None) == (architecture == "Phi")
    policy.head.__dict__["scale"] = 0.5 * policy.head.scale
    with pytest.raises(ModelError, match="not known here"):
        check_logits(policy)


def test_a_torn_adapter_is_one_clear_error(policy, tiny_recipe, tmp_path):
    save_adapter(policy.model, tmp_path / "adapter", base_id="tiny")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded on this base"):
        load_adapter_weights(policy.model, tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be loaded on this base"):
        load_policy(tiny_recipe(f'lora.init_from="{tmp_path / "adapter"}"'))


def test_the_templates_end_of_turn_ends_an_answer(policy):
    """A base model's EOS is often another token than the one its chat template closes a turn with."""
    base, tokenizer = policy.model.get_base_model(), policy.tokenizer
    template = "{% for m in messages %}{{ m['content'] + '<|system|>\\n' }}{% endfor %}"
    ids = stop_ids_of(base, tokenizer, template)
    assert {tokenizer.decode([one]) for one in ids} == {"<|end|>", "<|system|>"}
    assert stop_ids_of(base, tokenizer, "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}") == {1}


def test_a_model_that_nothing_stops_is_refused(policy):
    base, tokenizer = policy.model.get_base_model(), policy.tokenizer
    base.generation_config.eos_token_id = base.config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="names a token that ends an answer"):
        stop_ids_of(base, tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")


def test_a_logit_scale_that_is_a_little_off_is_noticed_in_16_bit(tiny_recipe):
    policy = load_policy(tiny_recipe('model.dtype="bfloat16"'))
    policy.head.__dict__["scale"] = 1.05
    with pytest.raises(ModelError, match="not known here"):
        check_logits(policy)


def test_a_run_can_be_loaded_without_the_adapter_it_started_from(policy, tiny_recipe, tmp_path):
    disturb(policy)
    save_adapter(policy.model, tmp_path / "adapter", base_id="tiny")
    trained = load_trained_policy(tiny_recipe('lora.init_from="/gone"'), tmp_path / "adapter")
    for (_, ours), (_, theirs) in zip(policy.adapter_parameters(), trained.adapter_parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("set_before", "expected"),
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None)],
)
def test_a_gpus_segments_can_grow_unless_the_user_configured_the_allocator(monkeypatch, set_before, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    pick_device("cpu")
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pick_device("auto")
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_torch_reads_the_allocators_setting_after_its_import():
    code = "import torch, os; from popo_lite.policy.memory import prefer_expandable_segments as prefer; prefer();"
    code += "print(torch._C._accelerator_getAllocatorSettings())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "expandable_segments:True"


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserInputError, match="no CUDA GPU is visible"):
        pick_device("cuda")
