"""Simulate a step of every shipped GPU recipe, and of settings of one of them, beside the memory plan.

    python benchmarks/simulated.py                      all, into benchmarks/results/simulated.jsonl; prints a table
    python benchmarks/simulated.py qwen_7b_lora DoRA    only these
    python benchmarks/simulated.py --every-layer        without leaving out layers that are alike

Cases that the file already holds are skipped: remove it to start anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.recipe_file import load_recipe, shipped_recipes
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.simulation import trainer_bytes
from popo_lite.tools.simulate import Simulator

RESULTS = Path(__file__).parent / "results" / "simulated.jsonl"
MODELS = ("qwen_1_5b", "qwen_7b", "r1_distill_1_5b", "r1_distill_7b", "llama_8b", "deepseek_math_7b")
RECIPES = {f"{model}_{kind}": (f"{model}_{kind}",) for model in MODELS for kind in ("lora", "grpo")}
SETTINGS = {
    name: ("qwen_1_5b_lora", *overrides)
    for name, overrides in {
        "without checkpointing": ("train.gradient_checkpointing=false", "train.tokens_per_microbatch=2048"),
        "offloaded": ("train.offload_activations=true",),
        "prompts repeated": ("train.shared_prefix=false",),
        "one sequence at a time": ("train.packing=false",),
        "eager": ('model.attn_implementation="eager"',),
        "float32": ('model.dtype="float32"',),
        "DoRA": ("lora.dora=true",),
        "dropout": ("lora.dropout=0.1",),
    }.items()
}
PHASES = ("load", "siamese", "update", "step")


def measure(simulator: Simulator, name: str, case: tuple[str, ...], *, every_layer: bool) -> dict[str, Any]:
    """Return the simulated and planned bytes of a case, or its error."""
    recipe = load_recipe(shipped_recipes()[case[0]], (*case[1:], 'rollout.engine="hf"'))
    line: dict[str, Any] = {"case": name, "recipe": case[0], "overrides": case[1:], "model": recipe.model.id}
    try:
        found = simulator.run(recipe, extrapolate=not every_layer)
    except (PopoError, RuntimeError) as error:
        return line | {"error": str(error)}
    kept = {key: found[key] for key in ("smallest_bytes", "depths", "layers", "packing", "seconds")}
    return line | kept | {"phases": found["phases"], "planned": trainer_bytes(recipe, load_shape(recipe.model))}


def show(lines: list[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    print("| recipe or setting | " + " | ".join(PHASES) + " | update, plan / simulation | smallest |")
    print("|---" * (len(PHASES) + 3) + "|")
    for line in lines:
        if "error" in line:
            print(f"| {line['case']} | {line['error']} |")
            continue
        cells, held = [], line["phases"]
        for phase in PHASES:
            sizes = (held[phase]["allocated_bytes"], line["planned"][phase]) if phase in held else ()
            cells.append(" / ".join(f"{size / 2**30:.2f}" for size in sizes))
        ratio = line["planned"]["update"] / held["update"]["allocated_bytes"]
        smallest = " / ".join(f"{size / 2**30:.2f}" for size in line["smallest_bytes"].values())
        print(f"| {line['case']} | {' | '.join(cells)} | {ratio:.3f} | {smallest} |")


def main() -> None:
    """Run what is asked for and not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="recipes and settings; default: all")
    parser.add_argument("--every-layer", action="store_true")
    asked = parser.parse_args()
    cases = RECIPES | SETTINGS
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    with Simulator() as simulator, RESULTS.open("a", encoding="utf-8") as results:
        for name in asked.cases or cases:
            if name not in {line["case"] for line in done}:
                done.append(measure(simulator, name, cases[name], every_layer=asked.every_layer))
                results.write(json.dumps(done[-1]) + "\n")
                results.flush()
    show(done)


if __name__ == "__main__":
    main()
