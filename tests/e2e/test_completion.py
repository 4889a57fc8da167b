"""Tab completes names of recipes and folders of runs, in bash, zsh and fish."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from popo_lite.cli import main

PROGRAM = """
import sys
sys.argv = ["popo-lite"]
from popo_lite.cli import main
try:
    main(prog_name="popo-lite")
finally:
    print(*({"torch", "transformers", "matplotlib"} & sys.modules.keys()), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    for run in ("runs/tiny_cpu-seed0", "runs/other-seed1", "deep/down/here"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "recipe.toml").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "tiny_mine.toml").touch()
    monkeypatch.chdir(tmp_path)


def complete(line: str) -> list[str]:
    """What the last word of a line may become."""
    *words, incomplete = line.split(" ")
    found = ShellComplete(main, {}, "popo-lite", "_POPO_LITE_COMPLETE").get_completions(words, incomplete)
    return [item.value for item in found]


def asked_by_shell(line: str, kind: str) -> str:
    """What the command prints when a shell asks it, as the script of `kind` does."""
    words = ["popo-lite", *line.split(" ")]
    last = words[-1] if kind.startswith("fish") else str(len(words) - 1)
    environment = {"_POPO_LITE_COMPLETE": kind, "COMP_WORDS": " ".join(words), "COMP_CWORD": last}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    assert done.stderr.strip() == ""
    return done.stdout


@pytest.mark.parametrize("command", ["train", "plan", "bench", "recipe check"])
def test_recipes_by_name_and_file(command):
    assert complete(f"{command} tiny_") == ["tiny_cpu", "tiny_vllm", "tiny_mine.toml"]


@pytest.mark.parametrize("command", ["resume", "eval", "generate", "export", "compare"])
def test_runs(command):
    assert complete(f"{command} ru") == ["runs/other-seed1", "runs/tiny_cpu-seed0"]


def test_runs_further_down():
    assert complete("resume runs/ti") == ["runs/tiny_cpu-seed0"]
    assert complete("resume deep/down/") == ["deep/down/here"]
    assert complete("resume nowhere/") == []


def test_sweeps():
    assert complete("sweep tiny_c") == ["tiny_components"]


@pytest.mark.parametrize(("shell", "answer"), [("bash", "plain,"), ("zsh", "plain\n"), ("fish", "plain,")])
def test_shells_without_importing_torch(shell, answer):
    assert asked_by_shell("train tiny_c", f"{shell}_complete").startswith(f"{answer}tiny_cpu\n")
    assert "_POPO_LITE_COMPLETE" in asked_by_shell("", f"{shell}_source")
