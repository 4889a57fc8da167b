"""The real command, from a run of `popo-lite train` to a model that loads without PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import popo_lite


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ("train.steps=4", "data.prompts_per_step=8", "eval.problems=40")
    overrides = [part for setting in settings for part in ("--set", setting)]
    popo_lite("train", "tiny_cpu", *overrides, "--output", str(folder), "--view", "silent")
    return folder


def example(folder: Path) -> str:
    """The Python of the folder's model card."""
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def test_a_run_becomes_a_model_that_loads_without_peft(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    printed = popo_lite("export", str(run), "--output", str(folder), "--prompts", "40", "--json").stdout
    report = json.loads(printed)
    assert report["folder"] == str(folder)
    assert (report["what"], report["weights"], report["dtype"]) == ("merged", "policy", "float32")
    assert report["files"] == {file.name: file.stat().st_size for file in folder.iterdir()}
    assert report["verification"]["prompts"] == 40
    assert report["verification"]["greedy_agreement"] == 1.0
    assert report["verification"]["pass_at_1"]["problems"] == 40
    # The card's own example, in a process that has neither PEFT nor this package.
    code = 'import sys; sys.modules["peft"] = sys.modules["popo_lite"] = None\n' + example(folder)
    code = code.replace("path/to/this/folder", str(folder))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "\\boxed{" in ran.stdout


def test_the_example_of_an_adapter_runs(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    out = popo_lite("export", str(run), "--what", "adapter", "--weights", "siamese", "--output", str(folder)).stdout
    assert "adapter_model.safetensors" in out
    assert f"popo-lite push {folder} USER/NAME --dry-run" in out
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        run / "siamese" / "adapter_model.safetensors"
    ).read_bytes()
    code = example(folder).replace("path/to/this/folder", str(folder))
    code += "assert base.is_loaded_in_4bit and base.config.quantization_config.bnb_4bit_use_double_quant\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "\\boxed{" in ran.stdout


def test_mistakes_are_refused_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    assert "--dtype" in popo_lite("export", str(run), "--what", "adapter", "--dtype", "float16", code=2).stderr
    assert "--base" in popo_lite("export", str(run), "--what", "adapter", "--base", "original", code=2).stderr
    assert "there is no run here" in popo_lite("export", str(tmp_path), code=2).stderr
    assert not (run / "export").exists()
