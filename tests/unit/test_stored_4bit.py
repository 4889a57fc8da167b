"""Checkpoints that are stored in bitsandbytes' 4 bits: planned, computed in the recipe's dtype; others are refused."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch

from popo_lite.callbacks import Callback
from popo_lite.errors import ModelError
from popo_lite.policy.load import load_config
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.terms import base_bytes, nf4_bytes
from popo_lite.tools.plan.vram import plan_memory
from popo_lite.trainer import Trainer


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tiny model, quantised by transformers, with settings as repositories have them."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-bnb-4bit"
    policy = load_policy(load_recipe("tiny_cpu"))
    policy.model.unload().save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    change_settings(folder, bnb_4bit_compute_dtype="float16")
    return folder


def change_settings(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_recipes_dtype_wins_and_the_policy_is_the_same(tiny_recipe, stored, quantization):
    recipe = tiny_recipe(f'model.id="{stored}"', f'model.quantization="{quantization}"')
    policy, own = load_policy(recipe), load_policy(tiny_recipe())
    layers = [module for module in policy.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    ids = torch.arange(5, 25)
    with torch.no_grad():
        assert torch.equal(policy.hidden_states(ids, [[20]]), own.hidden_states(ids, [[20]]))


def test_a_run_says_that_the_stored_dtype_is_not_used(tiny_recipe, stored, tmp_path):
    with Trainer(tiny_recipe(f'model.id="{stored}"'), Callback()) as trainer:
        trainer.folder = RunFolder(tmp_path)
        model = trainer._facts()["model"]
        assert model.endswith("(NF4, 14 layers, 90% of the weights as stored; float16 there is not used, float32)")


def test_a_stored_base_is_planned_like_one_that_the_run_quantises(tiny_recipe, stored):
    recipe, own = tiny_recipe(f'model.id="{stored}"'), tiny_recipe()
    plan, other = (plan_memory(r, load_shape(r.model), vram_bytes=2**33) for r in (recipe, own))
    assert plan.phases[-1].bytes == other.phases[-1].bytes
    assert plan.shape.stored.compute_dtype == "float16"
    # A base of 4-bit values only: no weight in 16 bit is quantised while it is loaded.
    assert plan.phases[0].total_bytes <= other.phases[0].total_bytes


def test_layers_that_a_repository_keeps_in_16_bit_count_as_such(tiny_recipe, stored, tmp_path):
    config = json.loads((stored / "config.json").read_text())
    recipe = tiny_recipe(f'model.id="{tmp_path}"').model

    def bytes_with(*skipped):
        settings = config["quantization_config"] | {"llm_int8_skip_modules": list(skipped)}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return base_bytes(load_shape(recipe), recipe)["base linears"]

    shape = load_shape(tiny_recipe(f'model.id="{stored}"').model)
    down = next(linear for linear in shape.linears() if linear.name == "mlp.down_proj")
    each = 4 * down.inputs * down.outputs - nf4_bytes(down.inputs * down.outputs, double=shape.stored.double)
    whole = bytes_with()
    assert bytes_with("lm_head", "multi_modal_projector") == whole
    assert bytes_with("lm_head", "model.layers.1.mlp.down_proj") == whole + each
    assert bytes_with("lm_head", "down_proj") == whole + shape.layers * each
    assert bytes_with("model.layers.0.mlp", "model.layers.0.mlp.down_proj") > whole + each


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
    ],
)
def test_other_quantised_checkpoints_are_refused_by_name_before_loading(tiny_recipe, stored, tmp_path, settings, name):
    config = json.loads((stored / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = tiny_recipe(f'model.id="{tmp_path}"')
    for read in (load_policy, lambda recipe: load_config(recipe.model), lambda recipe: load_shape(recipe.model)):
        with pytest.raises(ModelError, match=rf"quantised already \({name}\)") as caught:
            read(recipe)
        assert "unquantised checkpoint" in caught.value.next_step
