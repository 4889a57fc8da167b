"""Test what `popo-lite recipe` prints, and its exit codes."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from popo_lite.errors import RecipeError
from popo_lite.recipe_file import load_recipe, shipped_recipes
from popo_lite.tools.recipe_docs import recipe, template_toml


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(recipe, arguments)


def test_show_prints_the_template_and_its_schema() -> None:
    assert invoke("show").output == template_toml()
    schema = json.loads(invoke("show", "--json").output)
    assert schema["$defs"]["LoraRecipe"]["properties"]["rank"]["maximum"] == 1024


def test_show_prints_the_resolved_recipe() -> None:
    result = invoke("show", "tiny_cpu", "--set", "lora.rank=4", "--set", "lora.alpha=8")
    expected = load_recipe("tiny_cpu", ("lora.rank=4", "lora.alpha=8")).to_dict()
    assert result.exit_code == 0
    assert tomllib.loads(result.output) == expected
    assert expected["lora"]["rank"] == 4
    assert (
        json.loads(invoke("show", "tiny_cpu", "--set", "lora.rank=4", "--set", "lora.alpha=8", "--json").output)
        == expected
    )


def test_show_refuses_overrides_of_nothing() -> None:
    result = invoke("show", "--set", "lora.rank=4")
    assert result.exit_code == 2
    assert "none is given" in result.output


def test_show_lets_a_recipe_error_through() -> None:
    result = invoke("show", "tiny_cpu", "--set", "lora.rank=0")
    assert isinstance(result.exception, RecipeError)
    assert result.output == ""


def test_check_reports_on_every_recipe_before_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[lora]\nrank = 0\ndropout = 2", encoding="utf-8")
    result = invoke("check", "bad.toml", "missing.toml", "tiny_cpu")
    assert result.output == "bad.toml: 2 errors\nmissing.toml: 1 error\ntiny_cpu: ok\n"
    assert isinstance(result.exception, RecipeError)
    assert result.exception.exit_code == 2
    assert [line.split(":")[0] for line in result.exception.what.split("\n")] == [
        "bad.toml",
        "bad.toml",
        "missing.toml",
    ]


def test_check_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[lora]\nrank = 0", encoding="utf-8")
    result = invoke("check", "tiny_cpu", "bad.toml", "--json")
    assert json.loads(result.output) == [
        {"recipe": "tiny_cpu", "ok": True, "errors": []},
        {
            "recipe": "bad.toml",
            "ok": False,
            "errors": ["bad.toml: lora.rank = 0: must be a whole number, at least 1 and at most 1024"],
        },
    ]
    assert isinstance(result.exception, RecipeError)


def test_check_passes_every_shipped_recipe() -> None:
    names = list(shipped_recipes())
    result = invoke("check", *names)
    assert (result.exit_code, result.output) == (0, "".join(f"{name}: ok\n" for name in names))


def test_list_names_every_shipped_recipe_with_its_first_line() -> None:
    lines = invoke("list").output.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    [tiny] = [line for line in lines if line.startswith("tiny_cpu ")]
    first_comment = shipped_recipes()["tiny_cpu"].read_text(encoding="utf-8").split("\n")[0]
    assert tiny.split(maxsplit=1)[1] == first_comment.removeprefix("# ")
