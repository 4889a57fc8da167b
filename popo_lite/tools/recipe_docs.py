"""The recipe schema as a commented TOML template and as a page of documentation.

`python -m popo_lite.tools.recipe_docs` writes both into a checkout.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import click
from pydantic.fields import FieldInfo

from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SECTIONS, allowed_values, keys_of, to_toml

COMMENT_COLUMNS = 100

TEMPLATE_HEAD = """\
# Every setting of a recipe with its default.
# popo-lite recipe show > my_recipe.toml
#
# A recipe holds only the keys that it changes: delete the rest. Generated from the schema.
"""

PAGE_HEAD = """\
# Recipes

A recipe is a TOML file with the settings of a run. Keys that are left out keep their defaults; unknown keys
and impossible combinations are refused, all of them at once. This page is generated from the schema in
`popo_lite/recipe.py` by `python -m popo_lite.tools.recipe_docs`.

```sh
popo-lite recipe list                                  # the recipes that come with popo-lite
popo-lite recipe show > my_recipe.toml                 # a template with every key
popo-lite recipe check my_recipe.toml                  # every fault of a recipe, before anything is loaded
popo-lite recipe show tiny_cpu --set lora.rank=8       # a recipe with defaults and overrides filled in
```

A command takes the path of a recipe or the name of a shipped one. `--set section.key=value` overrides a key
and may be repeated. The value is read as TOML (`8`, `true`, `[4, 5]`, `"text"`); what is not TOML is taken as
text, so `--set model.id=Qwen/Qwen2.5-1.5B` needs no quotes. Text that looks like a number does, inside the
shell's own: `--set 'model.revision="1234"'`.
"""


def template_toml() -> str:
    """Every key as TOML with its meaning, allowed values and default; optional keys without one are commented out."""
    parts = [TEMPLATE_HEAD]
    for name, section in SECTIONS.items():
        parts.append(f"\n{_comment(section_meaning(name))}[{name}]\n")
        for key, field in keys_of(section).items():
            setting = f"# {key} = ..." if field.default is None else f"{key} = {to_toml(field.default)}"
            parts.append(f"{_comment(meaning(field))}{setting}  # {allowed_values(field)}\n")
    return "".join(parts)


def recipes_markdown() -> str:
    """The page `docs/recipes.md`: a table for each section."""
    parts = [PAGE_HEAD]
    for name, section in SECTIONS.items():
        parts.append(f"\n## [{name}]\n\n{section_meaning(name)}\n\n")
        parts.append(_row("key", "allowed", "default", "meaning") + "|---|---|---|---|\n")
        for key, field in keys_of(section).items():
            default = "unset" if field.default is None else f"`{to_toml(field.default)}`"
            parts.append(_row(f"`{key}`", allowed_values(field), default, meaning(field)))
    return "".join(parts)


def meaning(field: FieldInfo) -> str:
    """The docstring of a key, on one line."""
    return " ".join((field.description or "").split())


def section_meaning(name: str) -> str:
    """The docstring of a section, on one line."""
    section: Any = Recipe.model_fields[name].annotation
    return " ".join((section.__doc__ or "").split())


def generated_files(checkout: Path) -> dict[Path, str]:
    """Path -> text of the files that are written from the schema."""
    return {
        checkout / "recipes" / "template.toml": template_toml(),
        checkout / "docs" / "recipes.md": recipes_markdown(),
    }


def main() -> None:
    """Write the generated files into the checkout that this module lies in."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").is_file():
        sys.exit(f"{checkout} is not a checkout of popo-lite; there is nothing to generate here")
    for path, text in generated_files(checkout).items():
        path.write_text(text, encoding="utf-8", newline="\n")
        click.echo(f"wrote {path}")


def _row(*cells: str) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |\n"


def _comment(text: str) -> str:
    lines = textwrap.wrap(text, COMMENT_COLUMNS - 2, break_long_words=False, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


if __name__ == "__main__":
    main()
