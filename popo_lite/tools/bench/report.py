"""Reports of `popo-lite bench` for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table


def bench_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `bench`: stages, memory beside the plan's, and what the whole run would take."""
    console = console if console is not None else open_console(sys.stdout)
    _headline(result, console)
    if result["out_of_memory"] is not None:
        console.print(Text(safe(result["out_of_memory"], console), "bold red"))
        console.print()
    if result["stages"]:
        _stages(result["stages"], result["step_seconds"], console)
    if result["memory"]:
        _peaks(result["memory"], console)
    elif result["device"] == "cpu":
        console.print(Text("Peak memory is measured on a GPU only: resident memory on a CPU is not comparable."))
        console.print()
    if result["tensors"]:
        rows = [
            (one["kind"], words.memory(one["counted_bytes"]), *_planned(one["counted_bytes"], one["planned_bytes"]))
            for one in result["tensors"]
        ]
        table("Tensors that stay", ("", "counted", "planned", "counted / planned"), rows, console)
    if result["run"] is not None:
        _estimate(result["run"], console)


def longest_report(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result of `bench_longest`."""
    console = console if console is not None else open_console(sys.stdout)
    found, planned = result["longest_tokens"], result["planned_tokens"]
    step = result["resolution_tokens"]
    text = f"longest sequence that can be trained on: {found:,} tokens" if found else f"not even {step:,} tokens fit"
    if found == result["context_tokens"] // step * step:
        text += ", the model's whole context"
    console.print(Text(text, "bold"))
    if planned is not None:
        console.print(Text(f"planned, rollouts included: {min(planned, result['context_tokens']):,} tokens"))


def _headline(result: Mapping[str, Any], console: Console) -> None:
    size = result["size"]
    cap = result["memory_cap_bytes"]
    lines = (
        f"{result['model']} with random weights, engine {result['engine']}, on {_machine(result)}"
        + (f" capped to {words.memory(cap)}" if cap else ""),
        f"{size['prompts']:,} prompts x {size['num_generations']} answers of {size['prompt_tokens']:,} + "
        f"{size['completion_tokens']:,} tokens, {size['positives']:,} positives; median of "
        f"{result['measured_steps']:,} steps",
    )
    for line in lines:
        console.print(Text(safe(line, console)), soft_wrap=True)
    console.print()


def _machine(result: Mapping[str, Any]) -> str:
    gpu = result["environment"]["gpu"]
    return f"{gpu['name']}" if gpu else str(result["environment"]["processor"])


def _stages(stages: Sequence[Mapping[str, Any]], step_seconds: float, console: Console) -> None:
    rows = [
        (
            stage["stage"],
            words.duration(stage["seconds"]) if stage["seconds"] >= 1 else f"{stage['seconds']:.3f} s",
            words.decimals(stage["tokens_per_second"], 0) if stage["tokens_per_second"] is not None else "",
            f"{stage['seconds'] / step_seconds:.0%}",
        )
        for stage in stages
    ]
    table(f"A step: {words.duration(step_seconds)}", ("stage", "time", "tokens/s", "share"), rows, console)


def _peaks(phases: Sequence[Mapping[str, Any]], console: Console) -> None:
    rows = [
        (
            one["phase"],
            words.memory(one["tensor_bytes"]) if one["tensor_bytes"] is not None else words.ABSENT,
            *_planned(one["tensor_bytes"], one["planned_tensor_bytes"]),
            words.memory(one["card_bytes"]),
            *_planned(one["card_bytes"], one["planned_card_bytes"]),
        )
        for one in phases
    ]
    columns = ("phase", "tensors", "planned", "ratio", "on the card", "planned", "ratio")
    table("Peak memory", columns, rows, console)


def _planned(measured: int | None, planned: int | None) -> tuple[str, str]:
    """Return the plan's figure, and measured over planned."""
    if measured is None or not planned:
        return words.ABSENT, words.ABSENT
    return words.memory(planned), f"{measured / planned:.2f}"


def _estimate(run: Mapping[str, Any], console: Console) -> None:
    text = (
        f"The whole run at this size: {words.duration(run['seconds'])}: {run['steps']:,} steps in "
        f"{words.duration(run['steps_seconds'])}, {run['evaluations']:,} evaluations in "
        f"{words.duration(run['evaluations_seconds'])}."
    )
    console.print(Text(safe(text, console), "bold"), soft_wrap=True)
    console.print(Text(f"Not counted: {', '.join(run['left_out'])}."), soft_wrap=True)
