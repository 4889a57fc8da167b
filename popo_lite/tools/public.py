"""Show a run's settings to others: without servers, folders and other private values. Free of torch.

Of a model, adapter, dataset or schema that is a local file or a URL only the last part of the name is shown. The output
folder, servers and the options of an environment are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.resuming import RULES

LOCAL_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gguf")
SOURCES = ("model.id", "lora.init_from", "data.dataset", "eval.dataset")  # local, or on the Hub
HIDDEN = ("output.", "rollout.server.", "rollout.environment.options")


def public_recipe(recipe: Recipe) -> Recipe:
    """Return `recipe` without what is private."""
    hidden = {
        "output": OutputRecipe(), "rollout.server": type(recipe.rollout.server)(), "rollout.environment.options": {},
    }  # fmt: skip
    public = recipe.with_values(hidden).to_dict()
    for section, name in (key.split(".") for key in (*SOURCES, "reward.functions")):
        if name in public.get(section, {}):
            public[section][name] = _public(f"{section}.{name}", public[section][name])
    return Recipe.model_validate(public)


def public_changes(summary: Mapping[str, Any]) -> Iterator[tuple[int, str, str, str]]:
    """Yield step, key, value before and value now of each change on resuming, without settings that are private."""
    for change in summary.get("changes") or ():
        if (key := change["key"]) in RULES and not key.startswith(HIDDEN):
            before, now = (
                "unset" if change[at] is None else to_toml(_public(key, change[at])) for at in ("before", "now")
            )
            yield change["step"], key, before, now


def is_local(source: str) -> bool:
    """Return True if a setting names a local file or folder, or a URL, and not something on the Hub."""
    path = Path(source).expanduser()
    return (
        path.exists() or path.is_absolute() or source.startswith(".") or "://" in source or path.suffix in LOCAL_FILES
    )


def known_as(source: str) -> str:
    """Return the public name of a model or dataset: its Hub id, or the last part of a local path."""
    return Path(source).expanduser().name if is_local(source) else source


def _public(key: str, value: Any) -> Any:
    """Return the value of a recipe's key with the last part of a local path or URL in place of the whole."""
    if key in SOURCES and isinstance(value, str):
        return known_as(value)
    if key == "reward.functions" and isinstance(value, list | tuple):
        return [_public_function(function) if isinstance(function, Mapping) else function for function in value]
    return value


def _public_function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    file = function.get("schema_file")
    return function if file is None else {**function, "schema_file": Path(str(file)).name}
