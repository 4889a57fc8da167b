"""Print findings as they come, and what to do next."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from popo_lite.tools.console.output import safe
from popo_lite.tools.console.words import duration
from popo_lite.tools.doctor.findings import CHECKS, Finding

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
STATUS_WIDTH, NAME_WIDTH = 9, max(len(check.name) for check in CHECKS) + 2
INDENT = " " * (STATUS_WIDTH + NAME_WIDTH)
INDENT_OF_REASONS = 28
NARROWEST = 30
"""Columns for the text; in a terminal that leaves fewer, lines are folded by the terminal."""


def show(finding: Finding, console: Console) -> None:
    """Print a finding, and below it what to do."""
    status, style = f"{finding.status:<{STATUS_WIDTH}}", STYLES[finding.status]
    what = _folded(safe(finding.what, console), console.width)
    line = Text.assemble((status, style), f"{finding.name:<{NAME_WIDTH}}{what}")
    if finding.next_step:
        next_step = _folded(f"next: {safe(finding.next_step, console)}", console.width)
        line.append(f"\n{INDENT}{next_step}", "cyan")
    console.print(line, soft_wrap=True)


def _folded(text: str, width: int) -> str:
    """Return the text folded at blanks only, with an indent, so that commands and paths can be copied."""
    columns = max(width - len(INDENT), NARROWEST)
    return f"\n{INDENT}".join(textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False))


def show_summary(findings: Sequence[Finding], seconds: float, console: Console) -> None:
    """Print how many findings there are of each kind, and the next commands."""
    counts = counted(findings)
    console.print(
        f"\n{', '.join(f'{count} {status}' for status, count in counts.items())} in {duration(seconds)}", markup=False
    )
    console.print("\nNext", style="bold")
    for command, why in next_commands(findings).items():
        console.print(Text.assemble((f"  {command:<{INDENT_OF_REASONS}}", "cyan"), why), soft_wrap=True)


def counted(findings: Sequence[Finding]) -> dict[str, int]:
    """Return the number of findings by status, of those that there are."""
    counts = Counter[str](finding.status for finding in findings)
    return {status: counts[status] for status in STYLES if counts[status]}


def next_commands(findings: Sequence[Finding]) -> dict[str, str]:
    """Return what to run next, and why."""
    if any(finding.status == "failed" for finding in findings):
        return {"popo-lite doctor": "once what failed is fixed"}
    return {
        "popo-lite train tiny_cpu": "the whole method in minutes, on any CPU",
        "popo-lite init": "a recipe of your own",
    }


def show_bundle(path: Path, files: Sequence[str], console: Console) -> None:
    """Print what the bug report holds."""
    text = f"\n{safe(str(path), console)} holds {', '.join(files)}: look at it, then attach it to an issue."
    console.print(text, markup=False, soft_wrap=True)
