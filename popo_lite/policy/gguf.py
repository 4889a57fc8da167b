"""Read a GGUF file: dequantise it once into a folder that transformers loads, with the tokenizer of llama.cpp.

transformers reads the weights. It is not trusted with the rest: version 5.17 takes the file's BOS for its EOS, splits
text as GPT-2 does whatever the file asks for, and silently drops unknown settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popo_lite.errors import ModelError
from popo_lite.policy.cache import cached_folder

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

GGUF_SUFFIX = ".gguf"
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens in transformers' names and in GGUF's."""
STOPS = ("eos", "eot", "eom")
"""Tokens that end an answer, in GGUF's names."""
CONTROL, USER_DEFINED = 3, 4  # token types
SPLITTERS = ("smollm", "starcoder", "gpt-2", "qwen2", "deepseek-r1-qwen", "llama-bpe")
"""Known values of `tokenizer.ggml.pre`: how text is split into words before BPE."""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROPE_TENSOR = "rope_freqs.weight"
LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
"""Rotary scaling of Llama 3.1 (factor 8) and 3.2 (factor 32). A GGUF file stores only the resulting factors."""
LLAMA3_FACTORS = (8.0, 32.0)
READ_ELSEWHERE = {"attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"}
"""Settings that are implied by the weights' shapes or checked here."""


def gguf_folder(path: Path, dtype: str) -> Path:
    """Return a folder with the file's weights in `dtype`, config and tokenizer; made once, in the Hub's cache folder.

    Raises ModelError if the file cannot be read, or if reading it would change the model.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{error.strerror}", where=f'model.id = "{path}"', next_step="check the path") from error
    versions = [metadata.version(package) for package in ("popo-lite", "transformers")]
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {dtype} {versions}"
    return cached_folder(path.stem, identity, lambda folder: convert_gguf(path, folder, dtype))


def convert_gguf(path: Path, folder: Path, dtype: str) -> None:
    """Write the file's weights in `dtype`, its config and tokenizer to `folder`. Raises ModelError as `gguf_folder`."""
    import torch
    from gguf import GGUFReader
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, modeling_gguf_pytorch_utils

    # Its progress bar cannot be switched off, and would disturb a terminal view.
    vars(modeling_gguf_pytorch_utils)["tqdm"] = lambda tensors, **_: tensors
    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        reader = GGUFReader(path)
        tokenizer = read_tokenizer(reader)
        config: Any = AutoConfig.from_pretrained(str(path.parent), **source)
        _complete_config(config, reader)
        source |= {"config": config, "dtype": getattr(torch, dtype), "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), **source)
        model, loading = loaded
        _refuse_unread(reader, model, loading["missing_keys"])
    except (ValueError, TypeError, LookupError, NotImplementedError, RuntimeError, OSError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        next_step = "check that the file is complete, or name the folder or Hub id that it was made from"
        where = f'model.id = "{path}"'
        raise ModelError(f"this GGUF file cannot be used: {reason}", where=where, next_step=next_step) from error
    vars(model.config).pop("quantization_config", None)
    model.config.save_pretrained(str(folder))  # makes the folder
    stops = {field(reader, f"tokenizer.ggml.{name}_token_id") for name in STOPS} - {None}
    GenerationConfig(eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id).save_pretrained(str(folder))
    save_torch_state_dict(model.state_dict(), str(folder))
    tokenizer.save_pretrained(str(folder))


def _complete_config(config: Any, reader: GGUFReader) -> None:
    """Set what transformers does not read: the width of a head, Llama 3's rotary scaling, and no BOS or EOS."""
    import numpy as np

    kind = field(reader, "general.architecture")
    if width := field(reader, f"{kind}.attention.key_length"):
        config.head_dim = width
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (rotary := field(reader, f"{kind}.rope.dimension_count") or width) != width:
        raise ValueError(f"it rotates {rotary} of a head's {width} dimensions, which transformers does not read")
    config.bos_token_id = config.eos_token_id = None  # they are the tokenizer's and generation's
    if factors := [tensor.data for tensor in reader.tensors if tensor.name == ROPE_TENSOR]:
        theta = config.rope_parameters["rope_theta"]
        for factor in LLAMA3_FACTORS:
            scaling = LLAMA3_ROPE | {"factor": factor}
            if np.allclose(llama3_factors(scaling, theta, width), factors[0], rtol=1e-3):
                config.rope_parameters = {**scaling, "rope_theta": theta}
                return
        raise ValueError(f"its rotary frequencies ({ROPE_TENSOR}) are scaled in an unknown way")


def llama3_factors(rope: Mapping[str, Any], theta: float, width: int) -> Any:
    """Return what Llama 3's scaling divides the rotary frequencies of a head of `width` by, float32 [width / 2]."""
    import numpy as np

    low, high, whole = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    turns = whole * theta ** -(np.arange(0, width, 2) / width) / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _refuse_unread(reader: GGUFReader, model: Any, missing: Collection[str]) -> None:
    """Raise ValueError if a tensor or setting of the file was not read, or if tensors of the model are missing."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if (field(reader, "split.count") or 1) > 1:
        raise ValueError("it is one of several files; llama.cpp's llama-gguf-split --merge joins them")
    if missing:
        raise ValueError(f"it lacks the tensors {', '.join(sorted(missing)[:5])}")
    architecture = field(reader, "general.architecture")
    known: Any = GGUF_CONFIG_MAPPING[{"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(architecture, architecture)]
    names = [key.partition(".")[2] for key in reader.fields if key.startswith(f"{architecture}.")]
    if unread := [name for name in names if name not in known and name not in READ_ELSEWHERE]:
        raise ValueError(f"transformers does not read its settings {', '.join(unread)}")
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    table = get_tensor_name_map(kind, model.config.num_hidden_layers)
    loaded = {f"{table.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}" for name in model.state_dict()}
    if unread := [tensor.name for tensor in reader.tensors if tensor.name not in {*loaded, ROPE_TENSOR}]:
        raise ValueError(f"transformers does not read its tensors {', '.join(unread[:5])}")


def field(reader: GGUFReader, key: str) -> Any:
    """Return the value of a key, or None."""
    found = reader.fields.get(key)
    return None if found is None else found.contents()


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return the tokenizer that the file describes. Raises ValueError if it is of an unknown kind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    kind, words = (field(reader, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    tokens, merges, types = (field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    if kind != "gpt2" or not tokens or not merges:
        raise ValueError(f'its tokenizer is of the kind "{kind}", and only byte-level BPE ("gpt2") can be read')
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=words == "llama-bpe"))
    if words == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = word_splitter(words), decoders.ByteLevel()
    for type_ in (CONTROL, USER_DEFINED):
        marked = [token for token, its_type in zip(tokens, types, strict=True) if its_type == type_]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=type_ == CONTROL) for token in marked])
    if tokenizer.get_vocab_size() != len(tokens):
        raise ValueError("its tokenizer names a token twice")
    ids = {name: field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    if ids["eos_token"] is None:
        raise ValueError("its tokenizer names no EOS token")
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    if field(reader, "tokenizer.ggml.add_bos_token"):
        bos = (names["bos_token"], ids["bos_token"])
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    template = field(reader, "tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def word_splitter(name: str | None) -> PreTokenizer:
    """Return how text is split into words before BPE, by llama.cpp's name. Raises ValueError for an unknown name."""
    from tokenizers import Regex, pre_tokenizers

    if name not in SPLITTERS:
        raise ValueError(f'its tokenizer splits words in the way "{name}"; known are {", ".join(SPLITTERS)}')
    if name in ("smollm", "starcoder", "gpt-2"):
        digits = [] if name == "gpt-2" else [pre_tokenizers.Digits(individual_digits=True)]
        return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    number = r"\p{N}{1,3}" if name == "llama-bpe" else r"\p{N}"
    split = pre_tokenizers.Split(Regex(CL100K.format(number=number)), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
