"""Broken recipes through the real command: one clear message, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from popo_lite.cli import COMMANDS, main

BROKEN = {
    "unknown key": (
        "[objective]\nsimilarity_coeff = 0.2\n",
        ["objective.similarity_coeff", "objective.similarity_coef"],
    ),
    "wrong type": ('[lora]\nrank = "many"\n', ['lora.rank = "many"', "whole number"]),
    "missing file": ('[data]\ndataset = "absent.jsonl"\n', ["absent.jsonl", "data.dataset"]),
    "rank 0": ("[lora]\nrank = 0\n", ["lora.rank = 0", "at least 1"]),
    "unknown algorithm": ('[objective]\nalgorithm = "ppo"\n', ['objective.algorithm = "ppo"', "popo"]),
    "group size 1": ("[rollout]\nnum_generations = 1\n", ["rollout.num_generations = 1", "at least 2"]),
    "top_p with positives only": ("[rollout]\ntop_p = 0.9\n", ["rollout.top_p = 0.9", "whole distribution"]),
    "adapter on the head": ('[lora]\ntarget_modules = ["q_proj", "lm_head"]\n', ["lora.target_modules", "lm_head"]),
    "missing column": (
        '[data]\ndataset = "rows.jsonl"\nprompt_column = "questoin"\nanswer_column = "answer"\n',
        ["questoin", "question", "data.prompt_column"],
    ),
    "longer than the context": (
        "[rollout]\nmax_prompt_length = 900\nmax_completion_length = 900\n",
        ["900 + 900 = 1800", "1024", "rollout.max_completion_length"],
    ),
    "too long a prompt": (
        "[rollout]\nmax_prompt_length = 6\nmax_completion_length = 64\n",
        ["rollout.max_prompt_length = 6"],
    ),
    "reward function that is not there": ('[reward]\nfunctions = "nowhere:grade"\n', ["reward.functions", "nowhere"]),
    "model that is not there": ('[model]\nid = "/no/such/folder"\n', ["model.id", "/no/such/folder"]),
    "broken TOML": ("[lora\nrank = 1\n", ["line 1"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_one_clear_message(name, command, tmp_path):
    text, expected = BROKEN[name]
    (tmp_path / "rows.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    (tmp_path / "broken.toml").write_text(text)
    done = command("train", "broken.toml", "--trust")
    assert done.returncode == 2, done.stderr
    message = " ".join(done.stderr.split())
    for part in expected:
        assert part in message
    assert "Traceback" not in message
    assert "broken.toml" in message
    assert len(done.stdout.splitlines()) <= 1  # that the model is being loaded
    assert len(message) < 1200
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_is_not_there(command):
    done = command("train", "tiny_cpi")
    assert done.returncode == 2
    assert "tiny_cpu" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_refused_before_anything_is_loaded(command):
    done = command("train", "tiny_cpu", "--set", "rollout.engine=vllm")
    assert done.returncode != 0
    assert 'rollout.engine="hf"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "code", ["import popo_lite.cli", "import popo_lite.tools.console.views, popo_lite.grading.worker"]
)
def test_help_and_validation_need_no_torch(code):
    check = f"import sys; {code}; print(sorted({{'torch', 'transformers', 'numpy', 'rich'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command(command):
    done = command("--help")
    assert done.returncode == 0
    for name in ("train", "eval", "generate", "export", "recipe"):
        assert f"\n  {name}" in done.stdout
        assert command(name, "--help").returncode == 0


@pytest.mark.parametrize("name", ["eval", "generate", "export"])
def test_a_full_gpu_is_told_with_what_to_do(name, monkeypatch):
    def run(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(main.get_command(click.Context(main), name), "callback", run)
    done = CliRunner().invoke(main, [name, "run", *(["question"] if name == "generate" else [])])
    assert done.exit_code == 1
    assert "the GPU ran out of memory" in done.stderr
    assert "CUDA_VISIBLE_DEVICES=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train", "resume"}))
def test_several_ranks_of_a_command_that_has_one_are_refused(name):
    """Each would do the whole, in the same folders. Its arguments are not read before."""
    first, other = [{"WORLD_SIZE": "2", "RANK": rank} for rank in "01"]
    done = CliRunner().invoke(main, [name, "run"], env=first)
    assert done.exit_code == 2
    assert f"2 ranks run popo-lite {name}" in done.stderr
    assert "run it without torchrun" in done.stderr
    done = CliRunner().invoke(main, [name, "run"], env=other)
    assert (done.exit_code, done.output) == (2, "")
    assert CliRunner().invoke(main, [name, "--help"], env=first).exit_code == 0
    for option in ("--help", "--version"):
        assert CliRunner().invoke(main, [option], env=first).exit_code == 0


def test_a_full_disk_is_told():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "popo_lite", "recipe", "show"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "no room left on the disk" in done.stderr
    assert "Traceback" not in done.stderr
