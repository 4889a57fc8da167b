"""Run code that a recipe or run folder names only if its user made it or trusts it. Free of torch.

What is trusted is remembered for the user, as direnv does it: a name with the file that it leads to, found without
importing anything, so the same name elsewhere is another one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

import click

from popo_lite.errors import UserInputError
from popo_lite.recipe import OwnFunction, PythonTestsFunction, Recipe
from popo_lite.recipe_file import to_toml
from popo_lite.recipe_rules import is_local_url

MODEL_CODE = ("model.",)
"""`only` of commands that load the model and grade nothing."""
GRADING_CODE = ("model.", "reward.", "rollout.environment.")
"""`only` of commands that also grade, and sample from the loaded model."""

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

    With `trust` all of it becomes trusted, for good. So do settings that `overrides`, as `--set` takes them, give by
    their own key. `only` has the beginnings of the keys whose code the caller may run.
    """
    recipes = [recipe] if isinstance(recipe, Recipe) else recipe
    typed = {override.partition("=")[0].strip() for override in overrides}
    named = {f"{key}: {what}": key for each in recipes for key, what in _items(each) if key.startswith(tuple(only))}
    trusted = _trusted() if named else set()
    new = [what for what in named if what not in trusted]
    if refused := [] if trust else [what for what in new if named[what] not in typed]:
        what = "\n".join(["it would run code that is not trusted yet:", *refused])
        next_step = "read it; then add --trust (in Python: trust=True), which is remembered"
        raise UserInputError(what, where=str(source), next_step=next_step)
    _remember(new)


def trust_own(recipe: Recipe) -> None:
    """Remember that the code in `recipe` is the user's own, so that the run's folder can be evaluated and exported."""
    with suppress(UserInputError):  # it runs all the same
        _remember(code_in(recipe))


def import_path() -> list[str]:
    """Return where the grading processes look for modules: as this process does, then in the working folder."""
    here = str(Path.cwd())
    return [*(entry or here for entry in sys.path), here]


def _items(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (key, what it runs and from where) for each piece of code. Together they identify it."""
    model, environment, server = recipe.model, recipe.rollout.environment, recipe.rollout.server
    if model.trust_remote_code:
        folder = Path(model.id).expanduser()
        place = str(folder.resolve()) if folder.exists() else f"{model.id} at {model.revision or 'any revision'}"
        yield "model.trust_remote_code", f"Python code that comes with {to_toml(place)}"
    for function in recipe.reward.functions or ():
        if isinstance(function, OwnFunction):
            yield "reward.functions", f"{to_toml(function.name)} {_place(function.name)}"
        if isinstance(function, PythonTestsFunction) and function.allow_uncontained:
            yield "reward.functions", "python_tests with allow_uncontained: code that the model writes, not contained"
    if environment.name is not None:
        options = f" with {to_toml(environment.options)}" if environment.options else ""
        yield "rollout.environment.name", f"{to_toml(environment.name)} {_place(environment.name)}{options}"
    for url in server.base_urls if recipe.rollout.engine == "server" else ():
        if not is_local_url(url):
            yield "rollout.server.base_urls", f"{to_toml(url)}, which gets the prompts and POPO_SERVER_TOKEN"


def _place(name: str) -> str:
    """Return where `module:attribute` is imported from. Nothing is imported, not even the parents of a dotted module.

    The file is that of the first part of the name: the rest is inside it.
    """
    top = name.partition(":")[0].partition(".")[0]
    if top in sys.builtin_module_names:
        return "(built into Python)"
    spec = None
    with suppress(ImportError, ValueError):
        # The second one asks the hooks of editable installations as well.
        spec = PathFinder.find_spec(top, import_path()) or importlib.util.find_spec(top)
    places = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    files = " and ".join(to_toml(str(Path(place).resolve())) for place in places)
    return f"in {files}" if files else "(not found)"


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
    path = _store()
    if not items or not {*items} - (trusted := _trusted()):
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = {"format": 1, "trusted": sorted({*trusted, *items})}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        partial.replace(path)
    except OSError as error:
        what, next_step = f"cannot be written: {error.strerror}", "set XDG_STATE_HOME to a folder of yours"
        raise UserInputError(what, where=str(path), next_step=next_step) from error
