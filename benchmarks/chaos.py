"""Kill runs with SIGKILL, resume them, and compare them with undisturbed ones: `python benchmarks/chaos.py`.

Every run is the real command on the tiny model. A third of the kills come at a random moment after the start-up, the
others in a stage that they aim at: at its start, or after a random part of the time that it takes undisturbed. A third
of the resumed runs are killed again, half of these during their start-up. In the end each run folder must hold the
same files as the undisturbed run's, equal byte for byte apart from times and memory, and no process of the run may be
left. The choice of kills follows from --seed; the exact moment of a kill also from the machine's load.

To save time, the runs are forks of one process that has imported everything; with --fresh they are new processes, which
also differ in the order of sets.
Folders of runs that differ are kept. Exit code 1 if any run does. Writes benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import mmap
import os
import random
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from popo_lite.callbacks import Callback, CallbackList

RESULTS = Path(__file__).parent / "results"

SMALL = (
    "data.date=2026-01-01", "data.prompts_per_step=6", "rollout.num_generations=4", "train.steps=6",
    "train.save_steps=2", "eval.problems=12", "eval.every=1", "optimizer.warmup_ratio=0.0", "train.device=cpu",
)  # fmt: skip
RECIPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "hf": {
        "fixed": (*SMALL, "train.save_total_limit=1"),
        "adaptive": (
            *SMALL, "data.dataset={sums}", "rollout.adaptive.enabled=true", "rollout.skip_known=true",
            "rollout.num_generations=6", "rollout.adaptive.max_rollouts=12", "eval.every=2",
            "train.save_steps=1", "train.steps=8",
        ),
        "grpo": (
            *SMALL, "objective.algorithm=grpo", "objective.kl_coef=0.05", "lora.dropout=0.1",
            "optimizer.name=adamw8bit", "data.dataset={sums}", "data.curriculum.enabled=true",
            "data.curriculum.column=level", "data.curriculum.window=2", "data.curriculum.high=0.4",
        ),
    },
    "vllm": {
        "fixed": (*SMALL, "train.steps=4", "eval.every=2", "train.save_steps=1", "rollout.max_num_seqs=64"),
    },
}  # fmt: skip
"""Overrides of `tiny_cpu` or `tiny_vllm`: a fixed budget; an adaptive one that skips known problems; GRPO with a KL
term, dropout, an 8-bit optimizer and levels of difficulty. {sums} is a file of two dozen problems, half far too hard.
"""

STAGES = (
    "start-up", "start-up of a resumed run", "prompts", "rollout", "grade", "weights", "siamese", "update",
    "optimizer", "record: metrics", "record: samples", "report", "sync", "evaluate", "evaluate: record",
    "checkpoint: begin", "checkpoint: before rename", "checkpoint: between rename and pruning", "checkpoint: pruning",
    "between steps", "end: adapters", "end: summary", "after the end",
)  # fmt: skip
"""Stages of a run, in order. Stages with a colon are recognised by the files that the run touches."""

UNCOMPARED = re.compile(r"log\.txt(\.\d+)?|\.lock")
"""Files that tell how often a run was started."""
MEASURED = {"seconds", "tokens_per_second", "swap_seconds", "peak_memory_bytes", "proven_step"}
"""Keys of times and memory, and of what every start does again: left out of comparisons at any depth."""
MARK = "POPO_CHAOS_RUN"
"""Environment variable by which the processes of a run are found."""
SHORT = 2e-3
"""Seconds below which a stage would be over before the kill comes from outside: such a run kills itself."""
HANGS_AFTER = 600.0


class Watch(Callback):
    """Publish in shared memory which stage a run is in; ask for the kill, or kill itself, when the aim is reached."""

    def __init__(self, board: Path, aim: Aim | None, pipe: int) -> None:
        with board.open("r+b") as file:
            self._board = mmap.mmap(file.fileno(), 1)
        self._aim, self._pipe, self._seen = aim, pipe, Counter[str]()
        self.trace: list[tuple[float, str]] = []

    def enter(self, stage: str) -> None:
        """Note that `stage` begins."""
        self._board[0] = STAGES.index(stage)
        self.trace.append((time.perf_counter(), stage))
        self._seen[stage] += 1
        if self._aimed_at(stage):
            assert self._aim is not None
            if self._aim.fraction == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(self._pipe, b"!")

    def _aimed_at(self, stage: str) -> bool:
        if self._aim is None or self._aim.stage is None:
            return self._aim is not None and len(self.trace) == 2  # the first stage after the start-up
        return (stage, self._seen[stage]) == (self._aim.stage, self._aim.occurrence)

    def stage(self, name: str, *, total: int | None = None) -> None:  # noqa: ARG002, D102
        self.enter("checkpoint: begin" if name == "checkpoint" else name)

    def step(self, record: Mapping[str, Any]) -> None:  # noqa: ARG002, D102
        self.enter("report")

    def message(self, text: str) -> None:  # noqa: D102
        if text.startswith("checkpoint:"):
            self.enter("between steps")

    def touched(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Tell stages apart by files: an audit hook (`sys.addaudithook`)."""
        if event not in ("open", "os.mkdir", "os.rename") or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(os.fspath(arguments[0]))
        appended = {"metrics": "record: metrics", "samples": "record: samples", "evaluations": "evaluate: record"}
        if event == "open" and path.suffix == ".jsonl" and path.stem in appended and arguments[1] == "a":
            self.enter(appended[path.stem])
        elif event == "open" and path.name == ".summary.json.partial":
            self.enter("end: summary")
        elif event != "os.rename" and any(re.fullmatch(r"\.step-\d+\.partial", part) for part in path.parts):
            self.enter("checkpoint: before rename")  # once for every file that is opened
        elif event != "os.rename" and re.search(r"(^|/)run/\.?(adapter|siamese)\b", str(path)):
            self.enter("end: adapters")
        elif event == "os.rename" and re.fullmatch(r"step-\d+", path.name):
            self.enter("checkpoint: pruning")

    def renamed(self, path: Path) -> None:
        """Note that `path` has got its final name."""
        if re.fullmatch(r"\.step-\d+\.partial", path.name):
            self.enter("checkpoint: between rename and pruning")
        elif re.fullmatch(r"step-\d+", path.name):
            self.enter("checkpoint: pruning")
        elif path.name == ".summary.json.partial":
            self.enter("after the end")


@dataclass(frozen=True, kw_only=True)
class Aim:
    """When to kill: after `fraction` of the time that an occurrence (from 1) of `stage` takes.

    Without a stage: of the time from the end of the start-up to the end of the run.
    """

    stage: str | None
    occurrence: int = 1
    fraction: float

    def __str__(self) -> str:
        return f"{self.stage} {self.occurrence} + {self.fraction:.0%}" if self.stage else f"{self.fraction:.0%}"


@dataclass(kw_only=True)
class Case:
    """A run to kill: its recipe, the aims of its kills in order, and what came of them."""

    number: int
    recipe: str
    aims: list[Aim]
    hit: list[str | None] = field(default_factory=list)
    difference: str | None = None
    seconds: float = 0.0


Times = Sequence[tuple[str, int, float]]
"""(stage, occurrence from 1, seconds) of an undisturbed run, in order."""


# --------------------------------------------------------------------------- running the command


def train_arguments(engine: str, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command line of a new run in `./run`."""
    values = [override.format(sums=folder / "sums.jsonl") for override in overrides]
    recipe = {"hf": "tiny_cpu", "vllm": "tiny_vllm"}[engine]
    return ["train", recipe, *(word for value in values for word in ("--set", value)), "--output", "run", "--view",
            "plain"]  # fmt: skip


def run_command(arguments: list[str], watch: Watch) -> int:
    """Run the real command in this process; return its exit code."""
    from popo_lite.cli import main
    from popo_lite.tools.console import views

    open_view = views.open_view

    def watched(*values: Any, **named: Any) -> Callback:
        return CallbackList([open_view(*values, **named), watch])

    def watching(call: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **named: Any) -> None:
            call(source, target, **named)
            watch.renamed(Path(source))

        return moved

    views.open_view, os.replace, os.rename = watched, watching(os.replace), watching(os.rename)  # type: ignore[assignment]
    sys.addaudithook(watch.touched)
    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(place: Path, arguments: list[str], aim: Aim | None, pipe: int) -> int:
    """Be the process that is killed: run the command in the folder `place`, all output in `place`/output.txt."""
    os.setsid()
    os.chdir(place)
    os.environ[MARK] = str(place)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    watch = Watch(place / "board", aim, pipe)
    watch.enter("start-up of a resumed run" if (place / "run" / "recipe.toml").is_file() else "start-up")
    code = run_command(arguments, watch)
    sys.stdout.flush()
    sys.stderr.flush()
    ends = [*(moment for moment, _ in watch.trace[1:]), time.perf_counter()]
    times = [(stage, end - start) for (start, stage), end in zip(watch.trace, ends, strict=True)]
    (place / "trace.json").write_text(json.dumps({"times": times, "modules": sorted(sys.modules)}))
    return code


def start(place: Path, arguments: list[str], aim: Aim | None, pipe: int, *, fork: bool) -> int:
    """Start the child and return its process id."""
    (place / "board").write_bytes(b"\0")
    with (place / "output.txt").open("a") as file:
        file.write(f"$ popo-lite {shlex.join(arguments)}\n")
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        if fork:
            code = child(place, arguments, aim, pipe)
        else:
            os.set_inheritable(pipe, True)
            spec = {"place": str(place), "arguments": arguments, "aim": aim and asdict(aim), "pipe": pipe}
            os.execv(sys.executable, [sys.executable, __file__, "--child", json.dumps(spec)])  # noqa: S606
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def attempt(place: Path, arguments: list[str], aim: Aim | None, times: Times, *, fork: bool) -> tuple[int, str]:
    """Run the command, killed by `aim`; return its wait status as an exit code (below 0: signal) and its last stage."""
    receiving, sending = os.pipe()
    try:
        pid = start(place, arguments, aim, sending, fork=fork)
        if aim is not None and aim.fraction:
            killed = reached(pid, receiving)
            lasting = {(stage, number): seconds for stage, number, seconds in times}
            begun = sum(seconds for stage, _, seconds in times if not stage.startswith("start-up"))
            seconds = lasting.get((aim.stage, aim.occurrence), 0.0) if aim.stage else begun
            time.sleep(aim.fraction * seconds if killed else 0)
            if killed:  # it may have ended, but has not been waited for, so the id is its own
                os.kill(pid, signal.SIGKILL)
        if not wait_for(pid, HANGS_AFTER):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"no end within {HANGS_AFTER:g} s")
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), STAGES[(place / "board").read_bytes()[0]]
    finally:
        os.close(receiving)
        os.close(sending)


def wait_for(pid: int, seconds: float) -> bool:
    """Wait until the child has ended, for `seconds` at most, without reaping it; return whether it has."""
    with os.fdopen(os.pidfd_open(pid)) as handle:
        return bool(select.select([handle], [], [], seconds)[0])


def reached(pid: int, pipe: int) -> bool:
    """Wait until the child says that it has reached its aim; return False if it ended or hung before."""
    with os.fdopen(os.pidfd_open(pid)) as handle:
        return pipe in select.select([pipe, handle], [], [], HANGS_AFTER)[0]


def left_processes(place: Path) -> list[int]:
    """Return the processes of the run in `place` that are alive ten seconds after its end."""
    mark = f"{MARK}={place}\0".encode()
    for _ in range(100):
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes() and "Z" not in (entry / "stat").read_text().split()[2]:
                    found.append(int(entry.name))
        if not found:
            return []
        time.sleep(0.1)
    return found


# --------------------------------------------------------------------------- comparing


def comparable(path: Path) -> Any:
    """Return what a file must have in common with that of the undisturbed run."""
    if path.suffix == ".jsonl":
        return [without_measured(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return without_measured(json.loads(path.read_text("utf-8"))) if path.suffix == ".json" else path.read_bytes()


def without_measured(value: Any) -> Any:
    """Return a JSON value without times and memory."""
    if isinstance(value, dict):
        return {key: without_measured(inner) for key, inner in value.items() if key not in MEASURED}
    return [without_measured(inner) for inner in value] if isinstance(value, list) else value


def first_difference(run: Path, other: Path) -> str | None:
    """Return how the folder `run` differs from the undisturbed `other`, or None."""
    ours, theirs = (
        {str(path.relative_to(root)) for path in root.rglob("*") if not UNCOMPARED.fullmatch(path.name)}
        for root in (run, other)
    )
    if ours != theirs:
        return f"missing {sorted(theirs - ours)}, too many {sorted(ours - theirs)}"
    for name in sorted(ours):
        if (run / name).is_dir():
            continue
        mine, its = comparable(run / name), comparable(other / name)
        if mine != its:
            return f"{name}: {_detail(run / name, other / name, mine, its)}"
    return None


def _detail(path: Path, other: Path, mine: Any, its: Any, where: str = "") -> str:
    """Say what differs between two unequal files."""
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        first, second = load_file(path), load_file(other)
        if first.keys() != second.keys():
            return f"tensors {sorted(first.keys() ^ second.keys())} are in one file only"
        gaps = {
            key: abs(first[key].astype("f8") - second[key].astype("f8")).max()
            for key in first
            if first[key].tobytes() != second[key].tobytes()
        }
        return f"{len(gaps)} of {len(first)} tensors differ, by {max(gaps.values(), default=0):.3g} at most"
    if isinstance(mine, list) and isinstance(its, list) and len(mine) != len(its):
        return f"{where} has {len(mine)} entries instead of {len(its)}"
    pairs: Iterator[tuple[Any, Any, Any]] = iter(())
    if isinstance(mine, dict) and isinstance(its, dict):
        pairs = ((key, mine.get(key), its.get(key)) for key in mine | its)
    elif isinstance(mine, list) and isinstance(its, list):
        pairs = ((number, *pair) for number, pair in enumerate(zip(mine, its, strict=True)))
    for key, first, second in pairs:
        if first != second:
            return _detail(path, other, first, second, f"{where}[{key!r}]")
    return f"{where} is {str(mine)[:200]} instead of {str(its)[:200]}"


# --------------------------------------------------------------------------- cases


def choose_cases(runs: int, seed: int, times: Mapping[str, Times], stages: Sequence[str]) -> list[Case]:
    """Choose recipes and kills; with `stages` one kill a run, at the start of each in turn."""
    source = random.Random(seed)  # noqa: S311
    names = list(times)
    turns: dict[str, list[str]] = {name: [] for name in names}  # the stages of a recipe that are still to be aimed at
    cases = []
    for number in range(runs):
        name = names[number % len(names)]
        aimed = (number // len(names)) % 3 != 0 or bool(stages)
        if aimed and not turns[name]:
            turns[name] = source.sample(found := sorted({stage for stage, *_ in times[name]}), len(found))
        stage = (stages[number % len(stages)] if stages else turns[name].pop()) if aimed else None
        occurrences = {at: seconds for found, at, seconds in times[name] if found == stage}
        if stage and not occurrences:
            raise SystemExit(
                f"{name} never reaches the stage {stage!r}; it has {sorted({one for one, *_ in times[name]})}"
            )
        occurrence = source.choice(list(occurrences) or [1])
        fraction = source.random()
        if aimed and (occurrences[occurrence] < SHORT or stages or source.random() < 1 / 3):
            fraction = 0.0
        aims = [Aim(stage=stage, occurrence=occurrence, fraction=fraction)]
        while not stages and len(aims) < 3 and source.random() < 1 / 3:
            start_up = source.random() < 0.5
            aims.append(Aim(stage="start-up of a resumed run" if start_up else None, fraction=source.random() / 2))
        cases.append(Case(number=number, recipe=name, aims=aims))
    return cases


def endure(case: Case, engine: str, folder: Path, times: Times, undisturbed: Path, *, fork: bool) -> Case:
    """Train, kill and resume until the run has ended, then compare it."""
    place = folder / f"{case.number:03}"
    place.mkdir()
    run, begin = place / "run", time.perf_counter()
    starting = next(seconds for stage, _, seconds in times if stage == "start-up")
    times = [*times, ("start-up of a resumed run", 1, starting)]
    try:
        aims = list(case.aims)
        while not (run / "summary.json").is_file():
            # A run that was killed before its recipe was written is started again by the same command.
            begun = (run / "recipe.toml").is_file()
            new = train_arguments(engine, RECIPES[engine][case.recipe], folder)
            arguments = ["resume", "run", "--view", "plain"] if begun else new
            aim = aims[0] if aims else None
            code, stage = attempt(place, arguments, aim, times, fork=fork)
            if code == -signal.SIGKILL and aims:
                case.hit.append(stage)
                aims.pop(0)
                if left := left_processes(place):
                    raise RuntimeError(f"the processes {left} outlived the run that was killed in {stage}")
            elif code or not (run / "summary.json").is_file():
                raise RuntimeError(f"exit code {code} in {stage}, see output.txt")
            elif aims and not case.hit:  # faster than the undisturbed run, it ended before it was killed: once more
                shutil.rmtree(run)
                aims[0] = replace(aims[0], fraction=aims[0].fraction / 2 if aims[0].fraction > 0.05 else 0.0)
        case.difference = first_difference(run, undisturbed)
    except (OSError, RuntimeError, ValueError) as error:
        case.difference = f"{type(error).__name__}: {error}"
    case.seconds = time.perf_counter() - begin
    if case.difference is None:
        shutil.rmtree(place)
    return case


def undisturbed_run(
    engine: str, name: str, place: Path, folder: Path, *overrides: str, fork: bool
) -> tuple[Times, list[str]]:
    """Run a recipe undisturbed in `place`; return how long each stage took, and the modules that it imported."""
    place.mkdir()
    arguments = train_arguments(engine, (*RECIPES[engine][name], *overrides), folder)
    code, _ = attempt(place, arguments, None, [], fork=fork)
    if code:
        raise SystemExit(f"the undisturbed run failed with exit code {code}:\n{(place / 'output.txt').read_text()}")
    trace, count = json.loads((place / "trace.json").read_text()), Counter[str]()
    times = []
    for stage, seconds in trace["times"]:
        count[stage] += 1
        times.append((stage, count[stage], seconds))
    if missing := {"prompts", "update", "record: metrics", "checkpoint: before rename", "after the end"} - count.keys():
        raise SystemExit(f"the stages {sorted(missing)} were not seen: this script no longer fits the trainer")
    return times, trace["modules"]


def write_sums(path: Path) -> None:
    """Write a file so small that every problem comes up again and again."""
    numbers = [(first + offset, level) for level, first in enumerate((20, 2000)) for offset in range(12)]
    rows = [
        json.dumps({"prompt": f"What is {a} + {a + 7}?", "answer": 2 * a + 7, "level": level}) for a, level in numbers
    ]
    path.write_text("\n".join(rows) + "\n")


def import_all(modules: Sequence[str]) -> None:
    """Import what a run imports, so that forks need not. Raises RuntimeError if that started threads."""
    import torch

    from popo_lite.samplers.vllm import ENVIRONMENT

    torch.set_num_threads(1)
    os.environ |= ENVIRONMENT
    for name in modules:
        # Some only exist after others have made them.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # That of pyarrow's allocator, which is made for forks: jemalloc starts it again in the child.
    names = [name for name in names if name != "jemalloc_bg_thd"]
    if len(names) > 1:
        raise RuntimeError(f"the threads {names} are alive: a fork would lose all but one")


def run_cases(cases: Sequence[Case], jobs: int, folder: Path, work: Callable[[Case], Case]) -> list[Case]:
    """Work on the cases in `jobs` forked processes; print each when it is done; return them in order."""
    done = [folder / f"cases-{job}.jsonl" for job in range(jobs)]
    runners = []
    for job, path in enumerate(done):
        sys.stdout.flush()
        if not (pid := os.fork()):
            code = 1
            try:
                for case in cases[job::jobs]:
                    work(case)
                    with path.open("a") as file:
                        file.write(json.dumps(asdict(case)) + "\n")
                    print(describe(case), flush=True)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        runners.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runners]
    if any(codes):
        raise SystemExit(f"the processes that run the cases ended with {codes}")
    lines = [json.loads(line) for path in done if path.is_file() for line in path.read_text().splitlines()]
    found = [Case(**line | {"aims": [Aim(**aim) for aim in line["aims"]]}) for line in lines]
    return sorted(found, key=lambda case: case.number)


def describe(case: Case) -> str:
    """Return one line on a case."""
    aims = ", ".join(map(str, case.aims))
    verdict = "equal" if case.difference is None else f"DIFFERS: {case.difference}"
    hit = ", ".join(map(str, case.hit)) or "nothing"
    return f"{case.number:3}  {case.recipe}; aimed at {aims}; hit {hit}; {case.seconds:.1f} s: {verdict}"


def table(cases: Sequence[Case], times: Mapping[str, Times]) -> str:
    """Return the kills by stage: of new runs and of resumed ones, and how many of their runs ended equal."""
    first = Counter(case.hit[0] for case in cases if case.hit)
    later = Counter(stage for case in cases for stage in case.hit[1:])
    equal = Counter(stage for case in cases if case.difference is None for stage in case.hit)
    possible = {stage for recipe in times.values() for stage, *_ in recipe} | {"start-up of a resumed run"}
    lines = [f"{'stage':<40} {'kills':>6} {'of them resumed':>16} {'ended equal':>12}", "-" * 77]
    for stage in STAGES:
        if stage in possible or first[stage] + later[stage]:
            kills = first[stage] + later[stage]
            lines.append(f"{stage:<40} {kills:>6} {later[stage]:>16} {equal[stage]:>12}")
    total = first.total() + later.total()
    return "\n".join([*lines, "-" * 77, f"{'all':<40} {total:>6} {later.total():>16} {equal.total():>12}"])


def main() -> int:
    """Run the undisturbed runs, then the cases; print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="number of runs to kill (default: 100 with hf, 20 with vllm)")
    parser.add_argument("--engine", choices=list(RECIPES), default="hf")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of kills (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--stage", action="append", default=[], choices=STAGES, help="kill at the start of this; repeatable"
    )
    parser.add_argument("--recipe", action="append", help="use this alone: fixed, adaptive, grpo; repeatable")
    parser.add_argument("--fresh", action="store_true", help="run everything in new processes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/chaos.json or chaos-vllm.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        spec = json.loads(arguments.child)
        aim = spec["aim"] and Aim(**spec["aim"])
        return child(Path(spec["place"]), spec["arguments"], aim, spec["pipe"])
    engine, fork = arguments.engine, not arguments.fresh
    recipes = arguments.recipe or list(RECIPES[engine])
    runs = arguments.runs or (100 if engine == "hf" else 20)
    folder = Path(tempfile.mkdtemp(prefix="popo-chaos-"))
    print(f"seed {arguments.seed}, {runs} runs with {engine}, {arguments.jobs} at a time, in {folder}", flush=True)
    write_sums(folder / "sums.jsonl")
    begin = time.perf_counter()
    if fork:
        import_all(undisturbed_run(engine, recipes[0], folder / "imports", folder, "train.steps=1", fork=fork)[1])
    times, undisturbed = {}, {}
    for number, name in enumerate(recipes):
        undisturbed[name] = folder / f"undisturbed-{number}"
        times[name], modules = undisturbed_run(engine, name, undisturbed[name], folder, fork=fork)
        if fork:
            import_all(modules)
    cases = choose_cases(runs, arguments.seed, times, arguments.stage)

    def work(case: Case) -> Case:
        return endure(case, engine, folder, times[case.recipe], undisturbed[case.recipe] / "run", fork=fork)

    cases = run_cases(cases, arguments.jobs, folder, work)
    shown = table(cases, times)
    differing = [case for case in cases if case.difference is not None]
    print(f"\n{shown}\n\n{len(cases) - len(differing)} of {len(cases)} runs ended equal to the undisturbed run")
    import torch

    from popo_lite.run_folder import environment

    result = {
        "command": shlex.join(["python", "benchmarks/chaos.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": arguments.seed,
        "engine": engine,
        "runs": len(cases),
        "equal": len(cases) - len(differing),
        "kills": sum(len(case.hit) for case in cases),
        "seconds": round(time.perf_counter() - begin, 1),
        "table": shown.splitlines(),
        "cases": [asdict(case) | {"aims": [*map(str, case.aims)]} for case in cases],
        "environment": environment(torch.device("cpu")),
    }
    output = arguments.output or RESULTS / ("chaos.json" if engine == "hf" else f"chaos-{engine}.json")
    output.write_text(json.dumps(result, indent=1) + "\n")
    if differing:
        print(f"first difference: {describe(differing[0])}\nkept: {folder / format(differing[0].number, '03')}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
