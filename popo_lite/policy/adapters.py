"""LoRA adapters by PEFT: add them to a frozen base, and write and read them in PEFT's own format."""

from __future__ import annotations

import json
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
        _check_adapter_config(folder, recipe, base)
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
        raise ModelError(
            f"no adapter could be added to {targets!r}: {error}",
            where="lora.target_modules",
            next_step=f"{meant}linear layers here: {', '.join(sorted(names))}",
        ) from error


def adapter_folder(path: str | Path, *, key: str) -> Path:
    """Return the folder at `path`. Raises ModelError naming `key` if it holds no PEFT adapter in safetensors."""
    folder = Path(path).expanduser()
    if missing := [name for name in ("adapter_config.json", ADAPTER_FILE) if not (folder / name).is_file()]:
        raise ModelError(
            f"{folder} is not an adapter in PEFT format: it lacks {' and '.join(missing)}",
            where=key,
            next_step="name the adapter/ folder of a run, or leave the key out",
        )
    return folder


def _check_adapter_config(folder: Path, recipe: LoraRecipe, base: PreTrainedModel) -> None:
    """Raise ModelError if the adapter has other settings than the recipe: PEFT would use the adapter's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for ours, theirs in PEFT_NAMES.items():
        if getattr(recipe, ours) != (value := config.get(theirs, False)):
            raise ModelError(
                f"the adapter in {folder} was made with {theirs} = {value}",
                where=f"lora.{ours} = {getattr(recipe, ours)}",
                next_step=f"--set lora.{ours}={json.dumps(value)}",
            )
    wanted, targets = recipe.target_modules, config.get("target_modules") or ()
    targets = {name.split(".")[-1] for name in ([targets] if isinstance(targets, str) else targets)}
    if targets != (linear_names(base) if wanted == "all-linear" else {name.split(".")[-1] for name in wanted}):
        raise ModelError(
            f"the adapter in {folder} was made for {', '.join(sorted(targets))}",
            where=f"lora.target_modules = {wanted!r}",
            next_step=f"--set 'lora.target_modules={json.dumps(sorted(targets))}'",
        )


def linear_names(base: PreTrainedModel) -> set[str]:
    """Return the last names of the layers that `all-linear` means: all linear ones but the LM head."""
    head = base.get_output_embeddings()
    linear = (name for name, layer in base.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head)
    return {name.split(".")[-1] for name in linear}


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
    except (SafetensorError, RuntimeError) as error:
        # A truncated file, or shapes of another base.
        raise ModelError(
            f"the adapter cannot be loaded on this base: {str(error).strip().splitlines()[0]}",
            where=str(folder / ADAPTER_FILE),
            next_step="check that the file is complete and belongs to the recipe's model.id",
        ) from error
    missing, unknown = [name for name in result.missing_keys if "lora_" in name], result.unexpected_keys
    if missing or unknown:
        raise ModelError(
            f"{folder} holds an adapter of another shape: {len(missing)} tensors missing, {len(unknown)} unknown",
            where=str(folder),
            next_step="use the recipe that the adapter was trained with",
        )
