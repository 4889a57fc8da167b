"""Read and write recipes: TOML files, `--set` overrides, and all errors of a recipe at once. Free of torch."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from popo_lite.errors import RecipeError, nearest
from popo_lite.formats import KEY, checked
from popo_lite.recipe import FUNCTIONS, OBJECTIVES, Objective, OwnFunction, Recipe, Section
from popo_lite.recipe_rules import NOT_RENAMED, RENAMED, impossible_combinations
from popo_lite.redaction import has_login, redact

SHOW_KEYS = "popo-lite recipe show   (every key with its meaning, allowed values and default)"
LONGEST_VALUE = 120
LONGEST_PATH = 4000  # Linux opens no longer ones, and no part of more than 255 bytes
TEXTS = ("chat_template", "system_prompt", "column")  # ends of keys whose text may have any characters
PROSE = ("data.system_prompt", "data.chat_template", "reward.functions", "rollout.server.base_urls")
"""Settings that may contain text that looks like a login, or have a rule of their own for it."""
HOLDS_LOGIN = "holds a login, which the run's files would keep; leave it out"
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
KINDS = {"boolean": "true or false", "integer": "a whole number", "number": "a finite number", "string": "text",
         "array": "a list of text",
         "date": "a date, such as 2026-01-31",
         "object": "a table whose values are true or false, numbers or text"}  # fmt: skip
"""Types and bounds of JSON Schema in plain words."""


def sections_of(algorithm: str = "popo") -> dict[str, type[Section]]:
    """Return section name (`rollout.vllm`) -> its class, in the order of the schema."""
    found: dict[str, type[Section]] = {}
    for name, field in Recipe.model_fields.items():
        found[name] = OBJECTIVES[algorithm] if name == "objective" else type(field.default)
        inner = {f"{name}.{key}": type(part.default) for key, part in found[name].model_fields.items()}
        found |= {key: kind for key, kind in inner.items() if issubclass(kind, Section)}
    return found


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the keys of a section without its subsections; `algorithm` has the values of all algorithms."""
    fields = {name: field for name, field in section.model_fields.items() if not isinstance(field.default, Section)}
    return {**fields, "algorithm": Objective.model_fields["algorithm"]} if "algorithm" in fields else fields


def schema_of(algorithm: str) -> dict[str, FieldInfo]:
    """Return `section.key` -> field for every key of a recipe with this algorithm."""
    sections = sections_of(algorithm).items()
    return {f"{name}.{key}": field for name, section in sections for key, field in keys_of(section).items()}


SECTIONS = sections_of()
THERE_ARE = f"there are {', '.join(SECTIONS)}"


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Recipe:
    """Read the recipe at the path `source`, or the shipped recipe of that name, and apply `overrides`.

    An override is `section.key=value`. Its value is read as TOML (`8`, `[4, 5]`, `"text"`) and otherwise taken as text,
    so that `model.id=Qwen/Qwen2.5-1.5B` needs no quotes. `data.system_prompt=` unsets a key that may be unset. A later
    override wins. Raises RecipeError with one line for every error of file and overrides.

    `stored` says that a run wrote the file, maybe an older version without a stamp (`formats`).
    """
    errors: list[str] = []
    path = find_recipe(source)
    document = read_toml(path, str(source))
    if stored or KEY in document:
        document = checked(document, path)
    written = {name: (f"{source}: ", value) for name, value in _settings(document)}
    for override in overrides:
        try:
            name, value = _read_override(override)
            written[name] = ("--set ", value)
        except ValueError as error:
            errors.append(f"--set {error}")
    algorithm = str(written.get("objective.algorithm", ("", "popo"))[1] or "")
    if algorithm not in OBJECTIVES:  # which other keys [objective] may have is unknown then
        written = {n: s for n, s in written.items() if n == "objective.algorithm" or not n.startswith("objective.")}
        algorithm = "popo"
    schema, values, wrong = schema_of(algorithm), dict[str, Any](), dict[str, str]()
    for name, (_, value) in written.items():
        if name not in schema:
            wrong[name] = _unknown_key(name, value, algorithm)
            continue
        try:
            values[name] = type_of(schema[name]).validate_python(value)
            if isinstance(value, str) and not value.strip():
                unset = f"leave the key out, or unset it by --set {name}=" if schema[name].default is None else "set it"
                wrong[name] = f"is empty; {unset}"
            elif isinstance(value, str) and not name.endswith(TEXTS) and not _is_name(value):
                wrong[name] = "is not a valid path: too long, or contains unprintable characters; correct it"
        except ValidationError as error:
            if name == "reward.functions" and (place := error.errors()[0]["loc"]):
                wrong[name] = _wrong_function(value, place)
                continue
            guess = nearest(str(value), type_of(schema[name]).json_schema().get("enum", ())) if value else None
            meant = f"; did you mean {to_toml(guess)}?" if guess else ""
            wrong[name] = f"must be {allowed_values(schema[name])}{meant}"
    errors += [f"{written[name][0]}{_shown(name, written[name][1])}: {why}" for name, why in wrong.items()]
    # Wrong keys keep their defaults here only so that the other settings can be checked together.
    recipe = Recipe.model_validate({"objective": {"algorithm": algorithm}}).with_values(values)
    settings = flatten(recipe)
    logins = [([name], HOLDS_LOGIN) for name, value in settings.items() if name not in PROSE and has_login(str(value))]
    for names, why in [*impossible_combinations(recipe), *logins]:
        if wrong.keys().isdisjoint(names):
            origin = next((written[name][0] for name in names if name in written), f"{source}: ")
            errors.append(f"{origin}{_shown(names[0], settings.get(names[0]))}: {why}")
    if errors:
        # Not only where it is printed: callers of the library show errors themselves.
        raise RecipeError(redact("\n".join(errors)), next_step=SHOW_KEYS)
    return recipe


def _is_name(text: str) -> bool:
    """Say whether `text` can name a file or something on the Hub.

    Names go into model cards and commands, where a line break would begin something else.
    """
    return (
        text.isprintable() and len(text) <= LONGEST_PATH and all(len(part.encode()) <= 255 for part in text.split("/"))
    )


def shipped_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    installed, checkout = Path(__file__).parent / "recipes", Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else checkout


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes, sorted; a name in a subfolder is `folder/name`."""
    folder = shipped_folder()
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.toml"))}
    return {name: path for name, path in files.items() if not name.startswith("ablations/")}


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of the sweeps that come with the package, sorted."""
    return {path.stem: path for path in sorted((shipped_folder() / "ablations").glob("*.toml"))}


def find_recipe(source: str | Path) -> Path:
    """Return the file that `source` names: an existing file, else the shipped recipe of exactly that name.

    A missing path such as `recipes/tiny_cpu.toml` is refused: the user would not notice that a shipped recipe ran.
    """
    if not _is_name(str(source)):
        what = "is not a valid path: too long, or contains unprintable characters"
        raise RecipeError(f"{to_toml(str(source))[:LONGEST_VALUE]}: {what}", next_step="popo-lite recipe list")
    path, name, shipped = Path(source), str(source).removesuffix(".toml"), shipped_recipes()
    if path.is_file() or name in shipped:
        return path if path.is_file() else shipped[name]
    is_file = path.suffix == ".toml" or len(path.parts) > 1
    what = "is a folder, not a recipe" if path.is_dir() else "no such file" if is_file else "no such recipe"
    if guess := nearest(name, shipped) or nearest(path.stem, shipped):
        what += f"; did you mean the shipped recipe {guess}?"
    raise RecipeError(f"{source}: {what}", next_step="popo-lite recipe list shows them; popo-lite init writes one")


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as TOML with every key that is set; reading it gives an equal recipe."""
    tables: dict[str, list[str]] = {}
    for name, value in flatten(recipe).items():
        section, _, key = name.rpartition(".")
        tables.setdefault(section, [f"[{section}]\n"]).append(f"{key} = {to_toml(value)}\n")
    return "\n".join("".join(lines) for lines in tables.values())


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return `section.key` -> value for every key that is set."""
    return dict(_settings(recipe.to_dict()))


def to_toml(value: Any) -> str:
    """Return a value on one line of TOML; a table is written inline."""
    if isinstance(value, str):
        # JSON's escapes are TOML's as well, but JSON lets through DEL, the C1 controls, separators that end a line,
        # marks that reverse the order of what is read, and lone surrogates.
        shown = (c if c.isprintable() else f"\\U{ord(c):08x}" if c > "\uffff" else f"\\u{ord(c):04x}" for c in
                 json.dumps(value, ensure_ascii=False))  # fmt: skip
        return "".join(shown)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, dict):
        pairs = ", ".join(f"{_toml_key(key)} = {to_toml(item)}" for key, item in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    # Integers, and the dates and times that only a wrong recipe holds.
    return str(value).lower() if isinstance(value, bool) else str(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else to_toml(key)


def type_of(field: FieldInfo) -> TypeAdapter[Any]:
    """Return what validates the values of a key."""
    annotated: Any = Annotated[field.annotation, Field(), *field.metadata]
    return TypeAdapter(annotated, config=Section.model_config)


def allowed_values(field: FieldInfo) -> str:
    """Describe the values of a key: `a whole number, at least 1`, or its values as TOML."""
    return _in_words(type_of(field).json_schema())


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(member) for member in schema["anyOf"] if member["type"] != "null")
    if "const" in schema:
        return to_toml(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(map(to_toml, schema['enum']))}"
    if "prefixItems" in schema:
        return " and ".join(_in_words(item) for item in schema["prefixItems"]) + ", in a list"
    if "oneOf" in schema.get("items", {}):
        return "a name, or a list of names and tables"
    if schema.get("additionalProperties") is True:
        return "a table"
    inner = schema.get("items", schema.get("additionalProperties", {}))
    if isinstance(inner, dict) and inner.get("type") == "object":
        return (
            "a table of tasks, each with a table of settings" if "items" not in schema else "a list of tables by task"
        )
    if isinstance(inner, dict) and "enum" in inner:
        return f"a list of {_in_words(inner).removeprefix('one of ')}"
    if isinstance(inner, dict) and any(member["type"] == "array" for member in inner.get("anyOf", ())):
        return f"{KINDS['object']}, or lists of these"
    limits = " and ".join(f"{words} {schema[name]:g}" for name, words in BOUNDS.items() if name in schema)
    return KINDS[schema.get("format", schema["type"])] + (f", {limits}" if limits else "")


def read_toml(path: Path, shown_as: str) -> dict[str, Any]:
    """Read the document at `path`. Raises RecipeError, which calls the file `shown_as`, with line and column."""
    try:
        # Some editors put a byte order mark in front, which TOML does not know.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else f"not valid TOML: {error}"
        what = f"is not UTF-8 text (byte {error.start})" if isinstance(error, UnicodeDecodeError) else what
        raise RecipeError(f"{shown_as}: {what}", next_step=f"fix {path}") from error


def _settings(table: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (`section.key`, value) for all that a document holds; a table that is no section is a value."""
    for key, value in table.items():
        name = section + _toml_key(key)
        if name in SECTIONS and isinstance(value, dict):
            yield from _settings(value, f"{name}.")
        else:
            yield name, value


def _read_override(override: str) -> tuple[str, Any]:
    """Return (`section.key`, value) of `--set`: None for no value, and text for one that is not TOML.

    Raises ValueError with the error.
    """
    name, sign, text = (part.strip() for part in override.partition("="))
    if not (name and sign):
        raise ValueError(f"{to_toml(override)}: must be section.key=value, or section.key= to unset the key")
    if not text:
        return name, None
    # An argument's bytes that were not UTF-8 arrive as lone surrogates, which no TOML file can hold.
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{_shown(name, text)}: is not UTF-8 text")
    try:
        document = tomllib.loads(f"value = {text}")
    except ValueError as error:
        # `[q_proj, v_proj]` lacks its quotes; as text it would be taken for one module of that name.
        if text[0] in "[{\"'":
            why = "is not valid TOML; text inside a list or table needs quotes"
            raise ValueError(f"{_shown(name, text)}: {why}") from error
        return name, text
    return name, document["value"] if len(document) == 1 else text


def _shown(name: str, value: Any) -> str:
    """Return `key = value` on one line of bounded length, or `[section]`."""
    if value is None:  # unset by `--set`, or required and not set
        return name
    if "." not in name and isinstance(value, dict):
        return f"[{name}]"
    shown = to_toml(value)
    return f"{name} = {shown if len(shown) <= LONGEST_VALUE else f'{shown[: LONGEST_VALUE - 4]} ...'}"


def _wrong_function(value: Any, place: tuple[int | str, ...]) -> str:
    """Return what is wrong at `place` of `reward.functions`: (number of the function, its kind, key)."""
    number, tag, key = (*place, "", "", "")[:3]
    table = value if isinstance(value, str) else value[int(number)]
    name = table if isinstance(table, str) else table.get("name") if isinstance(table, dict) else None
    if tag == "own" and key in ("name", ""):
        guess = nearest(str(name), FUNCTIONS)
        what = f"{to_toml(table)}: names neither a built-in function ({', '.join(FUNCTIONS)}) nor module:function"
        return f"{what}; did you mean {to_toml(guess)}?" if guess else what
    fields = FUNCTIONS.get(str(tag), OwnFunction).model_fields
    keys = {field.alias or own: field for own, field in fields.items()}
    if key not in keys:
        guess = nearest(str(key), keys)
        meant = f"did you mean {guess}?" if guess else f"it has {', '.join(keys)}"
        return f"{to_toml(name)} has no key {key}; {meant}"
    needs = "must be" if isinstance(table, dict) and key in table else "is required:"
    return f"{key} of {to_toml(name)} {needs} {allowed_values(keys[str(key)])}"


def _unknown_key(name: str, value: Any, algorithm: str) -> str:
    """Return what to write instead of a key that this algorithm's schema lacks."""
    section, _, key = name.rpartition(".")
    if name in SECTIONS:
        return f"must be a section, [{name}]"
    table = name if not section and isinstance(value, dict) else section
    if table and table not in SECTIONS:
        guess = nearest(table, SECTIONS)
        return f"unknown section; {f'did you mean [{guess}]?' if guess else THERE_ARE}"
    schema = schema_of(algorithm)

    def algorithms_with(key: str) -> str:
        return " or ".join(to_toml(name) for name, kind in OBJECTIVES.items() if key in kind.model_fields)

    if keys := [full for full, names in RENAMED.items() if not {name, key}.isdisjoint(names.split())]:
        known = [full for full in keys if full in schema][:1]  # of several meanings, the first that the algorithm has
        others = [f"{full} (algorithm {algorithms_with(full.rpartition('.')[2])})" for full in keys]
        return f"is called {' or '.join(known or others)} here"
    if key in NOT_RENAMED:
        return NOT_RENAMED[key]
    if sections := [full.removesuffix(f".{key}") for full in schema if full.endswith(f".{key}")]:
        return f"belongs to {' or '.join(f'[{section}]' for section in sections)}"
    if algorithms := algorithms_with(key):
        return f"unknown key of algorithm {to_toml(algorithm)}; {algorithms} has it in [objective]"
    if not section:
        return f"stands outside a section; {THERE_ARE}"
    own = keys_of(sections_of(algorithm)[section])
    guess = nearest(key, own) or nearest(key, (full.rpartition(".")[2] for full in schema))
    if guess is None:
        return f"unknown key; [{section}] has {', '.join(own)}"
    homes = [f"{section}.{guess}"] if guess in own else [full for full in schema if full.endswith(f".{guess}")]
    return f"unknown key; did you mean {' or '.join(homes)}?"
