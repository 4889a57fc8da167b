"""Print the lines that depend on CUDA and that no test on the simulated GPU runs: `make cuda-branches`.

    python benchmarks/cuda_branches.py coverage.json

A line counts if it names CUDA or its device, and was not run or one of its branches was not taken. Conditional
expressions have no branches of their own.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

DEPENDS = re.compile(r"cuda|on_gpu|capability|pin_memory|VARLEN_GROUPS|unsloth|compile_rows", re.IGNORECASE)
IGNORED = ("popo_lite/tools/simulate/", "popo_lite/recipe", "popo_lite/tools/plan/")  # name CUDA and never use it


def main() -> None:
    """Read coverage's report in JSON."""
    files = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["files"]
    for name, found in sorted(files.items()):
        if name.startswith(IGNORED):
            continue
        missed = {*found["missing_lines"], *(first for first, _ in found["missing_branches"])}
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
            if number in missed and DEPENDS.search(line):
                print(f"{name}:{number}: {line.strip()}")


if __name__ == "__main__":
    main()
