"""The trainer's own code on a simulated GPU: every setting with a CUDA path of its own, and memory against the plan.

All tests of this file share one process with one simulated device. Those that are not slow run in `make test`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from popo_lite.errors import PopoError, UserInputError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import simulation
from popo_lite.tools.plan.advice import refuse_without_room
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES, plan_memory
from popo_lite.tools.simulate import Simulator

pytestmark = pytest.mark.fakegpu
ROOT = Path(__file__).parents[2]
ROUNDING = 0.004  # torch's allocator rounds tensors up to 512 bytes

# As wide as a model of 0.5B, with two layers: the cost of a simulation depends only on the number of operators.
NARROW = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "eos_token_id": 1,
}  # fmt: skip
SIZE = (
    "data.prompts_per_step=4", "rollout.num_generations=4", "rollout.max_prompt_length=128",
    "rollout.max_completion_length=992", "train.tokens_per_microbatch=8192", "train.logits_mib=16",
    "siamese.head_width=256", "train.gradient_checkpointing=true", 'model.dtype="bfloat16"', 'train.device="cuda"',
)  # fmt: skip


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator() as started:
        yield started


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("narrow"))


def folder_of(folder: Path, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(NARROW | config))
    return folder


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "tiny_cpu.toml", (f'model.id="{folder}"', *SIZE, *overrides))


# ---------------------------------------------------------------------- settings

SETTINGS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "one tile": ("rollout.max_completion_length=224", "train.tokens_per_microbatch=2048"),
    "without checkpointing": ("train.gradient_checkpointing=false",),
    "offloaded": ("train.offload_activations=true",),
    "prompts repeated": ("train.shared_prefix=false",),
    "one sequence at a time": ("train.packing=false",),
    "eager": ('model.attn_implementation="eager"',),
    "float32": ('model.dtype="float32"',),
    "not quantised": ('model.quantization="none"',),
    "not quantised, float32": ('model.quantization="none"', 'model.dtype="float32"'),
    "single quantisation": ("model.double_quantization=false",),
    "dropout": ("lora.dropout=0.1",),
    "DoRA": ("lora.dora=true",),
    "DoRA on two targets": ("lora.dora=true", 'lora.target_modules=["q_proj", "v_proj"]'),
    "two targets": ('lora.target_modules=["q_proj", "v_proj"]',),
    "rank 64": ("lora.rank=64",),
    "adamw8bit": ('optimizer.name="adamw8bit"',),
    "paged": ('optimizer.name="paged_adamw8bit"',),
    "state stays on the GPU": ("rollout.vllm.enable_sleep_mode=false",),
    "temperature": ("rollout.temperature=0.7",),
    "weights by the trainer": ('objective.weights_from="trainer"',),
    "features": ('objective.target="features"',),
    "entropy over all": ('objective.entropy_over="all"',),
    "importance weights": ("objective.importance_sampling_clip_max=2.0",),
    "no similarity": ("objective.similarity_coef=0.0",),
    "raft": ('objective.algorithm="raft"',),
    "mixed": ('objective.algorithm="mixed"',),
    "grpo": ('objective.algorithm="grpo"',),
    "grpo with KL": ('objective.algorithm="grpo"', "objective.kl_coef=0.05"),
}


# In each another kernel computes attention: FlashAttention over packed rows, SDPA's FlashAttention, no kernel, and the
# memory-efficient one.
KERNELS = ("as it is", "one sequence at a time", "eager", "float32")


def slow_unless(sampled: tuple[str, ...], names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in sampled else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_unless(KERNELS, SETTINGS))
def test_a_setting_takes_what_the_plan_says(simulator: Simulator, narrow: Path, name: str) -> None:
    recipe = recipe_of(narrow, *SETTINGS[name])
    found = simulator.run(recipe)
    assert found["micro_batches"] >= 2
    hold_against_plan(found, recipe)


@pytest.mark.slow
def test_a_pass_of_the_base_has_no_adapters(simulator: Simulator, narrow: Path) -> None:
    recipe = recipe_of(narrow, *SETTINGS["grpo with KL"])
    assert 1 - ROUNDING <= ratios_to_plan(simulator.run(recipe), recipe)["siamese"] <= 1.01


@pytest.mark.slow
def test_smollm3_takes_what_the_plan_says(simulator: Simulator, tmp_path: Path) -> None:
    recipe = recipe_of(folder_of(tmp_path, model_type="smollm3", no_rope_layers=[1, 0], pad_token_id=0))
    hold_against_plan(simulator.run(recipe), recipe)


def test_float32_takes_no_more_on_an_older_card(simulator: Simulator, narrow: Path) -> None:
    """Compute capability 7.5 has no FlashAttention, and its other kernel without T x T scores groups no heads."""
    recipe = recipe_of(narrow, *SETTINGS["float32"])
    hold_against_plan(simulator.run(recipe, capability=(7, 5)), recipe)


@pytest.mark.slow
def test_an_older_card_takes_float16_and_no_bfloat16(simulator: Simulator, narrow: Path) -> None:
    recipe = recipe_of(narrow, "model.dtype=float16")
    hold_against_plan(simulator.run(recipe, capability=(7, 5)), recipe, capability=(7, 5))
    with pytest.raises(UserInputError, match="does not compute in bfloat16"):
        simulator.run(recipe_of(narrow, "model.dtype=bfloat16"), capability=(7, 5))


def hold_against_plan(found: dict[str, Any], recipe: Recipe, **machine: Any) -> None:
    """In the fullest phase the plan is never below the simulation, and at most 3 % above it."""
    ratios = ratios_to_plan(found, recipe, **machine)
    fullest = max(found["phases"], key=lambda name: found["phases"][name]["allocated_bytes"])
    assert 1 - ROUNDING <= ratios[fullest] <= 1.03, ratios
    # DoRA keeps 2 % more between the passes than is planned.
    assert min(ratios.values()) >= 0.98, ratios


def ratios_to_plan(found: dict[str, Any], recipe: Recipe, **machine: Any) -> dict[str, float]:
    """Return planned over simulated tensors by phase."""
    alone, shape = recipe.with_values({"rollout.engine": "hf", "train.device": "cuda"}), load_shape(recipe.model)
    planned = {p.name: p.tensor_bytes for p in plan_memory(alone, shape, vram_bytes=2**40, **machine).phases}
    return {name: planned[name] / phase["allocated_bytes"] for name, phase in found["phases"].items()}


# ---------------------------------------------------------------------- memory that runs out, and layers left out


def test_a_step_goes_on_with_smaller_micro_batches_on_a_card_that_is_too_small(
    simulator: Simulator, narrow: Path
) -> None:
    recipe = recipe_of(narrow)
    ample = simulator.run(recipe)
    peak = ample["phases"]["update"]["allocated_bytes"]
    vram = CUDA_CONTEXT_BYTES + round(0.8 * peak)
    found = simulator.run(recipe, vram_bytes=vram, enforce=True)
    assert any("memory ran out in the" in notice for notice in found["notices"])
    assert found["microbatch_tokens"] < 8192
    assert found["micro_batches"] > ample["micro_batches"]
    assert max(phase["reserved_bytes"] for phase in found["phases"].values()) <= 0.8 * peak


def test_a_card_too_small_for_one_sequence_is_an_error(simulator: Simulator, narrow: Path) -> None:
    with pytest.raises(PopoError, match="out of memory"):
        simulator.run(recipe_of(narrow), vram_bytes=CUDA_CONTEXT_BYTES + 90 * 2**20, enforce=True)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("train.gradient_checkpointing=false",)])
def test_a_few_layers_say_what_all_take(simulator: Simulator, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = recipe_of(folder_of(tmp_path, num_hidden_layers=8), *overrides)
    every, few = simulator.run(recipe), simulator.run(recipe, extrapolate=True)
    assert (every["depths"], few["depths"]) == ([8], [2, 3])
    for name, phase in every["phases"].items():
        assert few["phases"][name]["allocated_bytes"] == pytest.approx(phase["allocated_bytes"], rel=0.001)


@pytest.mark.slow
def test_layers_that_differ_are_all_run(simulator: Simulator, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    folder = folder_of(tmp_path, model_type="qwen3", num_hidden_layers=6, head_dim=64, layer_types=kinds,
                       use_sliding_window=True, sliding_window=256)  # fmt: skip
    recipe = recipe_of(folder)
    assert simulator.run(recipe, extrapolate=True)["depths"] == [6]


# ---------------------------------------------------------------------- shipped recipes


def test_a_run_of_an_architecture_without_a_plan_is_refused_by_simulation(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "Simulator", lambda: nullcontext(simulator))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**29))
    recipe = recipe_of(folder_of(tmp_path, model_type="olmo2"))
    with pytest.raises(UserInputError, match=r"simulated without rollouts, needs \d.*, and there are 512\.0 MiB"):
        refuse_without_room(recipe, print)


@pytest.mark.parametrize("name", slow_unless(("qwen_1_5b_lora",), ["qwen_1_5b_lora", "r1_distill_7b_grpo"]))
def test_a_shipped_recipe_takes_what_the_plan_says(simulator: Simulator, name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
    hold_against_plan(simulator.run(recipe, extrapolate=True), recipe)


# ---------------------------------------------------------------------- a pause


@pytest.mark.parametrize(
    "name", slow_unless(("state stays on the GPU",), ("adamw8bit", "paged", "DoRA", "state stays on the GPU"))
)
def test_a_pause_gives_the_gpu_back_and_takes_it_again(simulator: Simulator, narrow: Path, name: str) -> None:
    recipe = recipe_of(narrow, *SETTINGS[name], "rollout.max_completion_length=96", "train.tokens_per_microbatch=1024")
    found = simulator.run(recipe, pause=True)
    workspaces = 2 * 8_519_680  # cuBLAS keeps them, one for each direction
    # What is left are maps that bitsandbytes shares between optimizers, and what PEFT's copies for DoRA leave.
    assert found["while_paused"] - workspaces < 0.03 * (found["before_pause"] - workspaces)
    assert found["after_pause"] == found["before_pause"]
