"""Show a run's settings to others: without servers, folders and other private values. Free of torch.

Of a model, adapter, dataset or schema that is a local file or a URL only the last part of the name is shown. The output
folder, servers and the options of an environment are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from popo_lite.recipe import OutputRecipe, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.recipe_rules import read_server_urls
from popo_lite.resuming import RULES

LOCAL_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".gguf")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SOURCES = ("model.id", "lora.init_from", "data.dataset", "eval.dataset")  # local, or on the Hub
LEFT_OUT = "..."
PATH_ENDS = " \t\n\"'`=([<,"
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
    """Return True if a setting names a local file or folder, or a URL, and not something on the Hub.

    A folder NAME/NAME that is not below the working folder looks like an id on the Hub.
    """
    is_id = HUB_ID.fullmatch(source) is not None and not source.endswith(LOCAL_FILES)
    return source != "tiny" and (not is_id or Path(source).exists())


def known_as(source: str) -> str:
    """Return the public name of a model or dataset: its Hub id, or the last part of a local path."""
    return _last_part(source) if is_local(source) else source


def private_places(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Return what `hide_places` replaces: the places that a run's recipe names, and its `folder`; longest first."""
    values, server, output, name = recipe.to_dict(), recipe.rollout.server, recipe.output, folder.resolve().name
    sources = [values.get(section, {}).get(key) for section, key in (source.split(".") for source in SOURCES)]
    functions = [function for function in values["reward"].get("functions", ()) if isinstance(function, Mapping)]
    sources += [function.get("schema_file") for function in functions]
    places = {source: known_as(source) for source in sources if source}
    places |= dict.fromkeys([str(Path(output.dir, name)), str(folder), str(folder.resolve())], name)
    places |= dict.fromkeys([output.dir, *map(_host, [*server.base_urls, *_listed(server.urls_file)])], LEFT_OUT)
    places |= {place: LEFT_OUT for place in (server.shared_dir, server.urls_file, output.hub_model_id) if place}
    places |= {str(Path(place).expanduser()): shown for place, shown in places.items() if place.startswith("~")}
    # A name without a folder, such as "runs", is not private, and may be any word.
    private = {
        place: shown for place, shown in places.items() if place != shown and re.search(r".[/\\:]|[/\\].", place)
    }
    return dict(sorted(private.items(), key=lambda item: -len(item[0])))


def hide_places(text: str, places: Mapping[str, str]) -> str:
    """Return `text` with public names for `private_places`."""
    for place, shown in places.items():
        *parts, last = text.split(place)
        # A relative path may stand there with the folder that it was relative to.
        text = "".join(part[: 1 + max(map(part.rfind, PATH_ENDS))] + shown for part in parts) + last
    return text


def _listed(urls_file: str | None) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return read_server_urls(Path(urls_file).expanduser(), allow_http=True)[0] if urls_file else []
    return []


def _host(url: str) -> str:
    return urlsplit(url).netloc or url


def _last_part(path: str) -> str:
    """Return the last part of a path of any system, or of a URL."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _public(key: str, value: Any) -> Any:
    """Return the value of a recipe's key with the last part of a local path or URL in place of the whole."""
    if key in SOURCES and isinstance(value, str):
        return known_as(value)
    if key == "reward.functions" and isinstance(value, list | tuple):
        return [_public_function(function) if isinstance(function, Mapping) else function for function in value]
    return value


def _public_function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    file = function.get("schema_file")
    return function if file is None else {**function, "schema_file": _last_part(str(file))}
