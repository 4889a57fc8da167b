"""The offline default over several seeds, through the real command: `python benchmarks/tiny_seeds.py`.

`--recipe tiny_vllm` does the same with rollouts from vLLM. Writes one line a seed to
benchmarks/results/<recipe>.jsonl: summary.json of the run with the machine, the versions
and the command beside it, and the seconds of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def run_seed(recipe: str, seed: int, overrides: list[str]) -> dict[str, object]:
    """One run in a folder of its own; raises CalledProcessError where it fails."""
    command = ["popo-lite", "train", recipe, "--seed", str(seed), "--output", "run", "--json"]
    for override in overrides:
        command += ["--set", override]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "popo_lite", *command[1:]],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        environment = json.loads((Path(folder) / "run" / "environment.json").read_text())
    summary = json.loads(done.stdout.splitlines()[-1])
    return {"command": " ".join(command), "process_seconds": seconds, **summary, "environment": environment}


def main() -> None:
    """Run every seed and write the results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--recipe", choices=["tiny_cpu", "tiny_vllm"], default="tiny_cpu")
    arguments = parser.parse_args()
    lines = []
    for seed in arguments.seeds:
        result = run_seed(arguments.recipe, seed, arguments.overrides)
        before, after = result["before"], result["after"]
        print(
            f"seed {seed}: pass@1 {before['pass_at_1']:.1%} -> {after['pass_at_1']:.1%}, step by step "
            f"{before['task_figures']['step_by_step_ratio']:.1%} -> {after['task_figures']['step_by_step_ratio']:.1%}, "
            f"{result['process_seconds']:.0f} s",
            flush=True,
        )
        lines.append(json.dumps(result) + "\n")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.recipe}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
