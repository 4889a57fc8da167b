"""The dequantised base in the Hub's cache: what it holds, what its name depends on, and half-written copies."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from popo_lite.errors import ModelError
from popo_lite.policy import load
from popo_lite.policy.cache import cached_folder
from popo_lite.policy.load import TINY_FOLDER, dequantized_folder
from popo_lite.policy.policy import load_policy


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "popo-lite"


def test_a_base_is_written_once_and_named_by_its_content(tiny_recipe, cache, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(load, "write_dequantized_base", lambda _, folder: (written.append(folder), folder.mkdir()))

    def folder_of(*overrides):
        recipe = tiny_recipe(*overrides)
        return dequantized_folder(load_policy(recipe), recipe.model)

    copied = tmp_path / "mine"
    shutil.copytree(TINY_FOLDER, copied)
    mine = f'model.id="{copied}"'
    first = folder_of(mine)
    assert first.parent == cache
    assert first.name.startswith("mine-dequantized-")
    assert folder_of(mine, "lora.rank=2", "train.seed=7") == first
    assert len(written) == 1
    others = [folder_of(mine, "model.double_quantization=false"), folder_of(mine, 'model.dtype="bfloat16"')]
    weights = load_file(file := copied / "model.safetensors")
    save_file(weights, file, metadata={"format": "pt"})
    assert folder_of(mine) == first
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    others.append(folder_of(mine))
    assert len({first, *others}) == len(written) == 4


def test_a_dequantised_base_is_the_base_that_is_trained_in_several_files(tiny_recipe, monkeypatch):
    monkeypatch.setattr(load, "DEQUANTIZED_FILE_BYTES", 2**19)
    recipe = tiny_recipe()
    policy = load_policy(recipe)
    folder = dequantized_folder(policy, recipe.model)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert sum(len(load_file(file)) for file in files) == len(list(plain.named_parameters()))
    ids = torch.arange(5, 25)[None]
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad(), policy.model.disable_adapter():
        torch.testing.assert_close(
            plain(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_copy_that_was_not_finished_is_made_again(cache):
    def stop(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("base", 1, stop)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    (lock,) = cache.iterdir()
    (killed := lock.with_suffix(".partial")).mkdir()
    (killed / "half").touch()
    folder = cached_folder("base", 1, lambda folder: folder.mkdir())
    assert list(folder.iterdir()) == []
    assert not killed.exists()


def _write(folder: Path) -> None:
    folder.mkdir()
    (folder / "whole").touch()


def _twice(home: str) -> None:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HOME = home
    assert list(cached_folder("base", 1, _write).iterdir())


def test_two_processes_at_once_share_one_copy(cache):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_twice, args=(str(cache.parent),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_disk_without_space_is_an_error_with_what_to_do(cache):
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match="No space left") as caught:
        cached_folder("base", 1, full)
    assert "HF_HOME" in caught.value.next_step
