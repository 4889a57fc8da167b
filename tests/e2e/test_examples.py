"""Test the examples that bring their own task: their data, their reward, and a step of each recipe."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from popo_lite.cli import main
from popo_lite.grading import Grader
from popo_lite.recipe_file import load_recipe
from popo_lite.tasks import open_tasks
from popo_lite.tools.tiny_model import teach

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ["train.steps=1", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=2"]


def make(name: str) -> ModuleType:
    """The generator of an example."""
    spec = importlib.util.spec_from_file_location(f"make_{name}", EXAMPLES / name / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A copy of the example, as the working folder."""
    folder = tmp_path / request.param
    shutil.copytree(EXAMPLES / request.param, folder, ignore=shutil.ignore_patterns("tiny", "runs", "__pycache__"))
    monkeypatch.chdir(folder)
    if (folder / "make.py").is_file():
        make(folder.name).write_problems()
    return folder


@pytest.mark.parametrize(
    "recipe", sorted(EXAMPLES.glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_recipes_are_valid(recipe: Path) -> None:
    load_recipe(recipe)


@pytest.mark.parametrize("example", ["json_extraction", "code_by_tests"], indirect=True)
def test_the_reward_tells_the_taught_slips_from_right_answers(example: Path) -> None:
    recipe, module, source = load_recipe("recipe.toml"), make(example.name), random.Random(0)
    answers = dict(module.taught(source) for _ in range(40_000))
    problems = [problem for problem in open_tasks(recipe)[0].held_out(20) if problem.question in answers]
    right = {problem.question: problem.answer for problem in problems}
    if example.name == "code_by_tests":
        codes = {module.question(words, n): code.format(n=n) for words, (code, _) in module.KINDS.items()
                 for n in range(2, 41)}  # fmt: skip
        right = {question: f"def f(x):\n    return {code}" for question, code in codes.items()}
    with Grader(recipe.grading) as grader:
        rewards = grader.grade([(answers[problem.question], problem) for problem in problems])
    expected = [answers[problem.question] == right[problem.question] for problem in problems]
    assert {True, False} == set(expected)
    assert [reward.positive for reward in rewards] == expected
    if example.name == "json_extraction":
        assert all(0 < reward.parts["partial_credit:fields"] < 1 for reward in rewards if not reward.positive)


@pytest.mark.parametrize("example", ["json_extraction", "code_by_tests", "guessing_game"], indirect=True)
def test_a_step_of_the_example(example: Path) -> None:
    if (example / "make.py").is_file():
        teach(Path("tiny"), pair=make(example.name).taught, tokens=448, steps=2, batch=2)
    options = [word for setting in SHORT for word in ("--set", setting)]
    done = CliRunner().invoke(main, ["train", "recipe.toml", "--trust", "--json", *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 1
