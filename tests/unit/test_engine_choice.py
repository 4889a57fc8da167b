"""Test what happens if vLLM does not start or does not take an adapter, without vLLM."""

from __future__ import annotations

import os

import filelock
import pytest
from pydantic import BaseModel, ValidationError, model_validator

from popo_lite import samplers
from popo_lite.distributed import Ranks
from popo_lite.errors import EngineError, EngineFailedError
from popo_lite.policy.policy import load_policy
from popo_lite.samplers import open_sampler, vllm


class Config(BaseModel):
    """Fails as vLLM's configs do."""

    @model_validator(mode="after")
    def check(self):
        raise ValueError("Bfloat16 is only supported on GPUs with compute capability of at least 8.0.\nUse float16.")


def validation_error():
    with pytest.raises(ValidationError) as caught:
        Config()
    return caught.value


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (validation_error(), "Bfloat16 is only supported on GPUs with compute capability of at least 8.0."),
        (
            ValueError("LoRA rank 32 is greater than max_lora_rank 16."),
            "LoRA rank 32 is greater than max_lora_rank 16.",
        ),
        (AssertionError(), "AssertionError"),
        (ValueError("expected modules " + "gate_up_proj " * 100), "expected modules gate_up_proj"),
    ],
)
def test_the_reason_of_an_error_is_shown(error, reason):
    assert vllm._reason(error).startswith(reason)
    assert len(vllm._reason(error)) <= 300


@pytest.fixture
def refusing(monkeypatch):
    """`refusing("what")`: vLLM is there and refuses with these words."""

    def make(what):
        def refuse(*_, **__):
            raise EngineError(what, where='rollout.engine = "vllm"')

        monkeypatch.setattr(vllm, "why_not", lambda _: None)
        monkeypatch.setitem(samplers.SAMPLERS, "vllm", refuse)

    return make


def test_auto_samples_from_the_trainers_model_if_vllm_refuses_it(refusing, tiny_recipe):
    refusing("the vLLM engine did not start: no such architecture")
    recipe, told = tiny_recipe("rollout.engine=auto"), []
    policy = load_policy(recipe)
    with open_sampler(recipe, policy, text=str, notify=told.append) as sampler:
        assert sampler.engine == "hf"
    assert told == [
        "the vLLM engine did not start: no such architecture; sampling from the trainer's own model (hf) instead"
    ]
    with pytest.raises(EngineError, match="no such architecture"):
        open_sampler(tiny_recipe("rollout.engine=vllm"), policy, text=str, notify=told.append)


def test_several_ranks_do_not_change_to_another_engine(refusing, tiny_recipe):
    class Two(Ranks):
        size = 2

        def gather(self, value):
            return [value, None]

    refusing("the vLLM engine did not start: no such architecture")
    recipe = tiny_recipe("rollout.engine=auto")
    with pytest.raises(EngineError, match="no such architecture"):
        open_sampler(recipe, load_policy(recipe), text=str, notify=print, ranks=Two())


def test_running_out_of_memory_is_not_hidden(refusing, tiny_recipe):
    refusing("the vLLM engine did not start: No available memory for the cache blocks.")
    recipe = tiny_recipe("rollout.engine=auto")
    with pytest.raises(EngineError, match="No available memory"):
        open_sampler(recipe, load_policy(recipe), text=str, notify=print)


def test_folders_of_killed_processes_are_deleted_and_those_of_living_ones_are_not(tmp_path):
    kept = {"of another program", f"{vllm.PREFIX}1-new", f"{vllm.PREFIX}2-held"}
    for name in (*kept, f"{vllm.PREFIX}3-left"):
        (tmp_path / name / "7").mkdir(parents=True)
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    handle = os.open(tmp_path / f"{vllm.PREFIX}2-held", os.O_RDONLY)
    filelock.lock_descriptor(handle)
    vllm._delete_leftovers(tmp_path)
    os.close(handle)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_failing_token_is_an_error_with_a_way_out():
    def fail(*_, **__):
        raise ValueError("LoRA rank 32 is greater than max_lora_rank 16.")

    with pytest.raises(EngineFailedError, match="engine failed: LoRA rank 32") as caught, vllm._failures():
        fail()
    assert 'rollout.engine="hf"' in caught.value.next_step


def test_the_engine_is_built_for_the_largest_rank_in_the_adapter(tiny_recipe):
    recipe = tiny_recipe("lora.rank=16")
    assert vllm.engine_options(recipe, 16)["max_lora_rank"] == 16
    assert vllm.engine_options(recipe, 32)["max_lora_rank"] == 32  # PEFT doubles that of fused experts
    assert vllm.engine_options(recipe, 33)["max_lora_rank"] == 64
