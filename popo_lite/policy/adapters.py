"""LoRA adapters by PEFT: add them to a frozen base, and write and read them in PEFT's own format."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from popo_lite.errors import ModelError, nearest
from popo_lite.formats import reading
from popo_lite.policy.parts import decoder_of, expert_weights, is_mamba
from popo_lite.recipe import LoraRecipe
from popo_lite.seeding import stream_seed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER_FILE = "adapter_model.safetensors"
ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Names of the modules that choose a token's experts. They are trained only if `lora.target_modules` names them."""

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
    options: dict[str, Any] = {theirs: getattr(recipe, ours) for ours, theirs in PEFT_NAMES.items()}
    options["target_modules"] = target_names(base, recipe.target_modules)
    torch.manual_seed(stream_seed("adapters", seed))
    try:
        return get_peft_model(base, LoraConfig(**options, bias="none", task_type="CAUSAL_LM"))
    except ValueError as error:
        what = f"PEFT adds no adapter to {recipe.target_modules!r}: {str(error).splitlines()[0]}"
        raise ModelError(what, where="lora.target_modules", next_step='use "all-linear"') from error


def check_targets(base: PreTrainedModel, recipe: LoraRecipe) -> list[str]:
    """Return a notice of the weights that `all-linear` leaves out. Raises ModelError for targets that are impossible.

    `base` may be empty, on the meta device.
    """
    adapted = set(target_names(base, recipe.target_modules))
    if recipe.target_modules != "all-linear":
        return []
    head, decoder = base.get_output_embeddings(), set(decoder_of(base).modules())
    sizes: Counter[str] = Counter()
    for name, module in base.named_modules():
        if _is_linear(module) and module is not head and name not in adapted and module in decoder:
            sizes[name.split(".")[-1]] += module.weight.numel()
    for module, name in expert_weights(base):
        sizes["experts"] += getattr(module, name).numel()
    share = sizes.total() / sum(parameter.numel() for parameter in base.parameters())
    names = ", ".join(sorted(sizes, key=lambda name: -sizes[name]))
    return [f"all-linear leaves out {names}: {share:.0%} of the weights, which get no adapters"] if sizes else []


def target_names(base: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Return the full names of the modules that `lora.target_modules` means; only the text model gets adapters.

    Names match as in PEFT: the whole name, or its end after a dot. Raises ModelError for a target that matches none,
    for the embeddings of a tied model, and for fused experts.
    """
    if isinstance(targets, str):
        return _without_experts(base, _all_linear(base))
    decoder, embeddings, found = set(decoder_of(base).modules()), base.get_input_embeddings(), list[str]()
    tied = base.get_output_embeddings().weight is embeddings.weight
    for target in targets:
        modules = {
            name: module
            for name, module in base.named_modules()
            if module in decoder and (name == target or name.endswith(f".{target}"))
        }
        if not modules:
            raise _no_adapter(base, f"the text model has no {target}", target)
        for name, module in modules.items():
            if not (_is_linear(module) or isinstance(module, torch.nn.Embedding)):
                raise _no_adapter(base, f"{name} is a {type(module).__name__}, and adapters are for linear layers")
            if module is embeddings and tied:
                raise _no_adapter(base, f"{name} is the LM head too, and an adapter would change only one of the two")
        found += modules
    if experts := sorted({name.split(".")[-1] for name in set(found) - set(_without_experts(base, found))}):
        what = f"PEFT takes {', '.join(experts)} for the experts of a {base.config.model_type} model"
        raise _no_adapter(base, f"{what}, which get no adapters here")
    return found


def _no_adapter(base: PreTrainedModel, what: str, target: str = "") -> ModelError:
    """Return the error that says why there is no adapter, and what could have one."""
    names = sorted(linear_names(base))
    guess = nearest(target, names)
    meant = f'did you mean "{guess}"? ' if guess else ""
    next_step = f'{meant}use "all-linear", or some of {", ".join(names)}'
    return ModelError(what, where="lora.target_modules", next_step=next_step)


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _all_linear(base: PreTrainedModel) -> list[str]:
    """Return the full names of the text model's linear layers, without the LM head and routers.

    And without Mamba's last projection: PEFT refuses it, because a fused kernel takes its weight without a call.
    """
    head, decoder, found = base.get_output_embeddings(), set(decoder_of(base).modules()), []
    for name, module in base.named_modules():
        parent, _, last = name.rpartition(".")
        of_mamba = last == "out_proj" and is_mamba(base.get_submodule(parent))
        routes = not ROUTERS.isdisjoint(name.split("."))
        if _is_linear(module) and module in decoder and module is not head and not of_mamba and not routes:
            found.append(name)
    return found


def _without_experts(base: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Return the names without those that PEFT would read as experts, for the sake of adapters made elsewhere."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not any("experts" in key for key in base.config.get_text_config().to_dict()):
        return list(names)
    config: Any = LoraConfig(target_modules=sorted({name.split(".")[-1] for name in names}))
    with suppress(ValueError):  # it wants all parts of a fused weight or none
        convert_peft_config_for_transformers(config, base, None)
    return [name for name in names if name.split(".")[-1] in config.target_modules]


def adapter_folder(path: str | Path, *, key: str) -> Path:
    """Return the folder at `path`. Raises ModelError naming `key` if it holds no PEFT adapter in safetensors."""
    folder = Path(path).expanduser()
    if missing := [name for name in ("adapter_config.json", ADAPTER_FILE) if not (folder / name).is_file()]:
        what = f"{folder} is not an adapter in PEFT format: it lacks {' and '.join(missing)}"
        raise ModelError(what, where=key, next_step="name the adapter/ folder of a run, or leave the key out")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of adapter_config.json, which is PEFT's own file. Raises CheckpointError if it is damaged."""
    path = folder / "adapter_config.json"
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _check_settings(folder: Path, recipe: LoraRecipe, base: PreTrainedModel) -> None:
    """Raise ModelError if the adapter has other settings than the recipe: PEFT would use the adapter's."""
    config = read_config(folder)
    if (kind := config.get("peft_type")) != "LORA":  # PEFT would load what other kinds name, from the Hub too
        what, next_step = f"the adapter in {folder} is of the kind {kind!r}", "name the folder of a LoRA adapter"
        raise ModelError(what, where="lora.init_from", next_step=next_step)
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
    """Return the last names of the layers that `all-linear` means."""
    return {name.split(".")[-1] for name in target_names(base, "all-linear")}


def save_adapter(model: PeftModel, folder: Path, *, base_id: str) -> None:
    """Write the adapter as PEFT does, but name the base by its id in the recipe and not by a local path."""
    config: Any = model.peft_config["default"]
    original, targets = config.base_model_name_or_path, config.target_modules
    config.base_model_name_or_path = base_id
    # PEFT holds a set, whose order changes from process to process: equal adapters are to be equal files.
    config.target_modules = targets if isinstance(targets, str) else sorted(targets)
    try:
        # "auto" would ask the Hub about the base's vocabulary; embeddings are frozen here.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    finally:
        config.base_model_name_or_path, config.target_modules = original, targets
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
