"""Run code that a recipe or run folder names only if its user made it or trusts it. Free of torch.

What is trusted is remembered for the user, as direnv does it: a name with the file that it leads to, found without
importing anything, so the same name in another file must be trusted again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import click
from filelock import FileLock

from popo_lite.errors import UserInputError
from popo_lite.recipe import OwnFunction, PythonTestsFunction, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.recipe_rules import is_local_url

MODEL_CODE = ("model.",)
"""Key prefixes checked by commands that only load the model."""
GRADING_CODE = ("model.", "reward.", "rollout.environment.")
"""Key prefixes checked by commands that also grade, and sample from the loaded model."""
EVALUATION_CODE = ("model.", "reward.", "rollout.")
"""Key prefixes checked by commands that evaluate with the recipe's engine: as in training, but nothing is uploaded."""
SENDING = ("rollout.server.", "output.")
"""Key prefixes of what gets data of this machine and runs nothing here."""
NOT_FOUND = "(not found)"

trust_option = click.option(
    "--trust", is_flag=True, help="Run the code that the recipe or run names, and remember it: you have read it."
)


def code_in(recipe: Recipe) -> list[str]:
    """Return what the recipe runs beside popo-lite, and the other machines that it sends prompts to."""
    return [f"{key}: {what}" for key, what in _items(recipe)]


def refuse_untrusted(
    recipe: Recipe | Sequence[Recipe],
    source: str | Path,
    trust: bool = False,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = ("",),
) -> None:
    """Raise UserInputError if a recipe, read from the file or folder `source`, names code that is not trusted.

    With `trust` all of it becomes trusted, for good, except what is not found: a later file would be trusted unread. So
    do settings that `overrides`, as `--set` takes them, give by their own key. `only` has the beginnings of the keys
    whose code the caller may run.
    """
    recipes = [recipe] if isinstance(recipe, Recipe) else recipe
    typed = {override.partition("=")[0].strip() for override in overrides}
    named = {f"{key}: {what}": key for each in recipes for key, what in _items(each) if key.startswith(tuple(only))}
    trusted = _trusted() if named else set()
    new = [what for what in named if what not in trusted]
    if refused := [what for what in new if named[what] not in typed and (not trust or what.endswith(NOT_FOUND))]:
        what = "it would run code that is not trusted yet:"
        if all(named[each].startswith(SENDING) for each in refused):
            what = "it would send data to a place that is not trusted yet:"
        next_step = "read it; then add --trust (in Python: trust=True), which is remembered"
        if trust:
            next_step = "only what is found can be trusted: start popo-lite in the folder of that module"
        raise UserInputError("\n".join([what, *refused]), where=str(source), next_step=next_step)
    _remember(new)


def trust_own(recipe: Recipe) -> None:
    """Remember that the code in `recipe` is the user's own, so that the run's folder can be evaluated and exported."""
    with suppress(UserInputError):  # it runs all the same
        _remember(code_in(recipe))


def find_module(name: str) -> tuple[ModuleSpec | None, bool]:
    """Find the user's module without importing it; say whether the working folder has to be on the path for that.

    It is not there otherwise: libraries try to import optional packages, of which any folder may hold a namesake.
    """
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            return spec, False
    # Also for folders without an __init__.py, which Python joins to others of that name on the path.
    return PathFinder.find_spec(name, [*sys.path, str(Path.cwd())]), True


def _items(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, what it runs and from where) for each piece of code. Together they identify it."""
    model, environment, server = recipe.model, recipe.rollout.environment, recipe.rollout.server
    if model.trust_remote_code:
        folder = Path(model.id).expanduser()
        place = str(folder.resolve()) if folder.is_dir() else f"{model.id} at {model.revision or 'any revision'}"
        yield "model.trust_remote_code", f"Python code that comes with {to_toml(place)}"
    for function in recipe.reward.functions or ():
        if isinstance(function, OwnFunction):
            yield "reward.functions", f"{to_toml(function.name)} {_place(function.name)}"
        if isinstance(function, PythonTestsFunction) and function.allow_uncontained:
            yield "reward.functions", "python_tests with allow_uncontained: code that the model writes, not contained"
    if environment.name is not None:
        place = f"{to_toml(environment.name)} {_place(environment.name)}"
        yield "rollout.environment.name", place
        if environment.options:
            yield "rollout.environment.options", f"{to_toml(environment.options)} for {place}"
    for url in server.base_urls if recipe.rollout.engine == "server" else ():
        if not is_local_url(url):
            yield "rollout.server.base_urls", f"{to_toml(url)}, which gets the prompts and POPO_SERVER_TOKEN"
    if server.urls_file is not None and recipe.rollout.engine == "server":
        path = to_toml(str(Path(server.urls_file).expanduser().resolve()))
        yield "rollout.server.urls_file", f"{path}, whose servers get the prompts and POPO_SERVER_TOKEN"
    if (repo := recipe.output.hub_model_id) is not None:
        yield "output.hub_model_id", f"{to_toml(repo)}, to which adapters and recipe are uploaded with your login"


def _place(name: str) -> str:
    """Return where `module:attribute` is imported from. Nothing is imported, not even the parents of a dotted module.

    The file is that of the first part of the name: the rest is inside it.
    """
    top = name.partition(":")[0].partition(".")[0]
    spec, _ = find_module(top)
    if spec is not None and spec.origin in ("built-in", "frozen"):
        return "(built into Python)"
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    files = " and ".join(to_toml(str(Path(place).resolve())) for place in places)
    return f"in {files}" if files else NOT_FOUND


def _store() -> Path:
    """Return the user's file of what is trusted."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "popo-lite" / "trusted.json"


def _trusted() -> set[str]:
    path = _store()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["trusted"])
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"what you have trusted cannot be read ({type(error).__name__})"
        raise UserInputError(what, where=str(path), next_step="delete this file and trust the code again") from error


def _remember(items: Sequence[str]) -> None:
    path, found = _store(), {item for item in items if not item.endswith(NOT_FOUND)}
    if not found or found <= _trusted():
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # the runs of a sweep write at the same time
            content = {"format": 1, "trusted": sorted(_trusted() | found)}
            partial = path.with_suffix(".partial")
            with os.fdopen(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            partial.replace(path)
    except OSError as error:
        what, next_step = f"cannot be written: {error.strerror}", "set XDG_STATE_HOME to a folder of yours"
        raise UserInputError(what, where=str(path), next_step=next_step) from error
