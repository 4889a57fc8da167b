"""Settings that cannot go together, though each of them is valid alone. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from popo_lite.recipe import ObjectiveRecipe, Recipe

Combination = tuple[tuple[str, ...], Any, str]
"""Keys, value, why and what instead. The first key is to blame and holds the value; the others do not go with it."""


def impossible_combinations(recipe: Recipe) -> Iterator[Combination]:
    """Every group of settings that cannot go together, though each of them is valid alone."""
    rollout, lora = recipe.rollout, recipe.lora
    for key, value, off in (("top_p", rollout.top_p, 1.0), ("top_k", rollout.top_k, 0)):
        if value != off:
            yield (
                (f"rollout.{key}",),
                value,
                f"positives must be drawn from the policy itself, and a cut distribution is another one; set {off}",
            )
    targets = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    for target in targets:
        if target.split(".")[-1] in ("lm_head", "embed_out", "output_layer"):
            yield (
                ("lora.targets",),
                target,
                "the chunked loss reads the LM head's weight itself, so an adapter on it would be ignored; "
                "leave it out",
            )
    if isinstance(lora.targets, str) and lora.targets not in ("", "all-linear"):
        yield ("lora.targets",), lora.targets, f'one name goes into a list as well; write ["{lora.targets}"]'
    if not targets or "" in targets:
        yield ("lora.targets",), lora.targets, 'names no module; use "all-linear" or a list of module names'
    yield from _impossible_models(recipe)
    yield from _impossible_rollouts(recipe)
    yield from _impossible_objectives(recipe)
    if recipe.optimizer.name == "paged_adamw8bit" and recipe.train.device == "cpu":
        why = 'paging needs a GPU; use "adamw8bit" or "adamw" on a CPU'
        yield ("optimizer.name", "train.device"), recipe.optimizer.name, why
    if recipe.train.offload_activations and not recipe.train.gradient_checkpointing:
        why = "offloads what gradient checkpointing keeps; turn that on as well"
        yield ("train.offload_activations", "train.gradient_checkpointing"), True, why
    if recipe.train.offload_activations and recipe.train.device == "cpu":
        yield ("train.offload_activations", "train.device"), True, "frees GPU memory; leave it off on a CPU"
    longest, budget = rollout.max_prompt_tokens + rollout.max_completion_tokens, recipe.train.tokens_per_microbatch
    if budget < longest:
        why = f"one prompt with its answer may take {longest} tokens; set at least that"
        keys = ("train.tokens_per_microbatch", "rollout.max_prompt_tokens", "rollout.max_completion_tokens")
        yield keys, budget, why
    if recipe.objective.target_entropy is not None and recipe.objective.beta == 0:
        why = "is multiplied up and down to reach the target entropy, and 0 stays 0; set a positive start"
        yield ("objective.beta", "objective.target_entropy"), recipe.objective.beta, why
    if ":" not in recipe.reward.function and recipe.reward.function != "math":
        yield ("reward.function",), recipe.reward.function, 'is neither "math" nor "module:function"'
    reasons = {
        "arithmetic": "the built-in arithmetic is generated and has no such setting; leave the key out",
        None: "describes a dataset, and eval.dataset names none; set it, or leave this key out",
    }
    for name, part in (("data", recipe.data), ("eval", recipe.eval)):
        for key in ("config", "split", "prompt_column", "answer_column", "filter", "limit"):
            value = getattr(part, key)
            if part.dataset in reasons and value not in (None, {}):
                yield (f"{name}.{key}", f"{name}.dataset"), value, reasons[part.dataset]
    if recipe.data.system_prompt is not None and not recipe.data.system_prompt.strip():
        yield ("data.system_prompt",), recipe.data.system_prompt, "is empty; leave the key out instead"


ONLY_WITH = {
    "negative_weight": "mixed",
    "advantage_scaling": "grpo",
    "length_normalization": "grpo",
    "clip_low": "grpo",
    "clip_high": "grpo",
    "kl": "grpo",
    "kl_correction": "grpo",
}
"""Keys of the objective that belong to one algorithm."""
NOT_WITH_GRPO = (
    "weights",
    "weight_temperature",
    "weights_from",
    "normalizer",
    "target",
    "noise_sigma",
    "entropy_over",
    "importance_cap",
    "skip_all_right",
)


def _impossible_objectives(recipe: Recipe) -> Iterator[Combination]:
    objective, algorithm = recipe.objective, recipe.objective.algorithm
    defaults = ObjectiveRecipe()
    for key, owner in ONLY_WITH.items():
        value = getattr(objective, key)
        if algorithm != owner and value != getattr(defaults, key):
            yield (f"objective.{key}", "objective.algorithm"), value, f'belongs to "{owner}"; leave the key out'
    if algorithm == "grpo":
        for key in NOT_WITH_GRPO:
            value = getattr(objective, key)
            if value != getattr(defaults, key):
                why = 'is not part of "grpo"; leave the key out'
                yield (f"objective.{key}", "objective.algorithm"), value, why
    if objective.entropy_over == "all" and objective.beta == 0:
        why = "would forward wrong answers for an entropy term that is off; leave the key out, or set beta"
        yield ("objective.entropy_over", "objective.beta"), "all", why
    if algorithm == "mixed" and objective.negative_weight == 0:
        why = 'makes of "mixed" a "popo" that forwards wrong answers for nothing; use "popo", or a weight above 0'
        yield ("objective.negative_weight",), 0.0, why
    if objective.skip_all_right and recipe.rollout.budget == "adaptive":
        why = "would leave out prompts that an adaptive budget stopped before their first wrong answer; use one of both"
        yield ("objective.skip_all_right", "rollout.budget"), True, why
    off: dict[str, dict[str, float | str]] = {
        "raft": {"alpha": 0.0, "beta": 0.0, "weights": "uniform"},
        "grpo": {"alpha": 0.0},
    }
    for key, value in off.get(algorithm, {}).items():
        if getattr(objective, key) != value:
            wanted = f'"{value}"' if isinstance(value, str) else value
            why = f'"{algorithm}" has no such term; set {wanted} or leave the key out, or use "popo"'
            yield (f"objective.{key}", "objective.algorithm"), getattr(objective, key), why


def _impossible_rollouts(recipe: Recipe) -> Iterator[Combination]:
    rollout = recipe.rollout
    if recipe.lora.dora and rollout.engine in ("vllm", "server"):
        yield ("rollout.engine", "lora.dora"), rollout.engine, 'vLLM cannot serve DoRA adapters; use "hf"'
    if recipe.lora.rank > 512 and rollout.engine in ("vllm", "server"):
        yield ("lora.rank", "rollout.engine"), recipe.lora.rank, 'vLLM serves adapters up to rank 512; use that or "hf"'
    if rollout.base == "nf4" and recipe.model.quantization == "none":
        why = 'would sample a 4-bit policy while another one is trained; use "dequantized"'
        yield ("rollout.base", "model.quantization"), rollout.base, why
    if rollout.base == "nf4" and not recipe.model.double_quantization:
        why = 'vLLM quantises the scales too; use "dequantized" without double quantisation'
        yield ("rollout.base", "model.double_quantization"), rollout.base, why
    if recipe.model.dtype == "float64" and rollout.engine in ("vllm", "server"):
        yield ("rollout.engine", "model.dtype"), rollout.engine, 'vLLM does not compute in float64; use "hf"'
    if rollout.engine == "server":
        for key in ("servers", "shared_dir"):
            if not getattr(rollout, key):
                yield (f"rollout.{key}", "rollout.engine"), getattr(rollout, key), 'is needed by the engine "server"'
    elif rollout.servers:
        yield ("rollout.servers", "rollout.engine"), rollout.servers, 'only the engine "server" uses them'
    if rollout.budget == "adaptive":
        if rollout.round_size > rollout.group_size:
            why = (
                f"a step makes at most group_size = {rollout.group_size} rollouts a prompt on average; set at most that"
            )
            yield ("rollout.round_size", "rollout.group_size"), rollout.round_size, why
        for key in ("round_size", "positives_wanted"):
            if getattr(rollout, key) > rollout.max_rollouts:
                why = f"a prompt gets at most max_rollouts = {rollout.max_rollouts}"
                yield (f"rollout.{key}", "rollout.max_rollouts"), getattr(rollout, key), why


def _impossible_models(recipe: Recipe) -> Iterator[Combination]:
    model, device = recipe.model, recipe.train.device
    wide = model.dtype in ("float32", "float64")
    if model.backend == "unsloth" and wide:
        why = 'unsloth computes in 16 bit; use "bfloat16"'
        yield ("model.dtype", "model.backend"), model.dtype, why
    if model.backend == "unsloth" and recipe.lora.init_from is not None:
        why = 'cannot start from an adapter through this backend; use "transformers"'
        yield ("model.backend", "lora.init_from"), model.backend, why
    if model.backend == "unsloth" and model.attention != "sdpa":
        why = "unsloth chooses its attention itself; leave the key out"
        yield ("model.attention", "model.backend"), model.attention, why
    if model.backend == "unsloth" and not model.double_quantization:
        why = "unsloth always quantises the scales; leave the key out"
        yield ("model.double_quantization", "model.backend"), model.double_quantization, why
    if model.backend == "unsloth" and recipe.train.offload_activations:
        why = "unsloth offloads its checkpoints itself; leave the key out"
        yield ("train.offload_activations", "model.backend"), True, why
    if model.backend == "unsloth" and device == "cpu":
        yield ("model.backend", "train.device"), model.backend, 'needs a CUDA GPU; use "transformers" on a CPU'
    if model.backend == "unsloth" and model.id == "tiny":
        yield ("model.backend", "model.id"), model.backend, 'the model "tiny" is loaded by "transformers"'
    if model.quantization == "nf4" and model.dtype == "float64":
        why = 'NF4 computes in "bfloat16" or "float32"'
        yield ("model.dtype", "model.quantization"), model.dtype, why
    if model.attention == "flash_attention_2" and wide:
        why = f'needs a 16-bit model.dtype, not "{model.dtype}"; use "sdpa"'
        yield ("model.attention", "model.dtype"), model.attention, why
    if model.attention == "flash_attention_2" and device == "cpu":
        yield ("model.attention", "train.device"), model.attention, 'needs a CUDA GPU; use "sdpa" on a CPU'
