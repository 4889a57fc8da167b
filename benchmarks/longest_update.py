"""Find the longest answers that an update of eight of them holds on cards of 8 to 24 GiB, by plan and by simulation.

    python benchmarks/longest_update.py                all, into benchmarks/results/longest_update.jsonl; prints a table
    python benchmarks/longest_update.py 7B             only this model
    python benchmarks/longest_update.py --only-table   only print what is stored

Models have the shapes of Qwen2.5 in NF4, rank-32 adapters on all linear layers, and POPO's objective, in bfloat16. A
micro-batch is one answer after a prompt of 512 tokens. The length is the longest, in steps of 1,024 tokens, for which
the plan's phases siamese, update and step fit, with a sleeping vLLM, CUDA context and margin for fragmentation. For the
largest card two steps of that length are then simulated: `smallest_bytes` is the smallest card for the trainer alone,
of two and three layers and extrapolated. Contexts are taken to be long enough; rollouts of that length may need a
larger card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from popo_lite.errors import PopoError
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES, plan_memory
from popo_lite.tools.simulate import Simulator

RESULTS = Path(__file__).parent / "results" / "longest_update.jsonl"
COMMON = {"model_type": "qwen2", "max_position_embeddings": 2**22, "eos_token_id": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
CARDS_GIB = (8, 12, 16, 24)
STEP = 1024


def recipe_of(folder: Path, tokens: int, offload: bool) -> Recipe:
    """Return qwen_7b_lora for the model in `folder` and answers of `tokens` tokens with their prompt."""
    values = (
        f'model.id="{folder}"', "data.prompts_per_step=1", "rollout.max_prompt_length=512", 'train.device="cuda"',
        f"rollout.max_completion_length={tokens - 512}", f"train.tokens_per_microbatch={tokens}",
        f"train.offload_activations={json.dumps(offload)}",
    )  # fmt: skip
    return load_recipe("qwen_7b_lora", values)


def longest(folder: Path, card_gib: int, offload: bool) -> int:
    """Return the most tokens that fit by the plan, 0 if a single step of them does not."""

    def fits(tokens: int) -> bool:
        recipe = recipe_of(folder, tokens, offload)
        plan = plan_memory(recipe, load_shape(recipe.model), vram_bytes=card_gib * 2**30)
        return not any(plan.excess[phase] for phase in ("siamese", "update", "step"))

    low, high = 0, 2**21 // STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle - 1)
    return low * STEP


def measure(simulator: Simulator, folder: Path, card_gib: int, offload: bool) -> dict[str, Any]:
    """Return the longest answers on a card, and for the largest what a step with them takes by simulation."""
    tokens = longest(folder, card_gib, offload)
    if card_gib < max(CARDS_GIB):
        return {"tokens": tokens}
    try:
        found = simulator.run(recipe_of(folder, tokens, offload), extrapolate=True)
    except (PopoError, RuntimeError) as error:
        return {"tokens": tokens, "error": str(error)}
    smallest = {name: size + CUDA_CONTEXT_BYTES for name, size in found["smallest_bytes"].items()}
    peak = max(phase["allocated_bytes"] for phase in found["phases"].values())
    return {"tokens": tokens, "smallest_bytes": smallest, "tensor_bytes": peak}


def show(lines: list[dict[str, Any]]) -> None:
    """Print a Markdown table: tokens, and GiB of the smallest card for the trainer alone by simulation."""
    print("| model | inputs of layers | " + " | ".join(f"{card} GiB" for card in CARDS_GIB) + " |")
    print("|---" * (len(CARDS_GIB) + 2) + "|")
    rows: dict[tuple[str, bool], dict[int, str]] = {}
    for line in lines:
        simulated = f" ({line['smallest_bytes']['expandable'] / 2**30:.1f})" if "smallest_bytes" in line else ""
        text = f"{line['tokens']:,}{simulated}" if line["tokens"] else "-"
        rows.setdefault((line["model"], line["offload"]), {})[line["card_gib"]] = text
    for (model, offload), cells in rows.items():
        where = "in host memory" if offload else "on the GPU"
        print(f"| {model} | {where} | " + " | ".join(cells.get(card, "") for card in CARDS_GIB) + " |")


def main() -> None:
    """Run what is asked for and not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(SHAPES)}; default: all")
    parser.add_argument("--only-table", action="store_true")
    asked = parser.parse_args()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if not asked.only_table:
        done = {(line["model"], line["offload"], line["card_gib"]) for line in lines}
        cases = [(m, o, c) for m in asked.models or SHAPES for o in (False, True) for c in CARDS_GIB]
        with Simulator() as simulator, RESULTS.open("a", encoding="utf-8") as results:
            for model, offload, card in cases:
                if (model, offload, card) in done:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    (Path(folder) / "config.json").write_text(json.dumps(COMMON | SHAPES[model]))
                    found = measure(simulator, Path(folder), card, offload)
                lines.append({"model": model, "offload": offload, "card_gib": card, **found})
                results.write(json.dumps(lines[-1]) + "\n")
                results.flush()
    show(lines)


if __name__ == "__main__":
    main()
