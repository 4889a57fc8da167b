"""Say why transformers could not load a part of a model, and what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from popo_lite.errors import ModelError
from popo_lite.recipe import ModelRecipe

HUB = "https://huggingface.co"


class Reason(NamedTuple):
    """What an error that matches `pattern` means, and what to do. `what` goes on after "the model of ID"."""

    pattern: str
    what: str
    next_step: str
    where: str = "model.id"


REASONS = (
    Reason("GatedRepoError", "is gated", f"accept its licence at {HUB}/{{id}} and log in with `hf auth login`"),
    Reason(
        "RevisionNotFoundError",
        'has no revision "{revision}"',
        f"give a branch, tag or commit of {HUB}/{{id}}, or unset it by --set model.revision=",
        "model.revision",
    ),
    Reason(
        "OfflineModeIsEnabled|outgoing traffic has been disabled",
        "is not in the Hub's cache, and HF_HUB_OFFLINE forbids to download it",
        "unset HF_HUB_OFFLINE, or download it before with `HF_HUB_OFFLINE=0 hf download {id}`",
    ),
    Reason(
        "LocalEntryNotFoundError|ConnectError|ConnectTimeout",
        f"is not in the Hub's cache, and {HUB} cannot be reached",
        "check the network, or download it elsewhere and give the folder",
    ),
    Reason("HFValidationError", "was not found: there is no such folder", "check the path"),
    Reason(
        "RepositoryNotFoundError",
        "was not found: it is neither a folder nor a model of the Hub",
        "check the name, and log in with `hf auth login` if it is private",
    ),
    Reason(
        "custom code|trust_remote_code=True",
        "brings Python code of its own",
        "read that code, then run it by --set model.trust_remote_code=true",
        "model.trust_remote_code",
    ),
    Reason(
        r"Unrecognized configuration class <class '[\w.]*?(\w+)'> for this kind of AutoModel",
        "has a {0}, which is no causal language model",
        "use a model whose config.json names a ...ForCausalLM",
    ),
    Reason(
        "has model type `(.*?)` but Transformers does not recognize",
        'has the architecture "{0}", which transformers {transformers} does not know',
        "update popo-lite and transformers, or use another model",
    ),
    Reason(
        r"(\w+) does not support an attention implementation through torch",
        "cannot use SDPA: {0} has no such attention",
        '--set model.attn_implementation="eager"',
        "model.attn_implementation",
    ),
    Reason(
        "(?i)flash.?attention",
        "cannot use Flash Attention: {reason}",
        '--set model.attn_implementation="sdpa"',
        "model.attn_implementation",
    ),
    Reason(
        r"file named \S*model\.safetensors",
        "has no *.safetensors, and no other weights are read",
        "convert it: python -c {convert}, then --set model.id=converted",
    ),
    Reason(
        "file named config.json|Can't load the configuration|Unrecognized model in",
        "has no config.json that names its model_type",
        "give a model; if this is a LoRA adapter, set lora.init_from to it and model.id to its base",
    ),
    Reason(
        "SafetensorError|size mismatch|ignore_mismatched_sizes",
        "has damaged or incomplete weights: {reason}",
        "download or copy it again",
    ),
    Reason(
        "sentencepiece or tiktoken|SentencePiece|tiktoken",
        "needs a package that is not installed, or its files are missing",
        "pip install sentencepiece tiktoken protobuf; else put the model's tokenizer files beside its weights",
    ),
    Reason("Can't load tokenizer|backend tokenizer", "has no files", "put the tokenizer's files beside the weights"),
    Reason("(Import|ModuleNotFound)Error", "needs a package that is not installed: {reason}", "install it", "model"),
)
"""Causes that have an answer of their own. The first one that matches counts."""


def loading_error(error: Exception, recipe: ModelRecipe, part: str) -> ModelError:
    """Return the error to raise in place of `error`, which came up while `part` of the model was loaded."""
    text = " ".join(f"{type(cause).__name__}: {cause}" for cause in _causes(error))
    # The user copies commands: the name in a stranger's recipe must not become a command of its own.
    facts = recipe.model_dump() | {"transformers": metadata.version("transformers"), "id": shlex.quote(recipe.id)}
    facts["convert"] = shlex.quote(
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"[kind.from_pretrained({recipe.id!r}).save_pretrained('converted') for kind in (M, T)]"
    )
    facts["reason"] = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for reason in REASONS:
        if match := re.search(reason.pattern, text, re.DOTALL):
            what, next_step = (words.format(*match.groups(), **facts) for words in (reason.what, reason.next_step))
            return ModelError(f"the {part} of {recipe.id} {what}", where=reason.where, next_step=next_step)
    what = f"could not be loaded: {type(error).__name__}: {facts['reason']}"
    kind = "folder" if Path(recipe.id).expanduser().is_dir() else "repository"
    next_step = f"check that the {kind} is complete: config.json, tokenizer files and *.safetensors"
    return ModelError(f"the {part} of {recipe.id} {what}", where="model.id", next_step=next_step)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
