"""Read and write recipes: TOML files, `--set` overrides, and all errors of a recipe at once. Free of torch."""

from __future__ import annotations

import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from popo_lite.errors import RecipeError, nearest
from popo_lite.recipe import OBJECTIVES, AnyObjective, Recipe, Section
from popo_lite.recipe_rules import FOREIGN_KEYS, impossible_combinations

SHOW_KEYS = "popo-lite recipe show   (every key with its meaning, allowed values and default)"
SWEEPS = "ablations"
"""Subfolder of the shipped recipes that holds sweep files."""
LONGEST_VALUE = 120
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def sections_of(section: type[Section] | None = None, prefix: str = "", algorithm: str = "popo") -> dict[str, Any]:
    """Return section name (`rollout.vllm`) -> section class, in the order of the schema."""
    found: dict[str, Any] = {}
    for name, field in (section or Recipe).model_fields.items():
        annotation = field.annotation
        if name == "objective" and section is None:
            annotation = OBJECTIVES[algorithm]
        if isinstance(annotation, type) and issubclass(annotation, Section):
            found[prefix + name] = annotation
            found |= sections_of(annotation, f"{prefix}{name}.")
    return found


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the keys of a section without its subsections."""
    return {name: field for name, field in section.model_fields.items() if not isinstance(field.default, Section)}


SECTIONS: Mapping[str, type[Section]] = sections_of()


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at the path `source`, or the shipped recipe of that name, and apply `overrides`.

    An override is `section.key=value`. Its value is read as TOML (`8`, `[4, 5]`, `"text"`) and otherwise taken
    as text, so that `model.id=Qwen/Qwen2.5-1.5B` needs no quotes. A later override wins.

    Raises RecipeError with one line for every error of file and overrides.
    """
    path = find_recipe(source)
    errors: list[str] = []
    written = {
        setting.name: setting
        for setting in (*_file_settings(path, str(source), errors), *_override_settings(overrides, errors))
    }
    schema = _schema(written)
    for name, setting in list(written.items()):
        if name not in schema:
            errors.append(setting.error(_unknown_key(name, schema)))
            del written[name]

    wrong = _wrong_values(written, schema)
    errors += [written[name].error(why) for name, why in wrong.items()]
    # Wrong keys fall back to their defaults here only so that the other settings can be checked together.
    recipe = _build(setting for name, setting in written.items() if name not in wrong)
    for names, value, why in impossible_combinations(recipe):
        if wrong.keys().isdisjoint(names):
            origin = next((written[name].origin for name in names if name in written), f"{source}: ")
            errors.append(_Setting(name=names[0], value=value, origin=origin).error(why))
    if errors:
        raise RecipeError("\n".join(errors), next_step=SHOW_KEYS)
    return recipe


def shipped_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed, checkout = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else checkout


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes, sorted; a name in a subfolder is `folder/name`."""
    folder = shipped_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
        if folder / SWEEPS not in path.parents
    }


def find_recipe(source: str | Path) -> Path:
    """Return the file that `source` names: an existing file, else the shipped recipe of exactly that name.

    A path such as `recipes/tiny_cpu.toml` that does not exist is refused although a recipe of that name is
    shipped: the user meant that file and would not notice that another one ran.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = str(source).removesuffix(".toml")
    if name in shipped:
        return shipped[name]
    what = f"{source}: is a folder, not a recipe" if path.is_dir() else f"{source}: no such recipe"
    guess = nearest(name, shipped) or nearest(path.stem, shipped)
    if guess:
        what += f"; did you mean the shipped recipe {guess}?"
    raise RecipeError(f"{what} (shipped: {', '.join(shipped)})", next_step="popo-lite recipe list")


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as TOML with every key that is set; reading it gives an equal recipe."""
    values = flatten(recipe)
    return "\n".join(
        "".join([f"[{name}]\n", *(f"{key} = {to_toml(values[f'{name}.{key}'])}\n" for key in keys)])
        for name, section in sections_of(algorithm=recipe.objective.algorithm).items()
        if (keys := [key for key in keys_of(section) if f"{name}.{key}" in values])
    )


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return `section.key` -> value for every key that is set."""
    document = recipe.to_dict()
    values: dict[str, Any] = {}
    for name, section in sections_of(algorithm=recipe.objective.algorithm).items():
        table = document
        for part in name.split("."):
            table = table[part]
        values |= {f"{name}.{key}": table[key] for key in keys_of(section) if key in table}
    return values


def to_toml(value: Any) -> str:
    """Return a value on one line of TOML; a table is written inline."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            # JSON's escapes are TOML's as well, but JSON lets through DEL, the C1 controls, two separators that
            # end a line, and lone surrogates.
            text = json.dumps(value, ensure_ascii=False)
            return re.sub("[\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)
        case float():
            return repr(value).replace("e-0", "e-")
        case list() | tuple():
            return f"[{', '.join(map(to_toml, value))}]"
        case dict():
            pairs = ", ".join(f"{_toml_key(key)} = {to_toml(item)}" for key, item in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case _:  # integers, and the dates and times that only a wrong recipe holds
            return str(value)


def allowed_values(field: FieldInfo) -> str:
    """Describe the values of a key: `a whole number, at least 1`, or its values as TOML."""
    kind, bounds = _kind_and_bounds(field.annotation, field.metadata)
    return f"{kind}, {bounds}" if bounds else kind


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A value as the user wrote it. `origin` is the prefix that says where: `recipes/x.toml: ` or `--set `."""

    name: str
    value: Any
    origin: str

    def error(self, why: str) -> str:
        shown = to_toml(self.value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[: LONGEST_VALUE - 4]} ..."
        return f"{self.origin}{self.name} = {shown}: {why}"


def _file_settings(path: Path, shown_as: str, errors: list[str]) -> list[_Setting]:
    """Return the settings of a file in known sections; add everything else to `errors`."""
    settings: list[_Setting] = []
    origin = f"{shown_as}: "

    def visit(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = prefix + _toml_key(key)
            if name in SECTIONS:
                if isinstance(value, dict):
                    visit(value, f"{name}.")
                else:
                    errors.append(_Setting(name=name, value=value, origin=origin).error(f"must be a section, [{name}]"))
            elif prefix:
                settings.append(_Setting(name=name, value=value, origin=origin))
            elif isinstance(value, dict):
                errors.append(f"{origin}[{name}]: {_unknown_section(name)}")
            else:
                errors.append(_Setting(name=name, value=value, origin=origin).error(_without_section(name)))

    visit(read_toml(path, shown_as), "")
    return settings


def _override_settings(overrides: Iterable[str], errors: list[str]) -> list[_Setting]:
    """Return the settings of `--set`; add those that name no known section or hold no value to `errors`."""
    settings = []
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        section, _, key = name.rpartition(".")
        if not (equals and section and key):
            why = _without_section(name) if equals and name and not section else "must be section.key=value"
            errors.append(f"--set {to_toml(override)}: {why}")
        elif section not in SECTIONS:
            errors.append(f"--set {name}: {_unknown_section(section)}")
        elif not text:
            errors.append(f"--set {name}: has no value; the form is section.key=value")
        else:
            try:
                settings.append(_Setting(name=name, value=_override_value(text), origin="--set "))
            except ValueError as error:
                errors.append(_Setting(name=name, value=text, origin="--set ").error(str(error)))
    return settings


def _override_value(text: str) -> Any:
    """Read as TOML, else take as text. Raises ValueError with a reason for what cannot be meant as text."""
    # An argument's bytes that were not UTF-8 arrive as lone surrogates, which no TOML file can hold.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not UTF-8 text")
    try:
        document = tomllib.loads(f"value = {text}")
    except ValueError as error:
        # `[q_proj, v_proj]` lacks its quotes; as text it would be taken for one module of that name.
        if text[0] in "[{\"'":
            raise ValueError("is not valid TOML; text inside a list or table needs quotes") from error
        return text
    return document["value"] if len(document) == 1 else text


def read_toml(path: Path, shown_as: str) -> dict[str, Any]:
    """Read the document at `path`. Raises RecipeError, which calls the file `shown_as`, with line and column."""
    next_step = f"fix {path}"
    try:
        # Some editors put a byte order mark in front, which TOML does not know.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown_as}: is not UTF-8 text (byte {error.start})", next_step=next_step) from error
    except OSError as error:
        raise RecipeError(f"{shown_as}: cannot be read ({error.strerror})", next_step=next_step) from error
    except ValueError as error:
        raise RecipeError(f"{shown_as}: not valid TOML: {error}", next_step=next_step) from error


def _schema(written: Mapping[str, _Setting]) -> dict[str, FieldInfo]:
    """Return `section.key` -> field for the algorithm that the settings choose."""
    chosen = written.get("objective.algorithm")
    algorithm = chosen.value if chosen and chosen.value in OBJECTIVES else "popo"
    return {
        f"{name}.{key}": field
        for name, section in sections_of(algorithm=algorithm).items()
        for key, field in keys_of(section).items()
    }


def _build(settings: Iterable[_Setting]) -> Recipe:
    document: dict[str, Any] = {}
    for setting in settings:
        *parents, key = setting.name.split(".")
        table = document
        for parent in parents:
            table = table.setdefault(parent, {})
        table[key] = _with_tuples(setting.value)
    return Recipe.model_validate(document)


def _wrong_values(written: Mapping[str, _Setting], schema: Mapping[str, FieldInfo]) -> dict[str, str]:
    """Return name -> what the value must be, for every value that the schema refuses."""
    algorithm = written.get("objective.algorithm")
    if algorithm and algorithm.value not in OBJECTIVES:
        others = {name: setting for name, setting in written.items() if not name.startswith("objective.")}
        must = f"must be one of {', '.join(map(to_toml, OBJECTIVES))}"
        guess = nearest(str(algorithm.value), OBJECTIVES)
        why = f"{must}; did you mean {to_toml(guess)}?" if guess else must
        return {"objective.algorithm": why, **_wrong_values(others, schema)}
    try:
        _build(written.values())
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            # The location also names the union member or the item that was refused.
            parts = [str(part) for part in detail["loc"]]
            name = next(n for end in range(1, len(parts) + 1) if (n := _without_tag(parts[:end])) in written)
            wrong[name] = _must_be(written[name], schema[name])
        return wrong
    return {}


def _without_tag(parts: Sequence[str]) -> str:
    return ".".join([*parts[:1], *parts[2:]] if parts[0] == "objective" else parts)


def _must_be(setting: _Setting, field: FieldInfo) -> str:
    must = f"must be {allowed_values(field)}"
    if get_origin(field.annotation) is Literal and isinstance(setting.value, str):
        guess = nearest(setting.value, get_args(field.annotation))
        return f"{must}; did you mean {to_toml(guess)}?" if guess else must
    return must


def _kind_and_bounds(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[str, str]:
    """Return (type or values, range or "") of a schema annotation, in plain words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind_and_bounds(arguments[0], arguments[1].metadata)
    if origin in (Union, types.UnionType):
        members = [_kind_and_bounds(member, metadata) for member in arguments if member is not types.NoneType]
        return " or ".join(kind for kind, _ in members), members[0][1] if len(members) == 1 else ""
    if origin is Literal:
        values = ", ".join(map(to_toml, arguments))
        return (f"one of {values}" if len(arguments) > 1 else values), ""
    if origin is dict:
        return "a table of columns, each with true or false, a number, text, or a list of these", ""
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        tuple: "a list of text",
    }
    bounds = [
        f"{words} {getattr(bound, name):g}"
        for bound in metadata
        for name, words in BOUNDS.items()
        if hasattr(bound, name)
    ]
    return kinds[origin or annotation], " and ".join(bounds)


def _unknown_section(section: str) -> str:
    guess = nearest(section, SECTIONS)
    return f"unknown section; did you mean [{guess}]?" if guess else f"unknown section; there are {', '.join(SECTIONS)}"


def _unknown_key(name: str, schema: Mapping[str, FieldInfo]) -> str:
    section, _, key = name.rpartition(".")
    if section == "objective" and (owners := [a for a, kind in OBJECTIVES.items() if key in kind.model_fields]):
        return f"belongs to algorithm {' or '.join(map(to_toml, owners))}; leave the key out"
    if key in FOREIGN_KEYS:
        return FOREIGN_KEYS[key]
    if homes := _sections_with(key):
        return f"belongs to {homes}"
    own = [other.rpartition(".")[2] for other in schema if other.rpartition(".")[0] == section]
    if guess := nearest(key, own):
        return f"unknown key; did you mean {section}.{guess}?"
    if guess := nearest(key, (other.rpartition(".")[2] for other in schema)):
        return f"unknown key; did you mean {guess} of {_sections_with(guess)}?"
    return f"unknown key; [{section}] has {', '.join(own)}"


def _without_section(key: str) -> str:
    if key in FOREIGN_KEYS:
        return FOREIGN_KEYS[key]
    homes = _sections_with(key)
    return f"belongs to {homes}" if homes else f"stands outside a section; there are {', '.join(SECTIONS)}"


def _sections_with(key: str) -> str:
    sections: dict[str, type[AnyObjective | Section]] = dict(SECTIONS)
    return " or ".join(f"[{name}]" for name, section in sections.items() if key in keys_of(section))


def _with_tuples(value: Any) -> Any:
    """Return `value` with its lists as tuples: the schema is frozen, and strict about it."""
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else to_toml(key)
