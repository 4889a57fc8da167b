"""Load the frozen base, in 4-bit NormalFloat by bitsandbytes or in 16/32-bit, through transformers or unsloth.

It can be written again without quantisation, for a rollout engine to serve the same policy.
"""

from __future__ import annotations

import copy
import errno
import importlib.util
import inspect
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.constants import HF_HOME, SAFETENSORS_INDEX_FILE
from safetensors.torch import save_file
from torch import nn

from popo_lite.errors import ModelError
from popo_lite.installing import install_extra
from popo_lite.policy.adapters import PEFT_NAMES
from popo_lite.policy.cache import cached_folder
from popo_lite.policy.gguf import GGUF_SUFFIX, gguf_folder
from popo_lite.policy.loading_errors import loading_error
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.policy.parts import decoder_of, expert_weights
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.recipe_rules import stored_in_4_bits
from popo_lite.seeding import stream_seed
from popo_lite.tasks.rendering import keeps_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from popo_lite.policy.policy import Policy

TINY_FOLDER = Path(__file__).parent / "tiny"
"""The model `tiny`, which ships with the package."""

CODE_SOURCES: set[str] = set()
"""Models whose Python code this process may import."""

DEQUANTIZED_FILE_BYTES = 2**30
"""Largest file of a dequantised base, except for one with a single larger tensor."""


def model_source(recipe: ModelRecipe) -> str:
    """Return the folder or Hub id to load from. A GGUF file is dequantised into a folder first."""
    if recipe.id.endswith(GGUF_SUFFIX):
        return str(gguf_folder(Path(recipe.id).expanduser(), recipe.dtype))
    folder = TINY_FOLDER if recipe.id == "tiny" else Path(recipe.id).expanduser()
    return str(folder) if folder.is_dir() else recipe.id


def load_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer. Its PAD token is not used: padding is masked everywhere."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerBase = _from_pretrained(AutoTokenizer, recipe, "tokenizer")
    if not keeps_text(tokenizer):  # ignore the class that its config names, and take tokenizer.json as it is
        tokenizer = _from_pretrained(PreTrainedTokenizerFast, recipe, "tokenizer")
    return tokenizer


def load_base(recipe: ModelRecipe, device: torch.device, *, on_host: bool = False) -> PreTrainedModel:
    """Load the base in the recipe's precision on `device` and freeze it. Only safetensors are read.

    With `on_host` it is quantised on `device` all the same, but left in host memory.
    """
    config = load_config(recipe)
    nf4 = recipe.quantization == "nf4"
    fused = nf4 and can_be_built(recipe, config) and any(expert_weights(empty_base(recipe, config)))
    options: dict[str, Any] = {"dtype": recipe.dtype, "attn_implementation": attention_of(recipe, config)}
    if getattr(config, "quantization_config", None) is not None:
        # transformers takes a checkpoint's settings whole, its compute dtype too.
        config.quantization_config = {**config.quantization_config, "bnb_4bit_compute_dtype": recipe.dtype}
        options["config"] = config
    elif nf4:
        options["quantization_config"] = nf4_config(recipe)
    # In 16 bit the experts may not fit the GPU.
    host = torch.device("cpu")
    options |= {"use_safetensors": True, "device_map": {"": host if fused or on_host else device}}
    with _quantizing_on(device) if on_host else nullcontext():
        model: Any = _from_pretrained(_auto_class(config), recipe, "model", **options)
    for module, name in list(expert_weights(model)) if nf4 else ():
        quantize_experts(module, name, recipe, device)
        if on_host:
            move_quantized(module, host)
    if fused and not on_host:
        model.to(device)
    close_cpu_repacking(model)
    model.requires_grad_(False)
    return cast("PreTrainedModel", model)


def load_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """Load only the model's config.

    Raises ModelError for a checkpoint that is quantised otherwise than in bitsandbytes' 4 bits, or for a PAD token
    beyond the embedding.
    """
    from transformers import AutoConfig

    config: PreTrainedConfig = _from_pretrained(AutoConfig, recipe, "config")
    stored_in_4_bits(getattr(config, "quantization_config", None), where=f'model.id = "{recipe.id}"')
    pad, rows = (getattr(config.get_text_config(), name, None) for name in ("pad_token_id", "vocab_size"))
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        what = f"pad_token_id is {pad}, and the embedding of {recipe.id} has {rows} rows, so it cannot be built"
        next_step = "set pad_token_id in its config.json to null, in a copy of the model's folder"
        raise ModelError(what, where="model.id", next_step=next_step)
    return config


def load_generation_config(recipe: ModelRecipe) -> GenerationConfig | None:
    """Load the model's settings for generation, which name its EOS ids. Not all models have some."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model_source(recipe), revision=recipe.revision or "main")
    except OSError:
        return None


def can_be_built(recipe: ModelRecipe, config: PreTrainedConfig) -> bool:
    """Return True if transformers knows the architecture, and Python code that comes with the model is not run."""
    remote = recipe.trust_remote_code and hasattr(config, "auto_map")
    return not remote and type(config) in _auto_class(config)._model_mapping


def empty_base(recipe: ModelRecipe, config: PreTrainedConfig, attention: str = "eager") -> PreTrainedModel:
    """Return the model that `config` describes with weights on the meta device."""
    from accelerate import init_empty_weights

    settings: Any = {"attn_implementation": attention, "trust_remote_code": recipe.trust_remote_code}
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = _auto_class(config).from_config(config, dtype=getattr(torch, recipe.dtype), **settings)
    model.tie_weights()
    return model


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads the model: not every model that also sees images is a causal LM."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    sees_images = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees_images else AutoModelForCausalLM


def attention_of(recipe: ModelRecipe, config: PreTrainedConfig) -> str:
    """Return the attention to load with: the recipe's, or eager for a model that SDPA cannot compute.

    SDPA ignores the soft-capping of attention scores, and cannot add the attention sinks of gpt-oss.
    """
    model = _auto_class(config)._model_mapping.get(type(config), None)  # None for remote code
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if recipe.attn_implementation == "sdpa" and (capped or (model is not None and not model._supports_sdpa)):
        return "eager"
    return recipe.attn_implementation


def check_architecture(base: PreTrainedModel, recipe: ModelRecipe) -> None:
    """Raise ModelError if the empty `base` has no layer that can be in 4 bit though it should, or no cache."""
    from transformers.pytorch_utils import Conv1D

    decoder, kind = decoder_of(base), base.config.model_type
    if recipe.quantization == "nf4" and not any(type(module) in (nn.Linear, Conv1D) for module in decoder.modules()):
        what = f"bitsandbytes quantises none of the layers of a {kind} model"  # they have a class of their own
        raise ModelError(what, where='model.quantization = "nf4"', next_step='--set model.quantization="none"')
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:
        what = f"{type(base).__name__} has no cache of the usual kind to sample with"
        raise ModelError(what, where="model.id", next_step="use a model with attention layers; hybrids work")


def quantize_experts(module: nn.Module, name: str, recipe: ModelRecipe, device: torch.device) -> None:
    """Replace the weight `name` of fused experts by its NF4 form on `device`, which is dequantised in every pass."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    weight = getattr(module, name).detach().to(device)
    setattr(module, name, nn.Parameter(weight, requires_grad=False))
    replace_parameter_4bit(module, name, compress_statistics=recipe.double_quantization, quant_type="nf4")


@contextmanager
def _quantizing_on(device: torch.device) -> Iterator[None]:
    """Let bitsandbytes quantise on `device` what is loaded elsewhere. A GPU is faster, and breaks ties otherwise."""
    import bitsandbytes as bnb

    kind: Any = bnb.nn.Params4bit
    quantize = kind._quantize

    def and_return(weight: Any, home: Any) -> Any:
        quantize(weight, device)
        weight.data = weight.data.to(home)
        weight.quant_state.to(home)
        return weight

    kind._quantize = and_return
    try:
        yield
    finally:
        kind._quantize = quantize


def move_quantized(module: nn.Module, device: torch.device) -> None:
    """Move a module to `device` with its quantisation states, of which torch knows nothing."""
    module.to(device)
    for part in module.modules():
        if (state := getattr(part, "quant_state", None)) is not None:
            state.to(device)


def quantized_weights(base: nn.Module) -> tuple[int, float]:
    """Return how many weights of the base are in 4 bit, and their share of all its elements."""
    weights, elements = 0, {True: 0, False: 0}
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            state = quant_state_of(base, name)
            weights += state is not None
            elements[state is not None] += parameter.numel() if state is None else math.prod(state.shape)
    return weights, elements[True] / sum(elements.values())


def quant_state_of(base: nn.Module, name: str) -> Any:
    """Return bitsandbytes' state of the tensor `name` if it is in 4 bit, else None."""
    owner, _, last = name.rpartition(".")
    if last == "original":  # fused experts
        return getattr(cast("Any", base.get_submodule(owner))[0], "quant_state", None)
    return getattr(base.get_submodule(owner), "quant_state", None) if last == "weight" else None


def import_unsloth() -> None:
    """Import unsloth, which must come before transformers and peft to patch them. Raises ModelError if it cannot."""
    where, instead = 'model.backend = "unsloth"', '--set model.backend="transformers"'
    if not torch.cuda.is_available():
        raise ModelError("unsloth needs a CUDA GPU and torch sees none", where=where, next_step=instead)
    if importlib.util.find_spec("unsloth") is None:
        raise ModelError("unsloth is not installed", where=where, next_step=install_extra("gpu"))
    # It imports the modules that it finds there, by default in the working folder.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(HF_HOME) / "popo-lite" / "unsloth"))
    import unsloth  # noqa: F401


def load_unsloth(recipe: Recipe) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load base with new adapters, and tokenizer, through unsloth. Raises ModelError if it cannot run here."""
    import_unsloth()
    from unsloth import FastLanguageModel

    lora, targets = recipe.lora, recipe.lora.target_modules
    checkpointing = "unsloth" if recipe.train.gradient_checkpointing else False
    if targets == "all-linear":
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    model, tokenizer = _from_pretrained(
        FastLanguageModel,
        recipe.model,
        "model",
        max_seq_length=recipe.rollout.sequence_tokens,
        dtype=getattr(torch, recipe.model.dtype),
        load_in_4bit=recipe.model.quantization == "nf4",
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,  # otherwise it loads a repository of its own instead of the recipe's
    )
    model = FastLanguageModel.get_peft_model(
        model,
        target_modules=list(targets),
        bias="none",
        random_state=stream_seed("adapters", recipe.train.seed) % 2**31,
        use_gradient_checkpointing=checkpointing,
        **{theirs: getattr(lora, ours) for ours, theirs in PEFT_NAMES.items()},
    )
    return model, tokenizer


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Set the base's dropout to 0, and leave that of the adapters.

    With it the trained policy would be another one than samples. Many models hold its probability as a number.
    """
    for name, module in model.named_modules():
        if ".lora_" in name:
            continue
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in attribute or "pdrop" in attribute):
                setattr(module, attribute, 0.0)


def close_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 on the first no-grad forward in eval mode.

    After the repacking, layers without a bias silently pass no gradient, layers with one raise, and dequantisation
    gives wrong weights: rollouts would break the training after them.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def nf4_config(recipe: ModelRecipe) -> Any:
    """Return transformers' settings for 4-bit loading."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=recipe.dtype,
    )


def dequantized_folder(policy: Policy, recipe: ModelRecipe) -> Path:
    """Return a folder in the Hub's cache with the base without quantisation, written once.

    Its name depends on the weights themselves, not on their file: `popo-lite bench` has random ones. A later start has
    the same path, by which vLLM finds what it compiled.
    """
    base: Any = policy.model.get_base_model()
    config = {key: value for key, value in base.config.to_dict().items() if key != "_name_or_path"}
    content: list[Any] = [config, policy.head.weight.dtype]
    for name, weight in base.named_parameters():
        if "lora_" not in name:
            state = quant_state_of(base, name)
            parts = [weight, *(() if state is None else state.as_dict(packed=True).values())]
            content.append((name, *map(_byte_sum, parts)))
    versions = [metadata.version(package) for package in ("popo-lite", "transformers", "bitsandbytes")]
    name = Path(recipe.id).name.removesuffix(GGUF_SUFFIX)
    write = partial(write_dequantized_base, policy)
    return cached_folder(f"{name}-dequantized", [content, policy.device.type, versions], write)


def _byte_sum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bytes; part by part, because torch makes an int64 copy of what it sums."""
    parts = tensor.detach().contiguous().view(torch.uint8).flatten().split(2**24)
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


@torch.no_grad()
def write_dequantized_base(policy: Policy, folder: Path) -> None:
    """Write the base without adapters to `folder` as safetensors and config, 4-bit weights dequantised.

    In the policy's compute dtype: what the trainer's 4-bit layers multiply with. One layer is dequantised at a time
    on its device, and one file is held in host memory.
    """
    import bitsandbytes as bnb
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    base: Any = policy.model.get_base_model()
    dtype, stored = policy.head.weight.dtype, base.state_dict()
    weights = {name: weight for name, weight in base.named_parameters() if "lora_" not in name}
    weights |= {name: buffer for name, buffer in base.named_buffers() if name in stored}
    states = {name: quant_state_of(base, name) for name in weights}

    def dequantized(name: str) -> torch.Tensor:
        weight = weights[name]
        if states[name] is not None:
            weight = bnb.functional.dequantize_4bit(weight.data, states[name]).to(dtype)
            if getattr(base.get_submodule(name.rpartition(".")[0]), "source_cls", None) is Conv1D:
                weight = weight.T.contiguous()  # GPT-2's layers, which are quantised as linear ones
        return cast("torch.Tensor", weight.detach().to("cpu", copy=True))

    config = copy.deepcopy(base.config)
    config.dtype = dtype
    vars(config).pop("quantization_config", None)
    config.save_pretrained(str(folder))  # makes the folder
    if conversions := getattr(base, "_weight_conversions", None):  # that of a base stored in 4 bit has no inverse
        base._weight_conversions = [one for one in conversions if not _reads_4_bit(one)]
    sizes = {
        name: weight.to("meta") if states[name] is None else torch.empty(states[name].shape, dtype=dtype, device="meta")
        for name, weight in weights.items()
    }
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=DEQUANTIZED_FILE_BYTES)
    files: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        # As the Hub has it: engines know the experts one by one. These are views, which safetensors refuses.
        tensors = revert_weight_conversion(base, {_plain_name(name): dequantized(name) for name in names})
        for name, tensor in tensors.items():
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensors[name] = tensor.clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": files}
        (folder / SAFETENSORS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plain_name(name: str) -> str:
    """Return a weight's name without PEFT's wrapper around a layer, and without the 4-bit form of fused experts."""
    return name.replace(".base_layer", "").replace(".parametrizations", "").removesuffix(".original")


def _reads_4_bit(conversion: Any) -> bool:
    from transformers.integrations.bitsandbytes import Bnb4bitDeserialize

    return any(isinstance(operation, Bnb4bitDeserialize) for operation in getattr(conversion, "operations", ()))


def allow_code_of(source: str) -> None:
    """Let transformers, and vLLM through it, import Python code of the model `source`, and of no other that it names.

    A config can name a class as `another/model--module.Class`, and an adapter another base.
    """
    from transformers import dynamic_module_utils
    from transformers.generation import utils

    CODE_SOURCES.add(source)
    original = inspect.unwrap(dynamic_module_utils.get_cached_module_file)

    @wraps(original)
    def module_file(model: Any, *arguments: Any, **options: Any) -> Any:
        if str(model) not in CODE_SOURCES:
            what = f"the model names Python code of another one, {to_toml(str(model))}"
            next_step = (
                "read that code, copy it into the model's folder, and remove the prefix NAME-- in its JSON files"
            )
            raise ModelError(what, where="model.trust_remote_code", next_step=next_step)
        return original(model, *arguments, **options)

    for module in (dynamic_module_utils, utils):
        vars(module)["get_cached_module_file"] = module_file


def _from_pretrained(loader: Any, recipe: ModelRecipe, part: str, **options: Any) -> Any:
    """Call `loader.from_pretrained`. Raises ModelError that names model and `part` and says what to do.

    Missing tensors are an error too: transformers would draw them at random without a word.
    """
    from transformers.utils import logging as transformers_logging

    # Progress bars and advice would disturb a terminal view.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # On AVX512 CPUs bitsandbytes recommends a package whose kernels it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options |= {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    source, whole = model_source(recipe), part == "model" and recipe.backend == "transformers"
    if recipe.trust_remote_code:
        allow_code_of(source)
    try:
        loaded = loader.from_pretrained(source, **options, **({"output_loading_info": True} if whole else {}))
    except ModelError:
        raise
    except Exception as error:  # whatever the library or a model's own code raises
        if is_out_of_memory(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise loading_error(error, recipe, part) from error
    missing = sorted(loaded[1]["missing_keys"]) if whole else []
    if missing:
        what = f"the weights of {recipe.id} lack {len(missing)} of the model's tensors: {', '.join(missing[:3])}"
        raise ModelError(what, where="model.id", next_step="download or copy it again, or use another model")
    return loaded[0] if whole else loaded
