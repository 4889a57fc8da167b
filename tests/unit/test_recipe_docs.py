"""Test that the template and the documentation page are complete, load, and match the committed files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from popo_lite.cli.docs import generated_files
from popo_lite.recipe import OBJECTIVES, Recipe
from popo_lite.recipe_file import SECTIONS, keys_of, load_recipe, sections_of
from popo_lite.tools.recipe_docs import DESCRIBED, meaning, settings_markdown, template_toml

CHECKOUT = Path(__file__).parents[2]


def test_every_key_and_section_has_a_meaning() -> None:
    described = {name: meaning(section) for name, section in DESCRIBED.items()}
    for kind in OBJECTIVES:
        for name, section in sections_of(kind).items():
            described |= {f"{name}.{key}": meaning(field) for key, field in keys_of(section).items()}
    assert [name for name, text in described.items() if not text.endswith(".")] == []


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
    assert seen >= {f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys_of(keys)}


def test_the_template_wraps_its_comments() -> None:
    assert max(len(line) for line in template_toml().splitlines() if line.startswith("#")) <= 100


def test_the_page_describes_every_key_of_every_algorithm() -> None:
    page = settings_markdown()
    for kind in OBJECTIVES:
        for name, section in sections_of(kind).items():
            part = page.partition(f"\n## [{name}]\n")[2].partition("\n## ")[0]
            for key, field in keys_of(section).items():
                assert re.search(rf"^- `{key}\b.*: {re.escape(meaning(field))}$", part, re.MULTILINE)
    assert "\n- `rank = 16` (a whole number, at least 1 and at most 1024): Rank r of the update BA.\n" in page
    assert "\n- `limit`, unset (a whole number, at least 1): Use only the first rows.\n" in page
    grpo = page.partition("\nOnly with `grpo`:\n\n")[2].partition("\n## ")[0]
    assert "- `kl_coef = 0.0` (a finite number, at least 0): " in grpo
    assert "weights" not in grpo


def test_the_committed_files_are_the_generated_ones() -> None:
    stale = [
        path.relative_to(CHECKOUT).as_posix()
        for path, text in generated_files(CHECKOUT).items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: make docs"
