"""A run that will not fit is refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from popo_lite.errors import UserInputError
from popo_lite.policy.memory import refuse_without_room
from popo_lite.recipe_file import load_recipe

GPU = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A card with so many GiB, `used` of them by others."""

    def make(total, used=0):
        figures = ((total - used) * 2**30, total * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: figures)

    return make


def test_a_run_beyond_the_card_is_refused_with_what_makes_it_fit(gpu):
    recipe = load_recipe("qwen_7b_lora")
    gpu(24)
    refuse_without_room(recipe, GPU, pytest.fail)
    gpu(12)
    with pytest.raises(UserInputError, match=r"planned to need|lacks") as caught:
        refuse_without_room(recipe, GPU, pytest.fail)
    assert caught.value.next_step.startswith("--set ")
    options = caught.value.next_step.removeprefix("--set ").replace("'", "").split(" --set ")
    refuse_without_room(load_recipe("qwen_7b_lora", options), GPU, pytest.fail)


def test_what_others_hold_counts(gpu):
    gpu(24, used=14)
    with pytest.raises(UserInputError):
        refuse_without_room(load_recipe("qwen_7b_lora"), GPU, pytest.fail)


def test_a_cpu_has_no_plan(tiny_recipe):
    refuse_without_room(load_recipe("qwen_7b_lora"), torch.device("cpu"), pytest.fail)


def test_an_architecture_without_a_plan_goes_on_and_says_so(gpu, tmp_path, tiny_recipe):
    (tmp_path / "config.json").write_text('{"model_type": "falcon", "hidden_size": 64}')
    gpu(24)
    told = []
    refuse_without_room(tiny_recipe(f'model.id="{tmp_path}"'), GPU, told.append)
    assert len(told) == 1
    assert "falcon" in told[0]
