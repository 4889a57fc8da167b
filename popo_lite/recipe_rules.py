"""Combinations of settings that cannot work though each setting is valid alone, and other libraries' names of keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from popo_lite.errors import UserInputError
from popo_lite.recipe import Recipe

Rule = tuple[object, str, str]
"""True if it is broken; the keys, of which the first must change; what is wrong and what to do."""

RENAMED = {
    "model.id": "model_name model_name_or_path model.name model.path", "model.dtype": "torch_dtype bf16 fp16",
    "lora.rank": "r lora_r max_lora_rank", "lora.alpha": "lora_alpha", "lora.dropout": "lora_dropout",
    "lora.rslora": "use_rslora", "lora.dora": "use_dora", "siamese.tau": "ema_decay",
    "siamese.head_width": "hidden_dim predictor_hidden_dim",
    "objective.similarity_coef": "objective.alpha siamese.alpha", "objective.kl_coef": "beta kl kl_beta kl_loss_coef",
    "objective.entropy_coef": "beta entropy_coeff", "objective.noise_sigma": "sigma noise_std",
    "objective.epsilon": "epsilon_low clip_range cliprange",
    "objective.importance_sampling_clip_max": "vllm_importance_sampling_cap vllm_importance_sampling_clip_max",
    "rollout.num_generations": "group_size num_return_sequences",
    "rollout.max_completion_length": "max_new_tokens max_tokens",
    "rollout.max_num_seqs": "rollout.batch_size rollout.vllm.batch_size",
    "rollout.vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "rollout.vllm.enable_sleep_mode": "vllm_enable_sleep_mode",
    "rollout.server.base_urls": "vllm_server_base_url vllm_server_host vllm_server_port",
    "data.dataset": "dataset_name train_dataset", "eval.dataset": "eval_dataset", "eval.every": "eval_steps",
    "reward.function": "reward_funcs", "optimizer.name": "optim", "optimizer.learning_rate": "lr",
    "optimizer.schedule": "lr_scheduler_type", "train.steps": "max_steps", "train.seed": "random_state",
    "train.gradient_checkpointing": "use_gradient_checkpointing", "output.dir": "output_dir",
    "output.samples_per_step": "num_completions_to_print",
}  # fmt: skip
"""Key -> its names in TRL, PEFT, Unsloth, verl and the paper. A name with a section counts only there; a name with
several keys means the first that the algorithm has."""

NOT_RENAMED = {
    "load_in_4bit": 'is model.quantization = "nf4" here',
    "float8_kv_cache": 'is rollout.vllm.kv_cache_dtype = "fp8" here',
    "max_seq_length": "is rollout.max_prompt_length plus rollout.max_completion_length here",
    "gradient_accumulation_steps": "is not a setting: train.tokens_per_microbatch decides how many passes a step takes",
    "num_train_epochs": "is not a setting; set train.steps",
    "warmup_steps": "is optimizer.warmup_ratio here, a part of train.steps",
    "num_iterations": "is not a setting: every rollout is used for one step",
    "mask_truncated_completions": 'is reward.truncated = "wrong" here',
    "logging_steps": "is not a setting: every step is logged",
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"),
        "is not a setting: positives must be sampled from the policy's whole distribution; leave the key out"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"),
        "is data.prompts_per_step (prompts of a step) or train.tokens_per_microbatch (memory) here"),
    **dict.fromkeys(("use_vllm", "vllm_mode", "fast_inference"),
        'is rollout.engine = "vllm" (same process) or "server" here'),
}  # fmt: skip
"""Name of another library's key that is not just another name -> what to do instead."""


def impossible_combinations(recipe: Recipe) -> Iterator[tuple[list[str], str]]:
    """Yield (keys, what is wrong and what to do) for all settings that cannot be used together.

    The first key must change; the others conflict with it.
    """
    for broken, keys, why in (*_model(recipe), *_rollout(recipe), *_training(recipe), *_data(recipe)):
        if broken:
            yield keys.split(), why


def check_context(recipe: Recipe, context_tokens: int) -> None:
    """Raise UserInputError if prompt and answer may take more tokens than the model's context."""
    prompt, answer = recipe.rollout.max_prompt_length, recipe.rollout.max_completion_length
    if prompt + answer > context_tokens:
        raise UserInputError(
            f"prompt and answer may take {prompt} + {answer} = {prompt + answer} tokens, and the context of "
            f"{recipe.model.id} is {context_tokens}",
            where="rollout.max_prompt_length, rollout.max_completion_length",
            next_step=f"--set rollout.max_completion_length={context_tokens - prompt}"
            if prompt < context_tokens
            else f"set rollout.max_prompt_length below {context_tokens}",
        )


def _model(recipe: Recipe) -> Iterable[Rule]:
    model, lora, train = recipe.model, recipe.lora, recipe.train
    unsloth, on_cpu, flash = model.backend == "unsloth", train.device == "cpu", "flash_attention_2"
    wide = model.dtype != "bfloat16"
    names = lora.target_modules if isinstance(lora.target_modules, tuple) else ("all-linear",)
    head = next((name for name in names if name.split(".")[-1] in ("lm_head", "embed_out", "output_layer")), None)
    return (
        (head, "lora.target_modules", f'"{head}" is the LM head, where the loss would ignore an adapter; leave it out'),
        (not names or "" in names, "lora.target_modules", 'names no module; use "all-linear" or a list of names'),
        (model.quantization == "nf4" and model.dtype == "float64", "model.dtype model.quantization",
         'NF4 computes in "bfloat16" or "float32"'),
        (model.attn_implementation == flash and wide, "model.attn_implementation model.dtype",
         f'needs a 16-bit model.dtype, not "{model.dtype}"; use "sdpa"'),
        (model.attn_implementation == flash and on_cpu, "model.attn_implementation train.device",
         'needs a CUDA GPU; use "sdpa" on a CPU'),
        (unsloth and wide, "model.dtype model.backend", 'unsloth computes in 16 bit; use "bfloat16"'),
        (unsloth and lora.init_from is not None, "model.backend lora.init_from",
         'cannot start from an adapter; use "transformers"'),
        (unsloth and model.attn_implementation != "sdpa", "model.attn_implementation model.backend",
         "unsloth chooses its attention itself; leave the key out"),
        (unsloth and not model.double_quantization, "model.double_quantization model.backend",
         "unsloth always quantises the scales; leave the key out"),
        (unsloth and train.offload_activations, "train.offload_activations model.backend",
         "unsloth offloads its checkpoints itself; leave the key out"),
        (unsloth and on_cpu, "model.backend train.device", 'needs a CUDA GPU; use "transformers" on a CPU'),
        (unsloth and model.id == "tiny", "model.backend model.id", 'cannot load the model "tiny"; use "transformers"'),
    )  # fmt: skip


def _rollout(recipe: Recipe) -> Iterable[Rule]:
    rollout, model, adaptive = recipe.rollout, recipe.model, recipe.rollout.adaptive
    vllm, server, nf4 = rollout.engine in ("vllm", "server"), rollout.engine == "server", rollout.vllm.base == "nf4"
    needed, at_most = 'is required by rollout.engine = "server"', "rollout.adaptive.max_rollouts"
    return (
        (vllm and recipe.lora.dora, "rollout.engine lora.dora", 'vLLM cannot serve DoRA adapters; use "hf"'),
        (vllm and recipe.lora.rank > 512, "lora.rank rollout.engine",
         'vLLM serves adapters up to rank 512; use that, or rollout.engine = "hf"'),
        (vllm and model.dtype == "float64", "rollout.engine model.dtype",
         'vLLM does not compute in float64; use "hf"'),
        (nf4 and model.quantization == "none", "rollout.vllm.base model.quantization",
         'would sample from a 4-bit policy that is not the trained one; use "dequantized"'),
        (nf4 and not model.double_quantization, "rollout.vllm.base model.double_quantization",
         'vLLM quantises the scales too; use "dequantized" without double quantisation'),
        (server and not rollout.server.base_urls, "rollout.server.base_urls rollout.engine", needed),
        (server and not rollout.server.shared_dir, "rollout.server.shared_dir rollout.engine", needed),
        (rollout.server.base_urls and not server, "rollout.server.base_urls rollout.engine",
         'is used only with rollout.engine = "server"'),
        (adaptive.enabled and adaptive.round_size > rollout.num_generations,
         "rollout.adaptive.round_size rollout.num_generations",
         f"must be at most rollout.num_generations = {rollout.num_generations}"),
        *((adaptive.enabled and getattr(adaptive, key) > adaptive.max_rollouts, f"rollout.adaptive.{key} {at_most}",
           f"must be at most {at_most} = {adaptive.max_rollouts}") for key in ("round_size", "positives_wanted")),
    )  # fmt: skip


def _training(recipe: Recipe) -> Iterable[Rule]:
    objective, train, function = recipe.objective, recipe.train, recipe.reward.function
    on_cpu, offload = train.device == "cpu", train.offload_activations
    no_entropy = getattr(objective, "entropy_coef", None) == 0
    longest = recipe.rollout.sequence_tokens
    return (
        (no_entropy and getattr(objective, "target_entropy", None), "objective.entropy_coef objective.target_entropy",
         "is multiplied up and down to reach the target entropy, and 0 stays 0; set a positive start"),
        (no_entropy and getattr(objective, "entropy_over", "") == "all",
         "objective.entropy_over objective.entropy_coef",
         "runs wrong answers through the model for an entropy bonus of 0; leave the key out, or set entropy_coef"),
        (getattr(objective, "skip_all_right", False) and recipe.rollout.adaptive.enabled,
         "objective.skip_all_right rollout.adaptive.enabled",
         "would skip prompts that the adaptive budget stopped before their first wrong answer; use one of the two"),
        (recipe.optimizer.name == "paged_adamw8bit" and on_cpu, "optimizer.name train.device",
         'paging needs a GPU; use "adamw8bit" or "adamw" on a CPU'),
        (offload and not train.gradient_checkpointing, "train.offload_activations train.gradient_checkpointing",
         "offloads the inputs that gradient checkpointing keeps; turn on gradient_checkpointing as well"),
        (offload and on_cpu, "train.offload_activations train.device", "frees GPU memory; leave it off on a CPU"),
        (train.tokens_per_microbatch < longest,
         "train.tokens_per_microbatch rollout.max_prompt_length rollout.max_completion_length",
         f"one prompt with its answer may take {longest} tokens; set at least that"),
        (":" not in function and function != "math", "reward.function", 'is neither "math" nor "module:function"'),
    )  # fmt: skip


def _data(recipe: Recipe) -> Iterable[Rule]:
    reasons = {
        "arithmetic": "the built-in arithmetic is generated and has no such setting; leave the key out",
        None: "describes a dataset, and eval.dataset is not set; set it, or leave this key out",
    }
    for name, part in (("data", recipe.data), ("eval", recipe.eval)):
        for key in ("config", "split", "prompt_column", "answer_column", "filter", "limit"):
            used = part.dataset in reasons and getattr(part, key) not in (None, {})
            yield used, f"{name}.{key} {name}.dataset", reasons.get(part.dataset, "")
    prompt = recipe.data.system_prompt
    yield prompt is not None and not prompt.strip(), "data.system_prompt", "is empty; leave the key out instead"
