"""List the settings that cannot be combined though each is valid alone, and other libraries' names of keys."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from popo_lite.errors import ModelError, UserInputError
from popo_lite.recipe import (
    DatasetRecipe,
    EnvironmentFunction,
    JsonSchemaFunction,
    LanguageFunction,
    LengthFunction,
    ModelRecipe,
    OwnFunction,
    PythonTestsFunction,
    ReasoningGymFunction,
    Recipe,
    RegexFunction,
    RewardFunction,
    RewardRecipe,
)
from popo_lite.redaction import has_login, redact

CURRICULUM_OFF = "is used only with data.curriculum.enabled = true; set that too"
IMPOSSIBLE = {
    "model.dtype=float64 model.quantization=nf4": 'NF4 computes in "bfloat16", "float16" or "float32"',
    "model.attn_implementation=flash_attention_2 model.dtype!=bfloat16|float16":
        'needs a 16-bit model.dtype, not "{recipe.model.dtype}"; use "sdpa"',
    "model.attn_implementation=flash_attention_2 train.device=cpu": 'needs a CUDA GPU; use "sdpa" on a CPU',
    "model.dtype!=bfloat16|float16 model.backend=unsloth": 'unsloth computes in 16 bit; use "bfloat16"',
    "model.backend=unsloth lora.init_from!=<unset>": 'cannot start from an adapter; use "transformers"',
    "model.attn_implementation!=sdpa model.backend=unsloth": "unsloth chooses its attention itself; leave the key out",
    "model.double_quantization=False model.backend=unsloth": "unsloth always quantises the scales; leave the key out",
    "train.offload_activations=True model.backend=unsloth": "unsloth offloads its checkpoints itself; leave it out",
    "model.backend=unsloth train.device=cpu": 'needs a CUDA GPU; use "transformers" on a CPU',
    "model.backend=unsloth model.id=tiny": 'cannot load the model "tiny"; use "transformers"',
    "rollout.engine=vllm|server lora.dora=True": 'vLLM cannot serve DoRA adapters; use "hf"',
    "rollout.engine=vllm|server model.dtype=float64": 'vLLM does not compute in float64; use "hf"',
    "rollout.engine=vllm model.dtype=float32 train.device=cuda rollout.vllm.base!=bf16":
        'on a GPU vLLM serves adapters in 16 bit only; use "hf", or model.dtype = "bfloat16"',
    "rollout.vllm.base=nf4 model.quantization=none":
        'would sample from a 4-bit policy that is not the trained one; use "dequantized"',
    "rollout.vllm.base=nf4 model.double_quantization=False":
        'vLLM quantises the scales too; use "dequantized" without double quantisation',
    "rollout.server.base_urls=() rollout.server.urls_file=<unset>| rollout.engine=server":
        'or rollout.server.urls_file is required by rollout.engine = "server"',
    "rollout.server.shared_dir=<unset>| rollout.engine=server": 'is required by rollout.engine = "server"',
    "rollout.server.base_urls!=() rollout.engine!=server": 'is used only with rollout.engine = "server"',
    "rollout.server.urls_file!=<unset> rollout.engine!=server": 'is used only with rollout.engine = "server"',
    "rollout.server.allow_http=True rollout.engine!=server": 'is used only with rollout.engine = "server"',
    "rollout.async_level=1 rollout.engine!=server":
        'needs rollout.engine = "server": the other engines cannot sample while the policy is trained; leave it out',
    "objective.importance_sampling_clip_max=<unset> rollout.async_level=1":
        "must be set with rollout.async_level = 1, whose rollouts are one optimizer step old; set it to 2.0",
    "data.digits!=2 data.dataset!=arithmetic eval.dataset!=arithmetic":
        'is for the dataset "arithmetic" alone; leave the key out',
    "data.curriculum.levels!=() data.curriculum.column!=<unset>":
        "are levels of reasoning-gym's tasks, and data.curriculum.column names those of a dataset; set one of the two",
    "objective.entropy_coef=0.0 objective.target_entropy!=<unset>":
        "is multiplied up and down to reach the target entropy, and 0 stays 0; set a positive start",
    "objective.entropy_over=all objective.entropy_coef=0.0":
        "runs wrong answers through the model for an entropy bonus of 0; leave the key out, or set entropy_coef",
    **dict.fromkeys(
        (
            "rollout.environment.max_turns!=4 rollout.environment.name=<unset>",
            "rollout.environment.role!=user rollout.environment.name=<unset>",
            "rollout.environment.options!={} rollout.environment.name=<unset>",
        ),
        "is used only with rollout.environment.name; set that too",
    ),
    "data.curriculum.levels!=() data.curriculum.enabled=False": CURRICULUM_OFF,
    "data.curriculum.column!=<unset> data.curriculum.enabled=False": CURRICULUM_OFF,
    "objective.skip_all_right=True rollout.adaptive.enabled=True":
        "would skip prompts that the adaptive budget stopped before their first wrong answer; use one of the two",
    "optimizer.name=paged_adamw8bit train.device=cpu": 'paging needs a GPU; use "adamw8bit" or "adamw" on a CPU',
    "train.offload_activations=True train.gradient_checkpointing=False":
        "offloads the inputs that gradient checkpointing keeps; turn on gradient_checkpointing as well",
    "distributed.strategy=fsdp2 rollout.engine=vllm":
        'every process would hold the whole base for vLLM; use rollout.engine = "server"',
    "distributed.strategy=fsdp2 model.backend=unsloth": 'unsloth holds the whole base; use "transformers"',
    "train.offload_activations=True train.device=cpu": "frees GPU memory; leave it off on a CPU",
}  # fmt: skip
"""Values that cannot be used together -> what is wrong and what to do. The first key must change.

`=a|b` is one of the values and `!=a` any other, both as `str` writes them; <unset> stands for None."""

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
    "rollout.async_level": "max_async_level max_staleness max_head_offpolicyness",
    "rollout.max_num_seqs": "rollout.batch_size rollout.vllm.batch_size",
    "rollout.vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "rollout.vllm.enable_sleep_mode": "vllm_enable_sleep_mode",
    "rollout.server.base_urls": "vllm_server_base_url vllm_server_host vllm_server_port",
    "data.dataset": "dataset_name train_dataset", "eval.dataset": "eval_dataset", "eval.every": "eval_steps",
    "reward.functions": "reward_funcs reward.function",
    "reward.threshold": "reward_threshold", "optimizer.name": "optim", "optimizer.learning_rate": "lr",
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


SERVER_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?(/[A-Za-z0-9._~/-]*)?")
"""Scheme, host, port and path. Strict, so that every HTTP client finds the same host."""
LONGEST_SHOWN = 200
"""Characters of a wrong line that its message repeats."""


def impossible_combinations(recipe: Recipe) -> Iterator[tuple[list[str], str]]:
    """Yield ([key that must change, keys it conflicts with], what is wrong and what to do) for every conflict."""
    for conditions, why in IMPOSSIBLE.items():
        if all(_holds(recipe, condition) for condition in conditions.split()):
            keys = [condition.partition("=")[0].rstrip("!") for condition in conditions.split()]
            yield keys, why.format(recipe=recipe)
    rollout, adaptive = recipe.rollout, recipe.rollout.adaptive
    for url in rollout.server.base_urls:
        if wrong := wrong_server_url(url, allow_http=rollout.server.allow_http):
            yield ["rollout.server.base_urls", "rollout.server.allow_http"], wrong
    modules = recipe.lora.target_modules if isinstance(recipe.lora.target_modules, tuple) else ("all-linear",)
    head = next((name for name in modules if name.split(".")[-1] in ("lm_head", "embed_out", "output_layer")), None)
    if head:
        yield ["lora.target_modules"], f'"{head}" is the LM head, where the loss would ignore an adapter; leave it out'
    if not modules or "" in modules:
        yield ["lora.target_modules"], 'names no module; use "all-linear" or a list of names'
    if rollout.engine in ("vllm", "server") and recipe.lora.rank > 512:
        yield ["lora.rank", "rollout.engine"], 'vLLM serves adapters up to rank 512; use that, or rollout.engine = "hf"'
    for key, limit, most in (
        ("round_size", "rollout.num_generations", rollout.num_generations),
        ("round_size", "rollout.adaptive.max_rollouts", adaptive.max_rollouts),
        ("positives_wanted", "rollout.adaptive.max_rollouts", adaptive.max_rollouts),
    ):
        if adaptive.enabled and getattr(adaptive, key) > most:
            yield [f"rollout.adaptive.{key}", limit], f"must be at most {limit} = {most}"
    if recipe.train.tokens_per_microbatch < rollout.sequence_tokens:
        keys = ["train.tokens_per_microbatch", "rollout.max_prompt_length", "rollout.max_completion_length"]
        yield keys, f"one prompt with its answer may take {rollout.sequence_tokens} tokens; set at least that"
    for function in recipe.reward.functions or ():
        if isinstance(function, EnvironmentFunction) and (function.environment or function.options):
            yield ["reward.functions"], "takes environment and options from rollout.environment; leave them out here"
    if any(isinstance(function, ReasoningGymFunction) for function in recipe.grading.functions or ()):
        for name, part in (("data", recipe.data), ("eval", recipe.eval)):
            if part.dataset is not None and not is_gym(part):  # some verifiers run as Python what the problem holds
                why = f'"reasoning_gym" is for problems of reasoning-gym alone, and {name}.dataset = "{part.dataset}"'
                yield ["reward.functions", f"{name}.dataset"], f"{why}; name another function or dataset"
    for key, why in _wrong_functions(recipe.grading):
        yield [key], why
    generated = "built-in problems are generated and have no such setting; leave the key out"
    gym = "describes rows, and reasoning-gym's problems are generated; set data.tasks, or leave the key out"
    unset = "describes a dataset, and eval.dataset is not set; set it, or leave this key out"
    not_gym = 'is for tasks of reasoning-gym, dataset = "reasoning-gym:NAME"; leave the key out'
    for name, part in (("data", recipe.data), ("eval", recipe.eval)):
        reasons = {"arithmetic": generated, "comparison": generated, None: unset}
        reason = gym.replace("data", name) if is_gym(part) else reasons.get(part.dataset)
        for key in ("config", "split", "prompt_column", "answer_column", "filter", "limit"):
            if reason and getattr(part, key) not in (None, {}):
                yield [f"{name}.{key}", f"{name}.dataset"], reason
        if part.tasks and not is_gym(part):
            yield [f"{name}.tasks", f"{name}.dataset"], unset if part.dataset is None else not_gym
    curriculum = recipe.data.curriculum
    if curriculum.low >= curriculum.high:
        yield (
            ["data.curriculum.low", "data.curriculum.high"],
            f"must be below data.curriculum.high = {curriculum.high:g}",
        )
    if curriculum.levels and not is_gym(recipe.data):
        yield ["data.curriculum.levels", "data.dataset"], f"{not_gym}, or set data.curriculum.column"
    if curriculum.column and (is_gym(recipe.data) or recipe.data.dataset in ("arithmetic", "comparison")):
        yield (
            ["data.curriculum.column", "data.dataset"],
            "names a column, and these problems are generated; leave it out",
        )
    if curriculum.enabled and not is_gym(recipe.data) and not curriculum.column:
        column = "has no levels; name tasks of reasoning-gym, or a file or Hub dataset and data.curriculum.column"
        keys = ["data.curriculum.enabled", "data.dataset", "data.curriculum.column", "data.curriculum.levels"]
        yield keys, f'data.dataset = "{recipe.data.dataset}" {column}'


def is_local_url(url: str) -> bool:
    """Check whether a server's URL leads to this machine, by a loopback name or address."""
    found = SERVER_URL.fullmatch(url)
    host = found[2].strip("[]").lower() if found else ""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost"  # a name server may answer for names below it


def wrong_server_url(url: str, *, allow_http: bool) -> str | None:
    """Return why the trainer sends nothing to a server's URL, and what to do, or None. The reason repeats no login."""
    if has_login(url):
        return "holds a login, which the run's files would keep; leave it out and set POPO_SERVER_TOKEN to the token"
    if not (found := SERVER_URL.fullmatch(url)) or not _is_host(found[2]) or int((found[3] or ":0")[1:]) > 65535:
        return 'is no URL of a server; write it as "http://127.0.0.1:8000", without a query'
    if found[1] == "http" and not allow_http and not is_local_url(url):
        shown = "prompts, answers and the token would cross the network in plain text"
        return f"{shown}; use https://, or in a private network set rollout.server.allow_http = true"
    return None


def read_server_urls(path: Path, *, allow_http: bool) -> tuple[list[str], list[str]]:
    """Read `rollout.server.urls_file`; return its URLs, and one message for each line that is wrong.

    A line has one URL; # begins a comment. Raises OSError or UnicodeDecodeError if the file cannot be read.
    """
    urls, wrong = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        url = line.partition("#")[0].strip()
        if why := url and wrong_server_url(url, allow_http=allow_http):
            wrong.append(f"{path}, line {number}: {redact(url)[:LONGEST_SHOWN]!r} {why}")
        elif url:
            urls.append(url)
    return urls, wrong


def _is_host(host: str) -> bool:
    """Return whether `host` is a name, or an IP address that exists."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return not (host.startswith("[") or re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host))
    return True


def is_gym(part: DatasetRecipe) -> bool:
    """Check whether the problems come from reasoning-gym."""
    return part.dataset is not None and part.dataset.startswith("reasoning-gym:")


def _wrong_functions(reward: RewardRecipe) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and what to do) for reward functions that cannot be used together."""
    functions = {function.key: function for function in reward.functions or ()}
    if repeated := next(
        (key for key, count in Counter(f.key for f in reward.functions or ()).items() if count > 1), ""
    ):
        yield "reward.functions", f'lists "{repeated}" twice; give one of them another label = "..."'
    if all(function.weight <= 0 for function in functions.values()):
        yield "reward.functions", "need one with a weight above 0"
    for key, function in functions.items():
        if isinstance(function, EnvironmentFunction) and not function.environment:
            yield "reward.functions", f'"{key}" needs an environment; set rollout.environment.name'
        if why := _wrong_options(function):
            yield "reward.functions", f'"{key}" {why}'
        if isinstance(function, PythonTestsFunction) and function.timeout_seconds >= reward.timeout_seconds:
            limit = f"timeout_seconds = {function.timeout_seconds:g}"
            yield "reward.functions", f'"{key}" has {limit}; set it below reward.timeout_seconds'
    if reward.positive_if == "total":
        # The answer's correctness is what the function of the largest weight measures, unless that only reads the form.
        form = (RegexFunction, LengthFunction, LanguageFunction)
        positive = [key for key, function in functions.items() if function.weight > 0] or list(functions)
        main = max(positive, key=lambda key: (not isinstance(functions[key], form), functions[key].weight))
        weights = {key: abs(function.weight) for key, function in functions.items()}
        others = sum(weight for key, weight in weights.items() if key != main) / (sum(weights.values()) or 1.0)
        if others > reward.threshold:
            share = f'can make an answer positive without "{main}": their part of the weight, {others:.3g}, is above'
            advice = f'set reward.positive_if = ["{main}"]'
            yield "reward.functions", f"{share} reward.threshold = {reward.threshold:g}; {advice}"
        return
    if unknown := [name for name in reward.positive_if if name not in functions]:
        there = ", ".join(f'"{key}"' for key in functions)
        yield "reward.positive_if", f'"{unknown[0]}" is not one of reward.functions, which are {there}'
    elif any(functions[name].weight < 0 for name in reward.positive_if):
        yield "reward.positive_if", "names a function with a negative weight, a penalty; leave it out"
    elif all(functions[name].weight == 0 for name in reward.positive_if):
        # The weights of positives are proportional to their rewards, which could all be 0.
        yield "reward.positive_if", 'needs a function with a weight above 0; or use "total"'


def _wrong_options(function: RewardFunction) -> str | None:
    """Return what is wrong about options of a function that are valid one by one, and what to do."""
    if isinstance(function, OwnFunction) and function.range[0] >= function.range[1]:
        return f"has an empty range, {list(function.range)}; write the smaller number first"
    if isinstance(function, RegexFunction):
        try:
            re.compile(function.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return f"has a pattern that is not a regular expression ({error}); correct it"
    if isinstance(function, JsonSchemaFunction) and function.json_schema is not None and function.schema_file:
        return "has both schema and schema_file; leave one out"
    if isinstance(function, JsonSchemaFunction) and function.json_schema is None and not function.schema_file:
        return "needs schema or schema_file"
    if isinstance(function, LengthFunction):
        if function.min is None and function.max is None:
            return "needs min or max"
        if function.min and function.max and function.min > function.max:
            return f"has min = {function.min} above max = {function.max}"
    return None


def check_context(recipe: Recipe, context_tokens: int) -> None:
    """Raise UserInputError if prompt and answer may take more tokens than the model's context."""
    prompt, answer = recipe.rollout.max_prompt_length, recipe.rollout.max_completion_length
    if prompt + answer > context_tokens:
        longest = f"prompt and answer may take {prompt} + {answer} = {prompt + answer} tokens"
        what = f"{longest}, and the context of {recipe.model.id} is {context_tokens}"
        where = "rollout.max_prompt_length, rollout.max_completion_length"
        shorter_answer = f"--set rollout.max_completion_length={context_tokens - prompt}"
        shorter_prompt = f"set rollout.max_prompt_length below {context_tokens}"
        raise UserInputError(what, where=where, next_step=shorter_answer if prompt < context_tokens else shorter_prompt)


def refuse_emulated_bfloat16(recipe: ModelRecipe, capability: tuple[int, int], gpu: str = "the GPU") -> None:
    """Raise UserInputError for bfloat16 below compute capability 8.0, which emulates it: slow, and vLLM refuses it."""
    if recipe.dtype == "bfloat16" and capability < (8, 0):
        what = f"{gpu} (compute capability {capability[0]}.{capability[1]}) does not compute in bfloat16"
        raise UserInputError(what, where='model.dtype = "bfloat16"', next_step="--set model.dtype=float16")


def stored_in_4_bits(quantization: Any, *, where: str) -> bool:
    """Return True for a checkpoint in bitsandbytes' 4 bits, and False for one that is not quantised.

    `quantization` is `quantization_config` in its config.json. Raises ModelError for any other kind.
    """
    if quantization is None:
        return False
    settings = quantization if isinstance(quantization, Mapping) else {}
    if settings.get("load_in_4bit"):
        return True
    method = settings.get("quant_method", quantization)
    method = f"{method}, 8 bits" if settings.get("load_in_8bit") else method
    what = (
        f"the checkpoint is quantised already ({method}); popo-lite trains on 16-bit ones, and on bitsandbytes' 4 bits"
    )
    next_step = "set model.id to the model's unquantised checkpoint: the run quantises it to NF4 itself"
    raise ModelError(what, where=where, next_step=next_step)


def _holds(recipe: Recipe, condition: str) -> bool:
    key, _, values = condition.partition("=")
    try:
        value = attrgetter(key.rstrip("!"))(recipe)
    except AttributeError:  # a key of another algorithm
        return False
    value = "<unset>" if value is None else value + 0.0 if isinstance(value, float) else value  # -0.0 is 0.0
    return (str(value) in values.split("|")) != key.endswith("!")
