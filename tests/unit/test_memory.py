"""Test that a run that does not fit is refused before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from popo_lite.errors import UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import refuse_without_room


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that sets the card's GiB, and those used by others and by this process's CUDA context."""

    def make(total, used=0):
        figures = (round((total - used) * 2**30), total * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: figures)

    return make


def test_a_run_beyond_the_card_is_refused_with_what_makes_it_fit(gpu):
    recipe = load_recipe("qwen_7b_lora")
    gpu(24)
    refuse_without_room(recipe, pytest.fail)
    gpu(12)
    with pytest.raises(UserInputError, match=r"planned to need|lacks") as caught:
        refuse_without_room(recipe, pytest.fail)
    assert caught.value.next_step.startswith("--set ")
    options = caught.value.next_step.removeprefix("--set ").replace("'", "").split(" --set ")
    refuse_without_room(load_recipe("qwen_7b_lora", options), pytest.fail)


def test_what_others_hold_counts(gpu):
    gpu(24, used=14)
    with pytest.raises(UserInputError, match=r"beside 13\.4 GiB of other processes .* there are 24\.0 GiB"):
        refuse_without_room(load_recipe("qwen_7b_lora"), pytest.fail)


def test_the_engines_share_is_of_the_card_and_not_of_what_others_leave(gpu):
    """0.85 of 24 GiB and what is loaded before do not fit in 22; 0.85 of 22 would."""
    recipe = load_recipe("qwen_1_5b_lora", ("rollout.vllm.gpu_memory_utilization=0.85",))
    gpu(22)
    refuse_without_room(recipe, pytest.fail)
    gpu(24, used=2)
    with pytest.raises(UserInputError, match="in the phase load"):
        refuse_without_room(recipe, pytest.fail)


def test_this_processs_own_context_is_counted_once(gpu):
    recipe = load_recipe("qwen_1_5b_lora", ("rollout.vllm.gpu_memory_utilization=0.85",))
    gpu(24, used=0.5)
    refuse_without_room(recipe, pytest.fail)


def test_a_cpu_has_no_plan(gpu):
    gpu(1)
    refuse_without_room(load_recipe("qwen_7b_lora", ("train.device=cpu",)), pytest.fail)


def test_an_architecture_without_a_plan_goes_on_and_says_so(gpu, tmp_path, tiny_recipe):
    (tmp_path / "config.json").write_text('{"model_type": "falcon", "hidden_size": 64}')
    gpu(24)
    messages = []
    refuse_without_room(tiny_recipe(f'model.id="{tmp_path}"', 'train.device="cuda"'), messages.append)
    assert len(messages) == 1
    assert "falcon" in messages[0]
