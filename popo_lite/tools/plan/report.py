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

    phases, vram, rows, bars = plan["phases"], plan["vram_bytes"], [], []
    names = dict.fromkeys(name for phase in phases for name in phase["bytes"])
    for name in sorted(names, key=lambda name: name in NOT_TENSORS):
        cells = [phase["bytes"].get(name, 0) for phase in phases]
        if any(float(shown(cell).replace(",", "")) for cell in cells):
            rows.append([name, *(shown(cell) if cell else "" for cell in cells)])
    rows.append(["in all", *(shown(phase["total_bytes"]) for phase in phases)])
    memory = "memory of the GPU" if plan["device"] == "cuda" else "host memory, as the recipe runs on the CPU"
    console.print()
    title = f"{plan['model']}, engine {plan['engine']}: {memory}, {unit}"
    table(title, ["", *(phase["name"] for phase in phases)], rows, console)
    for phase in phases:
        total = phase["total_bytes"]
        style = "red" if total > vram else "green"
        bar = ProgressBar(vram, total, width=28, complete_style=style, finished_style=style)
        peak = "peak: " if phase["name"] == plan["peak_phase"] else ""
        bars.append((phase["name"], bar, f"{shown(total)} {unit}", peak + phase["moment"]))
    table("Fullest moment of each phase", ("", "", "memory", "moment"), bars, console)
    head, style = "It fits", "bold green"
    text = f": {words.memory(plan['peak_bytes'])} of {words.memory(vram)} ({plan['vram_source']})."
    if why_not is not None:
        head, style, text = "It does not fit", "bold red", f" ({plan['vram_source']}): {why_not}."
    if plan["others_bytes"]:
        text += f" Other processes hold {words.memory(plan['others_bytes'])} ({plan['others_source']})."
    verdict = Text(safe(head + text, console))
    verdict.stylize(style, 0, len(head))
    console.print(verdict, *(Text(safe(line, console)) for line in _remarks(plan, batch_size)), sep="\n")
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


def _remarks(plan: Mapping[str, Any], batch_size: int) -> Iterator[str]:
    longest, context, this = plan["longest_sequence_tokens"], plan["context_tokens"], plan["sequence_tokens"]
    if longest >= context:
        holds = f"the model's context (memory would hold {longest:,})"
        yield f"Longest prompt with answer: {context:,} tokens, {holds}; this recipe's: {this:,}."
    elif longest:
        its = f"this recipe's: {this:,}; the model's context: {context:,}"
        yield f"Longest prompt with answer that would fit: {longest:,} tokens; {its}."
    if (most := plan["sequences_at_once"]) is not None:
        yield f"Sequences of full length that can be decoded at once: {most:,}; rollout.max_num_seqs: {batch_size:,}."
    if (export := plan["phases"][-1]["total_bytes"]) > plan["vram_bytes"]:
        alone = f"popo-lite export, later and alone, takes {words.memory(export)}"
        yield f"Not counted: {alone}; with CUDA_VISIBLE_DEVICES= in front it runs on the CPU."
