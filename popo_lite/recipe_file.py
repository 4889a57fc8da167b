"""Reading and writing recipes: TOML files, `--set` overrides, and every fault of them at once. Free of torch."""

from __future__ import annotations

import json
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from popo_lite.errors import RecipeError, nearest
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import impossible_combinations

SECTIONS: Mapping[str, Mapping[str, FieldInfo]] = {name: type(section).model_fields for name, section in Recipe()}
"""Section -> key -> what the schema says of it."""

SHOW_KEYS = "popo-lite recipe show   (every key with its meaning, allowed values and default)"
SWEEPS = "ablations"
"""Subfolder of the shipped recipes that holds sweep files, which are no recipes."""
LONGEST_VALUE = 120
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
BOUND_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at the path `source`, or the shipped recipe of that name, and apply `overrides`.

    An override is `section.key=value`. Its value is read as TOML (`8`, `[4, 5]`, `"text"`) and otherwise taken
    as text as it stands, so that `model.id=Qwen/Qwen2.5-1.5B` needs no quotes. A later override wins.

    Raises RecipeError with one line for every fault of file and overrides.
    """
    path = find_recipe(source)
    faults: list[str] = []
    written = {
        setting.name: setting
        for setting in (*_file_settings(path, str(source), faults), *_override_settings(overrides, faults))
    }
    for name, setting in list(written.items()):
        section, _, key = name.partition(".")
        if key not in SECTIONS[section]:
            faults.append(setting.fault(_unknown_key(section, key)))
            del written[name]

    wrong = _value_faults(written)
    faults += [written[name].fault(why) for name, why in wrong.items()]
    # Faulty keys fall back to their defaults here only so that the other settings can be checked together.
    recipe = _build(setting for name, setting in written.items() if name not in wrong)
    for names, value, why in impossible_combinations(recipe):
        if wrong.keys().isdisjoint(names):
            origin = next((written[name].origin for name in names if name in written), f"{source}: ")
            faults.append(_Setting(name=names[0], value=value, origin=origin).fault(why))
    if faults:
        raise RecipeError("\n".join(faults), next_step=SHOW_KEYS)
    return recipe


def shipped_folder() -> Path:
    """The folder of the recipes that come with the package."""
    installed, checkout = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else checkout


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package, sorted; a name in a subfolder is `folder/name`."""
    folder = shipped_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.toml"))
        if folder / SWEEPS not in path.parents
    }


def find_recipe(source: str | Path) -> Path:
    """The file that `source` means: an existing file, else the shipped recipe of exactly that name.

    A path such as `recipes/tiny_cpu.toml` that does not exist is refused although a recipe of that name is
    shipped: whoever writes a path means that file, and would not notice that another one ran.
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
    """The recipe as TOML with every key that is set; reading it gives an equal recipe."""
    return "\n".join(
        "".join([f"[{name}]\n", *(f"{key} = {to_toml(value)}\n" for key, value in section.items())])
        for name, section in recipe.to_dict().items()
    )


def to_toml(value: Any) -> str:
    """A value on one line of TOML; a table is written inline."""
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
        case _:  # integers, and the dates and times that only a faulty recipe holds
            return str(value)


def allowed_values(field: FieldInfo) -> str:
    """What a key may hold, in plain words: `a whole number, at least 1`, or its values as TOML."""
    kind, bounds = _kind_and_bounds(field.annotation, field.metadata)
    return f"{kind}, {bounds}" if bounds else kind


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A value as somebody wrote it. `origin` is the prefix that says where: `recipes/x.toml: ` or `--set `."""

    name: str
    value: Any
    origin: str

    def fault(self, why: str) -> str:
        shown = to_toml(self.value)
        if len(shown) > LONGEST_VALUE:
            shown = f"{shown[: LONGEST_VALUE - 4]} ..."
        return f"{self.origin}{self.name} = {shown}: {why}"


def _file_settings(path: Path, shown_as: str, faults: list[str]) -> Iterator[_Setting]:
    """The settings of a file in known sections; whatever lies outside of them is added to `faults`."""
    for section, table in read_toml(path, shown_as).items():
        if section in SECTIONS and isinstance(table, dict):
            for key, value in table.items():
                yield _Setting(name=f"{section}.{_toml_key(key)}", value=value, origin=f"{shown_as}: ")
        elif isinstance(table, dict):
            faults.append(f"{shown_as}: [{_toml_key(section)}]: {_unknown_section(section)}")
        else:
            why = f"must be a section, written [{section}]" if section in SECTIONS else _without_section(section)
            faults.append(_Setting(name=_toml_key(section), value=table, origin=f"{shown_as}: ").fault(why))


def _override_settings(overrides: Iterable[str], faults: list[str]) -> Iterator[_Setting]:
    """The settings of `--set`; those that name no known section or hold no value are added to `faults`."""
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        section, dot, key = name.partition(".")
        if not (equals and section and key):
            why = _without_section(name) if equals and name and not dot else "must be section.key=value"
            faults.append(f"--set {to_toml(override)}: {why}")
        elif section not in SECTIONS:
            faults.append(f"--set {name}: {_unknown_section(section)}")
        elif not text:
            faults.append(f"--set {name}: has no value; the form is section.key=value")
        else:
            try:
                yield _Setting(name=name, value=_override_value(text), origin="--set ")
            except ValueError as error:
                faults.append(_Setting(name=name, value=text, origin="--set ").fault(str(error)))


def _override_value(text: str) -> Any:
    """Read as TOML, else text as it stands. Raises ValueError with a reason for what cannot be meant as text."""
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
    """The document at `path`. Raises RecipeError, in which the file is called `shown_as`, with line and column."""
    next_step = f"mend {path}"
    try:
        # Some editors put a byte order mark in front, which TOML does not know.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown_as}: is not UTF-8 text (byte {error.start})", next_step=next_step) from error
    except OSError as error:
        raise RecipeError(f"{shown_as}: cannot be read ({error.strerror})", next_step=next_step) from error
    except ValueError as error:
        found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
        message, line, column = found.groups() if found else (str(error), None, None)
        where = f"line {line}, column {column}" if line else "end of file"
        raise RecipeError(f"{shown_as}: {where}: not valid TOML: {message}", next_step=next_step) from error


def _build(settings: Iterable[_Setting]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        section, _, key = setting.name.partition(".")
        sections.setdefault(section, {})[key] = _with_tuples(setting.value)
    return Recipe.model_validate(sections)


def _value_faults(written: Mapping[str, _Setting]) -> dict[str, str]:
    """Name -> what its value must be, for every value that the schema refuses."""
    try:
        _build(written.values())
    except ValidationError as error:
        errors: dict[str, set[str]] = {}
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            # One key can have several errors: one for each member of a union, or of a list.
            section, key, *_ = detail["loc"]
            errors.setdefault(f"{section}.{key}", set()).add(detail["type"])
        return {name: _must_be(written[name], found) for name, found in errors.items()}
    return {}


def _must_be(setting: _Setting, errors: set[str]) -> str:
    section, _, key = setting.name.partition(".")
    field = SECTIONS[section][key]
    must = f"must be {allowed_values(field)}"
    if errors <= BOUND_ERRORS:
        return f"must be {_kind_and_bounds(field.annotation, field.metadata)[1]}"
    if errors == {"finite_number"}:
        return must.replace("a number", "a finite number")
    if errors == {"literal_error"} and isinstance(setting.value, str):
        guess = nearest(setting.value, get_args(field.annotation))
        return f"{must}; did you mean {to_toml(guess)}?" if guess else must
    return must


def _kind_and_bounds(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[str, str]:
    """(type or values, range or "") of a schema annotation, in plain words."""
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
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of text"}
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


def _unknown_key(section: str, key: str) -> str:
    if homes := _homes(key):
        return f"belongs to {homes}"
    if guess := nearest(key, SECTIONS[section]):
        return f"unknown key; did you mean {section}.{guess}?"
    if guess := nearest(key, (key for keys in SECTIONS.values() for key in keys)):
        return f"unknown key; did you mean {guess} of {_homes(guess)}?"
    return f"unknown key; [{section}] has {', '.join(SECTIONS[section])}"


def _without_section(key: str) -> str:
    homes = _homes(key)
    return f"belongs to {homes}" if homes else f"stands outside a section; there are {', '.join(SECTIONS)}"


def _homes(key: str) -> str:
    return " or ".join(f"[{section}]" for section, keys in SECTIONS.items() if key in keys)


def _with_tuples(value: Any) -> Any:
    """`value` with its lists as tuples: the schema is frozen, and strict about it."""
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else to_toml(key)
