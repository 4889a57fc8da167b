"""What the memory plan knows of a model: its shape, from the config alone. Free of torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popo_lite.errors import ModelError
from popo_lite.recipe import ModelRecipe

TINY_CONFIG = Path(__file__).parents[2] / "policy" / "tiny" / "config.json"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of a decoder layer: `name` as in the model (`self_attn.q_proj`), weight [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder-only model. Widths in elements, `context_tokens` as the config names it.

    `attention_biases` and `mlp_biases` name the linear layers of each kind that have one (`q_proj`, ...); with
    `qk_norms` queries and keys are normalised by head.
    """

    model_type: str
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool
    biases: frozenset[str]
    qk_norms: bool
    context_tokens: int

    @property
    def query_width(self) -> int:
        """Width of all heads together: what the queries and the attention's output have."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Width of all key heads together; values have the same."""
        return self.kv_heads * self.head_width

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer."""
        d, q, kv, i = self.width, self.query_width, self.kv_width, self.mlp_width
        sizes = {
            "self_attn.q_proj": (d, q),
            "self_attn.k_proj": (d, kv),
            "self_attn.v_proj": (d, kv),
            "self_attn.o_proj": (q, d),
            "mlp.gate_proj": (d, i),
            "mlp.up_proj": (d, i),
            "mlp.down_proj": (i, d),
        }
        return tuple(
            Linear(name=name, inputs=inputs, outputs=outputs, bias=name.split(".")[-1] in self.biases)
            for name, (inputs, outputs) in sizes.items()
        )


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a model by class, without adapters. A tied head is counted once, with the embeddings."""

    linears: int
    embeddings: int
    head: int
    norms_and_biases: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.linears + self.embeddings + self.head + self.norms_and_biases


def parameter_counts(shape: ModelShape) -> ParameterCounts:
    """Exact counts of the model that transformers builds from the same config."""
    linears = shape.linears()
    by_layer = 2 * shape.width + (2 * shape.head_width if shape.qk_norms else 0)
    by_layer += sum(linear.outputs for linear in linears if linear.bias)
    table = shape.vocabulary * shape.width
    return ParameterCounts(
        linears=shape.layers * sum(linear.weights for linear in linears),
        embeddings=table,
        head=0 if shape.tied else table,
        norms_and_biases=shape.layers * by_layer + shape.width,
    )


def adapted_linears(shape: ModelShape, targets: str | tuple[str, ...]) -> Iterator[Linear]:
    """The linear layers, of all decoder layers, that `lora.target_modules` adds an adapter to.

    Names match as in PEFT: the whole name, or its end after a dot. Raises ModelError for a target that matches none.
    """
    names = [
        (f"model.layers.{layer}.{linear.name}", linear) for layer in range(shape.layers) for linear in shape.linears()
    ]
    if targets == "all-linear":
        yield from (linear for _, linear in names)
        return
    wanted = (targets,) if isinstance(targets, str) else targets
    unknown = [target for target in wanted if not any(_matches(name, target) for name, _ in names)]
    if unknown:
        raise ModelError(
            f"{unknown[0]} is no linear layer of a {shape.model_type} model",
            where=f"lora.target_modules = {list(wanted)}",
            next_step=f"linear layers here: {', '.join(linear.name.split('.')[-1] for linear in shape.linears())}",
        )
    yield from (linear for name, linear in names if any(_matches(name, target) for target in wanted))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


# ---------------------------------------------------------------------- where a shape comes from

_QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 151643}
_QWEN_1_5B = _QWEN2 | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_QWEN_7B = _QWEN2 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
_QWEN_BASE = {
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "eos_token_id": 151643,
}
_QWEN_INSTRUCT = _QWEN_BASE | {"max_position_embeddings": 32768, "eos_token_id": 151645}
_QWEN_MATH = {
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "eos_token_id": 151643,
}
_QWEN_MATH_INSTRUCT = _QWEN_MATH | {"eos_token_id": 151645}
_R1_DISTILL = _QWEN_MATH | {"max_position_embeddings": 131072, "bos_token_id": 151646, "tie_word_embeddings": False}
_LLAMA_8B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_DEEPSEEK_MATH_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-1.5B": _QWEN_1_5B | _QWEN_BASE,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN_1_5B | _QWEN_INSTRUCT,
    "Qwen/Qwen2.5-7B": _QWEN_7B | _QWEN_BASE,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN_7B | _QWEN_INSTRUCT,
    "Qwen/Qwen2.5-Math-1.5B": _QWEN_1_5B | _QWEN_MATH,
    "Qwen/Qwen2.5-Math-1.5B-Instruct": _QWEN_1_5B | _QWEN_MATH_INSTRUCT,
    "Qwen/Qwen2.5-Math-7B": _QWEN_7B | _QWEN_MATH,
    "Qwen/Qwen2.5-Math-7B-Instruct": _QWEN_7B | _QWEN_MATH_INSTRUCT,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN_1_5B | _R1_DISTILL,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN_7B | _R1_DISTILL,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B | {"eos_token_id": [128001, 128008, 128009]},
    "deepseek-ai/deepseek-math-7b-base": _DEEPSEEK_MATH_7B,
    "deepseek-ai/deepseek-math-7b-instruct": _DEEPSEEK_MATH_7B,
    "deepseek-ai/deepseek-math-7b-rl": _DEEPSEEK_MATH_7B,
}
"""Hub id -> what its config.json says of the architecture, in the names of transformers 5."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
}
"""Understood architectures, and what transformers takes for keys that a config.json leaves out."""

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_OWN_CONFIG = "take the config.json that the model came with"


def known_config(name: str) -> dict[str, Any] | None:
    """The config of a model known by name, as `AutoConfig.for_model(**config)` takes it; None for other names."""
    found = KNOWN_CONFIGS.get(name)
    return None if found is None else dict(found)


def load_shape(recipe: ModelRecipe) -> ModelShape:
    """The shape of `model.id`: `tiny`, a folder, a model known by name, or the Hub's config.json.

    Only the last asks the Hub's cache and then the network; no weights are read. Raises ModelError where the config
    cannot be had or its architecture is not understood.
    """
    folder = Path(recipe.id).expanduser()
    if recipe.id == "tiny":
        return _read_shape(TINY_CONFIG)
    if folder.is_dir():
        return _read_shape(folder / "config.json")
    known = known_config(recipe.id) if recipe.revision is None else None
    return _read_shape(_hub_config(recipe)) if known is None else shape_of(known)


def shape_of(config: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
    """The shape that a config.json, read as a dict, describes. Raises ModelError for what is not understood.

    `source` is the file's name in errors.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ModelError(
            f"model_type is {kind!r}, and should name the architecture", where=source, next_step=_OWN_CONFIG
        )
    if kind not in _DEFAULTS:
        raise ModelError(
            f"the memory plan does not know the architecture {kind!r}",
            where=source,
            next_step=f"it knows {', '.join(_DEFAULTS)}; popo-lite bench measures instead of planning",
        )
    _refuse_quantized(config.get("quantization_config"), source)
    config = {key: value for key, value in {**_DEFAULTS[kind], **config}.items() if value is not None}
    _refuse_faults(config, source)
    heads = config["num_attention_heads"]
    biases: set[str] = {"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set()
    if kind in ("llama", "qwen3") and config.get("attention_bias"):
        biases |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if kind == "llama" and config.get("mlp_bias"):
        biases |= {"gate_proj", "up_proj", "down_proj"}
    return ModelShape(
        model_type=kind,
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_width=config.get("head_dim", config["hidden_size"] // heads),
        vocabulary=config["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        biases=frozenset(biases),
        qk_norms=kind == "qwen3",
        context_tokens=config["max_position_embeddings"],
    )


def _refuse_quantized(settings: Any, source: str) -> None:
    """A checkpoint that is quantised already has neither the sizes nor the gradients of the base that is planned."""
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    raise ModelError(
        f"quantization_config says that the checkpoint is quantised already ({method}); planned is a base in 16 or 32 "
        "bit, which the run itself quantises",
        where=source,
        next_step="name the model's unquantised checkpoint as model.id",
    )


def _refuse_faults(config: Mapping[str, Any], source: str) -> None:
    """Raise ModelError where keys are missing, or for the first that holds what no model can have."""
    if missing := [key for key in _REQUIRED if key not in config]:
        raise ModelError(f"the config lacks {', '.join(missing)}", where=source, next_step=_OWN_CONFIG)
    for key in _SIZES:
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            raise ModelError(
                f"{key} is {value!r}, and should be a whole number above 0", where=source, next_step=_OWN_CONFIG
            )
    for key in _SWITCHES:
        value = config.get(key, False)
        if not isinstance(value, bool):
            raise ModelError(f"{key} is {value!r}, and should be true or false", where=source, next_step=_OWN_CONFIG)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if "head_dim" not in config and width % heads:
        raise ModelError(
            f"num_attention_heads is {heads}, which does not divide hidden_size = {width}",
            where=source,
            next_step=_OWN_CONFIG,
        )


def _read_shape(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", where="model.id", next_step="name a folder with the model's config.json"
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"the file holds a {type(config).__name__}, and should hold an object",
            where=str(path),
            next_step=_OWN_CONFIG,
        )
    return shape_of(config, source=str(path))


def _hub_config(recipe: ModelRecipe) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        path = hf_hub_download(recipe.id, "config.json", revision=recipe.revision)
    except (OSError, HFValidationError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"the config of {recipe.id} could not be had: {reason}",
            where="model.id",
            next_step=f"check the name and the network, or use a folder; known without: {', '.join(KNOWN_CONFIGS)}",
        ) from error
    return Path(path)
