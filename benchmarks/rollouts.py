"""Rollout speed of the hf and vllm samplers with LoRA on, adapter swap time, and memory given back in sleep.

    python benchmarks/rollouts.py                       Qwen2.5-1.5B's shape with random weights, on a GPU
    python benchmarks/rollouts.py --shape tiny          the same on the tiny shape, to try the script on a CPU

Both engines answer the same prompts in one run. Nothing stops early: random weights rarely name the end token, and
answers are cut at --tokens. Neither needs true weights. Writes benchmarks/results/rollouts-<shape>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from popo_lite.policy.load import TINY_FOLDER
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe import Recipe
from popo_lite.run_folder import environment
from popo_lite.samplers import Sampler, SamplingParams, open_sampler
from popo_lite.tasks import ArithmeticTask
from popo_lite.tasks.rendering import Renderer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "qwen2.5-1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True, "rope_theta": 1_000_000.0,
    },
}  # fmt: skip


def write_model(shape: str, folder: Path, dtype: torch.dtype) -> str:
    """A model of the shape with random weights and the tiny model's tokenizer; its folder."""
    if shape == "tiny":
        return "tiny"
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[shape], eos_token_id=1, pad_token_id=0, bos_token_id=None))
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_FOLDER).save_pretrained(folder)
    return str(folder)


def measure(sampler: Sampler, policy: Policy, renderer: Renderer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the median tokens per second over the repeats after one warm-up, and the seconds of adapter swaps."""
    prompts = [renderer.render(problem) for problem in ArithmeticTask(2).held_out(arguments.sequences // 8)]
    params = SamplingParams(temperature=1.0, max_completion_length=arguments.tokens)
    rates = []
    for repeat in range(arguments.repeats + 1):
        policy.version += 1
        sampler.sync(policy.version)
        start = time.perf_counter()
        groups = sampler.sample(
            prompts, count=8, params=params, policy_version=policy.version, stream=("benchmark", repeat)
        )
        tokens = sum(len(one.token_ids) for group in groups for one in group)
        rates.append(tokens / (time.perf_counter() - start))
    for _ in range(arguments.swaps if sampler.swap_seconds else 0):
        policy.version += 1
        sampler.sync(policy.version)
    swaps = sampler.swap_seconds
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "tokens_per_second_all": rates[1:],
        "swap_seconds_median": statistics.median(swaps) if swaps else None,
        "swap_seconds_max": max(swaps) if swaps else None,
    }


def used_bytes() -> int | None:
    """Bytes of the GPU in use by anyone; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    """Measure both engines and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--engines", nargs="+", default=["hf", "vllm"])
    parser.add_argument("--base", default="dequantized", help="rollout.vllm.base of the vllm engine")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--swaps", type=int, default=50, help="adapter swaps to time, beside one before every repeat")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), **vars(arguments), "engines": {}}
    with tempfile.TemporaryDirectory() as folder:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = write_model(arguments.shape, Path(folder), dtype)
        recipe = Recipe.model_validate(
            {
                "model": {"id": model, "dtype": str(dtype).removeprefix("torch.")},
                "rollout": {
                    "engine": "hf",
                    "max_num_seqs": arguments.sequences,
                    "max_prompt_length": 64,
                    "max_completion_length": arguments.tokens,
                    "vllm": {"base": arguments.base, "enforce_eager": not on_gpu},
                },
            }
        )
        policy = load_policy(recipe)
        with torch.no_grad():
            for _, parameter in policy.adapter_parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        renderer = Renderer(recipe, policy.tokenizer)
        for engine in arguments.engines:
            chosen = recipe.with_values({"rollout.engine": engine})
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()  # what the engine before this one left in torch's cache is not the next one's
            before = used_bytes()
            with open_sampler(chosen, policy, text=renderer.text, notify=print) as sampler:
                found = measure(sampler, policy, renderer, arguments)
                if before is not None and engine == "vllm":
                    awake = used_bytes() or 0
                    sampler.sleep()
                    asleep = used_bytes() or 0
                    found |= {"engine_bytes": awake - before, "bytes_given_back_in_sleep": awake - asleep}
            results["engines"][engine] = found
            print(engine, json.dumps(found), flush=True)
    if {"hf", "vllm"} <= results["engines"].keys():
        rates = {name: found["tokens_per_second"] for name, found in results["engines"].items()}
        results["vllm_over_hf"] = rates["vllm"] / rates["hf"]
    results["environment"] = environment(policy.device)
    output = Path(__file__).parent / "results" / f"rollouts-{arguments.shape}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
