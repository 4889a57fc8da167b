"""Print a memory plan: bytes by class and phase, a bar for each phase, the verdict, and what to change."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from popo_lite.tools.console import words
from popo_lite.tools.console.output import open_console, safe, table
from popo_lite.tools.plan.vram import NOT_TENSORS, SHORTFALL


def plan_report(
    plan: Mapping[str, Any], *, batch_size: int, why_not: str | None, next_step: str, console: Console | None = None
) -> None:
    """Print a plan with the keys of `popo-lite plan --json`. `why_not` is None if it fits."""
    console = console if console is not None else open_console(sys.stdout)
    unit, size, places = ("GiB", 2**30, 2) if plan["peak_bytes"] >= 2**30 else ("MiB", 2**20, 1)

    def shown(size_bytes: int) -> str:
        return f"{size_bytes / size:,.{places}f}"

    phases, rows = plan["phases"], []
    names = dict.fromkeys(name for phase in phases for name in phase["bytes"])
    for name in sorted(names, key=lambda name: name in NOT_TENSORS):
        cells = [phase["bytes"].get(name, 0) for phase in phases]
        if any(float(shown(cell).replace(",", "")) for cell in cells):
            rows.append([name, *(shown(cell) if cell else "" for cell in cells)])
    rows.append(["in all", *(shown(phase["total_bytes"]) for phase in phases)])
    memory = "memory of the GPU" if plan["device"] == "cuda" else "host memory, as the recipe runs on the CPU"
    title = f"{plan['model']}, engine {plan['engine']}: {memory}, {unit}"
    console.print()
    table(title, ["", *(phase["name"] for phase in phases)], rows, console)
    bars = []
    for phase in phases:
        total = phase["total_bytes"]
        style = "red" if total > plan["vram_bytes"] else "green"
        bar = ProgressBar(plan["vram_bytes"], total, width=28, complete_style=style, finished_style=style)
        moment = ("peak: " if phase["name"] == plan["peak_phase"] else "") + phase["moment"]
        bars.append((phase["name"], bar, f"{shown(total)} {unit}", moment))
    table("Fullest moment of each phase", ("", "", "memory", "moment"), bars, console)
    console.print(_verdict(plan, why_not, console))
    for line in _remarks(plan, batch_size):
        console.print(Text(safe(line, console)))
    if why_not is not None:
        console.print()
        for change in plan["advice"]["changes"]:
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in change["values"].items())
            before, after = words.memory(change["before_bytes"]), words.memory(change["after_bytes"])
            effect = f"phase {change['eases']} from {before} to {after}"
            if change["eases"] == SHORTFALL:
                effect = f"the engine's share lacks {after if change['after_bytes'] else 'nothing'}, before {before}"
            console.print(Text(safe(f"{values}: {effect}", console)))
        console.print(Text("Next", "bold"))
        console.print(Text.assemble("  ", (safe(next_step, console), "cyan")), soft_wrap=True)


def _verdict(plan: Mapping[str, Any], why_not: str | None, console: Console) -> Text:
    peak, vram, source = words.memory(plan["peak_bytes"]), words.memory(plan["vram_bytes"]), plan["vram_source"]
    if why_not is None:
        verdict = Text.assemble(("It fits", "bold green"), f": {peak} of {vram} ({source}).")
    else:
        verdict = Text.assemble(("It does not fit", "bold red"), f" ({source}): {why_not}.")
    if plan["others_bytes"]:
        verdict.append(f" Other processes hold {words.memory(plan['others_bytes'])} ({plan['others_source']}).")
    return Text(safe(verdict.plain, console), spans=verdict.spans)


def _remarks(plan: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    longest, context = plan["longest_sequence_tokens"], plan["context_tokens"]
    this = f"this recipe's: {plan['sequence_tokens']:,}"
    if longest >= context:
        holds = f"the model's context (memory would hold {longest:,})"
        yield f"Longest prompt with answer: {context:,} tokens, {holds}; {this}."
    elif longest:
        its = f"{this}; the model's context: {context:,}"
        yield f"Longest prompt with answer that would fit: {longest:,} tokens; {its}."
    if plan["sequences_at_once"] is not None:
        yield (
            f"Sequences of full length that can be decoded at once: {plan['sequences_at_once']:,}; "
            f"rollout.max_num_seqs: {batch_size:,}."
        )
    if (export := plan["phases"][-1]["total_bytes"]) > plan["vram_bytes"]:
        alone = f"popo-lite export, later and alone, takes {words.memory(export)}"
        yield f"Not counted: {alone}; with CUDA_VISIBLE_DEVICES= in front it runs on the CPU."
