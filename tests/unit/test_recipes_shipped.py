"""Test that every shipped recipe loads and fits its card, and that a pair of recipes compares one thing."""

from __future__ import annotations

import json

import pytest

from popo_lite.recipe import MathFunction
from popo_lite.recipe_file import dump_recipe, flatten, load_recipe, shipped_recipes
from popo_lite.tools.plan.advice import advice_for
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS, UnknownArchitectureError, load_shape, shape_of
from popo_lite.tools.plan.vram import plan_memory

GIB = 2**30
MODELS = {
    "qwen_1_5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen_7b": "Qwen/Qwen2.5-Math-7B",
    "r1_distill_1_5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1_distill_7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "llama_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "deepseek_math_7b": "deepseek-ai/deepseek-math-7b-instruct",
}
GPU_RECIPES = [f"{name}_{kind}" for name in MODELS for kind in ("lora", "grpo")]
TODAY = {
    "qwen3_1_7b": "Qwen/Qwen3-1.7B",
    "qwen3_4b": "Qwen/Qwen3-4B",
    "qwen3_5_2b": "Qwen/Qwen3.5-2B",
    "gemma3_1b": "google/gemma-3-1b-it",
    "gemma3_4b": "google/gemma-3-4b-it",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "smollm3_3b": "HuggingFaceTB/SmolLM3-3B",
    "phi4_mini": "microsoft/Phi-4-mini-instruct",
}


def is_planned(name: str) -> bool:
    """Return True if the plan knows the recipe's model without a network."""
    model = load_recipe(name).model
    try:
        return model.id == "tiny" or bool(shape_of(KNOWN_CONFIGS[model.id]))
    except (KeyError, UnknownArchitectureError):
        return False


# The template shows every key with its default, and its default model is too small for its default lengths.
@pytest.mark.parametrize("name", [name for name in sorted(shipped_recipes().keys() - {"template"}) if is_planned(name)])
def test_every_recipe_loads_and_its_plan_fits_24_gib(name, tmp_path):
    recipe = load_recipe(shipped_recipes()[name])
    plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=24 * GIB)
    assert plan.fits
    assert advice_for(plan).changes == ()
    # A run folder's recipe.toml is a dump; chat templates have many lines.
    (tmp_path / "again.toml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_twelve_recipes_are_for_a_gpu():
    at_top = {name for name in shipped_recipes() if "/" not in name}
    on_gpu = {name for name in at_top if load_recipe(name).train.device != "cpu"} - {"template", "tiny_vllm"}
    assert on_gpu == {*GPU_RECIPES, *TODAY}
    assert len(GPU_RECIPES) == 12
    for name in GPU_RECIPES:
        recipe = load_recipe(name)
        assert recipe.model.id == MODELS[name.rpartition("_")[0]]
        assert recipe.model.id in KNOWN_CONFIGS  # planned without a network
        assert recipe.model.quantization == "nf4"
        assert recipe.objective.algorithm == ("grpo" if name.endswith("_grpo") else "popo")


@pytest.mark.parametrize("name", TODAY)
def test_recipes_of_today_ask_for_right_answers_that_end(name):
    recipe = load_recipe(name)
    assert recipe.model.id == TODAY[name]
    assert recipe.model.quantization == "nf4"
    assert (recipe.data.dataset, recipe.eval.dataset, recipe.grading.functions) == ("gsm8k", "gsm8k", (MathFunction(),))
    assert r"\boxed{}" in str(recipe.data.system_prompt)
    # Models that think by default, and would be cut off before they answer.
    assert ("/no_think" in str(recipe.data.system_prompt)) is name.startswith(("qwen3_1", "qwen3_4", "smollm3"))


@pytest.mark.parametrize("name", GPU_RECIPES)
def test_there_is_room_for_the_whole_answer_and_to_spare(name):
    recipe = load_recipe(name)
    shape = load_shape(recipe.model)
    plan = plan_memory(recipe, shape, vram_bytes=24 * GIB)
    assert plan.sequence_tokens <= plan.context_tokens
    assert plan.sequence_tokens <= plan.longest_sequence_tokens
    assert plan.sequences_at_once >= recipe.rollout.num_generations
    assert plan.peak.total_bytes <= 22 * GIB  # a 24 GB card rarely has all of it to give
    assert recipe.optimizer.learning_rate > 1e-6  # LoRA's, not that of full fine-tuning


@pytest.mark.parametrize("name", [name for name in GPU_RECIPES if name.startswith("r1_")])
def test_models_that_think_long_are_let_think(name):
    recipe = load_recipe(name)
    assert recipe.rollout.max_prompt_length + recipe.rollout.max_completion_length >= 16384
    assert recipe.data.system_prompt is None


@pytest.mark.parametrize("name", MODELS)
def test_popo_and_grpo_differ_in_the_objective_alone(name):
    popo, grpo = (flatten(load_recipe(f"{name}_{kind}")) for kind in ("lora", "grpo"))
    differing = {key for key in popo.keys() | grpo.keys() if popo.get(key) != grpo.get(key)}
    assert "objective.algorithm" in differing
    assert {key.partition(".")[0] for key in differing} <= {"objective", "siamese"}
    assert 0.01 <= grpo["objective.kl_coef"] <= 0.1  # the published baseline's


def test_longer_thinking_than_shipped_is_what_the_comment_says():
    """r1_distill_7b: 32,768 tokens fit, and vLLM holds four such answers at a time."""
    longer = ("rollout.max_completion_length=32256", "train.tokens_per_microbatch=32768")
    for name in ("r1_distill_7b_lora", "r1_distill_7b_grpo"):
        recipe = load_recipe(name, longer)
        plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=24 * GIB)
        assert plan.fits
        assert plan.sequences_at_once == 4


@pytest.mark.parametrize("name", [name for name in GPU_RECIPES if load_recipe(name).rollout.vllm.base == "nf4"])
def test_a_16_bit_engine_would_not_fit_beside_a_7b_trainer(name):
    recipe = load_recipe(name, ("rollout.vllm.base=dequantized",))
    plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=24 * GIB)
    assert not plan.fits or plan.sequences_at_once < recipe.rollout.num_generations, json.dumps(plan.as_json())
