"""What is evaluated: the weights of a run, or any model on its own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from popo_lite.errors import ModelError, UserInputError
from popo_lite.policy.adapters import ADAPTER_FILE
from popo_lite.policy.load import load_config, pick_device
from popo_lite.policy.policy import Policy, load_policy, load_trained_policy
from popo_lite.recipe import ModelRecipe, PopoObjective, Recipe
from popo_lite.run_folder import RunFolder

RUN_WEIGHTS = ("base", "adapter", "siamese")
MODEL_WEIGHTS = "model"
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
"""Files of a model's folder that its answers may follow from: weights, configuration and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and the sets of weights to measure, each with the folder of its adapter, None where it has none."""

    name: str
    recipe: Recipe
    adapters: Mapping[str, Path | None]

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have this many tokens."""
        return int(getattr(load_config(self.recipe.model), "max_position_embeddings", None) or 2**31)

    @property
    def digests(self) -> dict[str, str]:
        """What tells one state of local weights from another; empty for what is only on the Hub."""
        found = {name: _sha256(folder / ADAPTER_FILE) for name, folder in self.adapters.items() if folder is not None}
        folder = Path(self.recipe.model.id).expanduser()
        if folder.is_dir():
            # Hashing a whole model takes minutes.
            files = [
                (file.name, file.stat().st_size, file.stat().st_mtime_ns)
                for file in folder.iterdir()
                if file.suffix in MODEL_SUFFIXES
            ]
            found["files"] = hashlib.sha256(repr(sorted(files)).encode()).hexdigest()
        return found

    def load(self, recipe: Recipe) -> Policy:
        """The policy under `recipe`, which is the subject's own with other settings, in eval mode."""
        # Only training packs rows; a model that does not keep them apart can be measured all the same.
        recipe = recipe.with_values({"train.packing": False})
        first = next((folder for folder in self.adapters.values() if folder is not None), None)
        if first is not None:
            return load_trained_policy(recipe, first)
        # A base is measured without the adapter that the run may have started from.
        policy = load_policy(recipe.with_values({"lora.init_from": None}))
        policy.model.eval()
        return policy


def open_run(path: Path, wanted: Sequence[str]) -> Subject:
    """The weights `wanted` (default: all) of the run in `path`.

    Raises CheckpointError where it has not ended, unless its base alone is wanted.
    """
    folder = RunFolder(path)
    recipe = folder.recipe()
    adapters = {
        name: None if name == "base" else folder.trained_adapter("siamese" if name == "siamese" else "policy")
        for name in wanted or RUN_WEIGHTS
    }
    return Subject(name=path.resolve().name, recipe=recipe, adapters=adapters)


def open_model(model: str, wanted: Sequence[str]) -> Subject:
    """A folder in the format of transformers, such as an export, or a Hub id: bfloat16 on a GPU, float32 on a CPU.

    Raises UserInputError where `wanted` names weights that only a run has, and ModelError for an adapter's folder.
    """
    if wanted:
        raise UserInputError(
            f"{model} is a model on its own and has no {' or '.join(wanted)}",
            where="--weights",
            next_step="leave --weights out, or name a run's folder",
        )
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            "holds neither a run (recipe.toml) nor a model (config.json)",
            where=model,
            next_step="an adapter is measured through its run's folder; a merged model comes from popo-lite export",
        )
    dtype = "bfloat16" if pick_device("auto").type == "cuda" else "float32"
    known_as = str(folder.resolve()) if folder.is_dir() else model
    settings = ModelRecipe(id=known_as, quantization="none", dtype=dtype)  # type: ignore[arg-type]
    recipe = Recipe(model=settings, objective=PopoObjective())
    return Subject(name=known_as, recipe=recipe, adapters={MODEL_WEIGHTS: None})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
