"""Code that a recipe or run folder names runs only if it is trusted: every command on canaries that leave marks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import popo_lite
from popo_lite.cli import main
from popo_lite.errors import UserInputError
from popo_lite.policy.load import TINY_FOLDER

GRADER = """
def grade(text, problem):
    return text.strip() == problem["answer"]
"""
GAME = """
class Game:
    def reset(self, problem):
        self.said = False

    def step(self, text):
        self.said = True
        return "yes", True

    def reward(self):
        return self.said
"""
MODEL = """
from transformers import Qwen2Config, Qwen2ForCausalLM

class CanaryConfig(Qwen2Config):
    pass

class CanaryModel(Qwen2ForCausalLM):
    config_class = CanaryConfig
"""
RECIPE = """
[model]
id = "canary_model"
trust_remote_code = true
dtype = "float32"
[reward]
functions = ["canary_grader:grade", {name = "length", max = 9, weight = 0.1}]
positive_if = ["canary_grader:grade"]
[rollout]
engine = "hf"
max_prompt_length = 32
max_completion_length = 16
num_generations = 2
[rollout.environment]
name = "canary_game:Game"
[data]
prompts_per_step = 2
[train]
steps = 1
device = "cpu"
cpu_threads = 1
[eval]
problems = 2
"""
SERVER = RECIPE.replace('"hf"', '"server"') + (
    '[rollout.server]\nbase_urls = ["https://canary.invalid"]\nshared_dir = "shared"\n'
    '[output]\nhub_model_id = "canary/hub"\n'
)
SWEEP = 'recipe = "canary.toml"\n[variants.plain]\n[variants.other]\ntrain.steps = 2\n'
PIECES = {
    "model": "Python code that comes with",
    "grader": "canary_grader:grade",
    "game": "canary_game:Game",
    "server": "canary.invalid",
    "hub": "canary/hub",
}
RUNS = {  # command -> what it would run; the other commands run nothing
    "train": PIECES.keys(),
    "resume": PIECES.keys(),
    "sweep": PIECES.keys(),
    "eval": PIECES.keys() - {"hub"},  # it uploads nothing
    "export": {"model", "grader", "game"},
    "generate": {"model"},
    "chat": {"model"},
    "serve": {"model"},
    "plan": {"model"},
    "bench": {"model"},
}


def write_canaries(folder: Path) -> None:
    """Write modules, a model's code, recipes, a sweep and a run folder; imported code leaves a file in marks/."""
    (folder / "marks").mkdir()
    for name, code in {"grader": GRADER, "game": GAME}.items():
        mark = f"import pathlib\npathlib.Path({str(folder / 'marks' / name)!r}).touch()\n"
        (folder / f"canary_{name}.py").write_text(mark + code)
    model = folder / "canary_model"
    shutil.copytree(TINY_FOLDER, model, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "canary.CanaryConfig", "AutoModelForCausalLM": "canary.CanaryModel"}
    (model / "config.json").write_text(json.dumps(config))
    mark = f"import pathlib\npathlib.Path({str(folder / 'marks' / 'model')!r}).touch()\n"
    (model / "canary.py").write_text(mark + MODEL)
    (folder / "canary.toml").write_text(SERVER)
    (folder / "own.toml").write_text(RECIPE)
    (folder / "sweep.toml").write_text(SWEEP)
    own = ["model.id=tiny", "model.trust_remote_code=false", "reward.functions=math", "reward.positive_if=total"]
    popo_lite.train(
        popo_lite.load_recipe(folder / "own.toml", [*own, "rollout.environment.name="]), output=folder / "run"
    )
    popo_lite.export(folder / "run", what="adapter")
    (folder / "run" / "recipe.toml").write_text(SERVER)


@pytest.fixture(scope="module")
def canaries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stranger")
    write_canaries(folder)
    return folder


@pytest.fixture
def stranger(canaries, tmp_path, monkeypatch) -> Iterator[Path]:
    """The working folder, with nothing trusted; checks that nothing ran in it."""
    monkeypatch.chdir(canaries)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = files_in(canaries)
    yield canaries
    assert not list((canaries / "marks").iterdir())
    assert not (tmp_path / "popo-lite").exists()
    assert files_in(canaries) == before


def files_in(folder: Path) -> list[Path]:
    pages = ("comparison", "report.html")  # what `compare` and `report` may write
    return sorted(path for path in folder.rglob("*") if not path.name.startswith(pages))


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from leaves(inner, (*path, name))
    else:
        yield path, command


COMMANDS = dict(leaves(main))
ARGUMENTS = {
    "RECIPE": "canary.toml",
    "[RECIPE]": "canary.toml",
    "RECIPE...": "canary.toml",
    "SWEEP": "sweep.toml",
    "RUN": "run",
    "EXPORT": "run",
    "USER/NAME": "me/it",
    "RUN_OR_SWEEP...": "run",
    "MODEL_OR_RUN...": "run",
    "MODEL_OR_RUN": "run",
    "RUN_OR_FOLDER": "run",
    "question": "What is 1 + 1?",
}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_command_runs_code_that_is_not_trusted(path, stranger, tmp_path):
    command = COMMANDS[path]
    arguments = [ARGUMENTS[p.metavar or str(p.name)] for p in command.params if isinstance(p, click.Argument)]
    # The run has ended, nobody is logged in, and vLLM would take a minute.
    options = {
        "resume": ["--set", "train.steps=9"],
        "push": ["--dry-run"],
        "doctor": ["--quick"],
        "init": ["--model", "canary_model", "--card", "cpu", "--yes", "--output", str(tmp_path / "new.toml")],
    }
    more = options.get(path[0], [])
    done = CliRunner().invoke(main, [*path, *arguments, *more])
    names = [option for p in command.params for option in p.opts]
    assert ("--trust" in names) == (path[0] in RUNS), "list the command in RUNS if it can run code"
    if path[0] not in RUNS:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 2, done.output
    shown = "".join(done.stderr.split())
    assert {name for name, text in PIECES.items() if "".join(text.split()) in shown} == set(RUNS[path[0]])
    assert "--trust" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "eval run --benchmarks paper",
        "eval canary_model --task canary.toml",
        "eval canary_model --task run",
        "eval run --task tiny_cpu",
        "plan canary.toml --simulate",
        "bench canary.toml --longest",
        "resume run --set train.steps=9",
        "train canary.toml --set train.steps=2",
        "sweep sweep.toml --jobs 2 --set rollout.environment.name=canary_game:Game",
        "export run --what adapter",
        "export run --gguf f32",
    ],
)
def test_no_option_is_a_way_around_it(arguments, stranger):
    done = CliRunner().invoke(main, shlex.split(arguments))
    assert done.exit_code == 2, done.output
    assert "it would run code that is not trusted yet" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "call",
    [
        lambda: popo_lite.train("canary.toml"),
        lambda: popo_lite.evaluate("run"),
        lambda: popo_lite.evaluate("canary_model", task="canary.toml"),
        lambda: popo_lite.export("run"),
    ],
)
def test_functions_that_take_paths_refuse_as_well(call: Callable[[], object], stranger):
    with pytest.raises(UserInputError, match=r"trust=True"):
        call()


@pytest.mark.slow
def test_what_is_trusted_once_runs_from_then_on(tmp_path):
    write_canaries(tmp_path)
    (tmp_path / "run" / "recipe.toml").write_text(RECIPE)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "HF_MODULES_CACHE": str(tmp_path / "hub")}

    def ran(*arguments: str, code: int = 0) -> set[str]:
        command = [sys.executable, "-m", "popo_lite", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        marks = list((tmp_path / "marks").iterdir())
        for mark in marks:
            mark.unlink()
        return {mark.name for mark in marks}

    assert ran("generate", "run", "1 + 1", "--trust") == {"model"}
    store = tmp_path / "state" / "popo-lite" / "trusted.json"
    assert store.stat().st_mode & 0o777 == 0o600
    assert ran("generate", "run", "1 + 1") == {"model"}
    assert ran("plan", "own.toml") == set()  # its sizes are in config.json
    assert ran("bench", "own.toml") == {"model"}
    assert ran("train", "own.toml", code=2) == set()  # what the other command showed was less
    assert ran("train", "own.toml", "--trust", "--ignore-plan") == {"model", "grader", "game"}
    assert ran("train", "own.toml", "--output", "again", "--ignore-plan") == {"model", "grader", "game"}
    assert ran("eval", "again", "--samples", "1") == {"model", "grader", "game"}
    assert ran("export", "again", "--problems", "0", "--prompts", "1") == {"model", "grader", "game"}
    (tmp_path / "elsewhere").mkdir()
    for name in ("grader", "game"):
        shutil.copy(tmp_path / f"canary_{name}.py", tmp_path / "elsewhere")
    environment["PYTHONPATH"] = f"{tmp_path / 'elsewhere'}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    (tmp_path / "canary_grader.py").unlink()  # the same name leads to another file now
    assert ran("eval", "again", code=2) == set()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_files_of_the_working_folder_take_no_librarys_place(engine, tmp_path):
    names = ("click", "torch", "numpy", "sympy", "math_verify", "jsonschema", "transformers", "peft", "jinja2", "tqdm")
    # Not installed, but tried by sympy and jsonschema.
    optional = (
        "gmpy2",
        "flint",
        "fqdn",
        "idna",
        "rfc3339_validator",
        "rfc3987",
        "webcolors",
        "jsonpointer",
        "isoduration",
    )
    for name in (*names, *optional):
        (tmp_path / f"{name}.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n")
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}  # else it starts fewer processes
    sizes = (
        f"rollout.engine={engine}",
        "train.steps=1",
        "data.prompts_per_step=2",
        "rollout.num_generations=2",
        "eval.problems=2",
    )
    schema = '{name="json_schema", schema={type="object"}, weight=0.1}'
    functions = (f'reward.functions=["math", {schema}]', 'reward.positive_if=["math"]')
    options = [word for each in (*sizes, *functions) for word in ("--set", each)]
    for arguments in (["train", "tiny_cpu", "--output", "run", *options], ["generate", "run", "What is 1 + 1?"]):
        command = [sys.executable, "-m", "popo_lite", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_own_code_needs_no_flag(tmp_path, monkeypatch):
    """Given by --set or in a Recipe that was built in Python; its run can be evaluated, too."""
    write_canaries(tmp_path)
    (tmp_path / "plain.toml").write_text(RECIPE.replace("canary_model", "tiny").replace("trust_remote", "# "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    own = ["reward.functions=canary_grader:grade", "rollout.environment.name=canary_game:Game"]
    options = [word for one in own for word in ("--set", one)]
    done = CliRunner().invoke(main, ["train", "plain.toml", "--output", "typed", "--view", "silent", *options])
    assert done.exit_code == 0, done.output
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    recipe = popo_lite.load_recipe("plain.toml", own)
    popo_lite.train(recipe, output="built")
    assert popo_lite.evaluate("built", samples=1)
