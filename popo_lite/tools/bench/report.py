"""Print the results of `popo-lite bench`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.tools.console.words import ABSENT, duration, memory


def bench_report(result: Mapping[str, Any]) -> None:
    """Print the result of `bench`: stages, memory beside the plan's, and what the whole run would take."""
    size, cap, run, total = (result[name] for name in ("size", "memory_cap_bytes", "run", "step_seconds"))
    gpu = result["environment"]["gpu"]
    machine = gpu["name"] if gpu else result["environment"]["processor"]
    _say(
        f"{result['model']} with random weights, engine {result['engine']}, on {machine}"
        + (f" capped to {memory(cap)}" if cap else ""),
        f"{size['prompts']:,} prompts x {size['num_generations']} answers of {size['prompt_tokens']:,} + "
        f"{size['completion_tokens']:,} tokens, {size['positives']:,} positives; median of "
        f"{result['measured_steps']:,} steps",
        "",
    )
    if result["out_of_memory"] is not None:
        _say(result["out_of_memory"], "", style="bold red")
    stages: list[list[str]] = []
    for stage in result["stages"]:
        seconds, speed = stage["seconds"], stage["tokens_per_second"]
        took = duration(seconds) if seconds >= 1 else f"{seconds:.3f} s"
        stages.append([stage["stage"], took, "" if speed is None else f"{speed:,.0f}", f"{seconds / total:.0%}"])
    if stages:
        table(f"A step: {duration(total)}", ("stage", "time", "tokens/s", "share"), stages)
    peaks = []
    for phase in result["memory"]:
        tensors = _beside(phase["tensor_bytes"], phase["planned_tensor_bytes"])
        peaks.append([phase["phase"], *tensors, *_beside(phase["card_bytes"], phase["planned_card_bytes"])])
    if peaks:
        table("Peak memory", ("phase", "tensors", "planned", "ratio", "on the card", "planned", "ratio"), peaks)
    elif result["device"] == "cpu":
        _say("Peak memory is measured on a GPU only: resident memory on a CPU is not comparable.", "")
    kept = [[one["kind"], *_beside(one["counted_bytes"], one["planned_bytes"])] for one in result["tensors"]]
    if kept:
        table("Tensors that stay", ("", "counted", "planned", "counted / planned"), kept)
    if run is not None:
        _say(
            f"The whole run at this size: {duration(run['seconds'])}: {run['steps']:,} steps in "
            f"{duration(run['steps_seconds'])}, {run['evaluations']:,} evaluations in "
            f"{duration(run['evaluations_seconds'])}.",
            style="bold",
        )
        _say(f"Not counted: {', '.join(run['left_out'])}.")


def longest_report(result: Mapping[str, Any]) -> None:
    """Print the result of `bench_longest`."""
    found, planned, context = result["longest_tokens"], result["planned_tokens"], result["context_tokens"]
    step = result["resolution_tokens"]
    text = f"longest sequence that can be trained on: {found:,} tokens" if found else f"not even {step:,} tokens fit"
    _say(text + (", the model's whole context" if found == context // step * step else ""), style="bold")
    if planned is not None:
        _say(f"planned, rollouts included: {min(planned, context):,} tokens")


def _say(*lines: str, style: str = "") -> None:
    console = open_console(sys.stdout)
    for line in lines:
        console.print(Text(safe(line, console), style), soft_wrap=True)


def _beside(measured: int | None, planned: int | None) -> list[str]:
    """Return measured, planned, and the first over the second."""
    if measured is None or not planned:
        return [memory(measured), ABSENT, ABSENT]
    return [memory(measured), memory(planned), f"{measured / planned:.2f}"]
