"""Loading the frozen base: 4-bit NormalFloat by bitsandbytes, or 16/32-bit, through transformers or unsloth."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from popo_lite.errors import ModelError, UserInputError
from popo_lite.recipe import LoraRecipe, ModelRecipe
from popo_lite.tasks.rendering import keeps_text

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TINY_FOLDER = Path(__file__).parent / "tiny"
"""The model `tiny`, which ships with the package."""


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off a terminal that a view of ours draws on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # On AVX512 CPUs bitsandbytes recommends a package whose kernels it would download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def pick_device(wanted: str) -> torch.device:
    """The device for `train.device`. Raises UserInputError where a CUDA GPU is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserInputError(
            "no CUDA GPU is visible to torch",
            where='train.device = "cuda"',
            next_step='set train.device to "auto", or install a CUDA build of torch',
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def model_source(recipe: ModelRecipe) -> str:
    """What transformers is asked for: the shipped folder for `tiny`, else the recipe's id."""
    if recipe.id == "tiny":
        return str(TINY_FOLDER)
    return str(Path(recipe.id).expanduser()) if Path(recipe.id).expanduser().is_dir() else recipe.id


def load_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a PAD token where it has none (EOS serves; padding is masked everywhere)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    quiet_libraries()
    options: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_source(recipe), **options)
        if not keeps_text(tokenizer):  # its tokenizer.json as it stands
            tokenizer = PreTrainedTokenizerFast.from_pretrained(model_source(recipe), **options)
    except (OSError, ValueError) as error:
        raise _not_loaded(recipe, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(recipe: ModelRecipe, device: torch.device) -> PreTrainedModel:
    """The base in the recipe's precision on `device`, every weight frozen. Only safetensors are read."""
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    options: dict[str, Any] = {}
    if recipe.quantization == "nf4":
        options["quantization_config"] = nf4_config(recipe, dtype)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_source(recipe),
            revision=recipe.revision,
            dtype=dtype,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            use_safetensors=True,
            device_map={"": device},
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(recipe, "model", error) from error
    close_cpu_repacking(model)
    model.requires_grad_(False)
    return model


def import_unsloth() -> None:
    """Import unsloth, which must come before transformers and peft to patch them. Raises ModelError where it cannot."""
    if not torch.cuda.is_available():
        raise ModelError(
            "unsloth needs a CUDA GPU and torch sees none",
            where='model.backend = "unsloth"',
            next_step='--set model.backend="transformers"',
        )
    if importlib.util.find_spec("unsloth") is None:
        raise ModelError(
            "unsloth is not installed", where='model.backend = "unsloth"', next_step='pip install "popo-lite[gpu]"'
        )
    import unsloth  # noqa: F401


def load_unsloth(
    recipe: ModelRecipe, lora: LoraRecipe, *, sequence_tokens: int, seed: int, gradient_checkpointing: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base with adapters and tokenizer through unsloth. Raises ModelError where it cannot run here."""
    import_unsloth()
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if gradient_checkpointing else False
    targets = lora.target_modules
    if targets == "all-linear":
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    try:
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=model_source(recipe),
            revision=recipe.revision,
            max_seq_length=sequence_tokens,
            dtype=getattr(torch, recipe.dtype),
            load_in_4bit=recipe.quantization == "nf4",
            trust_remote_code=recipe.trust_remote_code,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # or it would take a repository of its own in place of the recipe's
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(recipe, "model", error) from error
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
        random_state=seed,
        use_gradient_checkpointing=checkpointing,
    )
    return model, tokenizer


def load_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """The model's config alone. Raises ModelError where it cannot be had."""
    from transformers import AutoConfig

    quiet_libraries()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            model_source(recipe), revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(recipe, "config", error) from error
    return config


def quantized_modules(model: torch.nn.Module) -> int:
    """Number of 4-bit linear layers."""
    import bitsandbytes as bnb

    return sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def close_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 on the first no-grad forward in eval mode.

    After the repacking layers without a bias pass no gradient, silently, layers with one raise, and
    dequantisation gives wrong weights; rollouts would break the training that follows them.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def nf4_config(recipe: ModelRecipe, dtype: torch.dtype) -> Any:
    """What transformers is told about 4-bit loading, computing in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def _not_loaded(recipe: ModelRecipe, part: str, error: Exception) -> ModelError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, ImportError):
        return ModelError(
            f"the {part} of {recipe.id} needs a package that is not here: {reason}",
            where="model",
            next_step='install it, or use model.attn_implementation = "sdpa" where it is flash-attention that is missing',
        )
    return ModelError(
        f"the {part} of {recipe.id} could not be loaded: {reason}",
        where="model.id",
        next_step="check the name, log in with `hf auth login` for a gated model, or give a local folder with "
        "config.json, tokenizer files and *.safetensors",
    )
