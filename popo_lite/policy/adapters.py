"""LoRA adapters by PEFT: add them to a frozen base, and write and read them in PEFT's own format."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from popo_lite.errors import ModelError, nearest
from popo_lite.recipe import LoraRecipe
from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}


def add_adapters(base: PreTrainedModel, recipe: LoraRecipe, seed: int) -> PeftModel:
    """Return `base` with new adapters (B = 0, so the policy starts as the base), or with those of `lora.init_from`."""
    from peft import LoraConfig, PeftConfig, get_peft_model

    if recipe.init_from is not None:
        folder = adapter_folder(recipe.init_from, key="lora.init_from")
        _check_settings(folder, recipe, base)
        config = PeftConfig.from_pretrained(str(folder))
        # PEFT freezes an adapter for inference, and warns if it was made on a base of another name.
        config.inference_mode, config.base_model_name_or_path = False, None
        model: PeftModel = get_peft_model(base, config)
        load_adapter_weights(model, folder)
        return model
    targets = recipe.target_modules
    options: dict[str, Any] = {theirs: getattr(recipe, ours) for ours, theirs in PEFT_NAMES.items()}
    options["target_modules"] = targets if isinstance(targets, str) else list(targets)
    torch.manual_seed(stream_seed("adapters", seed))
    try:
        return get_peft_model(base, LoraConfig(**options, bias="none", task_type="CAUSAL_LM"))
    except ValueError as error:
        names = linear_names(base)
        guess = nearest(targets if isinstance(targets, str) else targets[0], names)
        meant = f'did you mean "{guess}"? ' if guess else ""
        what = f"no adapter could be added to {targets!r}: {error}"
        next_step = f"{meant}linear layers here: {', '.join(sorted(names))}"
        raise ModelError(what, where="lora.target_modules", next_step=next_step) from error


def adapter_folder(path: str | Path, *, key: str) -> Path:
    """Return the folder at `path`. Raises ModelError naming `key` if it holds no PEFT adapter in safetensors."""
    folder = Path(path).expanduser()
    if missing := [name for name in ("adapter_config.json", ADAPTER_FILE) if not (folder / name).is_file()]:
        what = f"{folder} is not an adapter in PEFT format: it lacks {' and '.join(missing)}"
        raise ModelError(what, where=key, next_step="name the adapter/ folder of a run, or leave the key out")
    return folder


def _check_settings(folder: Path, recipe: LoraRecipe, base: PreTrainedModel) -> None:
    """Raise ModelError if the adapter has other settings than the recipe: PEFT would use the adapter's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    wanted: dict[str, Any] = {ours: getattr(recipe, ours) for ours in PEFT_NAMES}
    found: dict[str, Any] = {ours: config.get(theirs, False) for ours, theirs in PEFT_NAMES.items()}
    layers = linear_names(base) if recipe.target_modules == "all-linear" else recipe.target_modules
    targets = config.get("target_modules") or ()
    for settings, names in ((wanted, layers), (found, [targets] if isinstance(targets, str) else targets)):
        settings["target_modules"] = sorted({name.split(".")[-1] for name in names})
    for key, value in found.items():
        if value != wanted[key]:
            raise ModelError(
                f"the adapter in {folder} was made with {PEFT_NAMES.get(key, key)} = {value}",
                where=f"lora.{key} = {getattr(recipe, key)}",
                next_step=f"--set {shlex.quote(f'lora.{key}={json.dumps(value)}')}",
            )


def linear_names(base: PreTrainedModel) -> set[str]:
    """Return the last names of the layers that `all-linear` means: all linear ones but the LM head."""
    head, layers = base.get_output_embeddings(), base.named_modules()
    return {name.split(".")[-1] for name, one in layers if isinstance(one, torch.nn.Linear) and one is not head}


def save_adapter(model: PeftModel, folder: Path, *, base_id: str) -> None:
    """Write the adapter as PEFT does, but name the base by its id in the recipe and not by a local path."""
    config = model.peft_config["default"]
    original, config.base_model_name_or_path = config.base_model_name_or_path, base_id
    try:
        # "auto" would ask the Hub about the base's vocabulary; embeddings are frozen here.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = original
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; `popo-lite export` writes a real card


def empty_adapter(model: PeftModel) -> None:
    """Set every B to 0, so that the adapter adds nothing (DoRA's magnitudes stay: disable such an adapter instead)."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.zero_()


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Overwrite the model's adapter with the one in `folder`. Raises ModelError if the tensors do not match."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        result: Any = set_peft_model_state_dict(model, load_file(str(folder / ADAPTER_FILE)))
        missing, unknown = [name for name in result.missing_keys if "lora_" in name], result.unexpected_keys
        problem = f"{len(missing)} tensors missing, {len(unknown)} unknown" if missing or unknown else None
    except (SafetensorError, RuntimeError) as error:  # a truncated file, or shapes of another base
        problem = str(error).strip().splitlines()[0]
    if problem:
        what = f"the adapter cannot be loaded on this base: {problem}"
        next_step = "check that the file is complete and was trained with the recipe's model.id and [lora]"
        raise ModelError(what, where=str(folder / ADAPTER_FILE), next_step=next_step)
