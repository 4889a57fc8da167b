"""Fixed against adaptive rollout budget on prompts of mixed difficulty: `python benchmarks/adaptive_budget.py`.

The tiny model, warm-started on two-digit sums, meets a file of sums that it nearly always gets right, about half of
the time, and hardly ever. Every budget trains from the same adapter on the same file with the same seeds and steps.
Measured: prompts with a positive per 1,000 rollouts, of one and the same policy and over whole runs, and rollout
tokens until a held-out file of the same mixture is answered with `TARGET` accuracy. Writes
benchmarks/results/adaptive_budget.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from popo_lite.callbacks import Callback
from popo_lite.evaluation import evaluate
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, environment
from popo_lite.seeding import stream_seed
from popo_lite.tasks.generated import is_held_out
from popo_lite.trainer import Trainer
from popo_lite.types import Problem

RESULTS = Path(__file__).parent / "results" / "adaptive_budget.json"
CLASSES = ((2, 2), (3, 3), (1, 2), (2, 3))
"""Digits of the two numbers, easiest first."""
TRAINING_ROWS, HELD_OUT_ROWS = 48, 50
"""Of each class. Training goes through its rows several times, as `skip_known` is made for."""
WARM_STEPS, STEPS, EVALUATE_EVERY = 12, 36, 3
LEARNING_RATE = 1e-3
"""At 2e-3, the tiny recipe's, the fixed budget first falls below where it started."""
TARGET = 0.45
DEEP = ("data.prompts_per_step=16", "rollout.num_generations=8")
WIDE = ("data.prompts_per_step=32", "rollout.num_generations=4")
ADAPTIVE, SKIP = "rollout.adaptive.enabled=true", "rollout.skip_known=true"
SAVING = (ADAPTIVE, "rollout.adaptive.round_size=2")
SPENDING = (ADAPTIVE, "rollout.adaptive.round_size=4", "rollout.adaptive.max_rollouts=32")
BUDGETS: dict[str, tuple[str, ...]] = {
    "16 x 8, fixed": DEEP,
    "16 x 8, adaptive, most 32": (*DEEP, *SPENDING),
    "16 x 8, adaptive, most 8": (*DEEP, *SAVING, "rollout.adaptive.max_rollouts=8"),
    "16 x 8, adaptive, most 8, known skipped": (*DEEP, *SAVING, "rollout.adaptive.max_rollouts=8", SKIP),
    "32 x 4, fixed": WIDE,
    "32 x 4, adaptive, most 4": (*WIDE, *SAVING, "rollout.adaptive.max_rollouts=4"),
}
"""All make at most 128 rollouts a step, and stop at 2 positives where they are adaptive. With at most 32 rollouts of a
prompt what easy prompts save goes to hard ones; with at most G it is saved."""


def sums(digits: tuple[int, int], count: int, *, held_out: bool) -> list[dict[str, Any]]:
    """`count` distinct rows, fewer where there are not as many, from the split of the built-in arithmetic."""
    low, high = ([10 ** (n - 1) for n in digits], [10**n - 1 for n in digits])
    source = random.Random(stream_seed("adaptive budget", *digits, int(held_out)))  # noqa: S311
    found: dict[tuple[int, int], None] = {}
    for _ in range(100 * count):
        pair = (source.randint(low[0], high[0]), source.randint(low[1], high[1]))
        if is_held_out("arithmetic", *pair) == held_out:
            found[pair] = None
        if len(found) == count:
            break
    return [
        {"prompt": f"What is {a} + {b}?", "answer": str(a + b), "id": f"{a}+{b}", "digits": f"{digits[0]}+{digits[1]}"}
        for a, b in found
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pass_rates(overrides: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Pass rates of the warm-started model: by class, and the spread over single prompts (16 samples each)."""
    found: dict[str, Any] = {}
    with Trainer(load_recipe("tiny_cpu", overrides), Callback()) as trainer:
        for name in dict.fromkeys(row["digits"] for row in rows):
            problems = [
                Problem(id=row["id"], messages=({"role": "user", "content": row["prompt"]},), answer=row["answer"])
                for row in rows
                if row["digits"] == name
            ]
            recipe = trainer.recipe.with_values(
                {
                    "eval.samples_per_problem": 16,
                    "eval.temperature": 1.0,
                    "rollout.max_completion_length": 64,
                    "reward.threshold": 0.5,
                    "reward.max_ungraded_ratio": 0.0,
                }
            )
            worker = replace(trainer.worker, recipe=recipe)
            result = evaluate("policy", worker, trainer.policy.version, trainer.train_task, problems, seed=0)
            found[name] = {"problems": len(problems), "pass_at_k": asdict(result)["pass_at_k"]}
        found["environment"] = environment(trainer.policy.device)
    return found


def train(overrides: list[str], folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of metrics.jsonl, lines of evaluations.jsonl) of one run."""
    folder.mkdir()
    with Trainer(load_recipe("tiny_cpu", overrides), Callback()) as trainer:
        if trainer.run(RunFolder(folder)).summary is None:
            raise SystemExit("interrupted")
    run = RunFolder(folder)
    paths = (run.metrics_path, run.evaluations_path)
    lines = [[json.loads(line) for line in path.open()] if path.exists() else [] for path in paths]
    return lines[0], lines[1]


def at_equal_policy(overrides: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """The warm-started model's first step, over all training rows: what the budgets find before policies part."""
    folder.mkdir()
    found = {}
    for number, name in enumerate(name for name, keys in BUDGETS.items() if SKIP not in keys):
        whole = [f"data.prompts_per_step={len(CLASSES) * TRAINING_ROWS}", "train.steps=1", "eval.problems=0"]
        evaluations = {"eval.dataset", "eval.problems", "eval.every"}
        kept = [override for override in overrides if override.split("=")[0] not in evaluations]
        metrics, _ = train([*kept, *BUDGETS[name], *whole], folder / str(number))
        keys = ("prompts", "prompts_with_positive", "rollouts", "rollout_tokens", "rollout_tokens_per_positive_prompt")
        found[name] = {key: metrics[0][key] for key in keys}
        found[name]["prompts_with_positive_per_1000_rollouts"] = 1000 / metrics[0]["rollouts_per_positive_prompt"]
    return found


def measure(name: str, seed: int, overrides: list[str], folder: Path) -> dict[str, Any]:
    """One run under the budget `name`, and its figures."""
    start = time.perf_counter()
    metrics, evaluations = train([*overrides, *BUDGETS[name], f"train.seed={seed}"], folder)
    tokens = [0]
    for line in metrics:
        tokens.append(tokens[-1] + line["rollout_tokens"])
    curve = [
        {"step": line["step"], "rollout_tokens": tokens[line["step"]], "pass_at_1": line["pass_at_1"]}
        for line in evaluations
    ]
    rollouts = sum(line["rollouts"] for line in metrics)
    with_positive = sum(line["prompts_with_positive"] for line in metrics)
    return {
        "budget": name,
        "seed": seed,
        "rollouts": rollouts,
        "rollout_tokens": tokens[-1],
        "trained_tokens": sum(line["trained_tokens"] for line in metrics),
        "prompts": sum(line["prompts"] for line in metrics),
        "prompts_with_positive": with_positive,
        "prompts_with_positive_per_1000_rollouts": 1000 * with_positive / rollouts,
        "prompts_skipped": sum(line["prompts_skipped"] for line in metrics),
        "tokens_to_target": next((at["rollout_tokens"] for at in curve if at["pass_at_1"] >= TARGET), None),
        "pass_at_1_after": curve[-1]["pass_at_1"],
        "curve": curve,
        "seconds": time.perf_counter() - start,
    }


def median_tokens(runs: list[dict[str, Any]]) -> float | None:
    """Median tokens to the target; None where half of the runs or more never reached it."""
    reached = sorted(run["tokens_to_target"] for run in runs if run["tokens_to_target"] is not None)
    middle = len(runs) // 2
    return reached[middle] if middle < len(reached) else None


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and tokens to the target against the fixed budget with the same P x G, by budget."""
    by_budget = {name: [run for run in runs if run["budget"] == name] for name in BUDGETS}
    found: dict[str, Any] = {}
    for name, own in by_budget.items():
        figures = {
            key: statistics.fmean(run[key] for run in own)
            for key in (
                "prompts_with_positive_per_1000_rollouts",
                "rollout_tokens",
                "trained_tokens",
                "pass_at_1_after",
            )
        }
        tokens = median_tokens(own)
        baseline = median_tokens(by_budget[name.split(",")[0] + ", fixed"])
        found[name] = {
            **figures,
            "prompts_with_positive_ratio": sum(run["prompts_with_positive"] for run in own)
            / sum(run["prompts"] for run in own),
            "reached_target": sum(run["tokens_to_target"] is not None for run in own),
            "median_tokens_to_target": tokens,
            "times_fewer_tokens_than_fixed": baseline / tokens if baseline and tokens else None,
        }
    return found


def main() -> None:
    """Run every budget with every seed and write the results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--json", action="store_true", help="print the whole result and not a table")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        training = [row for digits in CLASSES for row in sums(digits, TRAINING_ROWS, held_out=False)]
        held_out = [row for digits in CLASSES for row in sums(digits, HELD_OUT_ROWS, held_out=True)]
        constant = ['optimizer.schedule="constant"', "optimizer.warmup_ratio=0.0"]
        train([*constant, "eval.problems=0", f"train.steps={WARM_STEPS}"], folder / "warm")
        warm = f'lora.init_from="{folder / "warm" / "adapter"}"'
        rates = pass_rates([warm, "eval.problems=0"], held_out)
        machine = rates.pop("environment")
        overrides = [
            *constant,
            warm,
            f'data.dataset="{write_rows(folder / "train.jsonl", training)}"',
            f'eval.dataset="{write_rows(folder / "held_out.jsonl", held_out)}"',
            f"eval.problems={len(held_out)}",
            f"optimizer.learning_rate={LEARNING_RATE}",
            "rollout.max_completion_length=48",
            f"eval.every={EVALUATE_EVERY}",
            f"train.steps={STEPS}",
            f"train.save_steps={STEPS}",
        ]
        first_step = at_equal_policy(overrides, folder / "first")
        for seed in range(arguments.seeds):
            for number, name in enumerate(BUDGETS):
                run = measure(name, seed, overrides, folder / f"{seed}-{number}")
                runs.append(run)
                if not arguments.json:
                    print(
                        f"seed {seed}  {name}: {run['prompts_with_positive_per_1000_rollouts']:.0f} prompts with a "
                        f"positive per 1,000 rollouts, target after {run['tokens_to_target']} tokens, "
                        f"pass@1 {run['pass_at_1_after']:.3f}, {run['rollout_tokens']} tokens, {run['seconds']:.0f} s",
                        flush=True,
                    )
    shown = [override.replace(temporary, ".") for override in overrides]
    result = {
        "settings": {"target": TARGET, "warm_steps": WARM_STEPS, "overrides": shown, "budgets": BUDGETS},
        "classes": rates,
        "at_equal_policy": first_step,
        "summary": summarize(runs),
        "runs": runs,
        "environment": machine,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result if arguments.json else result["summary"], indent=1))


if __name__ == "__main__":
    main()
