"""Read a model's shape from its config alone, without torch and transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from popo_lite.errors import ModelError
from popo_lite.recipe import ModelRecipe

TINY_CONFIG = Path(__file__).parents[2] / "policy" / "tiny" / "config.json"


class Linear(NamedTuple):
    """A linear layer of a decoder layer: its name in the model (`self_attn.q_proj`), and its weight's two sizes."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        """Return the number of elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder-only model. Widths are in elements.

    `biases` names the linear layers with a bias (`q_proj`, ...). With `qk_norms` each head's queries and keys are
    normalised.
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
        """Return the width of all query heads together, which the attention's output has too."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Return the width of all key heads together, which the values have too."""
        return self.kv_heads * self.head_width

    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers of one decoder layer."""
        return (
            Linear("self_attn.q_proj", self.width, self.query_width),
            Linear("self_attn.k_proj", self.width, self.kv_width),
            Linear("self_attn.v_proj", self.width, self.kv_width),
            Linear("self_attn.o_proj", self.query_width, self.width),
            Linear("mlp.gate_proj", self.width, self.mlp_width),
            Linear("mlp.up_proj", self.width, self.mlp_width),
            Linear("mlp.down_proj", self.mlp_width, self.width),
        )


def parameter_counts(shape: ModelShape) -> dict[str, int]:
    """Return the exact parameter counts by class of the model that transformers builds, without adapters.

    A tied head is counted once, with the embeddings.
    """
    linears = shape.linears()
    norms = 2 * shape.width + (2 * shape.head_width if shape.qk_norms else 0)
    biases = sum(linear.outputs for linear in linears if linear.name.split(".")[-1] in shape.biases)
    table = shape.vocabulary * shape.width
    return {
        "base linears": shape.layers * sum(linear.weights for linear in linears),
        "embeddings": table,
        "LM head": 0 if shape.tied else table,
        "norms, biases": shape.layers * (norms + biases) + shape.width,
    }


def adapted_linears(shape: ModelShape, targets: str | tuple[str, ...]) -> Iterator[Linear]:
    """Yield the linear layers, of all decoder layers, that `lora.target_modules` adds an adapter to.

    Names match as in PEFT: the whole name, or its end after a dot. Raises ModelError for a target that matches none.
    """
    names = [
        (f".model.layers.{layer}.{linear.name}", linear) for layer in range(shape.layers) for linear in shape.linears()
    ]
    if targets == "all-linear":
        yield from (linear for _, linear in names)
        return
    ends = [f".{target}" for target in ((targets,) if isinstance(targets, str) else targets)]
    for end in ends:
        if not any(name.endswith(end) for name, _ in names):
            raise ModelError(
                f"{end[1:]} is no linear layer of a {shape.model_type} model",
                where=f"lora.target_modules = {[end[1:] for end in ends]}",
                next_step=f"linear layers here: {', '.join(linear.name.split('.')[-1] for linear in shape.linears())}",
            )
    yield from (linear for name, linear in names if name.endswith(tuple(ends)))


# ---------------------------------------------------------------------- where a shape comes from

KNOWN_CONFIGS: Mapping[str, Mapping[str, Any]] = json.loads(
    Path(__file__).with_name("known_models.json").read_text(encoding="utf-8")
)
"""Hub id -> what its config.json says about the architecture, in the names of transformers 5."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
}
"""Supported architectures, and transformers' defaults for keys that a config.json leaves out."""

_REQUIRED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
_REQUIRED += ["max_position_embeddings"]
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def known_config(name: str) -> dict[str, Any] | None:
    """Return the config of a model known by name, as `AutoConfig.for_model(**config)` takes it, or None."""
    return dict(KNOWN_CONFIGS[name]) if name in KNOWN_CONFIGS else None


def load_shape(recipe: ModelRecipe) -> ModelShape:
    """Return the shape of `model.id`: `tiny`, a folder, a model known by name, or the Hub's config.json.

    Only the last reads the Hub's cache and then the network, and never weights. Raises ModelError if the config cannot
    be read or its architecture is not supported.
    """
    folder = Path(recipe.id).expanduser()
    if recipe.id == "tiny" or folder.is_dir():
        path = TINY_CONFIG if recipe.id == "tiny" else folder / "config.json"
    elif recipe.id in KNOWN_CONFIGS and recipe.revision is None:
        return shape_of(KNOWN_CONFIGS[recipe.id])
    else:
        path = _hub_config(recipe)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", where="model.id", next_step="name a folder with the model's config.json"
        ) from error
    return shape_of(config, source=str(path))


def shape_of(config: Any, *, source: str = "config.json") -> ModelShape:
    """Return the shape that the content of a config.json describes. `source` is the file's name in errors.

    Raises ModelError for an unsupported config.
    """
    kind, config = _check(config, source)
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


def _check(config: Any, source: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture and the config with its defaults, or raise ModelError for the first error in it."""

    def fail(what: str, next_step: str = "use the config.json that the model came with") -> NoReturn:
        raise ModelError(what, where=source, next_step=next_step)

    if not isinstance(config, Mapping):
        fail(f"the file holds a {type(config).__name__}, and should hold an object")
    kind, quantized = config.get("model_type"), config.get("quantization_config")
    if not isinstance(kind, str):
        fail(f"model_type is {kind!r}, and should name the architecture")
    if kind not in _DEFAULTS:
        known = f"it knows {', '.join(_DEFAULTS)}; popo-lite bench measures instead of planning"
        fail(f"the memory plan does not know the architecture {kind!r}", known)
    if quantized is not None:
        # Such a checkpoint has neither the sizes nor the gradients of the base that is planned.
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        fail(
            f"quantization_config says that the checkpoint is quantised already ({method}); the plan is for a base in "
            "16 or 32 bit, which the run itself quantises",
            "set model.id to the model's unquantised checkpoint",
        )
    config = {key: value for key, value in {**_DEFAULTS[kind], **config}.items() if value is not None}
    if missing := [key for key in _REQUIRED if key not in config]:
        fail(f"the config lacks {', '.join(missing)}")
    for key in (*_REQUIRED, "num_key_value_heads", "head_dim"):
        value = config.get(key, 1)
        if type(value) is not int or value < 1:
            fail(f"{key} is {value!r}, and should be a whole number above 0")
    for key in _SWITCHES:
        if not isinstance(config.get(key, False), bool):
            fail(f"{key} is {config[key]!r}, and should be true or false")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if "head_dim" not in config and width % heads:
        fail(f"num_attention_heads is {heads}, which does not divide hidden_size = {width}")
    return kind, config


def _hub_config(recipe: ModelRecipe) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(recipe.id, "config.json", revision=recipe.revision))
    except (OSError, HFValidationError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"the config of {recipe.id} could not be downloaded: {reason}",
            where="model.id",
            next_step="check the name and the network, or use a folder; these need no network: "
            + ", ".join(KNOWN_CONFIGS),
        ) from error
