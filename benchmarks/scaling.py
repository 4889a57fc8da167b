"""Model the time of a step on several ranks, and hold the model against runs of 1, 2 and 4 processes on this machine.

    python benchmarks/scaling.py              benches, the network and runs, in turns; then model and measurement
    python benchmarks/scaling.py --assumed    the model for 8 and 64 GPUs, from stated throughput: nothing is measured

The model: a rank does rollout and grading of every N-th prompt. All wait for the slowest and get its answers
("gather"). Each then does siamese and update of its part of the tokens, waits for the fullest, and the gradients are
summed ("reduce"). Choosing problems, weights, optimizer, files and the sync of the adapter take every rank as long as
one.

- Rollout: a position of a batch costs `position`, and `sequence` for each answer in it; the batch lasts as long as its
  longest answer. Without vLLM a batch shrinks when half of it has ended; with it, waiting answers take the free places.
- Siamese and update: a fixed part, one for each token forwarded, one for each token of the answers, and without
  FlashAttention one for each length of answers, which attention takes one after the other.
- Communication: latency for each collective, and bytes over bandwidth.
- Lengths, prompts and positives are those of a run; `popo_lite.balance.divide` divides the positives as a run does.

The costs come from `popo-lite bench` of one process with the prompts of one rank of 1, 2 and 4 and answers of two
lengths, and of many. Collectives are timed with gloo. What remains is small and comes from the run of one process.
Runs do not learn (learning rate 1e-9), so that all have the same answers, and each starts with a step that does not
count. Steps of all kinds take turns.

Other processes take time on this machine, so the figures compared are processor seconds, without those in which a rank
waits for others: of each stage those of the rank that needed most. That is the time of a step if every rank has a core.
The wall-clock time is written beside it.
Writes benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
RANKS = (1, 2, 4)
FIXED = ("optimizer.learning_rate=1e-9", "optimizer.head_learning_rate=1e-9", "eval.problems=0", "eval.every=0",
         "train.save_steps=1000")  # fmt: skip
"""Overrides of all runs: nothing is learned, so that the answers of a step are the same on any number of ranks."""
BENCH_LENGTHS, MANY = (8, 24, None), 28
"""Tokens of the answers in benches, around those of the runs; None: lengths from 4 to below `MANY`."""
STAGES = ("prompts", "rollout", "grade", "gather", "weights", "siamese", "update", "optimizer", "sync")
SMALL = 8
"""Prompts of one more bench, whose batches are not full: what a position costs besides its sequences."""
EVERY_RANK = ("prompts", "weights", "optimizer", "sync")
"""Stages that every rank does as a whole; files and records are written after "optimizer"."""


class Costs(NamedTuple):
    """Seconds on one rank. `rollout`: a batch, a position, a sequence in a position, a prompt token.

    `siamese` and `update`: fixed, a token forwarded, a token of an answer, a kind of segments. `grade`: an answer.
    `every`: the stages that each rank does as a whole.
    """

    rollout: tuple[float, float, float, float]
    siamese: tuple[float, float, float, float]
    update: tuple[float, float, float, float]
    grade: float
    every: float


class Network(NamedTuple):
    """Seconds of a collective without content, per byte of an object gathered by all, and per byte of a sum."""

    latency: float
    object_byte: float
    sum_byte: float
    collectives: float


class Answer(NamedTuple):
    """An answer of `tokens`; equal answers to a prompt have equal keys."""

    tokens: int
    positive: bool
    key: int


Work = Sequence[tuple[int, Sequence[Answer]]]
"""A step: (prompt tokens, answers) for each prompt."""


# --------------------------------------------------------------------------- the model


def predict(
    work: Work, ranks: int, costs: Costs, network: Network, *, slots: int, refill: bool, reduced_bytes: int
) -> dict[str, float]:
    """Return seconds by component, each of the slowest rank, and as `step` of all of them."""
    shares = [work[rank::ranks] for rank in range(ranks)]
    rollouts = [rollout_seconds(share, costs, slots=slots, refill=refill) for share in shares]
    grades = [costs.grade * sum(len(answers) for _, answers in share) for share in shares]
    siamese, update, tokens = zip(*(trained_seconds(part, costs) for part in divided(work, ranks)), strict=True)
    several = ranks > 1
    seconds = {
        "every rank": costs.every,
        "rollout": max(rollouts),
        "grade": max(grades),
        "gather": several * network.object_byte * gathered_bytes(work),
        "siamese": max(siamese),
        "update": max(update),
        "reduce": several * network.sum_byte * reduced_bytes,
        "latency": several * network.latency * network.collectives,
    }
    mean = sum(tokens) / ranks
    return seconds | {
        "step": sum(seconds.values()),
        "rollout_mean": statistics.fmean(rollouts),
        "tokens_ratio": max(tokens) / mean if mean else 1.0,
    }


def rollout_seconds(share: Work, costs: Costs, *, slots: int, refill: bool) -> float:
    """Return the seconds of a rank's rollouts in batches of at most `slots`."""
    batch, position, sequence, prompt = costs.rollout
    answers = [(size, answer.tokens) for size, group in sorted(share, key=lambda each: each[0]) for answer in group]
    read = prompt * sum(size for size, _ in share)
    batches = [answers] if refill else [answers[first : first + slots] for first in range(0, len(answers), slots)]
    return read + sum(
        batch + position * positions + sequence * sequences
        for positions, sequences in (decode([tokens for _, tokens in each], slots, refill) for each in batches)
    )


def decode(lengths: Sequence[int], slots: int, refill: bool) -> tuple[int, int]:
    """Return the positions decoded until all answers have ended, and the sequences in them, summed."""
    waiting, running, positions, sequences = list(lengths)[::-1], list[int](), 0, 0
    size = 0
    while waiting or running:
        while waiting and len(running) < slots and (refill or not positions):
            running.append(waiting.pop())
            size = len(running)
        ends = min(running)
        positions, sequences = positions + ends, sequences + ends * size
        running = [left - ends for left in running if left > ends]
        if refill or 2 * len(running) <= size:  # samplers/hf.py: finished answers leave when half have
            size = len(running)
    return positions, sequences


class Part(NamedTuple):
    """A rank's part of an update: the tokens that it forwards, the tokens of all answers, and the kinds of segments.

    Without FlashAttention, attention is called once for all answers of the same length to prompts of the same length.
    """

    tokens: int
    answers: int
    kinds: int


def divided(work: Work, ranks: int) -> list[Part]:
    """Return what each rank trains on of a step's positives."""
    from popo_lite.balance import divide

    rollouts: list[Any] = []
    for index, (size, answers) in enumerate(work):
        prompt = SimpleNamespace(token_ids=(index,) * size)
        for answer in answers:
            completion = SimpleNamespace(token_ids=(answer.key,) * answer.tokens)
            rollouts += [SimpleNamespace(prompt=prompt, completion=completion)] if answer.positive else []
    parts = []
    for members in divide(rollouts, ranks, shared_prefix=True):
        pairs = [(rollouts[member].prompt.token_ids, rollouts[member].completion.token_ids) for member in members]
        prompts = {prompt for prompt, _ in pairs}
        kinds = {(len(prompt), len(answer)) for prompt, answer in pairs} | {(len(prompt), 0) for prompt in prompts}
        tokens = sum(map(len, prompts)) + sum(len(answer) for _, answer in set(pairs))
        parts.append(Part(tokens, sum(len(answer) for _, answer in pairs), len(kinds)))
    return parts


def trained_seconds(part: Part, costs: Costs) -> tuple[float, float, int]:
    """Return the seconds of siamese and update of a rank's part, and the tokens it forwards."""
    if not part.tokens:
        return 0.0, 0.0, 0
    numbers = (1, part.tokens, part.answers, part.kinds)
    siamese, update = (
        sum(cost * number for cost, number in zip(of, numbers, strict=True)) for of in (costs.siamese, costs.update)
    )
    return siamese, update, part.tokens


def gathered_bytes(work: Work) -> int:
    """Return the bytes of a step's answers and rewards as they are pickled: token ids, log-probs, and the rest."""
    tokens = sum(answer.tokens for _, answers in work for answer in answers)
    return 13 * tokens + 400 * sum(len(answers) for _, answers in work)


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Return costs >= 0 that explain `seconds` = rows x costs, with least squares of relative errors."""
    matrix, kept = np.array(rows) / np.array(seconds)[:, None], list(range(len(rows[0])))
    while True:
        found = np.linalg.lstsq(matrix[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if (found >= 0).all():
            costs = dict(zip(kept, found.tolist(), strict=True))
            return tuple(costs.get(column, 0.0) for column in range(len(rows[0])))
        del kept[int(found.argmin())]


# --------------------------------------------------------------------------- measured here


class Timed:
    """A trainer whose steps are timed. `work` are the groups of each step."""

    def __init__(self, trainer: Any, meter: Any) -> None:
        self.trainer, self.meter = trainer, meter
        self.wall: list[float] = []
        self.work: list[Work] = []
        self.groups: Sequence[Any] = ()
        self.steps, plan = 0, trainer.learner.plan

        def noting(groups: Any) -> Any:
            self.groups = groups
            self.work.append([
                (len(group.prompt.token_ids), [
                    Answer(len(each.completion.token_ids), each.reward.positive, hash(each.completion.token_ids))
                    for each in group.rollouts
                ])
                for group in groups
            ])  # fmt: skip
            return plan(groups)

        trainer.learner.plan = noting

    def step(self) -> None:
        """Do the next step."""
        start = time.perf_counter()
        self.trainer.train_step(self.steps)
        self.wall.append(time.perf_counter() - start)
        self.meter.stage("end")
        self.steps += 1

    def processor(self, step: int) -> dict[str, float]:
        """Return the processor seconds of a step by stage."""
        return {stage: self.meter.processor[step].get(stage, 0.0) for stage in STAGES}


def open_run(settings: Any, ranks: Any, stack: ExitStack) -> Timed:
    """Return a trainer as a run has it; its files go nowhere."""
    import torch

    from popo_lite.tools.bench.synthetic import Meter
    from popo_lite.trainer import Trainer

    meter = Meter(torch.device("cpu"))
    trainer = stack.enter_context(Trainer(settings, meter, ranks=ranks))
    trainer.folder = SimpleNamespace(metrics_path=Path(os.devnull), samples_path=Path(os.devnull))  # type: ignore[assignment]
    return Timed(trainer, meter)


def open_bench(
    recipe: str, prompts: int, tokens: int | None, prompt_tokens: int, ratio: float, stack: ExitStack
) -> Timed:
    """Return the trainer of `popo-lite bench` with a rank's prompts; `ratio` of its answers are right.

    Without `tokens` nothing is sampled, and answers have many lengths.
    """
    import torch

    from popo_lite.recipe_file import load_recipe
    from popo_lite.tools.bench import synthetic

    def of_many_lengths(*arguments: Any, **options: Any) -> list[list[Any]]:
        groups, lengths = synthetic.random_answers(*arguments, **options), itertools.cycle(range(4, MANY))
        return [
            [
                replace(one, token_ids=one.token_ids[:length], sampler_logps=one.sampler_logps[:length])
                for one, length in zip(group, lengths, strict=False)
            ]
            for group in groups
        ]

    keys = ("data.prompts_per_step", "rollout.max_completion_length", "rollout.max_prompt_length")
    values = zip(keys, (prompts, tokens or MANY, prompt_tokens), strict=True)
    settings = load_recipe(recipe, tuple(f"{key}={value}" for key, value in values))
    meter, answers = synthetic.Meter(torch.device("cpu")), prompts * settings.rollout.num_generations
    policy, rewards = synthetic.random_policy(settings), synthetic.spread(max(1, round(ratio * answers)), answers)
    trainer = stack.enter_context(synthetic.BenchTrainer(settings, policy, meter, rewards, sample=tokens is not None))
    vocabulary = policy.head.weight.shape[0]

    def rendered(problem: Any) -> Any:  # prompts of unequal length, as in a run: decoding then needs a mask
        number = int(problem.id)
        return synthetic.random_prompt(number, vocabulary, prompt_tokens - number % 2)

    trainer.renderer.render = rendered
    if tokens is None:
        trainer.sampler.sample = partial(of_many_lengths, policy.head.weight.shape[0])
    return Timed(trainer, meter)


def network_of(ranks: Any, run: Timed) -> tuple[float, float, float]:
    """Return seconds of a collective, per byte of answers and per byte of gradients: medians. Itself a collective."""

    def median(work: Any) -> float:
        taken = []
        for _ in range(20):
            ranks.gather(None)
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
        return statistics.median(taken)

    parameters = [parameter for _, parameter in run.trainer.policy.trainable_parameters()]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    size = sum(parameter.nbytes for parameter in parameters)
    mine = [[(each.completion, each.reward) for each in group.rollouts] for group in ranks.share(run.groups)]
    answers = median(partial(ranks.gather, mine)) / gathered_bytes(run.work[-1])
    return median(partial(ranks.gather, None)), answers, median(partial(ranks.sum_gradients, parameters)) / size


def costs_of(benches: dict[tuple[int, int | None], Timed], alone: Timed, slots: int) -> Costs:
    """Return the costs from benches by (prompts, answer tokens), and what is left from the run of one process."""
    rows: dict[str, list[list[float]]] = {"rollout": [], "siamese": [], "update": []}
    seconds: dict[str, list[float]] = {stage: [] for stage in rows}
    for (_, length), timed in benches.items():
        work = timed.work[0]
        [part] = divided(work, 1)
        answers = sum(len(group) for _, group in work)
        batches = -(-answers // slots)
        if length is not None:
            rows["rollout"].append([batches, batches * length, answers * length, sum(size for size, _ in work)])
        rows["siamese"].append(list(map(float, (1, *part))))
        rows["update"].append(rows["siamese"][-1])
        for stage in rows if length else ("siamese", "update"):
            seconds[stage].append(statistics.median(timed.processor(step)[stage] for step in range(1, timed.steps)))
    rest = {
        stage: statistics.median(alone.processor(step)[stage] for step in range(1, alone.steps)) for stage in STAGES
    }
    fits: dict[str, Any] = {stage: fitted(rows[stage], seconds[stage]) for stage in rows}
    grade = rest["grade"] / sum(len(group) for _, group in alone.work[-1])
    return Costs(**fits, grade=grade, every=sum(rest[stage] for stage in EVERY_RANK))


def session(recipe: str, prompts: int, rounds: int) -> None:
    """As one of four ranks, do steps of 1, 2 and 4 ranks and of benches in turns; rank 0 prints lines of results."""
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    from popo_lite.distributed import ProcessGroup, Ranks, join
    from popo_lite.recipe_file import load_recipe
    from popo_lite.run_folder import environment

    class Working(ProcessGroup):
        """Ranks whose looks for others that are not there yet are no work."""

        meter: Any = None

        @contextmanager
        def _meeting(self, name: str) -> Iterator[None]:
            start = time.process_time()
            with super()._meeting(name):
                if self.meter is not None:
                    self.meter._processor_start += time.process_time() - start
                yield

    torch.set_num_threads(1)
    settings = load_recipe(recipe, (*FIXED, f"data.prompts_per_step={prompts}"))
    slots = settings.rollout.max_num_seqs
    with join() as world, ExitStack() as stack:
        groups = {size: distributed.new_group(list(range(size)), backend="gloo") for size in RANKS[1:]}
        everyone: Any = world
        runs: dict[int, Timed] = {}
        members: dict[int, Any] = {1: Ranks()}
        networks, meetings = {1: (0.0, 0.0, 0.0)}, {1: 0.0}
        for size in RANKS:
            if world.rank < size:
                if size > 1:
                    watch = copy(everyone._watch)
                    watch.size = size
                    store = PrefixStore(f"of {size}", everyone._store)
                    members[size] = Working(watch, store, groups[size])
                runs[size] = open_run(settings, members[size], stack)
                members[size].meter = runs[size].meter
            world.gather(None)
        benches: dict[tuple[int, int | None], Timed] = {}
        for index in range(rounds + 1):  # the first does not count
            for size in RANKS if index % 2 else RANKS[::-1]:
                if world.rank < size:
                    runs[size].step()
                world.gather(None)
            if world.first:
                work = runs[1].work[-1]
                ratio = statistics.fmean(answer.positive for _, group in work for answer in group)
                length = round(statistics.fmean(size for size, _ in work))
                for share in dict.fromkeys((*(prompts // size for size in RANKS), SMALL)):
                    for tokens in BENCH_LENGTHS:
                        if index == 0:
                            benches[share, tokens] = open_bench(recipe, share, tokens, length, ratio, stack)
                        benches[share, tokens].step()
            world.gather(None)
        for size in RANKS[1:]:
            if world.rank < size:
                # Without those of answers and gradients, which are timed as a whole: three of a step.
                meetings[size] = members[size]._meetings.total() / runs[size].steps - 3
                members[size].meter = None
                networks[size] = network_of(members[size], runs[size])
            world.gather(None)
        mine = {
            size: ([run.processor(step) for step in range(run.steps)], run.wall, run.meter.records)
            for size, run in runs.items()
        }
        everything = world.gather(mine)
        if not world.first:
            return
        costs = costs_of(benches, runs[1], slots)
        for size in RANKS:
            steps = range(1, rounds + 1)
            noted = [mine[size] for mine in everything[:size]]
            slowest = [
                {stage: max(processor[step][stage] for processor, *_ in noted) for stage in STAGES} for step in steps
            ]
            measured = [sum(stages.values()) for stages in slowest]
            records = noted[0][2]
            network = Network(*networks[size], collectives=meetings[size])
            modelled = [
                predict(runs[1].work[step], size, costs, network, slots=slots, refill=False,
                        reduced_bytes=records[step]["reduced_bytes"] or 0)
                for step in steps
            ]  # fmt: skip
            middle = {name: statistics.median(each[name] for each in modelled) for name in modelled[0]}
            line = {
                "kind": "measured", "recipe": recipe, "prompts": prompts, "ranks": size, "steps": rounds,
                "seconds": statistics.median(measured), "modelled_seconds": middle["step"],
                "ratio": middle["step"] / statistics.median(measured),
                "seconds_quartiles": statistics.quantiles(measured, n=4),
                "wall_seconds": statistics.median(noted[0][1][1:]), "wall_least": min(noted[0][1][1:]),
                "stages": {stage: statistics.median(each[stage] for each in slowest) for stage in STAGES},
                "modelled_stages": middle, "costs": costs._asdict(), "network": network._asdict(),
                "tokens_ratio": statistics.median(records[step]["rank_tokens_ratio"] or 1.0 for step in steps),
                "load": psutil.getloadavg()[0], "cores": os.cpu_count(),
                "command": f"python benchmarks/scaling.py --recipe {recipe} --prompts {prompts} --rounds {rounds}",
                "environment": environment(torch.device("cpu")),
            }  # fmt: skip
            print(json.dumps(line), flush=True)


# --------------------------------------------------------------------------- assumed

TFLOPS = 165e12
"""bfloat16 of an RTX 4090 (NVIDIA's Ada whitepaper)."""
UTILIZATION = 0.2
"""Of that, in siamese and update over a 4-bit base. arXiv 2509.12229 has 628 tokens/s at 1.5B on a small RTX 4060."""
PREFILL_UTILIZATION = 0.5
FORWARD, UPDATE = 2, 6
"""FLOP for each weight and token: forward; forward, again for the checkpoints, and backward to the activations."""
ANSWERS = {"median": 450, "sigma": 0.6}
"""Tokens of an answer: lognormal, cut off at rollout.max_completion_length. A prompt has 150."""
PROMPT_TOKENS = 150
PASS_RATES = (0.5, 0.5)
"""A prompt's pass rate: of this beta distribution."""
OBJECT_BYTE, LATENCY, COLLECTIVES = 1.2e-8, 10e-3, 8
"""Seconds per byte of gathered answers and collectives in a step, as measured here; half a pause of 20 ms."""
LINKS = {"PCIe 4.0 x16": 8e9, "10 GbE": 1.0e9, "25 GbE": 2.5e9, "100 GbE": 1.0e10}
"""Bytes per second of a ring: a quarter of PCIe's 32 GB/s, as consumer cards pass data through host memory; 80 % of
the network's rate, which the GPUs of a machine share."""


class Model(NamedTuple):
    """A recipe on a 24 GB card: weights; seconds of a position of a batch, of each sequence in it, and of every rank.

    vLLM on an RTX 4090 with 300 requests of 600 tokens made 13.85 and 5.96 requests/s at 1.5B and 7B
    (databasemart.com/blog/vllm-gpu-benchmark-rtx4090): some 31 and 28 ms for 256 and 100 sequences at once. A position
    of few sequences reads the 16-bit weights, at 1 TB/s, and starts kernels. `every`: waking and sleeping of the
    engine and the transfer of the adapter.
    """

    recipe: str
    weights: float
    position: float
    sequence: float
    every: float


MODELS = (Model("qwen_1_5b_lora", 1.54e9, 8e-3, 9e-5, 1.0), Model("qwen_7b_lora", 7.6e9, 20e-3, 8e-5, 2.0))
SIZES = ((1, 32), (2, 32), (8, 32), (8, 256), (64, 32), (64, 512), (64, 2048))
"""(GPUs, prompts of a step). 8 GPUs are one machine."""


def assumed() -> list[dict[str, Any]]:
    """Return the model of several GPUs: nothing in it was measured on a GPU."""
    from popo_lite.recipe_file import load_recipe
    from popo_lite.tools.plan.shapes import load_shape
    from popo_lite.tools.plan.vram import plan_memory

    lines = []
    for model in MODELS:
        settings = load_recipe(model.recipe)
        plan = plan_memory(settings, load_shape(settings.model), vram_bytes=24 * 2**30)
        flop = model.weights / TFLOPS
        costs = Costs(
            rollout=(0.1, model.position, model.sequence, FORWARD * flop / PREFILL_UTILIZATION),
            siamese=(0.05, FORWARD * flop / UTILIZATION, 0.0, 0.0),
            update=(0.05, UPDATE * flop / UTILIZATION, 0.0, 0.0),
            grade=2e-3, every=model.every,
        )  # fmt: skip
        for ranks, prompts in SIZES:
            machines = max(1, ranks // 8)
            links = ("PCIe 4.0 x16",) if ranks <= 8 else tuple(LINKS)[1:]
            for link in links if ranks > 1 else ("none",):
                byte = 2 * (ranks - 1) / ranks / LINKS.get(link, 1.0)
                network = Network(LATENCY, OBJECT_BYTE + (1 / LINKS[link] if machines > 1 else 0), byte, COLLECTIVES)
                source = random.Random(0)  # noqa: S311
                found = [
                    predict(drawn(settings, prompts, source), ranks, costs, network, refill=True,
                            slots=settings.rollout.max_num_seqs, reduced_bytes=plan.learned)
                    for _ in range(20 if prompts < 1000 else 5)
                ]  # fmt: skip
                seconds = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
                lines.append({
                    "kind": "assumed", "recipe": model.recipe, "ranks": ranks, "prompts": prompts, "link": link,
                    "seconds": seconds["step"], "prompts_per_second": prompts / seconds["step"], "components": seconds,
                    "reduced_bytes": plan.learned, "costs": costs._asdict(), "network": network._asdict(),
                    "command": "python benchmarks/scaling.py --assumed",
                })  # fmt: skip
    return lines


def drawn(settings: Any, prompts: int, source: random.Random) -> Work:
    """Return a step with answers of random lengths."""
    work = []
    for _ in range(prompts):
        rate, answers = source.betavariate(*PASS_RATES), []
        for _ in range(settings.rollout.num_generations):
            length = ANSWERS["median"] * source.lognormvariate(0, ANSWERS["sigma"])
            tokens = min(settings.rollout.max_completion_length, max(1, round(length)))
            answers.append(Answer(tokens, source.random() < rate, source.getrandbits(62)))
        work.append((PROMPT_TOKENS, answers))
    return work


def main() -> None:
    """Measure or assume, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assumed", action="store_true", help="8 and 64 GPUs, from stated throughput")
    parser.add_argument("--recipe", default="tiny_cpu")
    parser.add_argument("--prompts", type=int, nargs="*", default=[32, 256])
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each kind")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles take at least 2")
    if "RANK" in os.environ:
        session(options.recipe, options.prompts[0], options.rounds)
        return
    if options.assumed:
        lines = assumed()
        for line in lines:
            parts = {name: round(value, 2) for name, value in line["components"].items()}
            print(
                line["recipe"],
                line["ranks"],
                line["prompts"],
                line["link"],
                round(line["prompts_per_second"], 2),
                parts,
            )
        write("assumed", lines)
        return
    lines = []
    for prompts in options.prompts:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(RANKS))]
        asked = ["--recipe", options.recipe, "--prompts", str(prompts), "--rounds", str(options.rounds)]
        done = subprocess.run(
            [sys.executable, *torchrun, __file__, *asked], stdout=subprocess.PIPE, text=True, check=True
        )
        lines += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        show(lines[-len(RANKS) :])
        write("measured", lines)


def write(kind: str, lines: Sequence[dict[str, Any]]) -> None:
    """Replace the lines of one kind in the file of results."""
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    kept = [line for line in before if line["kind"] != kind]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in (*kept, *lines)))


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print measured beside modelled seconds."""
    for line in lines:
        print(f"{line['prompts']} prompts, {line['ranks']} ranks: {line['seconds']:.3f} s,"
              f" model {line['modelled_seconds']:.3f} ({line['ratio']:.2f}); wall {line['wall_seconds']:.3f},"
              f" least {line['wall_least']:.3f}; load {line['load']:.1f}")  # fmt: skip
        print("   ", {stage: round(value, 4) for stage, value in line["stages"].items()})
        print("   ", {stage: round(value, 4) for stage, value in line["modelled_stages"].items()})


if __name__ == "__main__":
    main()
