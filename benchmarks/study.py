"""The study of docs/study.md: `make study`, or `python benchmarks/study.py --jobs 2`.

Trains the shipped sweeps study_*: `popo-lite sweep`, a process a run, in runs/. Started again, it goes on where it
stopped. What every run came to is kept in benchmarks/results/study_*/seed-N.jsonl, a file a seed and a line a variant;
from these files, and nothing else, it writes the tables of docs/study.md and the plots in docs/study/.

`--only-write` trains nothing and writes the page from the files that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from popo_lite.run_folder import read_lines, write_atomically
from popo_lite.tools.sweep.compare import RunGroup, comparison_of
from popo_lite.tools.sweep.compare_report import Table, tables
from popo_lite.tools.sweep.figures import TOTALS, RunFigures, read_run
from popo_lite.tools.sweep.file import Sweep, load_sweep
from popo_lite.tools.sweep.folder import SweepFolder
from popo_lite.tools.sweep.intervals import mean_interval
from popo_lite.tools.sweep.plots import write_png

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "study.md"
SWEEP_FILES = ROOT / "recipes" / "ablations"
DIFFICULTIES = ("study_2_digits", "study_3_digits")
SWEEPS = (*DIFFICULTIES, "study_learning_rate")
COMMAND = "make study"
REACH = 0.8
"""Training pass rate to which time and tokens are counted."""
PARTS = 3
"""Parts of a run, from its start to its end, for which tokens are told apart."""
DIGITS = 5
"""Of the figures of curves."""
SUMMARY = ("popo", "raft", "skip-all-right", "reference", "grpo-token", "grpo")
"""Variants of the table at the top of the page."""
PLOTS: Mapping[str, Sequence[str]] = {
    "objectives": ("popo", "skip-all-right", "mixed", "raft", "grpo", "grpo-token"),
    "components": ("popo", "uniform", "sequence-logprob", "no-similarity", "no-siamese", "no-entropy", "no-noise",
                   "features-target"),
    "normalisers": ("popo", "reference", "sequence-sum", "sequence-mean"),
}  # fmt: skip
"""Pages of plots, and the variants on each."""


def load(name: str) -> Sweep:
    """The sweep of that name."""
    return load_sweep(str(SWEEP_FILES / f"{name}.toml"))


def main() -> None:
    """Train what is missing, keep its figures, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of the sweeps")
    parser.add_argument("--only-write", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    for name in SWEEPS:
        if not arguments.only_write:
            train(name, arguments.runs / name, arguments.jobs)
            keep(name, arguments.runs / name)
        draw(name)
    write_atomically(PAGE, written(PAGE.read_text(encoding="utf-8")))


def train(name: str, folder: Path, jobs: int) -> None:
    """`popo-lite sweep`; ends this process where it was interrupted or a run failed."""
    file = SWEEP_FILES / f"{name}.toml"
    command = [sys.executable, "-m", "popo_lite", "sweep", str(file), "--output", str(folder), "--jobs", str(jobs)]
    # Ctrl-C reaches the sweep as well, which saves and says how to go on; this process waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def keep(name: str, folder: Path) -> None:
    """Write what every run of a sweep came to, a file a seed."""
    lines: dict[int, list[str]] = {}
    for run in SweepFolder(folder).runs(load(name)):
        found = read_run(run.folder.path, reach=REACH)
        steps = read_lines(run.folder.metrics_path)
        line = {
            "command": COMMAND,
            "variant": run.variant.name,
            "seed": run.seed,
            "problems": found.problems,
            "before": json.loads(run.folder.summary_path.read_text(encoding="utf-8"))["before"],
            "figures": found.figures,
            "parts": [_part(steps[start:end]) for start, end in _bounds(len(steps))],
            "curves": {key: [_rounded(value) for value in course] for key, course in found.curves.items()},
            "environment": json.loads((run.folder.path / "environment.json").read_text(encoding="utf-8")),
        }
        lines.setdefault(run.seed, []).append(json.dumps(line) + "\n")
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for seed, its_lines in lines.items():
        write_atomically(RESULTS / name / f"seed-{seed}.jsonl", "".join(its_lines))


def draw(name: str) -> None:
    """Write the plots of a sweep into docs/study/."""
    (PAGE.parent / "study").mkdir(exist_ok=True)
    if name in DIFFICULTIES:
        for title, variants in PLOTS.items():
            write_png(comparison(name, variants), PAGE.parent / "study" / f"{name.removeprefix('study_')}_{title}.png")


def written(page: str) -> str:
    """The page with its tables as the kept files have them: what stands between `<!-- NAME -->` and `<!-- end -->`.

    Raises ValueError where the page has no place for one of them.
    """
    parts = {"summary": map(summary, DIFFICULTIES)} | {name: map(markdown, sections(name)) for name in SWEEPS}
    for name, part in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, opened, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f"{PAGE} has no {start.strip()} with {end} behind it")
        page = before + start + "\n" + "\n".join(part) + "\n" + end + after
    return page


def sections(name: str) -> Iterator[Table]:
    """The tables of a sweep."""
    yield from tables(comparison(name))
    if name in DIFFICULTIES:
        yield time_table(name)
        yield tokens_table(name)


def summary(name: str) -> str:
    """The table of a sweep at the top of the page, as Markdown: those of SUMMARY, held against popo seed by seed."""
    figures: dict[str, list[Mapping[str, float]]] = {variant: [] for variant in SUMMARY}
    starts = []
    for line in kept(name):
        if line["variant"] in figures:
            figures[line["variant"]].append(line["figures"])
            starts.append(line["before"]["pass_at_1"])
    rows = []
    for variant, runs in figures.items():
        pairs = list(zip(runs, figures["popo"], strict=True))
        gaps = mean_interval([100 * (run["pass_at_1"] - popo["pass_at_1"]) for run, popo in pairs])
        tokens = mean_interval([run["trained_tokens"] / popo["trained_tokens"] for run, popo in pairs])
        seconds = statistics.median(run["seconds"] / popo["seconds"] for run, popo in pairs)
        rows.append(
            (
                variant,
                f"{statistics.fmean(run['pass_at_1'] for run in runs):.1%}",
                "" if variant == "popo" else f"{gaps.mean:+.1f} [{gaps.low:+.1f}, {gaps.high:+.1f}]",
                "1" if variant == "popo" else f"{tokens.mean:.2f} [{tokens.low:.2f}, {tokens.high:.2f}]",
                "1" if variant == "popo" else f"{seconds:.2f}",
            )
        )
    columns = ("variant", "pass@1 at the end", "points above popo", "tokens trained on, of popo's", "time, of popo's")
    title = f"{name.removeprefix('study_').replace('_', ' ')}, pass@1 at the start {statistics.fmean(starts):.1%}"
    return markdown(Table(title=title, columns=columns, rows=rows))


def comparison(name: str, variants: Sequence[str] = ()) -> dict[str, Any]:
    """The comparison of the kept runs of `variants`, by default of all; the first is the one to hold others against."""
    sweep = load(name)
    names = variants or [variant.name for variant in sweep.variants]
    lines = list(kept(name))
    groups = [
        RunGroup(name=one, runs=tuple(_figures(sweep, line) for line in lines if line["variant"] == one))
        for one in names
    ]
    return comparison_of(groups, reach=REACH)


def kept(name: str) -> Iterator[dict[str, Any]]:
    """The lines of a sweep's kept files, seed by seed."""
    for seed in load(name).seeds:
        yield from read_lines(RESULTS / name / f"seed-{seed}.jsonl")


def time_table(name: str) -> Table:
    """Medians over seeds: seconds of the steps, and how many times popo's of the same seed they are."""
    seconds: dict[str, dict[int, float]] = {}
    for line in kept(name):
        seconds.setdefault(line["variant"], {})[line["seed"]] = line["figures"]["seconds"]
    rows = []
    for variant, by_seed in seconds.items():
        ratios = sorted(taken / seconds["popo"][seed] for seed, taken in by_seed.items())
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append((variant, f"{statistics.median(by_seed.values()):.1f}", shown))
    columns = ("variant", "seconds, median", "of popo's with the same seed, median (least to most)")
    return Table(title="Time of the training steps", columns=columns, rows=rows)


def tokens_table(name: str) -> Table:
    """What POPO and GRPO would train on, of the rollouts of the runs of POPO."""
    runs = [line for line in kept(name) if line["variant"] == "popo"]
    length = len(runs[0]["curves"]["pass_rate"])
    rows = []
    for part, (start, end) in enumerate([*_bounds(length), (0, length)]):
        sums = [run["parts"][part] if part < PARTS else _whole(run["parts"]) for run in runs]
        rows.append(
            (
                f"{start + 1} to {end}",
                f"{statistics.fmean(one['pass_rate'] for one in sums):.1%}",
                _ratio(sums, "tokens_of_positives", "tokens_of_all"),
                _ratio(sums, "tokens_of_mixed_groups", "tokens_of_all"),
                _ratio(sums, "tokens_of_positives", "tokens_of_mixed_groups"),
            )
        )
    return Table(
        title="Tokens to train on, of the rollouts of popo",
        columns=(
            "steps",
            "pass rate",
            "POPO / GRPO that forwards all answers",
            "GRPO that skips equal rewards / all",
            "POPO / GRPO that skips",
        ),
        rows=rows,
    )


def markdown(table: Table) -> str:
    """A table with its title."""
    lines = [f"**{table.title}**", "", _row(table.columns), _row(["---"] * len(table.columns))]
    return "\n".join([*lines, *(_row(row) for row in table.rows), ""])


def _figures(sweep: Sweep, line: Mapping[str, Any]) -> RunFigures:
    recipe = next(variant.recipe for variant in sweep.variants if variant.name == line["variant"])
    left_out = {f"pass_at_{k}" for k in (2, 4, 8)}
    return RunFigures(
        path=Path(line["variant"]) / f"seed-{line['seed']}",
        recipe=recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": line["seed"]})}),
        figures={key: value for key, value in line["figures"].items() if key not in left_out},
        curves=line["curves"],
        problems=line["problems"],
    )


def _bounds(steps: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each part of a run of that many steps."""
    return itertools.pairwise(steps * part // PARTS for part in range(PARTS + 1))


def _part(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rate = statistics.fmean(line["pass_rate"] for line in steps)
    return {"pass_rate": rate, **{key: sum(line[key] for line in steps) for key in TOTALS}}


def _whole(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    rate = statistics.fmean(part["pass_rate"] for part in parts)
    return {"pass_rate": rate, **{key: sum(part[key] for part in parts) for key in TOTALS}}


def _ratio(sums: Sequence[Mapping[str, float]], above: str, below: str) -> str:
    found = mean_interval([one[above] / one[below] for one in sums])
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
