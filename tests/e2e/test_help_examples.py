"""Every command has an example in its help, and each example works as it is written."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from popo_lite.cli import main

QUICK = ("train.steps=2", "data.prompts_per_step=2", "rollout.num_generations=4", "rollout.max_completion_length=24",
         "eval.problems=8")  # fmt: skip

ELSEWHERE = {
    "serve": "it needs vLLM and does not end; tests/engines/test_serve.py runs it",
    "train": "the fixture runs it, in two steps; tests/e2e/test_train.py does all of them",
}
"""Commands whose example is not run here, and why."""


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def examples(command: click.Command) -> list[str]:
    """The commands below "Example:" in a command's help."""
    below = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")[2].split("\n\n")[0]
    return [line.strip() for line in below.splitlines() if line.strip()]


COMMANDS = dict(commands())
CASES = [(name, line) for name, command in COMMANDS.items() for line in examples(command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `popo-lite train tiny_cpu` has finished, and a shell's environment."""
    path = tmp_path_factory.mktemp("examples")
    script = path / "bin" / "popo-lite"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m popo_lite "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", line], cwd=path, env=environment, capture_output=True, text=True, timeout=300,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    settings = " ".join(f"--set {each}" for each in QUICK)
    done = shell(f"popo-lite train tiny_cpu {settings}")
    assert done.returncode == 0, done.stderr
    assert Path(path, "runs", "tiny_cpu-seed0", "summary.json").is_file()
    return shell


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_of_its_own(name):
    lines = examples(COMMANDS[name])
    assert any(f"popo-lite {name}" in line for line in lines)


def test_no_exception_is_left_over():
    assert ELSEWHERE.keys() <= COMMANDS.keys()


@pytest.mark.parametrize(("name", "line"), CASES, ids=[line for _, line in CASES])
def test_an_example_works(folder, name, line):
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    done = folder(line)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
