"""Print a memory plan: bytes by class and phase, a bar for each phase, the verdict, and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.text import Text

from popo_lite.balance import idle_ranks
from popo_lite.tools.console.output import safe, table
from popo_lite.tools.console.words import memory
from popo_lite.tools.plan.advice import Advice, why_not
from popo_lite.tools.plan.vram import HOST, NOT_TENSORS, SHORTFALL, MemoryPlan


def plan_report(
    plan: MemoryPlan,
    advice: Advice,
    sources: tuple[str, str, str],
    command: str,
    train_command: str,
    console: Console,
) -> None:
    """Print a plan. `sources` say where the sizes of GPU, other processes and host come from; `command` made it."""
    phases, vram, rows, bars = (*plan.phases, plan.export), plan.vram_bytes, [], []
    unit, size, places = ("GiB", 2**30, 2) if plan.peak.total_bytes >= 2**30 else ("MiB", 2**20, 1)
    for name in sorted(dict.fromkeys(name for phase in phases for name in phase.bytes), key=NOT_TENSORS.__contains__):
        sizes = [phase.bytes.get(name, 0) / size for phase in phases]
        if any(round(cell, places) for cell in sizes):
            rows.append([name, *(f"{cell:,.{places}f}" if cell else "" for cell in sizes)])
    totals = [f"{phase.total_bytes / size:,.{places}f}" for phase in phases]
    used = "memory of the GPU" if plan.on_gpu else "host memory, as the recipe runs on the CPU"
    console.print()
    ranks = f", one of {plan.machine.ranks} ranks" if plan.machine.ranks > 1 else ""
    title = f"{plan.recipe.model.id}, engine {plan.engine}{ranks}: {used}, {unit}"
    table(title, ["", *(phase.name for phase in phases)], [*rows, ["in all", *totals]], console)
    for phase, total in zip(phases, totals, strict=True):
        style = "red" if phase.total_bytes > vram else "green"
        bar = ProgressBar(vram, phase.total_bytes, width=28, complete_style=style, finished_style=style)
        bars.append((phase.name, bar, f"{total} {unit}", "peak: " * (phase is plan.peak) + phase.moment))
    table("Fullest moment of each phase", ("", "", "memory", "moment"), bars, console)
    head, style, text = "It fits", "bold green", f": {memory(plan.peak.total_bytes)} of {memory(vram)} ({sources[0]})."
    if not plan.fits:
        source = sources[2] if plan.excess[HOST] and plan.peak.total_bytes <= vram else sources[0]
        head, style, text = "It does not fit", "bold red", f" ({source}): {why_not(plan)}."
    if plan.others_bytes:
        text += f" Other processes hold {memory(plan.others_bytes)} ({sources[1]})."
    verdict = Text(safe(head + text, console))
    verdict.stylize(style, 0, len(head))
    lines = [*_remarks(plan, sources[2]), *([] if plan.fits else [""])]
    for change in advice.changes:
        values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in change["values"].items())
        before, after = memory(change["before_bytes"]), memory(change["after_bytes"])
        effect = f"phase {change['eases']} from {before} to {after}"
        if change["eases"] == SHORTFALL:
            effect = f"the engine's share lacks {after if change['after_bytes'] else 'nothing'}, before {before}"
        elif change["eases"] == HOST:
            effect = f"host memory from {before} to {after}"
        lines.append(f"{values}: {effect}")
    console.print(verdict, *(Text(safe(line, console)) for line in lines), sep="\n")
    advised = f"{command} {advice.next_step}" if advice.changes else advice.next_step
    next_step = train_command if plan.fits else advised
    console.print(Text.assemble(("Next", "bold"), "\n  ", (safe(next_step, console), "cyan")), soft_wrap=True)


def _remarks(plan: MemoryPlan, host_source: str) -> Iterator[str]:
    if idle := idle_ranks(plan.recipe.data.prompts_per_step, plan.machine.ranks):
        yield f"{idle}."
    if stored := plan.shape.stored:
        dtype = plan.recipe.model.dtype
        unused = "" if dtype == stored.compute_dtype else f", not in the stored {stored.compute_dtype}"
        yield f"The checkpoint is stored in 4 bits. It computes in model.dtype = {dtype}{unused}."
    if held := plan.longest_sequence_tokens:
        limits = f"memory would hold {held:,}, the model's context {plan.context_tokens:,}"
        longest = f"Longest prompt with answer: {min(held, plan.context_tokens):,} tokens ({limits})"
        yield f"{longest}; this recipe's: {plan.sequence_tokens:,}."
    if (most := plan.sequences_at_once) is not None:
        batch = plan.recipe.rollout.max_num_seqs
        yield f"Sequences of full length that can be decoded at once: {most:,}; rollout.max_num_seqs: {batch:,}."
    if plan.host:
        parts = ", ".join(f"{name} {memory(size)}" for name, size in plan.host.items())
        parts += f", for each of {here} ranks" if (here := plan.machine.ranks_here) > 1 else ""
        available = "" if plan.host_bytes is None else f" of {memory(plan.host_bytes)} ({host_source})"
        yield f"Host memory: {memory(plan.needs[HOST])}{available}: {parts}."
    if plan.export.total_bytes > plan.vram_bytes:
        alone = f"popo-lite export, later and alone, takes {memory(plan.export.total_bytes)}, less for fewer answers"
        yield f"Not counted: {alone} at once; with CUDA_VISIBLE_DEVICES= in front it runs on the CPU."
