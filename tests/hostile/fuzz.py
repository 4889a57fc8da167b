"""Hypothesis fuzzing of what reads text and files of strangers.

    make fuzz CASES=20000

runs the corpus, then every target in a process of its own with a limit on its memory, and prints cases, hangs, crashes,
wrong verdicts, peak memory and seconds. A crash is any exception but a PopoError with a next step; of graders, an
outcome "error" for a reference that can be read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

from corpus import CATASTROPHIC, CODE, ESCAPES, JSON, MACROS, MARKUP, NUMBERS, THOUGHTS, boxed
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from popo_lite.errors import PopoError
from popo_lite.formats import read_json
from popo_lite.grading import Grader
from popo_lite.recipe import DatasetRecipe, Recipe, RewardRecipe
from popo_lite.recipe_file import dump_recipe, load_recipe, schema_of, shipped_recipes, to_toml
from popo_lite.types import Outcome, Problem

MEMORY_BYTES = 16 * 2**30
"""Of address space for a target's process, of which torch and pyarrow reserve several GiB at once."""
TIMEOUT = 2.0
SLOWEST = 30.0
"""Seconds for a case that is not graded; more is a hang. Machines are busy."""
LONGEST_MESSAGE = 20_000


class Wrong(AssertionError):
    """A verdict that is known to be wrong."""


class Hang(AssertionError):
    """A case that took too long."""


# --------------------------------------------------------------------------- material

SNIPPETS = [text for texts in (ESCAPES, MARKUP, CODE, NUMBERS, MACROS, THOUGHTS, JSON, CATASTROPHIC) for text in
            texts.values() if len(text) < 2000]  # fmt: skip
LATEX = r"""
\frac \sqrt \boxed{ \text{ \binom \left( \right) \{ \} { } ( ) [ ] ^ _ ^{ _{ \cdot \times \pm \le < > = , ; : . ! ' \pi
\infty \ln \sin \sum_{n=1}^{9} \int \lim \overline{ \begin{pmatrix} \end{pmatrix} \\ & \pmod \% \$ $ ° % e i x y n
ab and or the answer is <answer> </answer> <think> </think> ``` - + * / | 1 2 42 0.5 1e9 9999999 -3
""".split()  # noqa: SIM905
pieces = st.one_of(st.sampled_from(LATEX), st.sampled_from(SNIPPETS), st.text(max_size=8), st.integers().map(str))
texts = st.lists(pieces, max_size=25).map("".join) | st.lists(pieces, max_size=25).map(" ".join) | st.text(max_size=200)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.sampled_from(SNIPPETS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def changed(content: Any, draw: Callable[[Any], Any]) -> Any:
    """Return JSON content with a value somewhere replaced, deleted or added."""
    content = copy.deepcopy(content)
    place, key = None, None
    inner = content
    while isinstance(inner, dict | list) and inner and (place is None or draw(st.booleans())):
        place, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = inner[key]
    if place is None or draw(st.integers(0, 19)) == 0:
        return draw(json_values)
    match draw(st.integers(0, 3)):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[draw(st.text(max_size=8))] = draw(json_values)
        case _:
            place[key] = draw(json_values)
    return content


def damaged(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Return bytes that were cut off, or have flipped bits, or others in places."""
    match draw(st.integers(0, 3)):
        case 0:
            return content[: draw(st.integers(0, len(content)))]
        case 1:
            start = draw(st.integers(0, len(content)))
            return content[:start] + draw(st.binary(max_size=40)) + content[start + draw(st.integers(0, 40)) :]
        case _:
            found = bytearray(content)
            for _ in range(draw(st.integers(1, 4)) if found else 0):
                found[draw(st.integers(0, len(found) - 1))] ^= 1 << draw(st.integers(0, 7))
            return bytes(found)


def harmless(function: Callable[[], Any]) -> Any:
    """Call `function`; return None for a PopoError that is of use, raise whatever else comes out of it."""
    began = time.monotonic()
    try:
        result = function()
    except PopoError as error:
        result = None
        if not error.next_step or len(str(error)) > LONGEST_MESSAGE:
            raise AssertionError(f"no next step, or {len(str(error)):,} characters: {str(error)[:300]!r}") from error
    if time.monotonic() - began > SLOWEST:
        raise Hang(f"{time.monotonic() - began:.1f} s")
    return result


# --------------------------------------------------------------------------- graders

FUNCTIONS: dict[str, dict[str, Any]] = {
    "math": {"name": "math"},
    "exact": {"name": "exact"},
    "choice": {"name": "choice", "choices": 5},
    "numeric": {"name": "numeric", "tolerance": 0.01},
    "regex": {"name": "regex", "pattern": r"^(a|aa)+$|^\w \w$"},
    "json_schema": {"name": "json_schema", "schema": {"type": "object"}, "equals_reference": True},
    "language": {"name": "language", "script": "Greek"},
}
SPELLINGS: tuple[Callable[[int], str], ...] = (
    str,
    lambda n: f"{n:,}",
    lambda n: f"{n}.0",
    lambda n: rf"\frac{{{2 * n}}}{{2}}",
    lambda n: rf"\text{{{n}}}",
    lambda n: rf" {n} ",
    lambda n: rf"x = {n}",
    lambda n: rf"\left({n}\right)",
    lambda n: rf"\sqrt{{{n * n}}}" if n >= 0 else rf"-\sqrt{{{n * n}}}",
)
"""Spellings of an integer that the math reward takes for it, whatever stands before the box."""


@st.composite
def graded(draw: Callable[[Any], Any]) -> list[tuple[str, str, bool | None]]:
    """Return texts with references, and whether they are right: True, False, or None for unknown."""
    rows: list[tuple[str, str, bool | None]] = []
    for _ in range(3):
        text, reference = draw(texts), draw(texts)
        rows.append((boxed(text) if draw(st.booleans()) else text, reference, None))
    number, spelling = draw(st.integers(-(10**12), 10**12)), draw(st.sampled_from(SPELLINGS))
    off = draw(st.sampled_from([0, 0, 1, -7]))
    before = re.sub(r"<think>|</think>", "", draw(texts))
    rows.append((f"{before}\n\n{boxed(spelling(number + off))}", str(number), off == 0))
    return rows


def grade(name: str, rows: list[tuple[str, str, bool | None]]) -> int:
    """Grade the rows, and controls that are known to be right and wrong; return the number of rows."""
    known = {
        "math": (r"\boxed{\frac{\sqrt{8}}{2}}", r"\sqrt{2}", r"\boxed{\frac{\sqrt{8}}{3}}"),
        "exact": (" 42", "42", "42."),
        "choice": ("The answer is B", "B", "B or C"),
        "numeric": ("about 1/3", "2/6", "0.3"),
        "regex": ("a b", "", "!"),
        "json_schema": ('{"a": 1}', '{"a": 1.0}', '{"a": 2}'),
        "language": ("\u03b1\u03b2", "", "ab"),
    }[name]
    controls: list[tuple[str, str, bool | None]] = [(known[0], known[1], True), (known[2], known[1], False)]
    asked = [controls[0], *rows, controls[1]]
    problems = [Problem(id=str(n), messages=({"role": "user", "content": "?"},), answer=ref) for n, (_, ref, _) in
                enumerate(asked)]  # fmt: skip
    began = time.monotonic()
    rewards = grader(name).grade([(text, problem) for (text, _, _), problem in zip(asked, problems, strict=True)])
    if time.monotonic() - began > 10 * TIMEOUT + SLOWEST:
        raise Hang(f"{time.monotonic() - began:.1f} s for {len(asked)} answers")
    errors = [n for n, reward in enumerate(rewards) if reward.outcome is Outcome.ERROR]
    if errors:
        unreadable = grader(name).unreadable([problems[n] for n in errors])
        for n in errors:
            assert str(n) in unreadable, (asked[n], rewards[n])
    for n, ((text, reference, right), reward) in enumerate(zip(asked, rewards, strict=True)):
        if name != "math" and 0 < n < len(asked) - 1:
            continue  # what is right is known for `math` alone
        if right is not None and (reward.positive != right or not reward.outcome.is_graded):
            raise Wrong(f"{text!r} for {reference!r}: {reward}")
    return len(rows)


@cache
def grader(name: str) -> Grader:
    function = FUNCTIONS[name]
    return OPEN.enter_context(
        Grader(RewardRecipe.model_validate({"functions": [function], "timeout_seconds": TIMEOUT}))
    )


OPEN = ExitStack()

# --------------------------------------------------------------------------- recipes

toml_values = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(SNIPPETS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KEYS = sorted({key for name in ("popo", "grpo", "raft", "mixed") for key in schema_of(name)})


@st.composite
def recipes(draw: Callable[[Any], Any]) -> tuple[bytes, list[str]]:
    """Return a recipe file and `--set` overrides."""
    match draw(st.integers(0, 3)):
        case 0:
            content = draw(st.binary(max_size=200)) if draw(st.booleans()) else draw(texts).encode(errors="replace")
        case 1:
            lines = [f"{key} = {to_toml(value)}" for key, value in
                     draw(st.dictionaries(st.sampled_from(KEYS), toml_values, max_size=5)).items()]  # fmt: skip
            content = "\n".join(lines).encode(errors="replace")
        case _:
            content = draw(st.sampled_from(sorted(shipped_recipes().values()))).read_bytes()
            content = damaged(content, draw) if draw(st.booleans()) else content
    names = st.sampled_from(KEYS) | st.text(max_size=12)
    values = toml_values.map(to_toml) | texts | st.sampled_from(["", "[[", "{}", '"', "nan", "1e999", "2024-01-01"])
    overrides = draw(st.lists(st.tuples(names, values).map("=".join) | texts, max_size=4))
    return content, overrides


def read_recipe(case: tuple[bytes, list[str]]) -> int:
    """Read a recipe; one that is valid must be read again from what is written."""
    content, overrides = case
    path = folder() / "recipe.toml"
    path.write_bytes(content)
    if recipe := harmless(lambda: load_recipe(path, overrides)):
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
    return 1


# --------------------------------------------------------------------------- datasets

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "id": f"q{n}", "level": n % 3} for n in range(4)]


@st.composite
def datasets(draw: Callable[[Any], Any]) -> tuple[str, bytes, dict[str, Any]]:
    """Return a file's suffix, its bytes, and settings."""
    suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
    rows: Any = ROWS
    for _ in range(draw(st.integers(0, 3))):
        rows = changed(rows, draw)
    if suffix == ".parquet":
        content = parquet()
    elif suffix == ".csv":
        fields = draw(st.lists(st.lists(texts, max_size=5), max_size=6))
        content = "\n".join([draw(st.sampled_from(["question,answer", "question;answer", "a,a", ""])),
                             "1+1,2", *(",".join(one) for one in fields)]).encode(errors="replace")  # fmt: skip
    elif suffix == ".json" or not isinstance(rows, list):
        content = json.dumps(rows).encode()
    else:
        content = "\n".join(map(json.dumps, rows)).encode()
    if draw(st.booleans()):
        content = damaged(content, draw)
    columns = st.sampled_from([None, "question", "answer", "level"])
    filters = st.dictionaries(st.sampled_from(["level", "id", "x"]), st.integers(0, 3), max_size=1)
    return suffix, content, {"prompt_column": draw(columns), "answer_column": draw(columns), "filter": draw(filters)}


@cache
def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder() / "rows.parquet")
    return (folder() / "rows.parquet").read_bytes()


def read_dataset(case: tuple[str, bytes, dict[str, Any]]) -> int:
    """Open the file as training data and as held-out problems; every problem must be readable and have a hash."""
    from popo_lite.tasks.datasets import DatasetTask, digests

    suffix, content, options = case
    # A new name for every content: the library caches a Parquet file by its name and time.
    path = folder() / f"data-{time.monotonic_ns()}{suffix}"
    path.write_bytes(content)
    part = DatasetRecipe(dataset=str(path), **options)
    for section, held_out, level in (("data", 1, "level"), ("data", 0, None), ("eval", 0, None)):

        def use(section: Any = section, held_out: int = held_out, level: str | None = level) -> None:
            task = DatasetTask(part, section=section, held_out=held_out, level_column=level)
            problems = [*task.training(), *(task.held_out(held_out) if held_out else ())]
            digests(problems)
            assert all(isinstance(problem.answer, str) and problem.question for problem in problems)
            if section == "data":
                task.train_problem(0, 5)
                next(task.longest_candidates())

        harmless(use)
    path.unlink()
    return 1


# --------------------------------------------------------------------------- run folders


@cache
def finished() -> dict[str, bytes]:
    """Return the files of a finished run."""
    from helpers import record
    from runs import EVALUATION, SUMMARY

    counts = ("rollouts", "rollout_tokens", "trained_tokens", "shared_tokens", "peak_memory_bytes",
              "siamese_extra_bytes", "quantized_modules")  # fmt: skip
    evaluation = {**EVALUATION, "unreadable": 0, "ungraded_ratio": 0.0, "rollout_tokens": 9, "seconds": 1.0}
    summary = {**SUMMARY, "before": evaluation, "after": evaluation, "siamese": None, "output": "runs/x",
               "seconds": {"update": 1.0, "rollout": 2.0, "total": 3.0}, **dict.fromkeys(counts, 1)}  # fmt: skip
    lines = [json.dumps(record(step)) for step in range(3)]
    return {
        "recipe.toml": dump_recipe(load_recipe("tiny_cpu")).encode(),
        "metrics.jsonl": "\n".join(lines).encode() + b"\n",
        "evaluations.jsonl": json.dumps({"when": "before", "step": 0, **evaluation}).encode() + b"\n",
        "summary.json": json.dumps(summary).encode(),
        "data.json": json.dumps({"training": {"a": "1"}, "held_out": {"b": "2"}}).encode(),
        "settings.json": json.dumps({"date": "2026-01-01", "k": 8}).encode(),
        "adapter_config.json": json.dumps({"r": 16, "target_modules": ["q_proj"]}).encode(),
    }


@st.composite
def run_folders(draw: Callable[[Any], Any]) -> tuple[str, bytes]:
    """Return the name of a run's file and its damaged content."""
    name = draw(st.sampled_from(sorted(finished())))
    content = finished()[name]
    if name.endswith(".toml") or draw(st.booleans()):
        return name, damaged(content, draw)
    rows: Any = [json.loads(line) for line in content.decode().split("\n") if line]
    rows = [changed(row, draw) if draw(st.booleans()) else row for row in rows]
    deep = "[" * 20_000 if draw(st.integers(0, 30)) == 0 else ""
    return name, ("\n".join(map(json.dumps, rows)) + deep).encode()


def read_run_folder(case: tuple[str, bytes]) -> int:
    """Read the run with everything that reads one without a model."""
    from popo_lite.run_folder import RunFolder, keep_lines, read_lines
    from popo_lite.tools.benchmarks.run import EvaluationFolder
    from popo_lite.tools.sweep.compare import compare
    from popo_lite.tools.sweep.folder import SweepRun, Variant

    name, content = case
    path = folder() / "sweep" / "v" / "seed-0"
    path.mkdir(parents=True, exist_ok=True)
    for other, good in finished().items():
        (path / other).write_bytes(content if other == name else good)
    run = RunFolder(path)
    harmless(lambda: compare([path], reach=0.5))
    for file in (run.metrics_path, run.evaluations_path):
        harmless(lambda file=file: read_lines(file))
        harmless(lambda file=file: keep_lines(file, lambda line: bool(line.get("step"))))
    for file in (run.data_path, run.summary_path, path / "adapter_config.json"):
        harmless(lambda file=file: read_json(file))
    evaluation = EvaluationFolder(path)
    harmless(evaluation.date)
    harmless(lambda: evaluation.start({"date": "2026-01-01", "k": 9}))
    variant = Variant("v", {}, Recipe())
    harmless(lambda: SweepRun(folder() / "sweep", variant, 0, {}).result())
    return 1


# --------------------------------------------------------------------------- checkpoints


@cache
def learner() -> Any:
    """Return a learner of the tiny model after an update."""
    import torch

    from popo_lite.policy.policy import load_policy
    from popo_lite.update import Learner

    torch.set_num_threads(1)
    recipe = load_recipe("tiny_cpu", ["siamese.head_width=64"])
    made = Learner(recipe, load_policy(recipe), notify=str, memory_advice="")
    torch.manual_seed(0)
    for _, parameter in made.policy.trainable_parameters():
        parameter.grad = torch.randn_like(parameter)
    made.optimizer.step()
    made.siamese.update(1.0)
    made.policy.version = 1
    return made


@cache
def checkpoint() -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    from popo_lite.checkpoint import Cursor, save_checkpoint

    cursor = Cursor(next_step=1, history={"p": (4, 2, 0)}, totals={"rollouts": 4}, seconds={"update": 1.0})  # type: ignore[dict-item]
    made = save_checkpoint(folder() / "made", learner(), cursor, base_id="tiny", keep=1)
    return {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}


@st.composite
def checkpoints(draw: Callable[[Any], Any]) -> tuple[str, bytes, bool]:
    """Return a checkpoint's file, its damaged content, and whether the checksums are still there."""
    files = checkpoint()
    name = draw(st.sampled_from(sorted(files)))
    content = files[name]
    if name.endswith(".json") and draw(st.booleans()):
        content = json.dumps(changed(json.loads(content), draw)).encode()
    elif name.endswith(".safetensors") and draw(st.booleans()):
        (size,) = struct.unpack("<Q", content[:8])
        header = changed(json.loads(content[8 : 8 + size]), draw)
        written = json.dumps(header).encode() if draw(st.booleans()) else content[8 : 8 + size]
        length = draw(st.sampled_from([len(written), 0, 2**63, 2**64 - 1, 10**8, len(written) + 1]))
        content = struct.pack("<Q", length) + written + content[8 + size :]
    else:
        content = damaged(content, draw)
    return name, content, draw(st.booleans())


def read_checkpoint(case: tuple[str, bytes, bool]) -> int:
    """Load the checkpoint: it is refused, or all of it is loaded and the next update works."""
    import torch

    from popo_lite.checkpoint import load_checkpoint

    name, content, checked = case
    path = folder() / "step-000001"
    for other, good in checkpoint().items():
        (path / other).parent.mkdir(parents=True, exist_ok=True)
        (path / other).write_bytes(content if other == name else good)
    if not checked:
        (path / "checksums.json").unlink()
    other = learner()
    if (cursor := harmless(lambda: load_checkpoint(path, other))) is None:
        return 1
    assert type(cursor.next_step) is int
    if checked and name.endswith(".safetensors"):
        assert content == checkpoint()[name], f"{name} differs, and was loaded"
    for _, parameter in other.policy.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    other.optimizer.step()
    return 1


# --------------------------------------------------------------------------- found before

RECIPES = [
    (b"", ["model.id=a\n---\nlicense: mit"]),
    (b"", [f"data.dataset={'x' * 300}"]),
    (b"", ["output.dir=\u202egnp.exe"]),
]
RUN_FOLDERS = [
    ("summary.json", b'{"after": 5}'),
    ("summary.json", b'{"after": {"pass_at_1": "high"}}'),
    ("summary.json", b"[" * 20_000),
    ("metrics.jsonl", b"[1]\n"),
    ("metrics.jsonl", b"\xff\n"),
    ("metrics.jsonl", b'{"step":' * 20_000 + b"\n{}\n"),
    ("metrics.jsonl", b""),
    ("settings.json", b'{"date": 5}'),
    ("settings.json", b"null"),
    ("data.json", b"3"),
    ("adapter_config.json", b"\x00"),
]


def dataset_examples() -> list[Any]:
    """Return files that ended the command with a traceback."""
    same = {"prompt_column": None, "answer_column": None, "filter": {}}
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    return [
        (".jsonl", lines, same | {"answer_column": "question"}),
        (".jsonl", lines + b"\n" + b"[" * 20_000, same),
        (".json", b"[" * 20_000, same),
        (".parquet", parquet().replace(b"What is 0 + 0?", b"What is \xb1 + 0?"), same),
    ]


def checkpoint_examples() -> list[Any]:
    """Return files that were loaded although they are damaged."""
    state, siamese = checkpoint()["optimizer.safetensors"], checkpoint()["siamese.safetensors"]
    (size,) = struct.unpack("<Q", state[:8])
    header = json.loads(state[8 : 8 + size])
    name = next(key for key, value in header.items() if len(set(value.get("shape", ()))) == 2)
    header[name]["shape"].reverse()
    turned = json.dumps(header, separators=(",", ":")).encode()
    cursor = json.loads(checkpoint()["cursor.json"])
    return [
        ("siamese.safetensors", siamese[:-1] + bytes([siamese[-1] ^ 1]), True),
        ("optimizer.safetensors", struct.pack("<Q", len(turned)) + turned + state[8 + size :], False),
        ("cursor.json", json.dumps(cursor | {"cursor": cursor["cursor"] | {"next_step": "x"}}).encode(), False),
        ("cursor.json", b"[" * 20_000, False),
    ]


# --------------------------------------------------------------------------- running


class Target(NamedTuple):
    """What is read, by what, and its part of all cases; `examples` are what was found before."""

    strategy: Callable[[], Any]
    check: Callable[[Any], int]
    share: float
    each: int = 1
    examples: Callable[[], Sequence[Any]] = tuple


TARGETS = {
    **{
        f"grade {name}": Target(graded, lambda rows, name=name: grade(name, rows), 0.3 if name == "math" else 0.03, 4)
        for name in FUNCTIONS
    },
    "recipe": Target(recipes, read_recipe, 0.2, examples=lambda: RECIPES),
    "dataset": Target(datasets, read_dataset, 0.12, examples=dataset_examples),
    "run folder": Target(run_folders, read_run_folder, 0.12, examples=lambda: RUN_FOLDERS),
    "checkpoint": Target(checkpoints, read_checkpoint, 0.08, examples=checkpoint_examples),
}


@cache
def folder() -> Path:
    """Return a temporary folder of this process."""
    return Path(OPEN.enter_context(tempfile.TemporaryDirectory()))


@contextmanager
def elsewhere() -> Iterator[None]:
    """Work in a temporary folder, with the library's cache in it, and leave nothing behind."""
    before = Path.cwd()
    os.chdir(folder())
    import datasets as library

    library.config.HF_DATASETS_CACHE = str(folder() / "cache")
    library.disable_progress_bars()
    library.logging.set_verbosity(library.logging.CRITICAL)  # it prints what is wrong with every damaged file
    try:
        yield
    finally:
        os.chdir(before)
        OPEN.close()
        for cached in (grader, folder, parquet, learner, checkpoint):
            cached.cache_clear()


def run(name: str, cases: int, *, derandomize: bool) -> int:
    """Check `cases` cases of a target; return how many there were. Raises what the first that fails raises."""
    target, done = TARGETS[name], 0

    def check(case: Any) -> None:
        nonlocal done
        done += target.check(case)

    options = settings(
        max_examples=max(cases // target.each, 1), deadline=None, database=None, derandomize=derandomize,
        suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )  # fmt: skip
    with elsewhere():
        for found in target.examples():
            check = example(found)(check)
        options(given(target.strategy())(check))()
    return done


def main() -> None:
    """Run all targets, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--target", choices=TARGETS)
    options = parser.parse_args()
    if options.target:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        began, failure = time.monotonic(), ""
        try:
            done = run(options.target, options.cases, derandomize=False)
        except BaseException as error:
            done, failure = 0, type(error).__name__
            import traceback

            traceback.print_exc()
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps({"cases": done, "failure": failure, "mib": peak // 1024, "seconds": time.monotonic() - began}))
        return
    total = {"cases": 0, "hangs": 0, "crashes": 0, "wrong verdicts": 0}
    began, most = time.monotonic(), 0
    for name, target in TARGETS.items():
        cases = round(options.cases * target.share / sum(each.share for each in TARGETS.values()))
        command = [sys.executable, __file__, "--target", name, "--cases", str(cases)]
        result: dict[str, Any] = {"cases": 0, "failure": "Crash", "mib": 0, "seconds": 0.0}
        try:
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600 + cases).stdout
            result = json.loads(out.strip().rpartition("\n")[2])
        except subprocess.TimeoutExpired:
            result["failure"] = "Hang"
        except ValueError:  # it was killed
            pass
        total["cases"] += result["cases"]
        if result["failure"]:
            total[{"Hang": "hangs", "Wrong": "wrong verdicts"}.get(result["failure"], "crashes")] += 1
        most = max(most, result["mib"])
        print(f"{name:18} {result['cases']:6} cases  {result['failure'] or 'ok':12} peak {result['mib']:5} MiB  "
              f"{result['seconds']:6.0f} s", flush=True)  # fmt: skip
    print(", ".join(f"{count:,} {what}" for what, count in total.items())
          + f"; peak {most:,} MiB of a process, {time.monotonic() - began:,.0f} s")  # fmt: skip
    sys.exit(any(count for what, count in total.items() if what != "cases"))


if __name__ == "__main__":
    main()
