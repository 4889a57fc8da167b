"""A prompt computed once for its answers against once for each: `python benchmarks/shared_prefix.py`.

Trains random weights by the trainer's own steps on made-up prompts and answers of full length, all of them right, in
turns with and without `train.shared_prefix`. Writes the tokens forwarded and the median seconds of the siamese pass and
the update to benchmarks/results/shared_prefix-cpu.json, with the ratios. The shape of SmolLM2-135M comes from its GGUF
file if `make test-real` has installed it, else from the Hub.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from study import real_model

from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import environment
from popo_lite.tools.bench.synthetic import BenchTrainer, Meter, random_policy

RESULTS = Path(__file__).parent / "results" / "shared_prefix-cpu.json"
CASES = {
    "tiny_cpu, 14 + 23": ("tiny_cpu", (32, 8, 14, 23)),
    "tiny_cpu, 512 + 256": ("tiny_cpu", (1, 8, 512, 256)),
    "smollm2_135m, 75 + 5": ("smollm2_135m", (8, 8, 75, 5)),
}
"""Recipe, and how many prompts of how many answers, of how many tokens each."""
SIZES = (
    "data.prompts_per_step",
    "rollout.num_generations",
    "rollout.max_prompt_length",
    "rollout.max_completion_length",
)


def measure(name: str, sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return tokens, median seconds by stage, and the ratios of shared to not shared."""
    model = real_model()[1:] if name == "smollm2_135m" else ()
    recipe = load_recipe(name, [*model, *(f"{key}={value}" for key, value in zip(SIZES, sizes, strict=True))])
    recipe = recipe.with_values({"train.tokens_per_microbatch": sizes[1] * sum(sizes[2:])})
    torch.set_num_threads(1)
    policy = random_policy(recipe)
    rewards = [1.0] * sizes[0] * sizes[1]
    records: dict[bool, list[Any]] = {True: [], False: []}
    with ExitStack() as stack:
        trainers = {}
        for shared in records:
            policy.shared_prefix = shared  # which a trainer reads when it is made
            trainers[shared] = stack.enter_context(
                BenchTrainer(recipe, policy, Meter(policy.device), rewards, sample=False)
            )
        policy.shared_prefix = True
        for step in range(repeats + 1):
            for shared, trainer in trainers.items():
                trainer.train_step(step)
                if step:  # the first warms up
                    records[shared].append(trainer.meter.records[-1])

    def seconds(shared: bool, stage: str) -> float:
        return statistics.median(record["seconds"][stage] for record in records[shared])

    tokens = {shared: of[0]["trained_tokens"] for shared, of in records.items()}
    stages = {
        stage: {"shared": seconds(True, stage), "not_shared": seconds(False, stage)} for stage in ("siamese", "update")
    }
    return {
        "tokens": {"shared": tokens[True], "not_shared": tokens[False], "ratio": tokens[True] / tokens[False]},
        "seconds": {stage: of | {"ratio": of["shared"] / of["not_shared"]} for stage, of in stages.items()},
    }


def main() -> None:
    """Measure every case and write the results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found = {"command": f"python benchmarks/shared_prefix.py --repeats {arguments.repeats}", "cases": {}}
    for case, (name, sizes) in CASES.items():
        found["cases"][case] = result = measure(name, sizes, arguments.repeats)
        ratios = [f"{stage} {of['ratio']:.2f}" for stage, of in result["seconds"].items()]
        print(f"{case}: tokens {result['tokens']['ratio']:.2f}, time: {', '.join(ratios)}", flush=True)
    found["environment"] = environment(torch.device("cpu"))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
