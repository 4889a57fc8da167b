"""The corpus through every built-in reward function, and through what else reads model text in the trainer's process.

Each case is graded between two controls, in the same batch and by the same workers: neither may hang past the timeout,
and no control may change its verdict.
"""

import json
import os
import re
import time
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path

import psutil
import pytest
from corpus import ANY, CANARY, CONTROLS, RIGHT, WRONG, Case, corpus

from popo_lite.grading import Grader, sandbox
from popo_lite.metrics import make_record, rollout_metrics, sample_line, sample_views
from popo_lite.recipe import RewardRecipe
from popo_lite.run_folder import append_line, read_lines
from popo_lite.shapes import count_takeover, shape_metrics, start_shapes, takeover_message
from popo_lite.tasks.generated import ArithmeticTask
from popo_lite.types import Completion, FinishReason, Group, Outcome, Problem, Prompt, Reward, Rollout

CASES = list(corpus())
STRIDE = int(os.environ.get("CORPUS_STRIDE", "5"))
"""Grade every so-manieth case; `make fuzz` grades all of them, which takes minutes."""
TIMEOUT = 2.0
LONGEST = 4 * TIMEOUT + 20.0
"""Seconds for a case and its controls on a busy machine: the case's timeout, and two starts of a worker."""
MEMORY_MIB = 1024
"""Largest resident size of any worker, of the 4 GiB of address space that it may take."""

CODE = [
    Case(case.name, f"```python\n{text}\n```", "assert f(2) == 3")
    for case in CASES
    for text in (case.text, f"def f(x):\n    return {case.text}")
    if case.name.startswith(("code in the box", "markup in the box", "escape in the box", "3000 parentheses", "long: "))
] + [
    Case(
        "threads", "```python\nimport threading\nwhile True: threading.Thread(target=input).start()\n```", "assert f(2)"
    ),
    Case("memory", "```python\nx = []\nwhile True: x.append(bytearray(10**8))\n```", "assert f(2) == 3"),
    Case("output", "```python\nwhile True: print('\\x1b[31m' * 10**6)\n```", "assert f(2) == 3"),
    Case("forks", "```python\nimport os\nwhile True: os.fork()\n```", "assert f(2) == 3"),
    Case("deep tests", "```python\ndef f(x): return 3\n```", "assert " + "(" * 3000 + "f(2)" + ")" * 3000),
    Case("long tests", "```python\ndef f(x): return 4\n```", "assert f(2) == 3\n" * 20_000),
]
FUNCTIONS = {
    "math": ({"name": "math"}, CASES, CONTROLS),
    "exact": ({"name": "exact"}, CASES, (Case("", " 42\n", "42", RIGHT), Case("", "42.", "42", WRONG))),
    "choice": (
        {"name": "choice", "choices": 4},
        CASES,
        (Case("", "The answer is B", "B", RIGHT), Case("", "B or C", "B", WRONG)),
    ),
    "numeric": ({"name": "numeric"}, CASES, (Case("", "about 1/3", "2/6", RIGHT), Case("", "0.333", "1/3", WRONG))),
    "regex": (
        {"name": "regex", "pattern": "^(a+)+$|^<think>"},
        CASES,
        (Case("", "aaa", expected=RIGHT), Case("", "aab", expected=WRONG)),
    ),
    "json_schema": (
        {"name": "json_schema", "schema": {"required": ["value"]}, "equals_reference": True},
        CASES,
        (
            Case("", '{"value": 42}', '{"value": 42.0}', RIGHT),
            Case("", '{"value": 41}', '{"value": 42}', WRONG),
        ),
    ),
    "length": (
        {"name": "length", "max": 4},
        CASES,
        (Case("", "four words are right", expected=RIGHT), Case("", "word " * 8, expected=WRONG)),
    ),
    "language": (
        {"name": "language", "script": "Latin"},
        CASES,
        (Case("", "Latin", expected=RIGHT), Case("", "кириллица", expected=WRONG)),
    ),
    "python_tests": (
        {"name": "python_tests", "timeout_seconds": 0.5},
        CODE,
        (
            Case("", "```python\ndef f(x): return x + 1\n```", "assert f(2) == 3", RIGHT),
            Case("", "```python\ndef f(x): return x\n```", "assert f(2) == 3", WRONG),
        ),
    ),
    "several": (
        [
            {"name": "math"},
            {"name": "regex", "pattern": "a", "weight": 0.1},
            {"name": "length", "max": 9, "weight": 0.1},
        ],
        CASES[::3],
        CONTROLS[:4],
    ),
}
STRICT = ("math", "exact", "python_tests", "several")
"""Functions that no case satisfies unless it is right; a hostile text may well be short, Latin, or hold a letter."""


def request(case: Case, number: int) -> tuple[str, Problem]:
    question = {"role": "user", "content": f"Question {number}?"}
    return case.text, Problem(id=f"p-{number}", messages=(question,), answer=case.reference)


def peak_mib() -> float:
    """Return the most memory that a worker which is alive has had, MiB."""
    found = [0]
    for worker in psutil.Process().children():
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker.pid}/status").read_text()))
    return max(found) / 1024


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_case_hangs_runs_or_changes_a_neighbours_verdict(name, tmp_path, monkeypatch):
    if name == "python_tests" and (reason := sandbox.uncontained_reason()):
        pytest.skip(f"code cannot be contained here: {reason}")
    functions, cases, controls = FUNCTIONS[name]
    monkeypatch.chdir(tmp_path)  # where workers run, and so hostile code
    cases = cases[::STRIDE]
    settings = {"functions": functions if isinstance(functions, list) else [functions], "timeout_seconds": TIMEOUT}
    if name == "several":
        settings["positive_if"] = ["math"]
    slowest, peak, wrong, outcomes = 0.0, 0.0, [], dict.fromkeys(map(str, Outcome), 0)
    with Grader(RewardRecipe.model_validate(settings)) as grader:
        unreadable = grader.unreadable([request(case, number)[1] for number, case in enumerate(cases)])
        for number, (case, beside) in enumerate(zip(cases, pairwise(cycle(controls)), strict=False)):
            batch = [beside[0], case, beside[1]]
            began = time.monotonic()
            rewards = grader.grade([request(one, number) for one in batch])
            slowest, peak = max(slowest, time.monotonic() - began), max(peak, peak_mib())
            for one, reward in zip(batch, rewards, strict=True):
                if one is not case:  # its reference is readable and its verdict known
                    if (reward.outcome is Outcome.CORRECT) != (one.expected == RIGHT) or not reward.outcome.is_graded:
                        wrong.append((f"beside {case.name}", one, reward))
                    continue
                accepted = reward.positive and name in STRICT and case.expected == WRONG
                refused = not reward.positive and name == "math" and case.expected == RIGHT
                if accepted or refused or (reward.outcome is Outcome.ERROR and f"p-{number}" not in unreadable):
                    wrong.append((case.name, reward))
            outcomes[rewards[1].outcome] += 1
    print(f"{name}: {len(cases)} cases, {outcomes}, slowest {slowest:.1f} s, peak of a worker {peak:.0f} MiB")  # noqa: T201
    assert wrong == []
    assert slowest < LONGEST
    assert peak < MEMORY_MIB
    assert not list(tmp_path.rglob(CANARY))


def groups() -> list[Group]:
    """A group of three for every case, as the curriculum hands them on."""
    made = []
    for number, case in enumerate(CASES):
        problem = Problem(
            id=f"p-{number}", messages=({"role": "user", "content": case.reference},), answer=case.reference
        )
        told = {"answer": case.text[:100_000], "detail": case.text[:500], "parts": {"math": 0.5}}
        outcomes = {Outcome.CORRECT: True, Outcome.INCORRECT: False}
        rewards = [Reward(value=0.5, outcome=o, positive=right, **told) for o, right in outcomes.items()]
        completion = Completion(
            token_ids=(1,), sampler_logps=(-0.5,), finish_reason=FinishReason.STOP, text=case.text[:100_000],
            messages=({"role": "assistant", "content": case.text[:100_000]},),
        )  # fmt: skip
        prompt = Prompt(problem=problem, token_ids=(1,))
        made.append(
            Group(
                rollouts=tuple(
                    Rollout(prompt=prompt, completion=completion, reward=reward, policy_version=0, index=index)
                    for index, reward in enumerate(rewards)
                )
            )
        )
    return made


def test_samples_metrics_and_shapes_hold_every_text(tmp_path):
    """What the trainer does with texts in its own process, which no timeout guards."""
    made, path = groups(), tmp_path / "samples.jsonl"
    began = time.monotonic()
    values = rollout_metrics(made, ArithmeticTask(digits=2), first_round=2) | shape_metrics(made, start_shapes(made, 2))
    record = make_record(values | {"step": 0})
    for group in made[1:]:
        shaped = record | {"top_shape": "x", "top_shape_start_ratio": 0.0, "top_shape_ratio": 1.0}
        count_takeover({}, shaped)
        assert takeover_message(record, [group], {}) is None
    lines = [sample_line(0, group) for group in made]
    for line in [*lines, *sample_views(0, made, len(made)), record]:
        append_line(path, line)
    assert time.monotonic() - began < 60
    read = read_lines(path)
    assert read[: len(lines)] == json.loads(json.dumps(lines))
    assert read[-1] == json.loads(json.dumps(record))
    assert path.read_bytes().decode("utf-8").count("\n") == len(read)


def test_the_corpus_is_large_and_its_cases_are_named_once():
    assert len(CASES) >= 300
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.expected for case in CASES} == {WRONG, RIGHT, ANY}
