"""Combinations of settings that cannot work, though each setting is valid alone. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from popo_lite.recipe import PopoObjective, PositiveObjective, Recipe

Combination = tuple[tuple[str, ...], Any, str]
"""Keys, value, and what to do. The first key is the wrong one and holds the value; the others conflict with it."""

UNTRUNCATED = "is not a setting: positives must be drawn from the whole distribution of the policy; leave the key out"

FOREIGN_KEYS = {
    "top_p": UNTRUNCATED,
    "top_k": UNTRUNCATED,
    "min_p": UNTRUNCATED,
    "lora_r": "is called lora.rank here",
    "r": "is called lora.rank here",
    "lora_alpha": "is called lora.alpha here",
    "lora_dropout": "is called lora.dropout here",
    "use_rslora": "is called lora.rslora here",
    "use_dora": "is called lora.dora here",
    "model_name": "is called model.id here",
    "model_name_or_path": "is called model.id here",
    "load_in_4bit": 'is model.quantization = "nf4" here',
    "max_seq_length": "is rollout.max_prompt_length plus rollout.max_completion_length here",
    "beta": "is called objective.kl_coef (algorithm grpo) if you mean TRL's KL coefficient, "
    "objective.entropy_coef if you mean the paper's beta",
    "epsilon_low": "is called objective.epsilon (algorithm grpo) here",
    "clip_range": "is called objective.epsilon (algorithm grpo) here",
    "num_train_epochs": "is not a setting: set train.steps",
    "max_steps": "is called train.steps here",
    "per_device_train_batch_size": "is data.prompts_per_step (prompts) and train.tokens_per_microbatch (memory) here",
    "gradient_accumulation_steps": "is not a setting: train.tokens_per_microbatch bounds memory, and micro-batches are "
    "accumulated as needed",
    "lr_scheduler_type": "is called optimizer.schedule here",
    "optim": "is called optimizer.name here",
    "logging_steps": "is not a setting: every step is logged",
    "output_dir": "is called output.dir here",
    "eval_steps": "is called eval.every here",
    "reward_funcs": "is called reward.function here",
    "use_vllm": 'is rollout.engine = "vllm" here',
    "vllm_mode": 'is rollout.engine = "vllm" (same process) or "server" here',
    "vllm_gpu_memory_utilization": "is called rollout.vllm.gpu_memory_utilization here",
    "vllm_enable_sleep_mode": "is called rollout.vllm.enable_sleep_mode here",
    "vllm_server_base_url": "is called rollout.server.base_urls here",
    "vllm_importance_sampling_clip_max": "is called objective.importance_sampling_clip_max here",
    "fast_inference": 'is rollout.engine = "vllm" here',
}
"""Keys of TRL and Unsloth -> how to say it here."""

HEADS = ("lm_head", "embed_out", "output_layer")


def impossible_combinations(recipe: Recipe) -> Iterator[Combination]:
    """Yield every group of settings that cannot be used together."""
    yield from _lora(recipe)
    yield from _model(recipe)
    yield from _rollout(recipe)
    yield from _objective(recipe)
    yield from _train(recipe)
    yield from _data(recipe)


def _lora(recipe: Recipe) -> Iterator[Combination]:
    wanted = recipe.lora.target_modules
    names = (wanted,) if isinstance(wanted, str) else wanted
    key = ("lora.target_modules",)
    for name in names:
        if name.split(".")[-1] in HEADS:
            yield key, name, "the fused loss reads the LM head's weight and would ignore an adapter on it; leave it out"
    if isinstance(wanted, str) and wanted not in ("", "all-linear"):
        yield key, wanted, f'must be a list also for one name; write ["{wanted}"]'
    if not names or "" in names:
        yield key, wanted, 'names no module; use "all-linear" or a list of module names'
    if recipe.rollout.engine in ("vllm", "server"):
        for lora_key, wrong, why in (
            ("dora", recipe.lora.dora, "vLLM cannot serve DoRA adapters"),
            ("rank", recipe.lora.rank > 512, "vLLM serves adapters up to rank 512"),
        ):
            if wrong:
                value = getattr(recipe.lora, lora_key)
                yield (f"lora.{lora_key}", "rollout.engine"), value, f'{why}; use rollout.engine = "hf"'


def _model(recipe: Recipe) -> Iterator[Combination]:
    model, train = recipe.model, recipe.train
    wide, on_cpu = model.dtype in ("float32", "float64"), train.device == "cpu"
    if model.quantization == "nf4" and model.dtype == "float64":
        yield ("model.dtype", "model.quantization"), model.dtype, 'NF4 computes in "bfloat16" or "float32"'
    if model.attn_implementation == "flash_attention_2":
        if wide:
            why = f'needs a 16-bit model.dtype, not "{model.dtype}"; use "sdpa"'
            yield ("model.attn_implementation", "model.dtype"), model.attn_implementation, why
        if on_cpu:
            why = 'needs a CUDA GPU; use "sdpa" on a CPU'
            yield ("model.attn_implementation", "train.device"), model.attn_implementation, why
    if model.backend != "unsloth":
        return
    for key, wrong, value, why in (
        ("model.dtype", wide, model.dtype, 'unsloth computes in 16 bit; use "bfloat16"'),
        ("lora.init_from", recipe.lora.init_from, recipe.lora.init_from, "unsloth cannot start from an adapter; use "
         'model.backend = "transformers"'),
        ("model.attn_implementation", model.attn_implementation != "sdpa", model.attn_implementation,
         "unsloth chooses its attention itself; leave the key out"),
        ("model.double_quantization", not model.double_quantization, False,
         "unsloth always quantises the scales; leave the key out"),
        ("train.offload_activations", train.offload_activations, True,
         "unsloth offloads its checkpoints itself; leave the key out"),
        ("train.device", on_cpu, "cpu", 'unsloth needs a CUDA GPU; use model.backend = "transformers" on a CPU'),
        ("model.id", model.id == "tiny", "tiny", 'must be loaded with model.backend = "transformers"'),
    ):  # fmt: skip
        if wrong:
            yield (key, "model.backend"), value, why


def _rollout(recipe: Recipe) -> Iterator[Combination]:
    rollout, model = recipe.rollout, recipe.model
    if rollout.vllm.base == "nf4":
        if model.quantization == "none":
            why = 'would sample from a 4-bit policy that is not the one being trained; use "dequantized"'
            yield ("rollout.vllm.base", "model.quantization"), "nf4", why
        if not model.double_quantization:
            why = 'vLLM quantises the scales too; use "dequantized" without double quantisation'
            yield ("rollout.vllm.base", "model.double_quantization"), "nf4", why
    if model.dtype == "float64" and rollout.engine in ("vllm", "server"):
        yield ("rollout.engine", "model.dtype"), rollout.engine, 'vLLM does not compute in float64; use "hf"'
    if rollout.engine == "server":
        for key in ("base_urls", "shared_dir"):
            if not (value := getattr(rollout.server, key)):
                yield (f"rollout.server.{key}", "rollout.engine"), value, 'is required by rollout.engine = "server"'
    elif rollout.server.base_urls:
        why = 'is used only with rollout.engine = "server"'
        yield ("rollout.server.base_urls", "rollout.engine"), rollout.server.base_urls, why
    adaptive = rollout.adaptive
    if not adaptive.enabled:
        return
    if adaptive.round_size > rollout.num_generations:
        why = f"must be at most rollout.num_generations = {rollout.num_generations}"
        yield ("rollout.adaptive.round_size", "rollout.num_generations"), adaptive.round_size, why
    for key in ("round_size", "positives_wanted"):
        if (value := getattr(adaptive, key)) > adaptive.max_rollouts:
            why = f"must be at most rollout.adaptive.max_rollouts = {adaptive.max_rollouts}"
            yield (f"rollout.adaptive.{key}", "rollout.adaptive.max_rollouts"), value, why


def _objective(recipe: Recipe) -> Iterator[Combination]:
    objective = recipe.objective
    if getattr(objective, "target_entropy", None) is not None and getattr(objective, "entropy_coef", 0.0) == 0:
        why = "is scaled up and down to reach the target entropy, and 0 stays 0; set a positive start"
        yield ("objective.entropy_coef", "objective.target_entropy"), 0.0, why
    if isinstance(objective, PopoObjective) and objective.entropy_over == "all" and objective.entropy_coef == 0:
        why = "would forward wrong answers for an entropy bonus that is off; leave the key out, or set entropy_coef"
        yield ("objective.entropy_over", "objective.entropy_coef"), "all", why
    if isinstance(objective, PositiveObjective) and objective.skip_all_right and recipe.rollout.adaptive.enabled:
        why = "would skip prompts that the adaptive budget stopped before their first wrong answer; use one of both"
        yield ("objective.skip_all_right", "rollout.adaptive.enabled"), True, why


def _train(recipe: Recipe) -> Iterator[Combination]:
    train, rollout = recipe.train, recipe.rollout
    if recipe.optimizer.name == "paged_adamw8bit" and train.device == "cpu":
        why = 'paging needs a GPU; use "adamw8bit" or "adamw" on a CPU'
        yield ("optimizer.name", "train.device"), recipe.optimizer.name, why
    if train.offload_activations and not train.gradient_checkpointing:
        why = "offloads the inputs that gradient checkpointing keeps; turn gradient_checkpointing on as well"
        yield ("train.offload_activations", "train.gradient_checkpointing"), True, why
    if train.offload_activations and train.device == "cpu":
        yield ("train.offload_activations", "train.device"), True, "frees GPU memory; leave it off on a CPU"
    longest = rollout.max_prompt_length + rollout.max_completion_length
    if train.tokens_per_microbatch < longest:
        why = f"one prompt with its answer may take {longest} tokens; set at least that"
        keys = ("train.tokens_per_microbatch", "rollout.max_prompt_length", "rollout.max_completion_length")
        yield keys, train.tokens_per_microbatch, why
    if ":" not in recipe.reward.function and recipe.reward.function != "math":
        yield ("reward.function",), recipe.reward.function, 'is neither "math" nor "module:function"'


def _data(recipe: Recipe) -> Iterator[Combination]:
    reasons = {
        "arithmetic": "the built-in arithmetic is generated and has no such setting; leave the key out",
        None: "describes a dataset, and eval.dataset is not set; set it, or leave this key out",
    }
    for name, part in (("data", recipe.data), ("eval", recipe.eval)):
        for key in ("config", "split", "prompt_column", "answer_column", "filter", "limit"):
            value = getattr(part, key)
            if part.dataset in reasons and value not in (None, {}):
                yield (f"{name}.{key}", f"{name}.dataset"), value, reasons[part.dataset]
    if recipe.data.system_prompt is not None and not recipe.data.system_prompt.strip():
        yield ("data.system_prompt",), recipe.data.system_prompt, "is empty; leave the key out instead"
