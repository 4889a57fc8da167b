"""Fill the output blocks of pages: `python docs/outputs.py [PAGE.md ...]`, without pages all of docs/.

A block is a comment with a command of the shell, followed by a fence with what the command printed to stdout:

    <!-- output: popo-lite --version -->
    ```text
    popo-lite, version 0.1.0
    ```

`<!-- output 8+5: COMMAND -->` keeps the first 8 and the last 5 lines. `<!-- run: COMMAND -->` shows nothing; it makes,
for instance, the run that later commands read. The commands of a page run one after another, without a network, in a
new folder, which is shown as ~/popo. A text that differs from the old one only in times and memory is not replaced.
A command that fails leaves its block as it is, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^<!-- run: (.+) -->$|^(<!-- output(?: (\d+)\+(\d+))?: (.+) -->\n```\w*\n)((?:.*\n)*?)(?=```$)", re.MULTILINE
)
CHANGING = re.compile(
    r"(?:[\d.]+ (?:ms|s|min|h|[KMG]iB)\b|\d+:\d\d(?::\d\d)?| +\d+%(?= *[━╸╺]*$)|[━╸╺]+| {2,})+", re.MULTILINE
)


def refreshed(page: str, folder: Path) -> tuple[str, list[str]]:
    """Return the text of a page with new outputs, and what failed. Commands run in `folder`."""
    tools, work, failures = folder / "bin", folder / "popo", []
    for each in (tools, work):
        each.mkdir()
    (tools / "popo-lite").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m popo_lite "$@"\n', encoding="utf-8")
    (tools / "popo-lite").chmod(0o755)
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state")}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "96"}

    def filled(block: re.Match[str]) -> str:
        silent, head, first, last, command, old = block.groups()
        done = subprocess.run(
            ["sh", "-c", silent or command], cwd=work, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            failures.append(f"{silent or command}: exit code {done.returncode}\n{done.stderr[-1000:]}")
        if done.returncode or silent:
            return block[0]
        text = done.stdout.replace(str(work), "~/popo").replace(str(Path.home()), "~")
        lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line).rstrip() for line in text.strip("\n").splitlines()]
        if first and len(lines) > int(first) + int(last) + 1:
            lines = [*lines[: int(first)], "...", *lines[len(lines) - int(last) :]]
        new = "".join(f"{line}\n" for line in lines)
        return head + (old if CHANGING.sub(" ", new) == CHANGING.sub(" ", old) else new)

    return BLOCK.sub(filled, page), failures


def main() -> None:
    """Refresh the pages that are named, or all that have blocks."""
    failures: list[str] = []
    for path in [ROOT / "docs" / name for name in sys.argv[1:]] or sorted((ROOT / "docs").glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if not BLOCK.search(page):
            continue
        with tempfile.TemporaryDirectory() as folder:
            new, failed = refreshed(page, Path(folder))
        path.write_text(new, encoding="utf-8")
        failures += [f"{path.name}: {each}" for each in failed]
    sys.exit("\n".join(failures) or None)


if __name__ == "__main__":
    main()
