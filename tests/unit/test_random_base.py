"""Random bases: what `load_base` gives but for the values, and out of reach of a run."""

from __future__ import annotations

import ast
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

import popo_lite
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.load import load_base
from popo_lite.recipe import LoraRecipe, ModelRecipe
from popo_lite.tools.bench.synthetic import architecture, random_base

CPU = torch.device("cpu")
NAMES = ("synthetic", "random_base", "random_policy")


def tensors(model):
    """Everything that takes memory: type, dtype, shape of each parameter, buffer and quantisation statistic."""
    found = {name: (type(p).__name__, p.dtype, p.shape, p.requires_grad) for name, p in model.named_parameters()}
    found |= {f"buffer {name}": (b.dtype, b.shape) for name, b in model.named_buffers()}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert module.quant_state is module.weight.quant_state
            for key, part in module.quant_state.as_dict(packed=True).items():
                if "bitsandbytes__" not in key:  # a text whose length depends on the values
                    found[f"{name} {key}"] = (part.dtype, part.shape)
            state = module.quant_state
            found[f"{name} rules"] = (module.compute_dtype, state.dtype, state.nested, state.blocksize)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("double_quantization", [True, False])
def test_it_is_what_load_base_gives_but_for_the_values(dtype, quantization, double_quantization):
    recipe = ModelRecipe(dtype=dtype, quantization=quantization, double_quantization=double_quantization)
    true, random = load_base(recipe, CPU), random_base(recipe, CPU)
    assert [(name, type(m)) for name, m in random.named_modules()] == [(n, type(m)) for n, m in true.named_modules()]
    assert tensors(random) == tensors(true)
    assert random.config.to_dict() == true.config.to_dict()
    for base in (random, true):
        assert getattr(base, "is_loaded_in_4bit", False) == (quantization == "nf4")
    assert random.lm_head.weight is random.model.embed_tokens.weight
    assert not random.training
    for buffer, twin in zip(random.buffers(), true.buffers(), strict=True):
        assert torch.equal(buffer, twin)
    assert not torch.equal(random.lm_head.weight, true.lm_head.weight)


def test_a_head_of_its_own_stays_one(tmp_path):
    config = architecture(ModelRecipe())
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    base = random_base(ModelRecipe(id=str(tmp_path)), CPU)
    assert type(base.lm_head) is torch.nn.Linear
    assert base.lm_head.weight.dtype is torch.bfloat16
    assert not torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)


def test_a_shape_known_by_name_needs_no_download():
    config = architecture(ModelRecipe(id="Qwen/Qwen2.5-1.5B"))  # tests run with the Hub switched off
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (151_936, 1536, 28)


def test_logits_are_finite_and_neither_uniform_nor_certain():
    base = random_base(ModelRecipe(dtype="float32"), CPU)
    torch.manual_seed(0)
    logits = base(torch.randint(320, (4, 200))).logits
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 0.5 < entropy / torch.tensor(320.0).log() < 0.98


def test_the_seed_decides_the_values():
    first, same, other = (random_base(ModelRecipe(), CPU, seed=seed) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.get_parameter(name).data, same.get_parameter(name).data)
    assert not torch.equal(first.get_parameter(name).data, other.get_parameter(name).data)


def test_adapters_get_the_same_gradients_before_and_after_an_eval_forward():
    base = random_base(ModelRecipe(dtype="bfloat16"), CPU)
    assert all(not m.support_avx512bf16_for_cpu for m in base.modules() if isinstance(m, bnb.nn.Linear4bit))
    model = add_adapters(base, LoraRecipe(), seed=0)
    torch.manual_seed(0)
    ids = torch.randint(320, (2, 12))

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert any(grad.abs().max() > 0 for grad in before.values())
    for name, grad in before.items():
        assert torch.equal(grad, after[name])


def test_what_is_written_loads_to_the_same_base(tmp_path):
    made = random_base(ModelRecipe(), CPU, seed=3)
    made.save_pretrained(tmp_path)
    read = load_base(ModelRecipe(id=str(tmp_path)), CPU)
    ids = torch.arange(40)[None]
    assert torch.equal(made(ids).logits, read(ids).logits)
    assert tensors(read) == tensors(made)


def test_only_bench_and_simulation_can_load_random_weights():
    root = Path(popo_lite.__file__).parent
    users = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module and "bench.synthetic" in node.module)
        or (isinstance(node, ast.Import) and any("bench.synthetic" in name.name for name in node.names))
        or (isinstance(node, ast.ImportFrom) and any(name.name in NAMES for name in node.names))
    }
    assert users == {"tools/bench/measure.py", "tools/doctor/kernels.py", "tools/simulate/run.py"}
