"""Measure `rollout.async_level = 1`: sampling the next step while one trains, against sampling after it.

    python benchmarks/async_level.py                 tiny_vllm with one vLLM server on this machine, seeds 0 to 4
    python benchmarks/async_level.py --only-table    only print what is stored

One server is started for all runs; its processes and the trainers have one thread each. The two levels of a seed train
at the same time and take turns: a step of one, then a step of the other, while the first waits with nothing in flight.
So a load on the machine that changes slowly meets both. Each pair of runs is two lines of
benchmarks/results/async_level.jsonl; started again, the script skips stored seeds. Both levels have
`objective.importance_sampling_clip_max = 2.0`, which level 1 needs.

`seconds` is the wall clock of the training steps: rollouts, grading, update, sync and records, without checkpoints,
proofs of the sampler and evaluations. `trainer_cpu_seconds` and `server_cpu_seconds` are the processor time in them, of
this process with its graders and of the server's processes, which other load on the machine changes less. `stages` are
the trainer's seconds by stage, `ahead` those that it did not wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# Imports of torch, which take seconds, are in the functions of the training process.
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, append_line, read_lines
from popo_lite.tools.sweep.compare import mean_interval
from popo_lite.tools.sweep.report import cell

RESULTS = Path(__file__).parent / "results" / "async_level.jsonl"
START_SECONDS = 600
SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
Line = dict[str, Any]


def recipe_of(level: int, seed: int, url: str, folder: str, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a run with the server at `url`."""
    return load_recipe("tiny_vllm", [
        'rollout.engine="server"', f'rollout.server.base_urls=["{url}"]', f'rollout.server.shared_dir="{folder}"',
        f"rollout.async_level={level}", "objective.importance_sampling_clip_max=2.0", f"train.seed={seed}", *overrides,
    ])  # fmt: skip


# ---------------------------------------------------------------------- in the process of a run


def measure(recipe: Recipe, server_pid: int) -> Line:
    """Train, and return the run's line."""
    import torch

    from popo_lite.api import load_trainer
    from popo_lite.callbacks import Callback
    from popo_lite.run_folder import environment

    seconds: Counter[str] = Counter()
    step_seconds: list[float] = []
    trainer_processes, server_processes = psutil.Process(), psutil.Process(server_pid)
    with tempfile.TemporaryDirectory() as folder, load_trainer(recipe, Callback()) as trainer:
        run = RunFolder(Path(folder))
        train_step: Callable[[int], None] = trainer.train_step

        def timed(step: int) -> None:
            print("ready", flush=True)
            assert sys.stdin.readline(), "the other process is gone"
            start = time.perf_counter(), cpu_seconds(trainer_processes), cpu_seconds(server_processes)
            train_step(step)
            end = time.perf_counter(), cpu_seconds(trainer_processes), cpu_seconds(server_processes)
            for name, before, after in zip(("", "trainer_cpu_", "server_cpu_"), start, end, strict=True):
                seconds[f"{name}seconds"] += after - before
            step_seconds.append(end[0] - start[0])

        trainer.train_step = timed
        summary = trainer.run(run).summary
        assert summary is not None, "the run was interrupted"
        records = read_lines(run.metrics_path)
    versions = environment(torch.device("cpu"))
    versions["packages"] |= {d.name: d.version for d in metadata.distributions() if d.name in ("vllm", "vllm-cpu")}
    ahead = sum((Counter(record["seconds_ahead"] or {}) for record in records), Counter())
    return {
        **seconds,
        "stages": summary["seconds"],
        "ahead": dict(ahead),
        "lags": [record["lag"] for record in records],
        "step_seconds": step_seconds,
        "pass_at_1_before": summary["before"]["pass_at_1"],
        "pass_at_1_after": summary["after"]["pass_at_1"],
        "rollouts": summary["rollouts"],
        "rollout_tokens": summary["rollout_tokens"],
        "trained_tokens": summary["trained_tokens"],
        "logp_gap_mean": {
            lag: statistics.fmean(record["logp_gap_mean"] for record in records if record["lag"] == lag)
            for lag in sorted({record["lag"] for record in records})
        },
        "environment": versions,
    }


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time of a process and all that it started."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


# ---------------------------------------------------------------------- all runs


@contextmanager
def served(recipe: Recipe, folder: Path) -> Iterator[int]:
    """Serve the recipe's base, dequantised; yield the id of the server's process."""
    from popo_lite.policy.load import write_dequantized_base
    from popo_lite.policy.policy import load_policy
    from popo_lite.samplers.server import serve_command

    policy = load_policy(recipe)
    write_dequantized_base(policy, folder / "base")
    policy.tokenizer.save_pretrained(folder / "base")
    url = recipe.rollout.server.base_urls[0]
    setting, _, _, _, *options = shlex.split(serve_command(recipe, url))
    name, value = setting.split("=")
    log = folder / "server.log"
    with log.open("wb") as output:
        # The module that `vllm serve` runs; the command itself does not start where vLLM is called vllm-cpu.
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base"), *options,
             # Room for the adapters of two trainers.
             "--enforce-eager", "--max-loras", "2", "--max-cpu-loras", "4"],
            env={**os.environ, **SERVER_ENVIRONMENT, name: value},
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        limit = time.monotonic() + START_SECONDS
        while not healthy(url):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.5)
        yield process.pid
    except BaseException:
        print(log.read_text(), file=sys.stderr)
        raise
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    """Check whether the server at `url` answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:  # noqa: S310  # our own
            return bool(reply.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def free_url() -> str:
    """Return a URL on this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def run_missing(seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Run both levels of the seeds that are not stored."""
    stored = {line["seed"] for line in lines_of(overrides)}
    if not (missing := [seed for seed in seeds if seed not in stored]):
        return
    with tempfile.TemporaryDirectory() as folder:
        url, shared = free_url(), str(Path(folder) / "shared")
        with served(recipe_of(0, 0, url, shared, overrides), Path(folder)) as pid:
            for seed in missing:
                options = ["--seeds", str(seed), *(word for each in overrides for word in ("--set", each))]
                load = os.getloadavg()[0]
                runs = [
                    subprocess.Popen(
                        [sys.executable, __file__, *options, "--run", str(level), url, shared, str(pid)],
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    )
                    for level in (0, 1)
                ]  # fmt: skip
                for level, found in enumerate(take_turns(runs)):
                    line = {
                        "command": shlex.join(["python", "benchmarks/async_level.py", *options]),
                        "seed": seed,
                        "level": level,
                        "overrides": list(overrides),
                        "load_average": [load, os.getloadavg()[0]],
                        **found,
                    }
                    append_line(RESULTS, line)
                    print(f"seed {seed}, level {level}: {line['seconds']:.1f} s", line["load_average"], flush=True)


def take_turns(runs: Sequence[subprocess.Popen[str]]) -> list[Line]:
    """Let the runs do a step each, one after another, until they have ended; return their lines.

    A run has its turn until it is about to begin its next step, so its checkpoints and evaluations are in turns, too.
    """
    said = [read_line(run) for run in runs]
    first = 0
    while "ready" in said:
        for index in (first, 1 - first):
            if said[index] == "ready":
                print("go", file=runs[index].stdin, flush=True)
                said[index] = read_line(runs[index])
        first = 1 - first
    assert [run.wait() for run in runs] == [0] * len(runs)
    return [json.loads(line) for line in said]


def read_line(run: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints; wait for it."""
    assert run.stdout is not None
    return run.stdout.readline().rstrip("\n")


def lines_of(overrides: Sequence[str]) -> list[Line]:
    """Return the stored runs with these overrides."""
    lines = read_lines(RESULTS) if RESULTS.is_file() else []
    return [line for line in lines if line["overrides"] == list(overrides)]


def print_table(lines: Sequence[Line]) -> None:
    """Print medians over seeds, and means of ratios to level 0 with the same seed, with 95 % intervals."""
    by_level = {level: {line["seed"]: line for line in lines if line["level"] == level} for level in (0, 1)}
    seeds = sorted(by_level[0].keys() & by_level[1].keys())
    pairs = [(by_level[0][seed], by_level[1][seed]) for seed in seeds]
    print(f"{len(pairs)} seeds: medians at level 0 and 1, then the mean ratio or difference of 1 to 0, 95 % interval")
    if not pairs:
        return
    for key in ("seconds", "trainer_cpu_seconds", "server_cpu_seconds", "rollout_tokens"):
        before, after = (statistics.median(pair[level][key] for pair in pairs) for level in (0, 1))
        print(f"{key:20} {before:10,.1f} {after:10,.1f}   {cell(mean_interval([b[key] / a[key] for a, b in pairs]))}")
    for key in ("pass_at_1_before", "pass_at_1_after"):
        before, after = (statistics.median(pair[level][key] for pair in pairs) for level in (0, 1))
        points = cell(mean_interval([b[key] - a[key] for a, b in pairs]), 100, 1, sign="+")
        print(f"{key:20} {before:10.1%} {after:10.1%}   {points} points")
    for level in (0, 1):
        stages = {stage for pair in pairs for stage in pair[level]["stages"]} - {"total"}
        medians = {
            stage: statistics.median(pair[level]["stages"].get(stage, 0.0) for pair in pairs) for stage in stages
        }
        shown = ", ".join(
            f"{stage} {seconds:.1f}" for stage, seconds in sorted(medians.items(), key=lambda one: -one[1])
        )
        print(f"seconds of the trainer by stage, level {level}: {shown}")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        level, url, shared, pid = arguments.run
        recipe = recipe_of(int(level), arguments.seeds[0], url, shared, arguments.overrides)
        print(json.dumps(measure(recipe, int(pid))))
        return
    if not arguments.only_table:
        run_missing(arguments.seeds, arguments.overrides)
    print_table(lines_of(arguments.overrides))


if __name__ == "__main__":
    main()
