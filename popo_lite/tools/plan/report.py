"""The memory plan as a person reads it: classes by phase, a bar for each phase, the verdict, what to change."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.draw import bar
from popo_lite.tools.console.output import build_table, open_console, print_table, safe

_ORDER = (
    "base linears",
    "embeddings",
    "LM head",
    "norms, biases",
    "weight in 16 bit",
    "16-bit model",
    "merged model",
    "adapters",
    "predictor head",
    "siamese average",
    "optimizer state",
    "gradients",
    "weight copies",
    "adapter copies",
    "layer inputs",
    "layer activations",
    "layer working set",
    "final norm",
    "hidden states",
    "loss chunk",
    "engine weights",
    "KV cache",
    "logits",
    "engine, other",
    "CUDA graphs",
    "CUDA context",
    "fragmentation",
    "other processes",
)
_BAR_CELLS = 28


def plan_report(
    plan: Mapping[str, Any],
    *,
    batch_size: int,
    why_not: str | None,
    next_step: str,
    console: Console | None = None,
) -> None:
    """Print a plan, with the keys that `popo-lite plan --json` has. `why_not` is None where it fits."""
    console = console if console is not None else open_console(sys.stdout)
    console.print()
    phases = plan["phases"]
    unit, size, places = ("GiB", 2**30, 2) if plan["peak_bytes"] >= 2**30 else ("MiB", 2**20, 1)

    def shown(size_bytes: int) -> str:
        return f"{size_bytes / size:,.{places}f}"

    names = dict.fromkeys((*_ORDER, *(name for phase in phases for name in phase["bytes"])))
    rows = []
    for name in names:
        cells = [phase["bytes"].get(name, 0) for phase in phases]
        if any(float(shown(cell).replace(",", "")) for cell in cells):
            rows.append([name, *(shown(cell) if cell else "" for cell in cells)])
    rows.append(["in all", *(shown(phase["total_bytes"]) for phase in phases)])
    columns = ["", *(phase["name"] for phase in phases)]
    memory = "memory of the GPU" if plan["device"] == "cuda" else "host memory, as the recipe runs on the CPU"
    print_table(
        build_table(columns, rows, console), f"{plan['model']}, engine {plan['engine']}: {memory}, {unit}", console
    )
    console.print(_bars(plan, shown, unit, console))
    console.print()
    _print_verdict(plan, batch_size, why_not, next_step, console)


def _bars(plan: Mapping[str, Any], shown: Any, unit: str, console: Console) -> Table:
    """A row for each phase, how full it is, and what happens at its fullest moment."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for phase in plan["phases"]:
        total = phase["total_bytes"]
        is_peak = phase["name"] == plan["peak_phase"]
        style = "red" if total > plan["vram_bytes"] else "green"
        drawn = bar(total / plan["vram_bytes"], _BAR_CELLS, style)
        drawn.plain = words.encodable(drawn.plain, console.encoding)
        moment = f"peak: {phase['moment']}" if is_peak else phase["moment"]
        grid.add_row(
            Text(phase["name"], "bold" if is_peak else ""),
            drawn,
            Text(f"{shown(total)} {unit}", "bold" if is_peak else ""),
            Text(safe(moment, console), "bold" if is_peak else "dim"),
        )
    return grid


def _print_verdict(
    plan: Mapping[str, Any], batch_size: int, why_not: str | None, next_step: str, console: Console
) -> None:
    peak, there = words.memory(plan["peak_bytes"]), words.memory(plan["vram_bytes"])
    source = plan["vram_source"]
    if why_not is None:
        verdict = Text.assemble(("It fits", "bold green"), f": {peak} of {there} ({source}).")
    else:
        verdict = Text.assemble(("It does not fit", "bold red"), f" ({source}): {why_not}.")
    if plan["others_bytes"]:
        verdict.append(f" Other processes hold {words.memory(plan['others_bytes'])} ({plan['others_source']}).")
    console.print(Text(safe(verdict.plain, console), spans=verdict.spans))
    for line in _remarks(plan, batch_size):
        console.print(Text(safe(line, console)))
    if why_not is not None:
        console.print()
        for change in plan["advice"]["changes"]:
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in change["values"].items())
            console.print(Text(safe(f"{values}: {_effect(change)}", console)))
        console.print(Text("Next", "bold"))
        console.print(Text.assemble("  ", (safe(next_step, console), "cyan")), soft_wrap=True)


def _effect(change: Mapping[str, Any]) -> str:
    """What a change does to the phase that it eases, or for the engine's share."""
    before, after = words.memory(change["before_bytes"]), words.memory(change["after_bytes"])
    if change["eases"] == "engine shortfall":
        return f"the engine's share lacks {after if change['after_bytes'] else 'nothing'}, before {before}"
    return f"phase {change['eases']} from {before} to {after}"


def _remarks(plan: Mapping[str, Any], batch_size: int) -> list[str]:
    longest, context = plan["longest_sequence_tokens"], plan["context_tokens"]
    lines = []
    this = f"this recipe's: {plan['sequence_tokens']:,}"
    if longest >= context:
        lines.append(
            f"Longest prompt with answer: {context:,} tokens, the model's context (memory would hold {longest:,}); "
            f"{this}."
        )
    elif longest:
        lines.append(
            f"Longest prompt with answer that would fit: {longest:,} tokens; {this}; the model's context: {context:,}."
        )
    if plan["sequences_at_once"] is not None:
        lines.append(
            f"Sequences of full length that can be decoded at once: {plan['sequences_at_once']:,}; "
            f"rollout.max_num_seqs: {batch_size:,}."
        )
    export = next(phase for phase in plan["phases"] if phase["name"] == "export")
    if export["total_bytes"] > plan["vram_bytes"]:
        lines.append(
            f"Not counted: popo-lite export, later and alone, takes {words.memory(export['total_bytes'])}; "
            "with CUDA_VISIBLE_DEVICES= in front it runs on the CPU."
        )
    return lines
