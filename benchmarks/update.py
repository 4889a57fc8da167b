"""One whole update, ours against TRL's GRPOTrainer: same base, same rollouts and rewards, each in its own process.

    python benchmarks/update.py                                      Qwen2.5-1.5B's shape and every rival, on a GPU
    python benchmarks/update.py --shape tiny --lengths 128 256       the same on a tiny shape, to try it on a CPU
    python benchmarks/update.py --find-longest --memory-cap 24GiB    the longest sequences that fit, fused and naive

What is trained: one prompt with `--positives` answers of equal length and rewards between 0.6 and 1, so that every
answer is a positive for us and has an advantage for GRPO. Weights are random, NF4 with double quantisation, rank 16 on
all linear layers, compute in bfloat16, gradient checkpointing, AdamW with 8-bit state that stays on the GPU, gradients
clipped to norm 1.

Every side is measured with one sequence in a forward and backward pass, and with as many as 8,192 tokens hold and go
evenly into the positives; `--sequences-per-pass` sets it. Ours packs them into one row; TRL has them as a batch, which
needs no padding here, as all are of equal length.

Timed, ours: weights of the positives, the siamese pass, forward and backward of every positive with the predictor
head, clipping, optimizer, siamese average. Timed, TRL's: advantages, forward and backward of every answer, clipping,
optimizer, learning rate. In neither: sampling, grading, writing, and the first update, which warms up.

TRL gets the rollouts through `rollout_func`, its own hook for custom generation, and the rewards through a reward
function; the clock starts when that function returns and stops in the callback at the end of the step. No reference
model, log-probs in chunks (its only path), no dropout, LoRA weights in bfloat16 (it narrows them itself on a quantised
base; ours stay in float32). `trl-liger` is the same with Liger's kernels for norms, rotary embeddings and MLP; it is
measured where liger-kernel is installed, on a GPU alone. Every pair of settings is compared, and the result names the
leanest and the fastest of the rivals. TRL's loss kernels are written in Triton; on a CPU they run in Triton's
interpreter, which makes its seconds there meaningless.

Mean token entropies, in nats, of every update on both sides show that it is the same model and the same rollouts.

`--loss naive` takes the log-probs from all logits at once, in float32, in place of the fused chunks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from popo_lite import update
from popo_lite.fused import Head, LossOutput, TokenLoss, naive_logprobs
from popo_lite.policy.adapters import add_adapters
from popo_lite.policy.device import pick_device
from popo_lite.policy.load import load_tokenizer
from popo_lite.policy.memory import is_out_of_memory
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.run_folder import environment
from popo_lite.samplers import SamplingParams
from popo_lite.tools.bench.measure import bench_longest, cap_memory, frozen_bytes, peaks_beside_plan, plan_here
from popo_lite.tools.bench.synthetic import (
    PHASES,
    BenchTrainer,
    Meter,
    OutOfMemoryError,
    random_answers,
    random_base,
    random_policy,
    random_prompt,
)
from popo_lite.tools.plan.command import parse_size
from popo_lite.tools.plan.shapes import load_shape

SHAPES = {
    "tiny": "tiny",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "deepseek-math-7b": "deepseek-ai/deepseek-math-7b-base",
}
UPDATE_STAGES = ("weights", "siamese", "update", "optimizer")
"""The stages of a step in which it trains."""
RIVALS = ("trl", "trl-liger")
PASS_TOKENS = 8192
"""Tokens of a forward and backward pass of several sequences, unless told: the default of the recipes."""
RESULTS = Path(__file__).parent / "results"
CPU_REMARK = (
    "A tiny shape on a CPU: it shows that the script runs and says nothing about a GPU. TRL's loss kernels ran in "
    "Triton's interpreter, which takes nearly all of its time, so no ratio is given."
)

Side = dict[str, Any]
"""What was measured of one side: its figures, or `out_of_memory`, or `failed`."""


def recipe_for(arguments: argparse.Namespace, tokens: int) -> Recipe:
    """The recipe of both sides for sequences of `tokens`, so many of them in a pass as this process is told."""
    prompt = min(512, tokens // 4)
    (sequences_per_pass,) = arguments.sequences_per_pass
    return Recipe.model_validate(
        {
            "model": {"id": SHAPES[arguments.shape], "backend": arguments.backend},
            "lora": {"rank": arguments.rank, "alpha": 2.0 * arguments.rank},
            "rollout": {
                "engine": "hf",
                "num_generations": arguments.positives,
                "max_prompt_length": prompt,
                "max_completion_length": tokens - prompt,
                "vllm": {"enable_sleep_mode": False},  # the optimizer's state stays on the GPU, where TRL's is
            },
            "data": {"prompts_per_step": 1},
            "optimizer": {"name": "adamw8bit"},
            "train": {"steps": arguments.updates + 1, "tokens_per_microbatch": sequences_per_pass * tokens},
        }
    )


def rewards_of(answers: int) -> list[float]:
    """Return rewards from 1 down to 0.6: every answer is a positive, and has an advantage."""
    return [1.0 - 0.4 * number / answers for number in range(answers)]


# ---------------------------------------------------------------------- our side


def use_naive_loss() -> None:
    """Replace the fused loss by one over all logits, in this process alone."""

    def naive(hidden: Tensor, targets: Tensor, head: Head, token_loss: TokenLoss, **_: Any) -> LossOutput:
        logps, entropies = naive_logprobs(hidden, targets, head)
        loss = token_loss(logps, entropies, slice(None))
        return LossOutput(loss, logps.detach(), entropies.detach())

    update.fused_loss = naive  # type: ignore[assignment]


def our_side(arguments: argparse.Namespace, tokens: int) -> Side:
    """Measure updates of ours at sequences of `tokens`."""
    recipe = recipe_for(arguments, tokens)
    device = pick_device("auto")
    meter = Meter(device)
    cap = None if arguments.memory_cap is None else parse_size(arguments.memory_cap)
    plan = plan_here(recipe, device, cap)
    try:
        with meter:
            policy = random_policy(recipe)
            trainer = BenchTrainer(recipe, policy, meter, rewards=rewards_of(arguments.positives), sample=False)
            trainer.measure(arguments.updates)
    except OutOfMemoryError as error:
        return {"out_of_memory": error.what, "notices": meter.notices}
    stages = {stage: meter.seconds(stage) for stage in UPDATE_STAGES}
    seconds = [sum(record["seconds"][stage] for stage in UPDATE_STAGES) for record in meter.records]
    phases = {PHASES[stage] for stage in UPDATE_STAGES}
    return costs_of(seconds, [peaks for phase, peaks in meter.peaks.items() if phase in phases]) | {
        "seconds_by_stage": stages,
        "peaks_by_phase": peaks_beside_plan(meter, plan),
        "entropies": [record["entropy"] for record in meter.records],
        "grad_norms": [record["grad_norm"] for record in meter.records],
        "passes": meter.records[-1]["micro_batches"],
        "base_bytes": frozen_bytes(policy.model),
        "packing": policy.packing,
        "notices": meter.notices,
    }


def longest_of_ours(arguments: argparse.Namespace) -> Side:
    """The longest sequences of which an update fits, by doubling and bisection over one base."""
    tried: list[str] = []
    resolution = arguments.resolution
    found = bench_longest(
        recipe_for(arguments, resolution), memory_cap_bytes=None, notify=tried.append, resolution=resolution
    )
    return {"longest_tokens": found["longest_tokens"], "tried": tried}


# ---------------------------------------------------------------------- TRL's side


def trl_side(arguments: argparse.Namespace, tokens: int) -> Side:
    """Metered updates of TRL's GRPOTrainer at sequences of `tokens`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    recipe = recipe_for(arguments, tokens)
    device = pick_device("auto")
    base = random_base(recipe.model, device)
    base_bytes = frozen_bytes(base)
    (sequences_per_pass,) = arguments.sequences_per_pass
    passes = arguments.positives // sequences_per_pass
    model = add_adapters(base, recipe.lora, recipe.train.seed)
    tokenizer = load_tokenizer(ModelRecipe(id="tiny"))
    tokenizer.padding_side = "left"
    vocabulary = base.config.vocab_size
    meter = Meter(device)
    times: list[float] = []

    def rollouts(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        prompt = random_prompt(trainer.state.global_step, vocabulary, recipe.rollout.max_prompt_length)
        params = SamplingParams(temperature=1.0, max_completion_length=recipe.rollout.max_completion_length)
        (answers,) = random_answers(vocabulary, [prompt], count=len(prompts), params=params)
        return {
            "prompt_ids": [list(prompt.token_ids) for _ in answers],
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "logprobs": None,
            "made": rewards_of(len(answers)),
        }

    def reward(made: Sequence[float], **_: Any) -> list[float]:
        meter.stage("update")
        times.append(time.perf_counter())
        return list(made)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.stage("between updates")
            times.append(time.perf_counter())
            if len(times) == 2:
                meter.forget_step()

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            rollout_func=rollouts,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": "."}] * (arguments.updates + 1)),
            callbacks=[Clock()],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=arguments.updates + 1,
                num_generations=arguments.positives,
                per_device_train_batch_size=sequences_per_pass,
                gradient_accumulation_steps=passes,
                steps_per_generation=passes,
                max_completion_length=recipe.rollout.max_completion_length,
                temperature=recipe.rollout.temperature,
                beta=0.0,
                bf16=True,
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                use_liger_kernel=arguments.side == "trl-liger",
                optim="adamw_8bit",
                learning_rate=recipe.optimizer.learning_rate,
                weight_decay=recipe.optimizer.weight_decay,
                max_grad_norm=recipe.optimizer.max_grad_norm,
                save_strategy="no",
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=device.type == "cpu",
            ),
        )
        before = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if "lora_B" in name}
        try:
            trainer.train()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {"out_of_memory": "out of memory in update"}
    unchanged = [name for name, values in before.items() if torch.equal(values, model.get_parameter(name).cpu())]
    assert not unchanged, f"TRL left {len(unchanged)} of {len(before)} adapters as they were"
    entropies = [line["entropy"] for line in trainer.state.log_history if "loss" in line]
    seconds = [end - start for start, end in zip(times[2::2], times[3::2], strict=True)]
    peaks = [meter.peaks["update"]] if "update" in meter.peaks else []
    return costs_of(seconds, peaks) | {"entropies": entropies[1:], "passes": passes, "base_bytes": base_bytes}


# ---------------------------------------------------------------------- both


def costs_of(seconds: Sequence[float], peaks: Sequence[tuple[int, int]]) -> Side:
    """Return seconds and peaks of the measured updates; no peaks on a CPU."""
    return {
        "seconds": list(seconds),
        "seconds_median": statistics.median(seconds),
        "peak_allocated_bytes": max((peak[0] for peak in peaks), default=None),
        "peak_card_bytes": max((peak[1] for peak in peaks), default=None),
    }


def in_own_process(side: str, tokens: int, options: Sequence[str]) -> Side:
    """What `side` measures at sequences of `tokens`, in a fresh process; the end of its log where it fails."""
    variables = dict(os.environ)
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, __file__, *options, "--side", side, "--lengths", str(tokens), "--json", file.name]
        done = subprocess.run(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            return {"failed": done.stderr[-4000:]}
        found: Side = json.loads(Path(file.name).read_text())
    return found


def compare(ours: Side, theirs: Side) -> dict[str, float | None]:
    """A rival's figures over ours; None where one of them is missing."""

    def extra(side: Side) -> int | None:
        peak = side.get("peak_allocated_bytes")
        return None if peak is None else peak - side["base_bytes"]

    def ratio(top: float | None, bottom: float | None) -> float | None:
        return None if top is None or not bottom else top / bottom

    return {
        "seconds": ratio(theirs.get("seconds_median"), ours.get("seconds_median")),
        "peak_allocated": ratio(theirs.get("peak_allocated_bytes"), ours.get("peak_allocated_bytes")),
        "peak_beyond_base": ratio(extra(theirs), extra(ours)),
    }


def compare_all(sides: Sequence[Side]) -> dict[str, Any]:
    """Every setting of a rival over every setting of ours, and which of the rivals is leanest and which fastest."""

    def setting(side: Side) -> dict[str, Any]:
        return {"side": side["side"], "sequences_per_pass": side["sequences_per_pass"]}

    rivals = [side for side in sides if side["side"] != "ours"]
    measured = [side for side in rivals if "seconds" in side]
    return {
        "rival_over_ours": [
            {"rival": setting(theirs), "ours": setting(ours), **compare(ours, theirs)}
            for theirs in rivals
            for ours in sides
            if ours["side"] == "ours"
        ],
        "leanest_rival": setting(min(measured, key=lambda side: side["peak_allocated_bytes"])) if measured else None,
        "fastest_rival": setting(min(measured, key=lambda side: side["seconds_median"])) if measured else None,
    }


def per_pass(arguments: argparse.Namespace, tokens: int) -> list[int]:
    """Numbers of sequences of `tokens` in a forward and backward pass: one, and as many as `PASS_TOKENS` hold."""
    if arguments.sequences_per_pass:
        return list(arguments.sequences_per_pass)
    room = max(1, PASS_TOKENS // tokens)
    positives = arguments.positives
    return sorted({1, max(count for count in range(1, positives + 1) if positives % count == 0 and count <= room)})


def all_lengths(
    arguments: argparse.Namespace, options: Sequence[str], lines: list[dict[str, Any]], save: Callable[[], None]
) -> bool:
    """Every side at every length into `lines`, saved as they come; whether none failed."""
    for tokens in arguments.lengths:
        sides: list[Side] = []
        line: dict[str, Any] = {"tokens": tokens, "sequences": arguments.positives, "sides": sides}
        lines.append(line)
        for count, name in itertools.product(per_pass(arguments, tokens), ("ours", *arguments.rivals)):
            side = in_own_process(name, tokens, [*options, "--sequences-per-pass", str(count)])
            median = side.get("seconds_median")
            side["tokens_per_second"] = median and tokens * arguments.positives / median
            sides.append({"side": name, "sequences_per_pass": count, **side})
            print(f"{name}, {tokens:,} tokens, {count} a pass: {told(side)}", flush=True)
            save()
        if arguments.rivals and torch.cuda.is_available():
            line |= compare_all(sides)
            print(json.dumps(compare_all(sides), indent=1), flush=True)
            save()
    return not any("failed" in side for line in lines for side in line["sides"])


def longest_that_fit(options: Sequence[str], resolution: int, found: dict[str, Side], save: Callable[[], None]) -> bool:
    """The longest sequences for fused and naive loss into `found`, saved as they come; whether none failed.

    Searched with two sequences, one a pass, and confirmed with all positives in a process of its own.
    """
    for loss in ("fused", "naive"):
        mine = [*options, "--loss", loss, "--updates", "1", "--sequences-per-pass", "1"]
        line = found[loss] = in_own_process("longest", resolution, [*mine, "--positives", "2"])
        save()
        if line.get("longest_tokens") is not None:
            line["confirmed_with_all_positives"] = in_own_process("ours", line["longest_tokens"], mine)
            save()
        print(loss, line, flush=True)
    return not any("failed" in (line | line.get("confirmed_with_all_positives", {})) for line in found.values())


def told(side: Side) -> str:
    """One side's figures in a line."""
    if "failed" in side:
        return f"failed: {side['failed'].strip().splitlines()[-1]}"
    if "out_of_memory" in side:
        return str(side["out_of_memory"])
    peak = side["peak_allocated_bytes"]
    memory = "memory not measured on a CPU" if peak is None else f"peak {peak / 2**30:.2f} GiB"
    return f"{side['seconds_median']:.3f} s, {side['tokens_per_second']:,.0f} tokens/s, {memory}"


def write(path: Path, content: dict[str, Any]) -> None:
    """`content` as indented JSON, in the place of what was there in one go: the run may be cut short at any time."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def installed(package: str) -> bool:
    """Whether `package` can be imported."""
    return util.find_spec(package) is not None


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those of them that a process of its own is given as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens of a sequence")
    parser.add_argument("--positives", type=int, default=8)
    parser.add_argument("--updates", type=int, default=5, help="measured ones; one more comes before")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--sequences-per-pass", type=int, nargs="+", help="of every side; default 1 and what 8,192 tokens hold"
    )
    parser.add_argument("--backend", choices=["transformers", "unsloth"], default="transformers", help="ours")
    parser.add_argument("--loss", choices=["fused", "naive"], default="fused", help="ours")
    parser.add_argument("--rivals", choices=(*RIVALS, "none"), nargs="+", help="default all that can run here")
    parser.add_argument("--memory-cap", metavar="SIZE", help="such as 24GiB; a GPU's memory as of a smaller card")
    parser.add_argument("--find-longest", action="store_true", help="instead of the comparison")
    parser.add_argument("--resolution", type=int, default=512, help="of --find-longest, in tokens")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/update-<shape>[-longest][-cpu].json")
    parser.add_argument("--side", choices=["ours", "longest", *RIVALS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is None:
        refuse_impossible(parser, arguments)
    passed = ("shape", "positives", "updates", "rank", "backend", "loss", "memory_cap", "resolution")
    options = []
    for name in passed:
        value = getattr(arguments, name)
        if value is not None:
            options += [f"--{name.replace('_', '-')}", str(value)]
    return arguments, options


def refuse_impossible(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Stop with exit code 2 at what cannot be measured, and settle the rivals."""
    available = ["trl", "trl-liger"] if installed("liger_kernel") and torch.cuda.is_available() else ["trl"]
    if arguments.find_longest or arguments.rivals == ["none"]:
        arguments.rivals = []
    elif not (installed("trl") and installed("triton")):
        parser.error("TRL, or triton for its loss, is not installed: pip install trl==1.15.0 triton, or --rivals none")
    elif missing := set(arguments.rivals or ()) - set(available):
        parser.error(f"--rivals {', '.join(missing)}: needs a GPU and liger-kernel: pip install liger-kernel==0.8.5")
    arguments.rivals = arguments.rivals if arguments.rivals is not None else available
    if uneven := [count for count in arguments.sequences_per_pass or () if arguments.positives % count]:
        parser.error(f"--sequences-per-pass {uneven[0]} does not go evenly into --positives {arguments.positives}")
    model = ModelRecipe(id=SHAPES[arguments.shape])
    context = load_shape(model).context_tokens
    if not arguments.find_longest and max(arguments.lengths) > context:
        parser.error(f"--lengths: {max(arguments.lengths)} tokens are beyond the context of {model.id}, {context}")
    if arguments.memory_cap is not None and not torch.cuda.is_available():
        parser.error("--memory-cap: only a GPU's memory can be capped")
    if arguments.find_longest and not torch.cuda.is_available():
        parser.error("--find-longest needs a GPU: a CPU does not run out of memory, it swaps")
    if arguments.find_longest and arguments.backend == "unsloth":
        parser.error("--find-longest builds one model for all lengths, and unsloth builds one for a length")


def run_side(arguments: argparse.Namespace) -> Side:
    """What this process measures for the one that started it."""
    if arguments.memory_cap is not None:
        cap_memory(pick_device("auto"), parse_size(arguments.memory_cap))
    if arguments.loss == "naive":
        use_naive_loss()
    if arguments.side == "longest":
        return longest_of_ours(arguments)
    (tokens,) = arguments.lengths
    return our_side(arguments, tokens) if arguments.side == "ours" else trl_side(arguments, tokens)


def main() -> None:
    """Measure, writing what is there after every measurement. Exit code 1 where one failed."""
    arguments, options = parse()
    if arguments.side is not None:
        write(arguments.json, run_side(arguments))
        return
    device = pick_device("auto")
    rivals = {name: metadata.version(name) for name in ("trl", "liger-kernel") if installed(name.replace("-", "_"))}
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/update.py", *sys.argv[1:]]),
        "environment": environment(device) | {"rivals": rivals},
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    if device.type == "cpu":
        results["remark"] = CPU_REMARK
    endings = ("-longest" if arguments.find_longest else "") + ("-cpu" if device.type == "cpu" else "")
    path = arguments.json or RESULTS / f"update-{arguments.shape}{endings}.json"

    def save() -> None:
        write(path, results)

    if arguments.find_longest:
        results["longest"] = {}
        whole = longest_that_fit(options, arguments.resolution, results["longest"], save)
    else:
        results["lengths"] = []
        whole = all_lengths(arguments, options, results["lengths"], save)
    print(f"written to {path}")
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    main()
