"""Verdicts of the `math` reward against math-verify's, and plain answers per second against an older checkout.

    git worktree add /tmp/before COMMIT
    python benchmarks/grading.py --before /tmp/before --json benchmarks/results/grading.json

An error is an exception, or an outcome that says nothing about the answer. math-verify alone: `verify` on what `parse`
makes of the reference between dollar signs and of the whole text. Speed: `decide_exactly` on 2,000 texts of about 700
characters that end with a plain number in a box, half of them right; five rounds, each running both in turn in new
processes. References: `check_math` on 1,000 generated ones with degrees and roots. Verdicts a second: through a
`Grader` with two workers, over the answers that the two files hold and 5,000 plain ones.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "collected": ROOT / "tests/unit/grading_cases.jsonl",
    "held out": ROOT / "benchmarks/grading_held_out.jsonl",
}
ROUNDS = 5


def main() -> None:
    """Run the measurements, print them, and write them to the file of --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--job", choices=["ours", "math-verify", "speed", "references", "verdicts"], help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(options.job)))
        return
    code = {"ours": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")},
        "verdicts": {name: start("ours", path) for name, path in code.items()}
        | {"math-verify": start("math-verify", ROOT)},
        "references": start("references", ROOT),
        "verdicts_per_second": start("verdicts", ROOT),
    }
    rounds = [{name: start("speed", path) for name, path in code.items()} for _ in range(ROUNDS)]
    results["answers_per_second"] = {name: [round(speeds[name]) for speeds in rounds] for name in code}
    for name, files in results["verdicts"].items():
        for file, counts in files.items():
            print(f"{name:12} {file:10} {counts}")
    print("references  ", results["references"])
    print("verdicts a second, two workers:", results["verdicts_per_second"])
    for name, speeds in results["answers_per_second"].items():
        print(f"{name:12} {statistics.median(speeds):,.0f} plain answers/s, {speeds}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def start(job: str, path: Path) -> Any:
    """Run one job in a process that imports popo_lite from `path`."""
    command = [sys.executable, __file__, "--job", job]
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def run_job(job: str) -> Any:
    """Return the result of one job."""
    if job == "speed":
        return plain_answers_per_second()
    if job == "verdicts":
        return verdicts_per_second()
    if job == "references":
        return unreadable_references()
    return {name: count(job, path) for name, path in CASES.items()}


def count(judge: str, path: Path) -> dict[str, int]:
    """Count right verdicts, wrong answers accepted, right ones refused, and errors."""
    counts = dict.fromkeys(("pairs", "right verdicts", "wrong accepted", "right refused", "errors"), 0)
    for case in map(json.loads, path.read_text("utf-8").splitlines()):
        try:
            accepted = (ours if judge == "ours" else math_verify)(case["answer"], case["reference"])
        except Exception:
            accepted = None
        counts["pairs"] += 1
        counts["right verdicts"] += accepted is case["right"]
        counts["wrong accepted"] += accepted is True and not case["right"]
        counts["right refused"] += accepted is not True and case["right"]
        counts["errors"] += accepted is None
    return counts


def ours(text: str, reference: str) -> bool | None:
    """Return whether the math reward accepts `text`, or None for an error."""
    from popo_lite.grading.math import decide_exactly
    from popo_lite.types import Outcome

    reward = decide_exactly(text, problem(reference)) or math_function().grade(text, {"id": "p", "answer": reference})
    return None if reward.outcome in (Outcome.ERROR, Outcome.TIMEOUT) else reward.outcome == Outcome.CORRECT


@cache
def math_function() -> Any:
    """Return the loaded reward function."""
    from popo_lite.grading.functions import load_functions
    from popo_lite.recipe import RewardRecipe

    return load_functions(RewardRecipe.model_validate({"functions": "math"}), thinking_open=False)[0]


def math_verify(text: str, reference: str) -> bool:
    """Return whether math-verify alone accepts `text`."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${reference}$"), parse(text)))


def problem(reference: str) -> Any:
    """Return a problem with this reference answer."""
    from popo_lite.types import Problem

    return Problem(id="p", messages=({"role": "user", "content": "?"},), answer=reference)


def plain_answers_per_second() -> float:
    """Return how many plain answers `decide_exactly` grades in a second."""
    from popo_lite.grading.math import decide_exactly

    random.seed(0)
    numbers = [random.randint(-(10**6), 10**6) for _ in range(2000)]  # noqa: S311
    steps = r"First we see that $\frac{1}{2} + x^{2} = 7$, so {x} is small. " * 11
    answers = [(rf"{steps}\boxed{{{n + k % 2}}}", problem(str(n))) for k, n in enumerate(numbers)]
    started = time.perf_counter()
    verdicts = [decide_exactly(text, row) for text, row in answers]
    seconds = time.perf_counter() - started
    assert sum(reward is not None and reward.value == 1 for reward in verdicts) == len(answers) // 2
    return len(answers) / seconds


def verdicts_per_second() -> dict[str, float]:
    """Grade through two workers: by `exact`, by `math` with plain numbers, and pairs that math-verify must decide.

    Each of the latter is graded once, so that no cache knows it.
    """
    from popo_lite.grading import Grader
    from popo_lite.grading.math import decide_exactly
    from popo_lite.recipe import RewardRecipe

    pairs = [(case["answer"], problem(case["reference"])) for path in CASES.values() for case in
             map(json.loads, path.read_text("utf-8").splitlines())]  # fmt: skip
    plain = [(rf"First, $x = {n}$. \boxed{{{n + n % 2}}}", problem(str(n))) for n in range(5000)]
    jobs = {
        "exact": ("exact", [(str(n), problem(str(n + n % 2))) for n in range(5000)]),
        "math, plain numbers": ("math", plain),
        "math-verify": ("math", [(text, row) for text, row in pairs if decide_exactly(text, row) is None]),
    }
    speeds = {}
    for name, (function, answers) in jobs.items():
        with Grader(RewardRecipe.model_validate({"functions": function, "workers": 2})) as grader:
            grader.grade([("no answer", problem("1")), ("none", problem("1"))])  # starts both workers
            started = time.perf_counter()
            rewards = grader.grade(answers)
            speeds[name] = round(len(answers) / (time.perf_counter() - started), 1)
            assert all(reward.outcome.is_graded for reward in rewards)
    return speeds


def unreadable_references() -> dict[str, float]:
    """Check 1,000 references as they stand in MATH-500, and count those that cannot be read."""
    from popo_lite.grading.symbolic import check_math

    random.seed(0)
    shapes = [
        r"A^\circ", r"A^{\circ}", r"A\text{ degrees}", r"\theta = A^\circ", r"A^\circ, B^\circ",
        r"\tan A^\circ", r"A\sqrt{B}", r"\sqrt{A}", r"\sqrt[3]{A}", r"\frac{A\sqrt{B}}{C}",
        r"\frac{A + \sqrt{B}}{C}", r"A \pm B\sqrt{C}", r"\sqrt{A} + \sqrt{B}",
        r"\left(\sqrt{A}, \frac{B}{C}\right)", r"[-\sqrt{A}, B)", r"A + B i\sqrt{C}",
        r"\frac{\sqrt{A} - \sqrt{B}}{C}", r"\frac{1}{\sin A^\circ}", r"A\sqrt{B} \text{ cm}",
        r"\sqrt{\frac{A}{B}}",
    ]  # fmt: skip
    references = []
    for k in range(1000):
        numbers = [random.randint(2, 179) for _ in range(3)]  # noqa: S311
        references.append(
            re.sub("[ABC]", lambda match, n=numbers: str(n["ABC".index(match[0])]), shapes[k % len(shapes)])
        )
    started = time.perf_counter()
    unreadable = [reference for reference in references if check_math({"id": "p", "answer": reference})]
    seconds = time.perf_counter() - started
    return {"checked": len(references), "unreadable": len(unreadable), "milliseconds each": round(seconds, 3)}


def machine() -> dict[str, Any]:
    """Return the processor, the cores and the interpreter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"processor": model, "cores": os.cpu_count(), "python": sys.version.split()[0]}


if __name__ == "__main__":
    main()
