"""The template and the documentation page: complete, loadable, and the same as what is committed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from popo_lite.recipe import Recipe
from popo_lite.recipe_file import SECTIONS, load_recipe
from popo_lite.tools.recipe_docs import generated_files, meaning, recipes_markdown, section_meaning, template_toml

CHECKOUT = Path(__file__).parents[2]


def test_every_key_and_section_has_a_meaning() -> None:
    unexplained = [name for name in SECTIONS if not section_meaning(name).endswith(".")]
    unexplained += [
        f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys if not meaning(keys[key]).endswith(".")
    ]
    # A value in backticks may end a description.
    assert [name for name in unexplained if name != "data.filter" and name != "eval.filter"] == []


def test_the_template_is_the_default_recipe_with_every_key(tmp_path: Path) -> None:
    template = template_toml()
    assert tomllib.loads(template) == Recipe().to_dict()
    path = tmp_path / "template.toml"
    path.write_text(template, encoding="utf-8")
    assert load_recipe(path) == Recipe()

    section, seen = "", set()
    for line in template.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif " = " in line:
            seen.add(f"{section}.{line.removeprefix('# ').partition(' = ')[0]}")
    assert seen >= {f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys}


def test_the_template_wraps_its_comments() -> None:
    assert max(len(line) for line in template_toml().splitlines() if line.startswith("#")) <= 100


def test_the_page_has_a_row_with_all_four_cells_for_every_key() -> None:
    rows = [line for line in recipes_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(keys) for keys in SECTIONS.values())
    for row in rows:
        assert row.replace(r"\|", "").count("|") == 5
    assert "| `rank` | a whole number, at least 1 and at most 1024 | `16` | Rank r of the update BA. |" in rows
    assert "| `limit` | a whole number, at least 1 | unset | Use only this many rows, the first ones. |" in rows


def test_the_committed_files_are_the_generated_ones() -> None:
    stale = [
        path.relative_to(CHECKOUT).as_posix()
        for path, text in generated_files(CHECKOUT).items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: python -m popo_lite.tools.recipe_docs"
