"""GGUF files in and out: small models of every architecture, written, read back and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from popo_lite.errors import ExportError, ModelError
from popo_lite.policy.gguf import gguf_folder
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.export.gguf import check_gguf, modelfile, write_gguf
from popo_lite.tools.plan.shapes import load_shape

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "llama3": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 2**17}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


def small(folder: Path, name: str, **options: object) -> Path:
    kind, more = CONFIGS[name]
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **SIZES | more | options)).float()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return AutoConfig.from_pretrained(folder).to_dict()


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(1, 60)[None]).logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_as_it_was(tmp_path, name):
    folder = small(tmp_path / name, name)
    before = logits(folder)
    for kind, most in (("f32", 0.0), ("bf16", 0.005), ("q8_0", 0.01), ("q4_0", 0.1)):
        file = tmp_path / f"{name}-{kind}.gguf"
        write_gguf(folder, file, kind, name="small model")
        back = gguf_folder(file, "float32")
        gap = float((logits(back) - before).abs().max())
        assert gap <= most, kind
        assert kind == "f32" or gap > 0, kind  # it was quantised
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(back)
    for text in ("What is 12 + 345?\n It's  déjà vu, 3x<|end|><|user|>", "<|system|>\t\t--", "日本 \r\n"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    for special in ("eos_token", "pad_token", "bos_token", "unk_token", "chat_template"):
        assert getattr(theirs, special) == getattr(ours, special)
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [ours.eos_token_id]


def test_a_gguf_file_is_a_base(tmp_path, tiny_recipe):
    file = tmp_path / "tiny.gguf"
    write_gguf(TINY_FOLDER, file, "f32", name="tiny")
    policy, tiny = load_policy(tiny_recipe(f'model.id="{file}"')), load_policy(tiny_recipe())
    assert policy.quantized_modules == tiny.quantized_modules == 14
    assert policy.stop_ids == tiny.stop_ids
    ids = torch.arange(1, 30)
    with torch.no_grad():
        assert torch.equal(policy.hidden_states(ids, [[29]]), tiny.hidden_states(ids, [[29]]))
    recipe = tiny_recipe(f'model.id="{file}"').model
    assert load_shape(recipe) == load_shape(tiny_recipe().model)


def test_a_file_is_converted_once_for_each_state_and_dtype(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(TINY_FOLDER, file, "f32", name="tiny")
    first = gguf_folder(file, "float32")
    made = first.stat().st_mtime_ns
    assert gguf_folder(file, "float32") == first
    assert first.stat().st_mtime_ns == made
    assert gguf_folder(file, "bfloat16") != first
    write_gguf(TINY_FOLDER, file, "q8_0", name="tiny")
    assert gguf_folder(file, "float32") != first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file, writer: writer.add_tokenizer_pre("tekken"), 'splits words in the way "tekken"; known are smollm'),
        (lambda file, writer: writer.add_sliding_window(64), "does not read its settings attention.sliding_window"),
        (lambda file, writer: writer.add_rope_scaling_factor(4.0), "does not read its settings rope.scaling.factor"),
        (lambda file, writer: writer.add_rope_dimension_count(8), "it rotates 8 of a head's 32 dimensions"),
        (lambda file, writer: writer.add_uint16("split.count", 2), "it is one of several files"),
        (lambda file, writer: writer.add_pad_token_id(99999), "list index out of range"),
    ],
)
def test_what_would_change_the_model_is_refused(tmp_path, change, reason, monkeypatch):
    from gguf import GGUFWriter

    file = tmp_path / "tiny.gguf"
    end = GGUFWriter.write_header_to_file
    with monkeypatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", lambda self: (change(file, self), end(self)))
        patch.setattr(GGUFWriter, "add_key_value", _overwriting)
        write_gguf(TINY_FOLDER, file, "f32", name="tiny")
    with pytest.raises(ModelError, match=reason) as caught:
        gguf_folder(file, "float32")
    assert str(file) in caught.value.where
    assert not [path for path in (tmp_path / "hf" / "popo-lite").iterdir() if path.suffix != ".lock"]


def _overwriting(writer, key, val, vtype, sub_type=None):
    from gguf.gguf_writer import GGUFValue

    writer.kv_data[0][key] = GGUFValue(value=val, type=vtype, sub_type=sub_type)


@pytest.mark.parametrize("lost", ["blk.1.ffn_up.weight", "token_embd.weight", "output.weight"])
def test_a_file_without_a_tensor_is_refused(tmp_path, lost, monkeypatch):
    """transformers would fill the tensor with random numbers. Without a head, embeddings and head are one."""
    from gguf import GGUFWriter

    folder, write = small(tmp_path / "llama", "llama"), GGUFWriter.add_tensor
    with monkeypatch.context() as patch:
        patch.setattr(GGUFWriter, "add_tensor", lambda self, name, *a, **k: name == lost or write(self, name, *a, **k))
        write_gguf(folder, tmp_path / "part.gguf", "f32", name="part")
    if lost == "output.weight":
        assert load_shape_of(tmp_path / "part.gguf").tied
        return
    with pytest.raises(ModelError, match="cannot be used: it lacks the tensors|cannot be used: 'token_embd.weight'"):
        gguf_folder(tmp_path / "part.gguf", "float32")


def load_shape_of(file: Path):
    from popo_lite.recipe import ModelRecipe

    return load_shape(ModelRecipe(id=str(file)))


def test_three_stop_tokens_and_bos_go_through_a_file(tmp_path):
    folder = small(tmp_path / "llama", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|user|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("7")[0] == tokenizer.bos_token_id
    for stops, reason in (([1, 3, 4], None), ([1, 3, 4, 5], "it has 4 tokens that end an answer, and GGUF holds 3")):
        GenerationConfig(eos_token_id=stops).save_pretrained(folder)
        if reason:
            with pytest.raises(ExportError, match=reason):
                write_gguf(folder, tmp_path / "model.gguf", "f32", name="stops")
            continue
        write_gguf(folder, tmp_path / "model.gguf", "f32", name="stops")
        back = gguf_folder(tmp_path / "model.gguf", "float32")
        assert GenerationConfig.from_pretrained(back).eos_token_id == stops
        assert AutoTokenizer.from_pretrained(back).encode("7 + 5") == tokenizer.encode("7 + 5")
    recipe = load_recipe("tiny_cpu")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }};{% endfor %}"
    lines = modelfile(tokenizer, "model.gguf", recipe, stops).splitlines()
    assert lines[1].startswith('TEMPLATE """{{ if .System }}{{ .System }};{{ else }}{{ end }}{{ .Prompt }};')


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    write_gguf(TINY_FOLDER, tmp_path / "tiny.gguf", "f32", name="tiny")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="the dequantised model cannot be written") as caught:
        gguf_folder(tmp_path / "tiny.gguf", "float32")
    assert "HF_HOME" in caught.value.next_step


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No such file") as caught:
        gguf_folder(tmp_path / "none.gguf", "float32")
    assert "none.gguf" in caught.value.where
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="this GGUF file cannot be used"):
        gguf_folder(file, "float32")
    for size in (4, -5000):
        write_gguf(TINY_FOLDER, file, "f32", name="tiny")
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelError, match="this GGUF file cannot be used"):
            gguf_folder(file, "float32")
        with pytest.raises(ModelError, match="cannot be read"):
            load_shape_of(file)


def test_models_that_gguf_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    for name, options, reason in (
        ("mistral", {"sliding_window": 256}, "a sliding window of 256 tokens"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaling is linear"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"factor": 16.0}},
            "scaling is llama3 with settings other than Llama 3's",
        ),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"attention_bias": True}, "its linear layers have biases"),
    ):
        folder = small(tmp_path / name, name, **options)
        with pytest.raises(ExportError, match=reason):
            check_gguf(config_of(folder), folder, "bf16")
    folder = small(tmp_path / "llama", "llama")
    with pytest.raises(ExportError, match="architecture is phi3; llama, mistral, qwen2, qwen3 can be written"):
        check_gguf(config_of(folder) | {"model_type": "phi3"}, folder, "bf16")
    tokenizer = json.loads((TINY_FOLDER / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"].pop(0)
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["add_prefix_space"] = True
    folder = small(tmp_path / "other", "llama")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ExportError, match="no known name for the way its tokenizer splits text"):
        check_gguf(config_of(folder), folder, "bf16")
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"model": json.loads((TINY_FOLDER / "tokenizer.json").read_text())["model"] | {"ignore_merges": True}},
    ):
        tokenizer = json.loads((TINY_FOLDER / "tokenizer.json").read_text()) | change
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        with pytest.raises(ExportError, match="the way its tokenizer splits text"):
            check_gguf(config_of(folder), folder, "bf16")
    (folder / "tokenizer.json").unlink()  # a slow tokenizer
    with pytest.raises(ExportError, match="no known name for the way its tokenizer splits text"):
        check_gguf(config_of(folder), folder, "bf16")


def test_k_quants_need_llama_cpp_and_say_how(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match="llama-quantize, which is not on the PATH") as caught:
        check_gguf(config_of(TINY_FOLDER), TINY_FOLDER, "q4_k_m")
    assert caught.value.next_step.endswith("llama-quantize model-bf16.gguf model-q4_k_m.gguf q4_k_m")
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\n/bin/cp "$1" "$2"\necho "$@" > {tmp_path}/arguments\n')
    tool.chmod(0o755)
    check_gguf(config_of(TINY_FOLDER), TINY_FOLDER, "q4_k_m")
    write_gguf(TINY_FOLDER, tmp_path / "model.gguf", "q4_k_m", name="tiny")
    assert (tmp_path / "arguments").read_text().endswith("model.gguf q4_k_m\n")
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["model.gguf"]
    tool.write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    with pytest.raises(ExportError, match="llama-quantize failed: no room"):
        write_gguf(TINY_FOLDER, tmp_path / "model.gguf", "q4_k_m", name="tiny")


def test_the_modelfile_renders_as_the_chat_template_does(tiny_recipe):
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    text = modelfile(tokenizer, "model.gguf", tiny_recipe('data.system_prompt="Be brief."'), {1, 4})
    assert text.splitlines() == [
        "FROM ./model.gguf",
        'TEMPLATE """{{ if .System }}<|system|>{{ .System }}<|end|><|user|>{{ else }}<|user|>{{ end }}{{ .Prompt }}'
        '<|end|><|assistant|>{{ .Response }}"""',
        "PARAMETER temperature 1",
        'PARAMETER stop "<|end|>"',
        f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(4)}"',
        'SYSTEM """Be brief."""',
    ]
