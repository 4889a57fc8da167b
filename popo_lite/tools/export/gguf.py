"""Write a merged model as one GGUF file, for llama.cpp and what is built on it, with a Modelfile for Ollama."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from popo_lite.errors import ExportError
from popo_lite.policy.gguf import (
    CONTROL,
    LLAMA3_FACTORS,
    LLAMA3_ROPE,
    ROPE_TENSOR,
    SPECIAL,
    SPLITTERS,
    STOPS,
    USER_DEFINED,
    llama3_factors,
    word_splitter,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor

    from popo_lite.recipe import Recipe
from popo_lite.tasks.rendering import applying_template

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' `model_type` -> GGUF's architecture, for dense models that transformers can read back."""
EXACT_KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""Types that round every weight by itself, and torch's names for them."""
K_KINDS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
"""Written by llama.cpp's own `llama-quantize`, which must be on the PATH."""
BLOCK_KINDS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", *K_KINDS)
"""Types that share a scale within a block, so that what was learned may suffer."""
GGUF_KINDS = (*EXACT_KINDS, *BLOCK_KINDS)
NORMAL, UNUSED = 1, 5  # token types
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}


def check_gguf(config: dict[str, Any], folder: Path, kind: str) -> None:
    """Raise ExportError if a model with this config, and the tokenizer in `folder`, cannot be written as `kind`."""
    _architecture(config)
    _splitter(folder)
    if kind in K_KINDS and shutil.which("llama-quantize") is None:
        what = f"{kind} is written by llama.cpp's llama-quantize, which is not on the PATH"
        step = (
            f"export with --gguf bf16, install llama.cpp, then: llama-quantize model-bf16.gguf model-{kind}.gguf {kind}"
        )
        raise ExportError(what, where=f"--gguf {kind}", next_step=step)


def write_gguf(folder: Path, target: Path, kind: str, *, name: str) -> None:
    """Write the merged model in `folder` as the file `target`. Raises ExportError as `check_gguf` does."""
    if kind in K_KINDS:
        whole = target.with_suffix(".whole.gguf")
        write_gguf(folder, whole, "f32", name=name)
        done = subprocess.run(["llama-quantize", whole, target, kind], capture_output=True, text=True, check=False)
        whole.unlink()
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ExportError(f"llama-quantize failed: {last}", where=f"--gguf {kind}", next_step="try --gguf q8_0")
        return
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
    from gguf.constants import MODEL_ARCH_NAMES

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = _architecture(config)
    writer = GGUFWriter(target, architecture)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    _write_settings(writer, config)
    _write_tokenizer(writer, folder, config["vocab_size"])
    kinds = {theirs: ours for ours, theirs in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(kinds[architecture], config["num_hidden_layers"])
    for its_name, tensor in _tensors(folder):
        base, _, part = its_name.rpartition(".")
        if its_name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        theirs = names.get_name(base)
        if theirs is None:
            raise _refusal(f"GGUF has no name for its tensor {its_name}")
        values = tensor.float().numpy()
        if architecture == "llama" and theirs.endswith(("attn_q", "attn_k")):
            heads = config["num_attention_heads" if theirs.endswith("q") else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stored = GGMLQuantizationType[kind.upper()]
        if values.ndim == 1:
            stored = GGMLQuantizationType.F32
        elif theirs in ("token_embd", "output") and kind.startswith(("q4", "q5")):
            stored = GGMLQuantizationType.Q8_0  # fewer bits cost most here
        if stored.name.startswith("Q") and values.shape[-1] % 32:  # the size of a block
            stored = GGMLQuantizationType.F16
        writer.add_tensor(f"{theirs}.{part}", quants.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    if (rope := config["rope_parameters"])["rope_type"] == "llama3":
        writer.add_tensor(ROPE_TENSOR, llama3_factors(rope, rope["rope_theta"], _head_dim(config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                yield name, tensors.get_tensor(name)


def _architecture(config: dict[str, Any]) -> str:
    """Return GGUF's name of the architecture. Raises ExportError for one that could not be written and read exactly."""
    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    reason, scaling = None, rope.get("rope_type")
    if kind not in ARCHITECTURES:
        reason = f"its architecture is {kind}; {', '.join(ARCHITECTURES)} can be written"
    elif config.get("sliding_window") and config.get("use_sliding_window", True):
        reason = f"it has a sliding window of {config['sliding_window']} tokens"
    elif config.get("hidden_act", "silu") != "silu":
        reason = f"its activation is {config['hidden_act']}"
    elif config.get("attention_bias") or config.get("mlp_bias"):
        reason = "its linear layers have biases"
    elif scaling != "default" and not (kind == "llama" and any(LLAMA3_ROPE | {"factor": factor} == {
        key: value for key, value in rope.items() if key != "rope_theta"} for factor in LLAMA3_FACTORS)):  # fmt: skip
        reason = f"its rotary scaling is {scaling} with settings other than Llama 3's"
    if reason:
        raise _refusal(reason)
    return ARCHITECTURES[kind]


def _refusal(reason: str) -> ExportError:
    step = "export without --gguf; llama.cpp's convert_hf_to_gguf.py may convert the folder, which is not checked here"
    return ExportError(f"this model cannot be written as GGUF: {reason}", where="--gguf", next_step=step)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_settings(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _splitter(folder: Path) -> str:
    """Return llama.cpp's name for how the tokenizer splits text. Raises ExportError for another tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"type": None}}

    def essence(part: dict[str, Any]) -> list[Any]:
        steps = part["pretokenizers"] if part["type"] == "Sequence" else [part]
        keys = ("type", "pattern", "behavior", "individual_digits", "add_prefix_space", "use_regex")
        return [[step.get(key) for key in keys] for step in steps]

    if tokenizer["model"]["type"] == "BPE" and tokenizer["pre_tokenizer"]:
        from tokenizers import Tokenizer, models

        for name in SPLITTERS:
            empty = Tokenizer(models.BPE())
            empty.pre_tokenizer = word_splitter(name)
            same = essence(json.loads(empty.to_str())["pre_tokenizer"]) == essence(tokenizer["pre_tokenizer"])
            merges = bool(tokenizer["model"].get("ignore_merges")) == (name == "llama-bpe")
            normalizers = ({"type": "NFC"},) if name == "qwen2" else (None, {"type": "Sequence", "normalizers": []})
            if same and merges and tokenizer["normalizer"] in normalizers:
                return name
    raise _refusal("llama.cpp has no known name for the way its tokenizer splits text")


def _write_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    if (most := max(added["id"] for added in content["added_tokens"])) >= size:
        raise _refusal(f"its tokenizer has the token {most}, and its vocabulary {size:,}")
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitter(folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = content["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ids = {theirs: getattr(tokenizer, f"{ours}_id") for ours, theirs in SPECIAL.items()}
    stops = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops)
    # Programs that know only one take EOS.
    ids["eos"] = ids["eos"] if ids["eos"] in stops else stops[0]
    others = [stop for stop in stops if stop != ids["eos"]]
    if len(others) > len(STOPS) - 1:
        raise _refusal(f"it has {len(stops)} tokens that end an answer, and GGUF holds {len(STOPS)}")
    ids |= zip(STOPS[1:], others, strict=False)
    for name, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(tokenizer.encode("a")[0] == ids["bos"])
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.chat_template)


def modelfile(tokenizer: Any, weights: str, recipe: Recipe, stop_ids: Collection[int]) -> str:
    """Return an Ollama Modelfile. Ollama renders Go templates, so the chat template is written as one."""
    temperature, system = recipe.eval.temperature, recipe.data.system_prompt
    turn, question, answer = {"role": "user", "content": "<<P>>"}, "{{ .Prompt }}", "{{ .Response }}"

    def render(messages: list[dict[str, str]], **options: Any) -> str:
        with applying_template():
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    without = render([turn], add_generation_prompt=True)
    try:
        with_system = render([{"role": "system", "content": "<<S>>"}, turn], add_generation_prompt=True)
    except TemplateError:  # the template has no system role
        with_system = ""
    if tokenizer.bos_token and tokenizer.encode("a")[0] == tokenizer.bos_token_id:  # llama.cpp adds it itself
        without = without.removeprefix(tokenizer.bos_token)
        with_system = with_system.removeprefix(tokenizer.bos_token)
    before, _, after = without.partition("<<P>>")
    if "<<S>>" in with_system:
        system_before = with_system.partition("<<P>>")[0].replace("<<S>>", "{{ .System }}")
        before = f"{{{{ if .System }}}}{system_before}{{{{ else }}}}{before}{{{{ end }}}}"
    lines = [f"FROM ./{weights}", f'TEMPLATE """{before}{question}{after}{answer}"""']
    stops = tokenizer.convert_ids_to_tokens(sorted(stop_ids))
    lines += [f"PARAMETER temperature {temperature:g}", *(f'PARAMETER stop "{stop}"' for stop in stops)]
    if system and '"""' in system:
        raise _refusal('data.system_prompt holds """, which no Modelfile can')
    return "\n".join([*lines, *([f'SYSTEM """{system}"""'] if system else [])]) + "\n"
