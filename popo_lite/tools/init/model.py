"""Look at a model without its weights: size, context, chat template, and whether it thinks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from popo_lite.errors import ModelError
from popo_lite.policy.loading_errors import loading_error
from popo_lite.recipe import ModelRecipe, PopoObjective, Recipe
from popo_lite.recipe_file import load_recipe, shipped_recipes
from popo_lite.tools.init.hub import is_unreachable
from popo_lite.tools.plan.shapes import ModelShape, UnknownArchitectureError, load_shape, parameter_counts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = ("<think>", "enable_thinking")
"""What chat templates of thinking models hold."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model. `shape` is None if the memory plan cannot count it; `notes` say what is not known.

    `template` is the tokenizer's chat template, an empty string if it has none, and None if it was not seen.
    """

    id: str
    shape: ModelShape | None
    tokenizer: PreTrainedTokenizerBase | None = None
    template: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def shipped(self) -> tuple[str, Recipe] | None:
        """Name and recipe of what comes with popo-lite for this model. Of POPO's and GRPO's, that is POPO's."""
        if not is_from_hub(self.id):
            return None
        recipes = {key: load_recipe(path) for key, path in shipped_recipes().items()}
        made = ((key, recipe) for key, recipe in recipes.items() if recipe.model.id == self.id)
        return next((one for one in made if type(one[1].objective) is PopoObjective), None)

    @property
    def parameters(self) -> int | None:
        """Number of weights, if the shape is known."""
        return None if self.shape is None else sum(parameter_counts(self.shape).values())

    @property
    def thinks(self) -> bool:
        """True if the model writes its thoughts first, by its template or by the recipe that was made for it."""
        own = self.template or ""
        data = self.shipped[1].data if self.shipped else None
        made = (data.chat_template or "") + (data.system_prompt or "") if data else ""
        return any(sign in own + made for sign in (*THINKING, "/no_think"))

    @property
    def can_be_told_not_to_think(self) -> bool:
        """True if "/no_think" in the system prompt turns the thinking off."""
        made = self.shipped[1].data.system_prompt if self.shipped else None
        return "/no_think" in (made or self.template or "")

    def described(self) -> str:
        """Return the facts on one line."""
        size, shape = self.parameters, self.shape
        parts = ["size not known"]
        if size is not None and shape is not None:
            unit, places = (1e9, 1) if size >= 1e9 else (1e6, 0 if size >= 1e7 else 1)
            count = f"{size / unit:.{places}f}{'B' if unit == 1e9 else 'M'} parameters"
            parts = [count, f"context {shape.context_tokens:,} tokens"]
        seen = {None: "chat template not seen", "": "no chat template"}
        parts.append(seen.get(self.template, "has a chat template"))
        return ", ".join([*parts, *(["thinks before it answers"] if self.thinks else [])])


def look_at_model(name: str) -> ModelFacts:
    """Return what is known of `tiny`, a folder, a GGUF file or a Hub id. No weights are read and no code is run.

    Raises ModelError if there is no such model or it is gated. If the Hub cannot be reached, a note says so.
    """
    recipe, notes, shape = ModelRecipe(id=name), list[str](), None
    try:
        shape = load_shape(recipe)
    except UnknownArchitectureError as error:
        notes.append(f"{error.what}: `popo-lite plan` simulates a step instead")
    except ModelError as error:
        if isinstance(error.__cause__, OSError | ValueError) and is_unreachable(error):
            notes.append(f"could not look at the size of {name}: offline")
        elif is_from_hub(name) and isinstance(error.__cause__, Exception):
            raise loading_error(error.__cause__, recipe, "config") from error
        else:
            raise
    tokenizer = None
    try:
        tokenizer = open_tokenizer(recipe)
    except ModelError as error:
        if not is_unreachable(error):
            raise
        notes.append(f"could not look at the tokenizer of {name}: offline; prompts are measured by their characters")
    template = None if tokenizer is None else str(tokenizer.chat_template or "")
    return ModelFacts(name, shape, tokenizer, template, tuple(notes))


def is_from_hub(name: str) -> bool:
    """Check whether `name` is the id of a model on the Hub."""
    return name != "tiny" and not name.endswith(".gguf") and not Path(name).expanduser().is_dir()


def open_tokenizer(recipe: ModelRecipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer. That of a GGUF file is read from its head: loading the file would dequantise all of it."""
    from popo_lite.policy.load import load_tokenizer

    if not recipe.id.endswith(".gguf"):
        return load_tokenizer(recipe)
    from gguf import GGUFReader

    from popo_lite.policy.gguf import read_tokenizer

    try:
        return read_tokenizer(GGUFReader(Path(recipe.id).expanduser()))
    except (OSError, ValueError, LookupError) as error:
        next_step = "name the folder or Hub id that the file was made from"
        raise ModelError(f"this GGUF file cannot be used: {error}", where="model.id", next_step=next_step) from error
