"""Test float16 with its loss scale, float64, and GPUs that lack a dtype, a driver or are not there."""

from __future__ import annotations

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

from helpers import json_lines
from popo_lite.callbacks import Callback
from popo_lite.checkpoint import load_checkpoint
from popo_lite.errors import ModelError, StopRequested, UserInputError
from popo_lite.policy import device
from popo_lite.policy.device import check_cpu_size, check_dtype, cuda_problem, pick_device
from popo_lite.policy.policy import check_logits, load_policy
from popo_lite.run_folder import RunFolder
from popo_lite.samplers import pick_engine
from popo_lite.tools.plan import terms
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS, load_shape
from popo_lite.tools.plan.vram import plan_memory
from popo_lite.update import START_SCALE
from updates import backward, groups_of, trainer_of, update

SMALL = ("eval.problems=0", "model.quantization=none", "train.tokens_per_microbatch=512")
AS_IN_A_LONG_STEP = 2.0**-11
"""Without a scale, a token's loss in a step of 2,000 times the tokens."""


def distance(found, expected):
    norms = [(found[name] - expected[name]).norm() / expected[name].norm() for name in expected if "lora_B" in name]
    return float(torch.stack(norms).max())


def test_scaled_losses_keep_the_gradients_that_float16_would_lose(tiny_recipe):
    gradients = {}
    for dtype, scale in (("float32", None), ("float16", None), ("float16", AS_IN_A_LONG_STEP)):
        recipe = tiny_recipe(f"model.dtype={dtype}", *SMALL)
        with trainer_of(recipe) as trainer:
            assert trainer.learner.loss_scale == (START_SCALE if dtype == "float16" else 1.0)
            trainer.learner.loss_scale = scale or trainer.learner.loss_scale
            gradients[dtype, scale] = update(trainer, groups_of(trainer))
    expected = gradients["float32", None]
    assert distance(gradients["float16", None], expected) < 0.02
    assert distance(gradients["float16", AS_IN_A_LONG_STEP], expected) > 0.1
    torch.testing.assert_close(gradients["float16", None]["loss"], expected["loss"], rtol=1e-3, atol=1e-3)


def test_an_overflow_repeats_the_update_with_a_smaller_scale(tiny_recipe):
    with trainer_of(tiny_recipe("model.dtype=float16", *SMALL)) as trainer:
        groups = groups_of(trainer)
        expected, learner, done = update(trainer, groups), trainer.learner, []
        learner.loss_scale = 2.0**40
        plan = learner.plan(groups)
        targets = learner.siamese_targets(0, plan)
        result = learner.backward(plan, targets, None, trainer.cursor.entropy_coef, progress=done.append)
        assert math.isfinite(result.grad_norm)
        assert learner.loss_scale < 2.0**40
        assert sum(done) == len(plan.sequences) < max(map(abs, done)) * len(done)
        assert result.tokens == sum(sequence.rollout.tokens for sequence in plan.sequences) - shared(plan)
        assert result.sums["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
        # What no scale helps against is left to the trainer, which skips the step.
        next(trainer.policy.predictor.parameters()).data.fill_(math.nan)
        scale = learner.loss_scale
        assert not math.isfinite(backward(trainer, learner.plan(groups)).grad_norm)
        assert learner.loss_scale == scale


def test_an_update_that_is_stopped_keeps_its_scale(tiny_recipe):
    with trainer_of(tiny_recipe("model.dtype=float16", *SMALL)) as trainer:
        groups, learner = groups_of(trainer), trainer.learner
        learner.loss_scale = 2.0**40

        def stop(amount):
            if amount < 0:  # the second try begins
                raise StopRequested

        plan = learner.plan(groups)
        with pytest.raises(StopRequested):
            learner.backward(plan, learner.siamese_targets(0, plan), None, 0.0, progress=stop)
        assert learner.loss_scale == 2.0**40


def shared(plan):
    prompts = {sequence.rollout.prompt.token_ids for sequence in plan.sequences}
    every = sum(len(sequence.rollout.prompt.token_ids) for sequence in plan.sequences)
    return every - sum(map(len, prompts))


def test_a_run_in_float16_keeps_its_scale_in_checkpoints(tiny_recipe, tmp_path):
    recipe = tiny_recipe("model.dtype=float16", "train.steps=2", "data.prompts_per_step=8", "eval.problems=0")
    with trainer_of(recipe) as trainer:
        trainer.learner.loss_scale = 2.0**9
        assert trainer.run(RunFolder(tmp_path)).summary is not None
    lines = json_lines(tmp_path / "metrics.jsonl")
    assert [line["skipped_reason"] for line in lines] == [None, None]
    assert max(line["logp_gap_mean"] for line in lines) < 1e-3
    with trainer_of(recipe) as trainer:
        load_checkpoint(tmp_path / "checkpoints" / "step-000002", trainer.learner)
        assert trainer.learner.loss_scale == 2.0**9


def test_a_model_that_float16_cannot_hold_is_refused(tiny_recipe):
    policy = load_policy(tiny_recipe("model.dtype=float16", "model.quantization=none"))
    policy.trunk.layers[0].mlp.down_proj.base_layer.weight.data.fill_(6e4)
    with pytest.raises(ModelError, match="exceed what float16 can hold") as caught:
        check_logits(policy)
    assert "model.dtype=float32" in caught.value.next_step


def test_a_run_in_float64_agrees_with_its_sampler(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        "model.dtype=float64", "model.quantization=none", "train.steps=1", "data.prompts_per_step=4", "eval.problems=0"
    )
    with trainer_of(recipe) as trainer:
        assert trainer.run(RunFolder(tmp_path)).summary is not None
    assert json_lines(tmp_path / "metrics.jsonl")[0]["logp_gap_max"] < 1e-12


# ---------------------------------------------------------------------- GPUs


def test_bfloat16_needs_a_gpu_that_computes_in_it(tiny_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gpu = torch.device("cuda")
    with pytest.raises(UserInputError, match="Tesla T4 .compute capability 7.5. does not compute in bf") as caught:
        check_dtype(tiny_recipe("model.dtype=bfloat16").model, gpu)
    assert caught.value.next_step == "--set model.dtype=float16"
    for dtype in ("float16", "float32"):
        check_dtype(tiny_recipe(f"model.dtype={dtype}").model, gpu)
    check_dtype(tiny_recipe("model.dtype=bfloat16").model, torch.device("cpu"))


def test_float32_adapters_are_not_served_by_vllm_on_a_gpu(tiny_recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=name))
    recipe = tiny_recipe("rollout.engine=auto", "train.device=auto")
    shape = load_shape(recipe.model)
    explicit = recipe.with_values({"rollout.engine": "vllm"})
    assert pick_engine(recipe)[0] == pick_engine(explicit)[0] == "vllm"  # on this CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_engine(recipe) == ("hf", "hf (on a GPU vLLM serves adapters in 16 bit only)")
    assert terms.engine_of(recipe) == plan_memory(recipe, shape, vram_bytes=2**34).engine == "hf"
    with pytest.raises(UserInputError, match="16 bit only"):
        plan_memory(explicit, shape, vram_bytes=2**34)
    for change in ({"model.dtype": "float16"}, {"rollout.vllm.base": "bf16"}, {"train.device": "cpu"}):
        assert pick_engine(recipe.with_values(change))[0] == terms.engine_of(recipe.with_values(change)) == "vllm"


@pytest.fixture
def old_driver(monkeypatch):
    """A machine whose driver is too old for this torch."""

    def init():
        text = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."
        raise RuntimeError(text)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device.shutil, "which", lambda _: "nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="470.57.02\n470.57.02\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *_, **__: answer)


def test_a_driver_that_is_too_old_is_named(old_driver, monkeypatch):
    what, next_step = cuda_problem()
    assert "built for CUDA 13.0, cannot use the GPU (NVIDIA driver 470.57.02)" in what
    assert what.endswith("driver on your system is too old (found version 11040)")
    assert next_step.startswith("update the driver to 580 or newer")
    with pytest.raises(UserInputError, match="too old"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in cuda_problem()[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants the CPU
    assert cuda_problem() is None


def test_a_small_model_trains_on_the_cpu_and_says_why(old_driver, tiny_recipe):
    told = []

    class Told(Callback):
        def message(self, text):
            told.append(text)

    with trainer_of(tiny_recipe("train.device=auto", "eval.problems=0"), Told()) as trainer:
        assert trainer.policy.device.type == "cpu"
    assert [text for text in told if "driver 470.57.02" in text and "update the driver" in text]


def test_a_large_model_trains_on_a_cpu_only_if_asked(old_driver, tiny_recipe, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["Qwen/Qwen2.5-Math-7B"]))
    recipe = tiny_recipe(f"model.id={tmp_path}", "train.device=auto")
    with pytest.raises(UserInputError, match="has 7.6 billion parameters.*470.57.02") as caught:
        trainer_of(recipe)
    assert "--set train.device=cpu" in caught.value.next_step
    check_cpu_size(recipe.with_values({"train.device": "cpu"}), torch.device("cpu"))
    monkeypatch.setattr(device.shutil, "which", lambda _: None)
    with pytest.raises(UserInputError, match="torch finds no CUDA GPU"):
        trainer_of(recipe)
