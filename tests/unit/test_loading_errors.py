"""Every way in which loading a model commonly fails has a sentence of its own, and a next step that works."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import httpx
import huggingface_hub.errors as hub
import pytest
import torch
import transformers.utils.hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from popo_lite.errors import ModelError
from popo_lite.policy import load
from popo_lite.policy.load import TINY_FOLDER, load_base, load_config, load_tokenizer
from popo_lite.recipe import ModelRecipe

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(TINY_FOLDER, tmp_path / "model"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(loads, recipe: ModelRecipe) -> ModelError:
    with pytest.raises(ModelError) as caught:
        loads(recipe)
    return caught.value


def base(recipe: ModelRecipe):
    return load_base(recipe, CPU)


def http_error(kind: type[Exception]) -> Exception:
    response = httpx.Response(401, request=httpx.Request("HEAD", "https://huggingface.co/me/model"))
    return kind("401 Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "what", "next_step"),
    [
        (hub.GatedRepoError, "is gated", "https://huggingface.co/me/model and log in with `hf auth login`"),
        (hub.RepositoryNotFoundError, "neither a folder nor a model of the Hub", "check the name"),
        (hub.RevisionNotFoundError, 'has no revision "v2"', "--set model.revision="),
        (hub.LocalEntryNotFoundError, "cannot be reached", "check the network"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, what, next_step):
    def fail(*_, **__):
        raise error("no") if error is hub.LocalEntryNotFoundError else http_error(error)

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", fail)
    found = refusal(load_config, ModelRecipe(id="me/model", revision="v2"))
    assert what in found.what
    assert next_step in str(found.next_step)
    assert found.where == ("model.revision" if error is hub.RevisionNotFoundError else "model.id")


def test_a_model_that_is_not_in_the_cache_without_a_network():
    found = refusal(load_config, ModelRecipe(id="me/model"))
    assert found.what == "the config of me/model is not in the Hub's cache, and HF_HUB_OFFLINE forbids to download it"
    assert "HF_HUB_OFFLINE=0 hf download me/model" in str(found.next_step)


def test_a_folder_that_is_not_there():
    assert "there is no such folder" in refusal(load_config, ModelRecipe(id="/no/such/folder")).what


def test_an_adapter_in_the_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    found = refusal(load_config, ModelRecipe(id=str(tmp_path)))
    assert "has no config.json" in found.what
    assert "lora.init_from" in str(found.next_step)


def test_an_architecture_that_transformers_does_not_know(folder):
    edit(folder / "config.json", model_type="qwen9")
    assert 'has the architecture "qwen9", which transformers ' in refusal(load_config, ModelRecipe(id=str(folder))).what


def test_code_that_comes_with_a_model_is_not_run(folder):
    edit(folder / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"}, model_type="own")
    found = refusal(load_config, ModelRecipe(id=str(folder)))
    assert found.where == "model.trust_remote_code"


def test_a_model_that_is_no_causal_language_model(folder):
    AutoConfig.for_model("t5", d_model=8, num_layers=1).save_pretrained(folder)
    assert "has a T5Config, which is no causal language model" in refusal(base, ModelRecipe(id=str(folder))).what


def test_a_model_without_sdpa_works_with_the_advice(tmp_path):
    config = AutoConfig.for_model("bloom", vocab_size=320, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    recipe = ModelRecipe(id=str(tmp_path), quantization="none")
    found = refusal(
        lambda it: load._from_pretrained(AutoModelForCausalLM, it, "model", attn_implementation="sdpa"), recipe
    )
    assert found.what.endswith("cannot use SDPA: BloomForCausalLM has no such attention")
    assert found.next_step == '--set model.attn_implementation="eager"'
    base(recipe.with_values({"attn_implementation": "eager"}))


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
    ],
)
def test_a_model_that_is_stored_quantised(folder, stored, name):
    edit(folder / "config.json", quantization_config=stored)
    found = refusal(load_config, ModelRecipe(id=str(folder)))
    assert f"is quantised already ({name})" in found.what
    assert "set model.id to the model's unquantised checkpoint" in str(found.next_step)


def test_weights_in_another_format_can_be_converted_as_the_advice_says(folder, tmp_path, monkeypatch):
    recipe = ModelRecipe(id=str(folder), quantization="none", dtype="float32")
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = refusal(base, recipe)
    assert "has no *.safetensors" in found.what
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(str(found.next_step))[4].rstrip(","))  # noqa: S102
    converted = recipe.with_values({"id": str(tmp_path / "converted")})
    assert torch.equal(base(converted).state_dict()["lm_head.weight"], state["lm_head.weight"])
    load_tokenizer(converted)


def test_torn_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "has damaged or incomplete weights" in refusal(base, ModelRecipe(id=str(folder))).what


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for quantization in ("nf4", "none"):
        found = refusal(base, ModelRecipe(id=str(folder), quantization=quantization))
        assert found.what.endswith("lack 1 of the model's tensors: model.layers.0.mlp.up_proj.weight")


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=64)
    assert "has damaged or incomplete weights" in refusal(base, ModelRecipe(id=str(folder), quantization="none")).what


def test_a_folder_without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    found = refusal(load_tokenizer, ModelRecipe(id=str(folder)))
    assert "the tokenizer" in found.what
    assert "tokenizer files beside" in str(found.next_step)


def test_a_tokenizer_of_a_later_version(folder):
    edit(folder / "tokenizer.json", model={"type": "Later"})
    assert "the tokenizer of" in refusal(load_tokenizer, ModelRecipe(id=str(folder))).what


def test_a_pad_token_beyond_the_embedding(folder):
    edit(folder / "config.json", pad_token_id=99_999)
    assert "pad_token_id is 99999" in refusal(load_config, ModelRecipe(id=str(folder))).what
    edit(folder / "config.json", pad_token_id=None)
    base(ModelRecipe(id=str(folder)))
