"""Fixtures: the tiny model as a run has it, and the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and output would be folded
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network; read when huggingface_hub is imported

from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trusted_by_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests trust is not remembered for the user. Tests of own code in a recipe's file pass --trust."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> None:
    """Whatever the test before did with SIGINT; and shells start background jobs with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """`tiny_recipe("lora.rank=4", ...)`: the shipped CPU recipe with overrides."""

    def make(*overrides: str) -> Recipe:
        return load_recipe(ROOT / "recipes" / "tiny_cpu.toml", overrides)

    return make


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command("train", "tiny_cpu", ...)`: the real command in a fresh process and an empty folder."""

    def run(*arguments: str | Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "popo_lite", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
