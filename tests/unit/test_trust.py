"""What counts as code in a recipe, where it leads, and how it is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from popo_lite.errors import UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe, shipped_recipes, shipped_sweeps
from popo_lite.tools.sweep.folder import load_sweep
from popo_lite.trust import EVALUATION_CODE, MODEL_CODE, code_in, refuse_untrusted, trust_own


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "state" / "popo-lite" / "trusted.json"


def own(name: str, *overrides: str) -> Recipe:
    return load_recipe("tiny_cpu", [f"reward.functions={json.dumps(name)}", *overrides])


def test_what_ships_with_the_package_runs_no_code_of_others():
    recipes = [load_recipe(name) for name in shipped_recipes()]
    recipes += [variant.recipe for name in shipped_sweeps() for variant in load_sweep(name).variants]
    assert [code for recipe in recipes for code in code_in(recipe)] == []


def test_code_is_found_without_importing_anything(tmp_path):
    bomb = f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    (tmp_path / "here" / "single.py").write_text(bomb)
    for parts in (("package",), ("package", "inner"), ("space", "inner")):
        folder = tmp_path.joinpath("here", *parts)
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(bomb)
    modules = set(sys.modules)
    for name, place in {
        "single:f": '"single:f" in "HERE/single.py"',
        "package.inner.deep:f": '"package.inner.deep:f" in "HERE/package/__init__.py"',
        "space.inner:f": '"space.inner:f" in "HERE/space"',
        "nowhere.at.all:f": '"nowhere.at.all:f" (not found)',
        "builtins:exec": '"builtins:exec" (built into Python)',
        "os:system": '"os:system" (built into Python)',
        ".relative:f": '".relative:f" (not found)',
        "../single:f": '"../single:f" (not found)',
    }.items():
        assert code_in(own(name)) == [f"reward.functions: {place.replace('HERE', str(tmp_path / 'here'))}"]
    for name in ("timeit:timeit", "os:system", "popo_lite.grading.builtins:grade_exact"):
        assert len(code_in(own(name))) == 1
    assert set(sys.modules) - modules <= {"timeit"}
    assert not (tmp_path / "mark").exists()


def test_every_kind_of_code_is_listed():
    server = ("rollout.engine=server", "rollout.server.shared_dir=s")
    recipe = load_recipe("tiny_cpu", [
        'reward.functions=["exact", {name="python_tests", allow_uncontained=true}, {name="a:f", weight=0.1}]',
        'reward.positive_if=["exact"]', "rollout.environment.name=b:C", 'rollout.environment.options={command="rm"}',
        "model.trust_remote_code=true", "model.id=me/model", "model.revision=abc", *server,
        'rollout.server.base_urls=["http://localhost:1", "https://host.localhost:2"]', "rollout.server.urls_file=/u",
    ])  # fmt: skip
    assert [line.replace('"', "") for line in code_in(recipe)] == [
        "model.trust_remote_code: Python code that comes with me/model at abc",
        "reward.functions: python_tests with allow_uncontained: code that the model writes, not contained",
        "reward.functions: a:f (not found)",
        "rollout.environment.name: b:C (not found)",
        "rollout.environment.options: { command = rm } for b:C (not found)",
        "rollout.server.base_urls: https://host.localhost:2, which gets the prompts and POPO_SERVER_TOKEN",
        "rollout.server.urls_file: /u, whose servers get the prompts and POPO_SERVER_TOKEN",
    ]


def test_trust_is_for_this_code_in_this_place(tmp_path, monkeypatch, store):
    recipe = own("mine:f")
    (tmp_path / "here" / "mine.py").touch()
    with pytest.raises(UserInputError, match="mine.py") as caught:
        refuse_untrusted(recipe, "their.toml")
    assert caught.value.where == "their.toml"
    refuse_untrusted(recipe, "their.toml", trust=True)
    refuse_untrusted(recipe, "another.toml")
    assert store.stat().st_mode & 0o777 == 0o600
    assert store.parent.stat().st_mode & 0o777 == 0o700
    environment = ("rollout.environment.name=mine:C", "rollout.environment.options={a=1}")
    for other in (own("mine:g"), own("mine:f", *environment), own("mine.f:f")):
        with pytest.raises(UserInputError):
            refuse_untrusted(other, "their.toml")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.py").touch()
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserInputError, match="there/mine.py"):
        refuse_untrusted(recipe, "their.toml")


def test_what_is_not_found_is_never_trusted(tmp_path, store):
    recipe = own("mine:f", "rollout.environment.name=mine:C", "rollout.environment.options={a=1}")
    with pytest.raises(UserInputError, match="mine:f.*not found") as caught:
        refuse_untrusted(recipe, "their.toml", trust=True)
    assert "--trust" not in caught.value.next_step
    typed = ["reward.functions=mine:f", "rollout.environment.name=mine:C", "rollout.environment.options={}"]
    refuse_untrusted(recipe, "their.toml", overrides=typed)  # loading it will say what is wrong
    trust_own(recipe)
    assert not store.exists()
    (tmp_path / "here" / "mine.py").touch()
    with pytest.raises(UserInputError, match="mine.py"):
        refuse_untrusted(recipe, "their.toml")


def test_a_file_named_as_a_model_is_no_folder(tmp_path):
    (tmp_path / "here" / "me").mkdir()
    (tmp_path / "here" / "me" / "model").touch()  # transformers would ask the Hub
    recipe = load_recipe("tiny_cpu", ["model.trust_remote_code=true", "model.id=me/model"])
    assert code_in(recipe) == ['model.trust_remote_code: Python code that comes with "me/model at any revision"']


def test_processes_that_trust_at_the_same_time_lose_nothing(tmp_path, store):
    """As the runs of a sweep do."""
    program = (
        "import sys; from popo_lite.trust import _remember\n"
        "for number in range(40): _remember([f'reward.functions: {sys.argv[1]}-{number}'])"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, name], env={**os.environ}) for name in "abc"]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(json.loads(store.read_text())["trusted"]) == 120


def test_only_what_is_shown_is_trusted(tmp_path):
    (tmp_path / "here" / "mine.py").touch()
    recipe = own("mine:f", "model.trust_remote_code=true", "model.id=me/model")
    refuse_untrusted(recipe, "their.toml", trust=True, only=MODEL_CODE)
    with pytest.raises(UserInputError) as caught:
        refuse_untrusted(recipe, "their.toml")
    assert "mine:f" in caught.value.what
    assert "me/model" not in caught.value.what


def test_an_evaluation_uploads_nothing_and_a_place_is_not_called_code():
    server = [
        "rollout.engine=server",
        "rollout.server.shared_dir=s",
        'rollout.server.base_urls=["https://host.example"]',
    ]
    recipe = load_recipe("tiny_cpu", ["output.hub_model_id=me/run", *server])
    with pytest.raises(UserInputError, match="it would send data to a place that is not trusted yet") as caught:
        refuse_untrusted(recipe, "their_run", only=EVALUATION_CODE)
    assert "host.example" in caught.value.what
    assert "me/run" not in caught.value.what
    refuse_untrusted(load_recipe("tiny_cpu", ["output.hub_model_id=me/run"]), "their_run", only=EVALUATION_CODE)
    with pytest.raises(UserInputError, match="it would run code"):
        refuse_untrusted(own("mine:f", *server), "their_run")


def test_a_setting_on_the_command_line_is_the_users_own(tmp_path):
    (tmp_path / "here" / "mine.py").touch()
    environment = ("rollout.environment.name=mine:C", "rollout.environment.options={command=1}")
    recipe = own("mine:f", "model.trust_remote_code=true", "model.id=me/model", *environment)
    typed = ["reward.functions=mine:f", "model.id=me/model", environment[0]]
    with pytest.raises(UserInputError) as caught:
        refuse_untrusted(recipe, "their.toml", overrides=typed)
    assert "mine:f" not in caught.value.what
    assert "rollout.environment.name" not in caught.value.what
    assert "rollout.environment.options: { command = 1 }" in caught.value.what
    refuse_untrusted(recipe, "their.toml", overrides=[*typed, "model.trust_remote_code=true", environment[1]])
    refuse_untrusted(recipe, "runs/their-seed0")  # the run that it made


def test_a_store_that_cannot_be_used_is_an_error_and_trusts_nothing(tmp_path, store):
    (tmp_path / "here" / "mine.py").touch()
    store.parent.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"trusted": 1}'):
        store.write_text(text)
        with pytest.raises(UserInputError, match="cannot be read") as caught:
            refuse_untrusted(own("mine:f"), "their.toml", trust=True)
        assert caught.value.where == str(store)
    refuse_untrusted(own("math"), "plain.toml")  # without code it is not read
    trust_own(own("mine:f"))
    store.unlink()
    store.mkdir()
    with pytest.raises(UserInputError):
        refuse_untrusted(own("mine:f"), "their.toml", trust=True)
