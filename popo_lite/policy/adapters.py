"""LoRA adapters by PEFT: adding them to a frozen base, and writing and reading them in PEFT's own format."""

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


def add_adapters(base: PreTrainedModel, recipe: LoraRecipe, seed: int) -> PeftModel:
    """`base` with fresh adapters (B = 0, so the policy starts as the base), or those of `lora.init_from`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if recipe.init_from is not None:
        folder = adapter_folder(recipe.init_from, key="lora.init_from")
        _refuse_other_shape(folder, recipe, base)
        try:
            return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        except (SafetensorError, RuntimeError) as error:  # torn file; shapes of another base
            raise _unreadable(folder, error) from error
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules if isinstance(recipe.target_modules, str) else list(recipe.target_modules),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(stream_seed("adapters", seed))
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        names = linear_names(base)
        wanted = recipe.target_modules if isinstance(recipe.target_modules, str) else recipe.target_modules[0]
        hint = nearest(wanted, names)
        raise ModelError(
            f"no adapter could be added to {recipe.target_modules!r}: {error}",
            where="lora.target_modules",
            next_step=(f'did you mean "{hint}"? ' if hint else "") + f"linear layers here: {', '.join(sorted(names))}",
        ) from error


def adapter_folder(path: str | Path, *, key: str) -> Path:
    """The folder at `path` if it holds a PEFT adapter in safetensors, else ModelError naming `key`."""
    folder = Path(path).expanduser()
    missing = [name for name in ("adapter_config.json", ADAPTER_FILE) if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} is no adapter in PEFT format: it lacks {' and '.join(missing)}",
            where=key,
            next_step="name the adapter/ folder of a run, or leave the key out",
        )
    return folder


def _refuse_other_shape(folder: Path, recipe: LoraRecipe, base: PreTrainedModel) -> None:
    """The loaded adapter brings its own settings, so a recipe that names others would not be what runs."""
    config = json.loads((folder / "adapter_config.json").read_text())
    keys = (
        ("rank", "r"),
        ("alpha", "lora_alpha"),
        ("dropout", "lora_dropout"),
        ("rslora", "use_rslora"),
        ("dora", "use_dora"),
    )
    for key, theirs in keys:
        if getattr(recipe, key) != config.get(theirs, False):
            raise ModelError(
                f"the adapter in {folder} was made with {theirs} = {config.get(theirs)}",
                where=f"lora.{key} = {getattr(recipe, key)}",
                next_step=f"--set lora.{key}={json.dumps(config.get(theirs))}",
            )
    wanted = (
        linear_names(base)
        if recipe.target_modules == "all-linear"
        else {name.split(".")[-1] for name in recipe.target_modules}
    )
    made_for = config.get("target_modules") or ()
    found = {name.split(".")[-1] for name in ([made_for] if isinstance(made_for, str) else made_for)}
    if found != wanted:
        raise ModelError(
            f"the adapter in {folder} was made for {', '.join(sorted(found))}",
            where=f"lora.target_modules = {recipe.target_modules!r}",
            next_step=f"--set 'lora.target_modules={json.dumps(sorted(found))}'",
        )


def linear_names(base: PreTrainedModel) -> set[str]:
    """Last names of the linear layers that `all-linear` means: all but the LM head."""
    head = base.get_output_embeddings()
    return {
        name.split(".")[-1]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def _unreadable(folder: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    return ModelError(
        f"the adapter cannot be loaded on this base: {reason}",
        where=str(folder / ADAPTER_FILE),
        next_step="check that the file is whole and belongs to the recipe's model.id",
    )


def save_adapter(model: PeftModel, folder: Path, *, base_id: str) -> None:
    """Write the adapter the way PEFT does, naming the base as the recipe does and not by a local path."""
    config = model.peft_config["default"]
    known_as, config.base_model_name_or_path = config.base_model_name_or_path, base_id
    try:
        # "auto" would ask the Hub about the base's vocabulary; embeddings are frozen here.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path = known_as
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form; `popo-lite export` writes a real card


def empty_adapter(model: PeftModel) -> None:
    """Set every B to 0, so that the adapter adds nothing (DoRA's magnitudes stay, and need the adapter disabled)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.zero_()


def load_adapter_weights(model: PeftModel, folder: Path) -> None:
    """Overwrite the model's adapter with the one in `folder`. Raises ModelError where the tensors do not match."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        result: Any = set_peft_model_state_dict(model, load_file(str(folder / ADAPTER_FILE)))
    except (SafetensorError, RuntimeError) as error:
        raise _unreadable(folder, error) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ModelError(
            f"{folder} holds an adapter of another shape: {len(missing)} tensors missing, "
            f"{len(result.unexpected_keys)} unknown",
            where=str(folder),
            next_step="use the recipe that the adapter was trained with",
        )
