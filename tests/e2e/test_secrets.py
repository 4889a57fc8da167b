"""Planted tokens, a password and paths in the home folder: searched for in every byte that a run leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from popo_lite.policy.load import TINY_FOLDER

SECRETS = {
    "HF_TOKEN": "hf_planted_token_of_the_hub",
    "POPO_SERVER_TOKEN": "planted-token-of-the-server",
    "WANDB_API_KEY": "planted0key0of0wandb",
    "https_proxy": "http://someone:planted-password@127.0.0.1:9",
    "all_proxy": "http://someone:planted-password@127.0.0.1:9",
}
RECIPE = """
[model]
id = "~/planted-folder/base"
dtype = "float32"
[reward]
functions = ["math", {name = "json_schema", schema_file = "~/planted-folder/shape.json", weight = 0.1},
             {name = "mine:judge", weight = 0.1}]
positive_if = ["math"]
max_ungraded_ratio = 1.0
[rollout]
engine = "hf"
max_prompt_length = 32
max_completion_length = 48
num_generations = 4
[data]
prompts_per_step = 4
[train]
steps = 2
device = "cpu"
cpu_threads = 1
save_steps = 1
[eval]
problems = 4
"""


MINE = """
import os

def leak(text, problem):
    raise OSError(f"GET https://me:planted-password@host?key=planted-key {os.environ['HF_TOKEN']}")

def judge(text, problem):
    return leak(text, problem) if "boxed" in text and "think" not in text and len(text) % 2 else 1.0
"""


class Watched:
    """Commands in a home folder, with secrets in the environment. `seen` has the command lines of all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.seen, self.printed = folder, folder / "planted-home", set[str](), ""
        base = self.home / "planted-folder" / "base"
        shutil.copytree(TINY_FOLDER, base, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        (base.parent / "shape.json").write_text('{"type": "object"}')
        (folder / "mine.toml").write_text(RECIPE)
        (folder / "mine.py").write_text(MINE)

    def run(self, *arguments: str, code: int = 0, **environment: str) -> str:
        known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**known, "HF_HUB_OFFLINE": "1", "HOME": str(self.home), **SECRETS, **environment}
        process = subprocess.Popen(
            [sys.executable, "-m", "popo_lite", *arguments], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(psutil.Process(process.pid), ended))
        watcher.start()
        printed = process.communicate(timeout=300)[0]
        ended.set()
        watcher.join()
        assert process.returncode == code, printed
        self.printed += printed
        return printed

    def _watch(self, process: psutil.Process, ended: threading.Event) -> None:
        while not ended.wait(0.05):
            try:
                for one in (process, *process.children(recursive=True)):
                    self.seen.add("\0".join(one.cmdline()))
            except psutil.Error:  # it ended meanwhile
                continue


def found(folder: Path, *secrets: str) -> list[str]:
    """Return `FILE: SECRET` for each file whose bytes hold one, or whose name does; fails without files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [
        f"{path}: {secret}"
        for path in files
        for secret in secrets
        if secret.encode() in path.read_bytes() or secret in str(path.relative_to(folder))
    ]


@pytest.mark.slow
def test_planted_secrets_are_found_nowhere(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.run("train", "mine.toml", "--output", "run", "--ignore-plan", "--trust")
    watched.run("eval", "run", "--samples", "1")
    watched.run("generate", "run", "What is 17 + 25?")
    for what in ("merged", "adapter"):
        watched.run("export", "run", "--what", what, "--output", what, "--problems", "0", "--prompts", "2")
        card = watched.run("push", what, "me/my-model", "--dry-run")
        assert "planted" not in card
    assert "GET https://***@host?key=*** ***" in (tmp_path / "run" / "samples.jsonl").read_text()
    tokens = [value for name, value in SECRETS.items() if "proxy" not in name] + ["planted-password", "planted-key"]
    home = str(watched.home)

    assert found(tmp_path / "run", *tokens, home) == []
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "optimizer.safetensors").is_file()
    for what in ("merged", "adapter"):
        assert found(tmp_path / what, *tokens, home, "planted") == []
    lines = " ".join(watched.seen)
    assert "worker.py" in lines
    for secret in (*tokens, home):
        assert secret not in lines
        assert secret not in watched.printed


ERRORS = {
    "login in a server's URL": (
        ["--set", "rollout.engine=server", "--set", "rollout.server.shared_dir=x",
         "--set", 'rollout.server.base_urls=["https://me:planted-password@host"]'], 2, "POPO_SERVER_TOKEN"),
    "login in a model's URL": (["--set", "model.id=https://me:planted-password@host/x"], 2, "holds a login"),
    "token as a model": (["--set", f"model.id={SECRETS['HF_TOKEN']}"], 2, "***"),
    "refused, with the token": (["--set", "reward.functions=mine:leak", "--set", "reward.positive_if=total"], 2, "***"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_print_no_secret(name: str, tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    options, code, says = ERRORS[name]
    printed = watched.run("train", "mine.toml", "--output", "run", "--ignore-plan", "--trust", *options, code=code)
    assert says in printed
    for secret in ("planted-password", "planted-key", *SECRETS.values()):
        assert secret not in printed
    assert not (tmp_path / "run").exists()


def test_a_traceback_prints_no_secret(tmp_path: Path) -> None:
    """Of an error that is a bug of ours or of a library."""
    watched = Watched(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, popo_lite.tools.recipe_docs as docs\n"
        "def fail(*_):\n    raise RuntimeError(os.environ['https_proxy'] + os.environ['HF_TOKEN'])\n"
        "docs.template_toml = fail\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    printed = watched.run("recipe", "show", code=1, PYTHONPATH=path)
    assert "Traceback" in printed
    assert "http://***@127.0.0.1:9***" in printed
    assert "planted-password" not in printed
    assert json.dumps(SECRETS["HF_TOKEN"]) not in printed
