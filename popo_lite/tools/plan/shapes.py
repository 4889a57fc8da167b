"""Read a model's shape from its config alone, without torch and transformers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, Field, ValidationError

from popo_lite.errors import ModelError
from popo_lite.recipe import ModelRecipe, Positive
from popo_lite.recipe_rules import stored_in_4_bits

KNOWN_CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("known_models.json").read_text("utf-8"))
"""Hub id -> what its config.json says about the architecture, in the names of transformers 5."""

_DEFAULTS: Mapping[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}
"""Supported architectures, and transformers' defaults for keys that a config.json leaves out."""


GGUF_NAMES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "max_position_embeddings": "context_length",
}  # fmt: skip


class UnknownArchitectureError(ModelError):
    """Raised for an architecture that can only be simulated."""


class Linear(NamedTuple):
    """A linear layer of a decoder layer: its name in the model (`self_attn.q_proj`), and its weight's two sizes."""

    name: str
    inputs: int
    outputs: int


class Stored4Bit(NamedTuple):
    """How a checkpoint is stored in 4 bits. `whole`: linear layer -> number of decoder layers with it in 16 bit."""

    double: bool
    compute_dtype: str
    whole: Mapping[str, int]


class ModelShape(BaseModel, frozen=True, strict=True):
    """A dense decoder-only model, read from a config.json. Widths are in elements.

    `stored` is None for a checkpoint that is not quantised.
    """

    model_type: str
    width: Positive = Field(alias="hidden_size")
    mlp_width: Positive = Field(alias="intermediate_size")
    layers: Positive = Field(alias="num_hidden_layers")
    heads: Positive = Field(alias="num_attention_heads")
    kv_heads: Positive = Field(alias="num_key_value_heads", default_factory=lambda found: int(found["heads"]))
    head_width: Positive = Field(alias="head_dim", default_factory=lambda found: found["width"] // found["heads"])
    vocabulary: Positive = Field(alias="vocab_size")
    context_tokens: Positive = Field(alias="max_position_embeddings")
    tied: bool = Field(False, alias="tie_word_embeddings")
    attention_bias: bool = False
    mlp_bias: bool = False
    stored: Stored4Bit | None = None

    def linears(self) -> tuple[Linear, ...]:
        """Return the linear layers of one decoder layer."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return (
            Linear("self_attn.q_proj", self.width, queries),
            Linear("self_attn.k_proj", self.width, keys),
            Linear("self_attn.v_proj", self.width, keys),
            Linear("self_attn.o_proj", queries, self.width),
            Linear("mlp.gate_proj", self.width, self.mlp_width),
            Linear("mlp.up_proj", self.width, self.mlp_width),
            Linear("mlp.down_proj", self.mlp_width, self.width),
        )


def parameter_counts(shape: ModelShape) -> dict[str, int]:
    """Return the exact parameter counts of transformers' model by class; a tied head counts with the embeddings."""
    kind, linears, table = shape.model_type, shape.linears(), shape.vocabulary * shape.width
    norms = 2 * shape.width + (2 * shape.head_width if kind == "qwen3" else 0)
    attention = shape.attention_bias and kind not in ("qwen2", "mistral")
    biased = [*(linears[:3] if attention or kind == "qwen2" else ()), *(linears[3:4] if attention else ())]
    biased += linears[4:] if shape.mlp_bias and kind in ("llama", "smollm3") else ()
    return {
        "base linears": shape.layers * sum(linear.inputs * linear.outputs for linear in linears),
        "embeddings": table,
        "LM head": 0 if shape.tied else table,
        "norms, biases": shape.layers * (norms + sum(linear.outputs for linear in biased)) + shape.width,
    }


def adapted_linears(shape: ModelShape, targets: str | tuple[str, ...]) -> list[Linear]:
    """Return the linear layers, of all decoder layers, that `lora.target_modules` adds an adapter to.

    Names match as in PEFT: the whole name, or its end after a dot. Raises ModelError for a target that matches none.
    """
    names = [(f".model.layers.{index}.{linear.name}", linear) for index in range(shape.layers)
             for linear in shape.linears()]  # fmt: skip
    ends = ("",) if isinstance(targets, str) else tuple(f".{target}" for target in targets)  # text is "all-linear"
    for end in ends:
        if not any(name.endswith(end) for name, _ in names):
            what = f"{end[1:]} is no linear layer of a {shape.model_type} model"
            here = f"linear layers here: {', '.join(linear.name.split('.')[-1] for linear in shape.linears())}"
            raise ModelError(what, where=f"lora.target_modules = {list(targets)}", next_step=here)
    return [linear for name, linear in names if name.endswith(ends)]


def load_shape(recipe: ModelRecipe, *, offline: bool = False) -> ModelShape:
    """Return the shape of `model.id`: `tiny`, a folder, a GGUF file, a model known by name, or the Hub's config.json.

    Only the last reads the Hub's cache, then, unless `offline`, the network. Raises ModelError if the config is
    unreadable or unsupported.
    """
    if recipe.id.endswith(".gguf"):
        return shape_of(_gguf_config(Path(recipe.id).expanduser()), source=recipe.id)
    folder = Path(__file__).parents[2] / "policy" / "tiny" if recipe.id == "tiny" else Path(recipe.id).expanduser()
    path, on_hub = folder / "config.json", not folder.is_dir()
    if on_hub and recipe.id in KNOWN_CONFIGS and recipe.revision is None:
        return shape_of(KNOWN_CONFIGS[recipe.id])
    try:
        if on_hub:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(recipe.id, "config.json", revision=recipe.revision, local_files_only=offline))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        step = f"check name and network, or name a local folder; known offline: {', '.join(KNOWN_CONFIGS)}"
        what = f"{path} cannot be read: {reason}"
        if offline and on_hub:
            what = f"the config of {recipe.id} is not on this machine"
        raise ModelError(what, where="model.id", next_step=step) from error
    return shape_of(config, source=str(path))


def _gguf_config(path: Path) -> dict[str, Any]:
    """Return what a GGUF file says of its architecture, in the names of config.json."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        tables = {t.name: t for t in reader.tensors if t.name in ("token_embd.weight", "output.weight")}
        vocabulary = int(tables["token_embd.weight"].shape[1])
    except (OSError, ValueError, LookupError) as error:
        step = "check the path; the file must be complete"
        raise ModelError(f"{path} cannot be read: {error}", where="model.id", next_step=step) from error
    values = {key: reader.fields[key].contents() for key in reader.fields if not key.startswith("tokenizer.")}
    kind = values.get("general.architecture")
    config = {name: values.get(f"{kind}.{key}") for name, key in GGUF_NAMES.items()}
    return {"model_type": kind, **config, "vocab_size": vocabulary, "tie_word_embeddings": len(tables) == 1}


def shape_of(config: Any, *, source: str = "config.json") -> ModelShape:
    """Return the shape that a config.json's content describes. Raises ModelError for the first error in `source`."""

    def fail(what: str, next_step: str = "use the config.json that the model came with") -> NoReturn:
        raise ModelError(what, where=source, next_step=next_step)

    if not isinstance(config, Mapping):
        fail(f"the file holds a {type(config).__name__}, and should hold an object")
    kind, quantization = config.get("model_type"), config.get("quantization_config")
    in_4_bits = stored_in_4_bits(quantization, where=source)
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        step = f"popo-lite plan simulates it; known are {', '.join(_DEFAULTS)}"
        what = f"model_type is {kind!r}, an architecture that the memory plan does not know"
        raise UnknownArchitectureError(what, where=source, next_step=step)
    config = {key: value for key, value in {**_DEFAULTS[kind], **config}.items() if value is not None} | {
        "stored": None
    }
    try:
        shape = ModelShape.model_validate(config)
    except ValidationError as error:
        if missing := [str(found["loc"][0]) for found in error.errors() if found["type"] == "missing"]:
            fail(f"the config lacks {', '.join(missing)}")
        first = error.errors()[0]
        fail(f"{first['loc'][0]} is {first['input']!r}: {first['msg'].replace('Input', 'it')}")
    if "head_dim" not in config and shape.width % shape.heads:
        fail(f"num_attention_heads is {shape.heads}, which does not divide hidden_size = {shape.width}")
    return shape.model_copy(update={"stored": _stored(shape, quantization)}) if in_4_bits else shape


def _stored(shape: ModelShape, settings: Any) -> Stored4Bit:
    """Return how bitsandbytes' settings store the model. A module is skipped by a name, or the start or end of one."""
    skipped = settings.get("llm_int8_skip_modules") or ()
    starts, ends = tuple(f"{name}." for name in skipped), tuple(skipped)
    names = [(f"model.layers.{index}.{one.name}", one.name) for index in range(shape.layers) for one in shape.linears()]
    whole = Counter(name for path, name in names if f"{path}.".startswith(starts) or path.endswith(ends))
    double = bool(settings.get("bnb_4bit_use_double_quant"))
    return Stored4Bit(double, str(settings.get("bnb_4bit_compute_dtype") or "float32"), whole)
