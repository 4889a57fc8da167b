"""Check scores by enumeration, by hand and by simulation; check that a killed evaluation resumes."""

from __future__ import annotations

import asyncio
import datetime
import io
import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from rich.console import Console

from popo_lite.errors import CheckpointError, DataError, GradingError, ModelError, UserInputError
from popo_lite.evaluation import pass_at_k
from popo_lite.grading import Grader
from popo_lite.policy.load import TINY_FOLDER, load_tokenizer
from popo_lite.policy.policy import load_policy
from popo_lite.recipe import MathFunction, ModelRecipe, Recipe, RewardRecipe
from popo_lite.recipe_file import dump_recipe
from popo_lite.run_folder import append_line
from popo_lite.samplers import SamplingParams
from popo_lite.samplers.base import Request
from popo_lite.samplers.server_client import ServerClient
from popo_lite.tasks.rendering import Renderer
from popo_lite.tools.benchmarks import scores
from popo_lite.tools.benchmarks.command import eval_, with_options
from popo_lite.tools.benchmarks.datasets import BENCHMARKS, unreadable_references, within_tolerance
from popo_lite.tools.benchmarks.run import EvaluationFolder, plan_chunks, prepare, settings_of
from popo_lite.tools.benchmarks.run import _grade as grade_chunk
from popo_lite.tools.benchmarks.scores import (
    benchmark_report,
    bootstrap_interval,
    majority_at_k,
    refuse_ungraded,
    summarise,
)
from popo_lite.tools.benchmarks.subject import open_model, open_run
from popo_lite.types import Completion, FinishReason, Outcome, Problem, Prompt, Reward


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_answer(samples):
    for right in range(samples + 1):
        verdicts = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            choices = list(itertools.combinations(verdicts, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        ("5 7 7 5 7", "n y y n y", 5, 1.0),
        ("5 5 7 7", "n n y y", 4, 0.0),  # a tie: 5 came first
        ("7 5 5 7", "y n n y", 4, 1.0),  # a tie: 7 came first
        ("- - - 7", "n n n y", 4, 1.0),  # no answer has no vote
        ("- - - -", "n n n n", 4, 0.0),
        ("5 5 7 7 7 5", "n n y y y n", 2, 2 / 3),  # won, in turn: no, yes, and yes by the tie
        ("5 5 7 7 7 5", "n n y y y n", 4, 0.0),  # the last two make no block
        ("7 5", "y n", 1, 0.5),
    ],
)
def test_majority_by_hand(answers, right, k, expected):
    answers = [None if answer == "-" else answer for answer in answers.split()]
    right = [verdict == "y" for verdict in right.split()]
    assert majority_at_k(answers, right, k) == pytest.approx(expected, abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch):
    """400 benchmarks of 60 problems: the limits are four standard errors of a coverage of 95 %, less 2 for skew."""
    monkeypatch.setattr(scores, "RESAMPLES", 1000)
    generator = np.random.default_rng(0)
    truth, covered = 0.4, 0
    for _ in range(400):
        chances = generator.beta(0.8, 1.2, size=60)  # its mean is 0.4
        low, high = bootstrap_interval([list(generator.binomial(8, chances) / 8)])
        covered += low <= truth <= high
    assert 0.90 * 400 <= covered <= 0.99 * 400


def test_the_interval_is_that_of_a_mean():
    """Against the normal interval, which the bootstrap's comes close to with many problems."""
    values = list(np.random.default_rng(1).random(1000))
    low, high = bootstrap_interval([values])
    error = 1.96 * np.std(values) / np.sqrt(1000)
    assert (low, high) == pytest.approx((np.mean(values) - error, np.mean(values) + error), abs=0.05 * error)
    assert bootstrap_interval([values]) == (low, high)
    assert bootstrap_interval([[0.25] * 7]) == (0.25, 0.25)


def test_the_interval_of_an_average_counts_benchmarks_alike():
    """One benchmark of 30 and one of 300 problems: the variance of the mean of their means."""
    generator = np.random.default_rng(2)
    few, many = list(generator.random(30)), list(generator.random(300))
    low, high = bootstrap_interval([few, many])
    error = 1.96 * np.sqrt(np.var(few) / 30 + np.var(many) / 300) / 2
    assert high - low == pytest.approx(2 * error, rel=0.06)
    assert low < (np.mean(few) + np.mean(many)) / 2 < high


def line(problem, verdicts, *, seed=0, benchmark="amc23", weights="base", **keys):
    """`verdicts` is a letter a sample: right, wrong, unparsed, timeout."""
    outcomes = {"r": "correct", "w": "incorrect", "u": "unparsed", "t": "timeout"}
    return {
        "weights": weights,
        "seed": seed,
        "benchmark": benchmark,
        "problem": f"{benchmark}/{problem}",
        "reference": "5",
        "answers": [{"r": "5", "w": "7"}.get(verdict) for verdict in verdicts],
        "outcomes": [outcomes[verdict] for verdict in verdicts],
        "tokens": keys.get("tokens", [10] * len(verdicts)),
        "truncated": keys.get("truncated", [False] * len(verdicts)),
        "text": "",
        "unreadable": keys.get("unreadable"),
    }


def test_figures_of_a_benchmark_by_hand():
    lines = [
        line(1, "rwwr", tokens=[10, 20, 30, 40], truncated=[False, False, False, True]),
        line(2, "wwwu"),
        line(3, "trrr"),
    ]
    (result,) = summarise(lines, 2)
    score = result["pooled"]
    assert (result["problems"], score["samples_per_problem"]) == (3, 4)
    assert score["average"] == pytest.approx((2 / 4 + 0 + 3 / 4) / 3)
    assert score["pass_at_k"] == pytest.approx({1: 5 / 12, 2: (5 / 6 + 0 + 1) / 3, 4: 2 / 3})
    # Two votes each. Problem 1: right by the tie, wrong by the tie; 2: wrong, wrong; 3: right (no vote), right.
    assert score["majority_at_k"] == pytest.approx({2: (0.5 + 0 + 1) / 3, 4: 2 / 3})
    assert score["truncated_ratio"] == pytest.approx(1 / 12)
    assert score["ungraded_ratio"] == pytest.approx(1 / 12)  # an answer that is not there is a verdict
    assert score["completion_tokens_mean"] == pytest.approx((25 + 10 + 10) / 3)
    for figure, value in (("average", score["average"]), ("pass@2", score["pass_at_k"][2])):
        low, high = score["intervals"][figure]
        assert low < value < high
    assert result["by_seed"] == {0: score}


def test_seeds_are_pooled_and_benchmarks_averaged_alike():
    lines = [
        line(problem, verdicts, seed=seed, benchmark=benchmark)
        for seed, rows in ((0, ("rw", "rr", "ww")), (5, ("ww", "rw", "ww")))
        for benchmark, problem, verdicts in zip(("amc23", "amc23", "aime24"), (1, 2, 1), rows, strict=True)
    ]
    amc, aime, average = summarise(lines, 2)
    assert [amc["benchmark"], aime["benchmark"], average["benchmark"]] == ["amc23", "aime24", "average"]
    assert amc["pooled"]["samples_per_problem"] == 4
    assert amc["pooled"]["average"] == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert amc["pooled"]["pass_at_k"][2] == pytest.approx((1 / 2 + 1) / 2)
    assert {seed: score["average"] for seed, score in amc["by_seed"].items()} == {0: 0.75, 5: 0.25}
    # Two problems of one benchmark and one of the other: the average is of benchmarks, not of problems.
    assert average["pooled"]["average"] == pytest.approx((amc["pooled"]["average"] + aime["pooled"]["average"]) / 2)
    assert average["by_seed"][0]["average"] == pytest.approx(0.375)
    assert average["problems"] == 3


def test_weights_are_kept_apart():
    lines = [line(1, "rr", weights="base"), line(1, "ww", weights="adapter")]
    assert [(r["weights"], r["pooled"]["average"]) for r in summarise(lines, 1)] == [("base", 1.0), ("adapter", 0.0)]


def test_too_many_ungraded_answers_are_an_error_of_the_benchmark():
    lines = [line(1, "tttw"), line(2, "rrrr")]
    refuse_ungraded(lines, planned=2, limit=0.375)
    with pytest.raises(GradingError, match=r"38% of the answers to amc23 .* amc23/1 \(3 timeout, 0 error\)") as caught:
        refuse_ungraded(lines, planned=2, limit=0.37)
    assert caught.value.where == "weights base"


def test_a_few_problems_that_cannot_be_graded_do_not_stop_a_long_benchmark():
    hanging = [line(number, "tttt") for number in range(1, 6)]
    refuse_ungraded(hanging[:4], planned=500, limit=0.2)  # 4 of the 20 that are judged at least
    with pytest.raises(GradingError, match="25% of the answers"):
        refuse_ungraded(hanging, planned=500, limit=0.2)
    refuse_ungraded([*hanging, *(line(number, "rrrr") for number in range(6, 26))], planned=500, limit=0.2)


def test_problems_without_a_readable_answer_count_as_not_solved_and_stop_nothing():
    lines = [line(1, "rr"), *(line(number, "tt", unreadable="is no answer") for number in (2, 3, 4))]
    refuse_ungraded(lines, planned=4, limit=0.2)
    (result,) = summarise(lines, 2)
    assert (result["problems"], result["unreadable"], result["pooled"]["average"]) == (4, 3, 0.25)
    output = io.StringIO()
    benchmark_report([result], k=2, output="x", console=Console(file=output, width=200))
    assert "AMC23: 3 of 4 problems cannot be graded and count as not solved." in output.getvalue()


def test_an_answer_that_repeats_an_unreadable_reference_is_not_right():
    prompts = {
        ("base", 0, "x", name): Prompt(problem=Problem(id=name, messages=(), answer=r"\frac{1}{"), token_ids=(1,))
        for name in ("x/1", "x/2")
    }
    answer = Completion(
        token_ids=(1,), sampler_logps=(0.0,), finish_reason=FinishReason.STOP, text=r"\boxed{\frac{1}{}"
    )
    grader = SimpleNamespace(grade=lambda answers: [Reward(value=1.0, outcome=Outcome.CORRECT) for _ in answers])
    lines = grade_chunk(prompts, [[answer]] * 2, grader, {"x/2": "it is no answer"})
    found = [(line["outcomes"], line["answers"], line["unreadable"]) for line in lines.values()]
    assert found == [(["correct"], [None], None), (["error"], [None], "it is no answer")]


GRADABLE = (
    r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\text{Evelyn}", r"90^\circ", "6 - 5i", "52_8", r"x \in [-2,7]",
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", r"\text{(C)}", r"\$18.90", r"\$32,\!348", r"10\%",
    r"11,\! 111,\! 111,\! 100", r"\text{June 20}", r"5.4 \text{ cents}", r"15\mbox{ cm}^2", r"\{1\pm\sqrt{5},-2\}",
    r"(-\infty, 2) \cup (3, \infty)", r"1\frac{4}{5}", "10:15", "$2,-2$", "$2$, $-2$", r"$\frac{n(n+1)}{2}$",
    "$(1,8,19),(2,7,13),(4,5,7)$", "$f(x)=2x+c$", r"$k \geq 2$", r"$n \equiv 1 \pmod 2$", r"$\binom{2n}{n}$",
    r"$(-\infty, \frac{1}{3}]$", r"$2^{2021}$", r"$20 \mathrm{~cm}$", "1200", "033",
)  # fmt: skip


def test_references_that_nothing_can_be_graded_against_are_found():
    """Answers in the forms that MATH-500, OlympiadBench, AIME and GSM8K have them in, and three that are none."""
    wrong = (r"\frac{1}{", "x" * 2000, "{" * 30 + "1" + "}" * 30)
    problems = [
        Problem(id=f"x/{n}", messages=(), answer=answer, meta={}) for n, answer in enumerate((*GRADABLE, *wrong))
    ]
    with Grader(RewardRecipe(workers=1)) as grader:
        found = unreadable_references(problems, grader)
    assert list(found) == [problem.id for problem in problems[len(GRADABLE) :]]
    for error, text in zip(found.values(), ("not an expression", "characters long", "nested 30"), strict=True):
        assert text in error


@pytest.mark.parametrize(
    ("answer", "reference", "tolerances", "outcome"),
    [
        ("5.04", "$5$", "0.05", "correct"), ("4.95", "5", "5e-2", "correct"), ("5.06", "5", ".05", "incorrect"),
        ("5.04", "5", None, "incorrect"), ("x", "5", "9", "incorrect"), ("5", "2, 3", "9", "incorrect"),
        # On the boundary, where floating point says no: 2.5 - 2.4 > 0.1.
        ("2.4", "2.5", "1e-1", "correct"), ("2.3999999999999999999999", "2.5", "1e-1", "incorrect"),
        (r"\frac{239}{3}", "$79.67$", "1e-1", "correct"), (r"-\dfrac{239}{3}", "-79.67", "1e-1", "correct"),
        ("239/3", "79.67", "1e-1", "correct"), ("239/3", "79.67", "1e-3", "incorrect"),
        (r"\frac{1}{0}", "1", "9", "incorrect"), (r"\sqrt{2}", "1.41", "9", "incorrect"),
        ("1,234", "1234.5", "1", "correct"),
        # Several numbers, in any order; each with the tolerance of its reference.
        ("3.1, 2.4", "$2.5,3$", "1e-1", "correct"), ("$3.1$, $2.4$", "$2.5$, $3$", "1e-1", "correct"),
        ("3.1, 2.3", "2.5, 3", "1e-1", "incorrect"), ("2.4, 2.4", "2.5, 3", "1e-1", "incorrect"),
        ("3.01, 2.4", "2.5, 3", "1e-1,1e-2", "correct"), ("3.02, 2.4", "2.5, 3", "1e-1,1e-2", "incorrect"),
        ("2.2, 2", "2, 2.1", "0.3,0.1", "correct"), ("2.4", "2.5, 3", "1e-1", "incorrect"),
    ],
)  # fmt: skip
def test_numbers_may_be_off_by_the_tolerance(answer, reference, tolerances, outcome):
    meta = {} if tolerances is None else {"tolerance": tuple(tolerances.split(","))}
    problem = Problem(id="x", messages=(), answer=reference, meta=meta)
    reward = Reward(value=0.0, outcome=Outcome.INCORRECT, answer=answer)
    found = within_tolerance(reward, problem)
    assert (found.outcome, found.value) == (outcome, float(outcome == "correct"))
    timeout = Reward(value=0.0, outcome=Outcome.TIMEOUT, answer=answer)
    assert within_tolerance(timeout, problem) is timeout


def test_tolerances_are_as_many_as_the_numbers():
    problems = [
        Problem(id=answer, messages=(), answer=answer, meta={"tolerance": ("1e-1", "1e-2")}) for answer in ("1, 2", "1")
    ]
    with Grader(RewardRecipe(workers=1)) as grader:
        assert unreadable_references(problems, grader) == {"1": "it names 2 tolerances for the 1 numbers of '1'"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelRecipe())


def prepared(tokenizer, count=5, *, longest=1, limit=200, context=1024, skip=False, tokens=100, name="amc23"):
    problems = [
        Problem(
            id=f"{name}/{n}",
            messages=({"role": "user", "content": "What is 1 + 2? " * (longest if n == 1 else 1)},),
            answer="3",
        )
        for n in range(1, count + 1)
    ]
    renderer = Renderer(Recipe().with_values({"rollout.max_prompt_length": limit}), tokenizer)
    return prepare(name, problems, renderer, max_completion_length=tokens, context_tokens=context, skip_overlong=skip)


def test_overlong_prompts_are_an_error_or_left_out_and_counted(tokenizer):
    with pytest.raises(DataError, match=r"amc23: 1 of 5 prompts are longer than 60 tokens, the longest, amc23/1") as e:
        prepared(tokenizer, longest=9, limit=60)
    assert "--skip-overlong" in e.value.next_step
    found = prepared(tokenizer, longest=9, limit=60, skip=True)
    assert (found.contents["skipped"], found.prompts[0].problem.id) == (1, "amc23/2")
    assert (
        found.settings["digest"]
        == prepared(tokenizer, longest=9).settings["digest"]
        != prepared(tokenizer).settings["digest"]
    )


def test_all_that_is_asked_is_in_the_digest(tokenizer):
    """Token ids, so that a tokenizer whose own template was changed asks something else; answers; tolerances."""

    def digest(answer="3", meta=None, system_prompt=None, template=None):
        asked = {"role": "user", "content": "What is 1 + 2?"}
        problem = Problem(id="amc23/1", messages=(asked,), answer=answer, meta=meta or {})
        own, tokenizer.chat_template = tokenizer.chat_template, template or tokenizer.chat_template
        try:
            renderer = Renderer(Recipe().with_values({"data.system_prompt": system_prompt}), tokenizer)
            return prepare(
                "amc23", [problem], renderer, max_completion_length=9, context_tokens=1024, skip_overlong=False
            ).settings["digest"]
        finally:
            tokenizer.chat_template = own

    assert digest() == digest()
    others = [
        digest(answer="4"), digest(meta={"tolerance": ("1e-1",)}), digest(meta={"tolerance": ("1e-2",)}),
        digest(system_prompt="Be brief."), digest(template="Q: {{ messages[0].content }}"),
    ]  # fmt: skip
    assert len({digest(), *others}) == 6


def test_repeated_questions_and_missing_problems_are_counted(tokenizer):
    found = prepared(tokenizer, count=3, longest=2)
    assert found.contents == {
        "rows": 3,
        "published": 40,
        "skipped": 0,
        "unreadable": {},
        "repeats": {"amc23/3": "amc23/2"},
    }


def test_answers_end_with_the_context(tokenizer):
    longest = prepared(tokenizer).longest_prompt
    assert prepared(tokenizer, tokens=100, context=longest + 100).max_completion_length == 100
    assert prepared(tokenizer, tokens=100, context=longest + 99).max_completion_length == 99
    with pytest.raises(ModelError, match="no tokens for an answer"):
        prepared(tokenizer, context=longest)


def new_folder(tmp_path):
    folder = EvaluationFolder(tmp_path / "out")
    with folder.locked():
        folder.start({})
    return folder


@pytest.fixture(scope="module")
def plan(tokenizer):
    """Two chunks of two problems and one of one, under two seeds."""
    settings = {"weights": ["base"], "seeds": [0, 1], "samples": 8, "max_num_seqs": 4}
    chunks = plan_chunks([prepared(tokenizer)], settings)
    assert [len(chunk) for chunk in chunks] == [2, 2, 1] * 2
    return chunks


def append(folder, lines):
    for one in lines:
        append_line(folder.answers_path, one)


def lines_of(plan):
    return [line(int(problem.split("/")[1]), "rw", seed=seed) for chunk in plan for _, seed, _, problem in chunk]


@pytest.mark.parametrize(("written", "whole"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 3), (7, 4), (10, 6)])
def test_chunks_with_all_their_lines_are_kept(plan, tmp_path, written, whole):
    folder = new_folder(tmp_path)
    assert folder.resume(plan) == {}
    every = lines_of(plan)
    append(folder, every[:written])
    if written < len(every):
        with folder.answers_path.open("ab") as file:
            file.write('{"weights": "base", "text": "é'.encode()[:-1])  # torn by a kill, inside a character
    kept = sum(map(len, plan[:whole]))
    assert list(folder.resume(plan).values()) == every[:kept]
    assert len(folder.answers_path.read_text().splitlines()) == kept
    append(folder, every[kept:])
    assert list(folder.resume(plan).values()) == every


def test_finished_chunks_are_kept_wherever_they_are(plan, tmp_path):
    """Problems 1 and 2 are a chunk and so is 5; of the chunk of 3 and 4, 3 is missing."""
    folder = new_folder(tmp_path)
    append(folder, [*lines_of(plan)[:2], line(5, "rr"), line(4, "rr")])
    assert [key[3] for key in folder.resume(plan)] == ["amc23/1", "amc23/2", "amc23/5"]
    assert len(folder.answers_path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([0, 1, 0, 1], "line 3 repeats another one"),
        ([*range(10), 9], "line 11 repeats another one"),
        ([0, 1, None], "line 3 is not of this evaluation"),
    ],
)
def test_a_changed_file_is_refused(plan, tmp_path, lines, message):
    every = lines_of(plan)
    folder = new_folder(tmp_path)
    append(folder, [line(6, "rr") if index is None else every[index] for index in lines])
    before = folder.answers_path.read_bytes()
    with pytest.raises(CheckpointError, match=message) as caught:
        folder.resume(plan)
    assert caught.value.where == str(folder.answers_path)
    assert folder.answers_path.read_bytes() == before


def test_one_evaluation_at_a_time_works_in_a_folder(tmp_path):
    folder = EvaluationFolder(tmp_path / "out")
    with folder.locked():
        with pytest.raises(UserInputError, match="another evaluation is running") as caught, folder.locked():
            pass
        assert caught.value.where == str(tmp_path / "out")
    with EvaluationFolder(tmp_path / "out").locked():  # also if the first was killed before its settings
        pass


def test_other_settings_are_refused_with_the_difference(tmp_path):
    folder = new_folder(tmp_path)
    folder.settings_path.unlink()
    folder.start({"samples": 4, "benchmarks": {"amc23": {"digest": "a"}}, "seeds": (0, 1)})
    folder.start({"samples": 4, "benchmarks": {"amc23": {"digest": "a"}}, "seeds": (0, 1)})
    with pytest.raises(CheckpointError) as caught:
        folder.start({"samples": 8, "benchmarks": {"amc23": {"digest": "b"}}, "seeds": (0, 1)})
    assert "benchmarks.amc23.digest was 'a' and is 'b'; samples was 4 and is 8" in caught.value.what
    assert "--output" in caught.value.next_step


def test_an_evaluation_keeps_the_date_of_its_first_day(tmp_path):
    assert EvaluationFolder(tmp_path / "new").date() == datetime.date.today()
    folder = EvaluationFolder(tmp_path / "out")
    with folder.locked():
        folder.start({"date": "2026-01-17"})
    assert folder.date() == datetime.date(2026, 1, 17)
    assert with_options(Recipe(), {**options(), "date": folder.date()}).data.date == folder.date()


def test_a_benchmark_has_no_environment():
    recipe = Recipe().with_values({"rollout.environment.name": "a_module:Game", "rollout.environment.max_turns": 9})
    asked = with_options(recipe, options())
    assert [function.name for function in recipe.grading.functions] == ["environment"]
    assert [function.name for function in asked.grading.functions] == ["math"]
    assert asked.rollout.environment.name is None


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserInputError, match="holds no evaluation"), EvaluationFolder(tmp_path).locked():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_report_has_a_row_for_each_benchmark_and_weights(monkeypatch):
    lines = [
        line(problem, "rrww" if weights == "base" else "rrrw", seed=seed, weights=weights, benchmark=benchmark)
        for weights in ("base", "adapter")
        for seed in (0, 1)
        for benchmark in ("amc23", "aime24")
        for problem in (1, 2)
    ]
    output = io.StringIO()
    monkeypatch.setitem(BENCHMARKS, "amc23", replace(BENCHMARKS["amc23"], problems=2))
    monkeypatch.setitem(BENCHMARKS, "aime24", replace(BENCHMARKS["aime24"], title="[b]AIME24"))
    benchmark_report(summarise(lines, 2), k=2, output="runs/[x]", console=Console(file=output, width=200))
    rows = [row.split() for row in output.getvalue().splitlines()]
    table = [row[:2] for row in rows if len(row) > 2 and row[1] in ("base", "adapter") and row[2].isdecimal()]
    assert table == [[title, weights] for title in ("AMC23", "[b]AIME24", "average") for weights in ("base", "adapter")]
    found = next(row for row in rows if row[:2] == ["AMC23", "base"])
    # avg@8, pass@2 = 1 - C(4, 2) / C(8, 2), and two of four votes; all problems are alike, so the intervals are points.
    assert found[2:12] == ["2", "50.0%", "50.0", "to", "50.0", "78.6%", "78.6", "to", "78.6", "50.0%"]
    assert ["AMC23", "adapter", "avg@4", "75.0%", "75.0%"] in rows
    text = output.getvalue()
    assert "[b]AIME24 has 30 problems; 2 were measured." in text
    assert "AMC23 has" not in text
    assert "Answers and results: runs/[x]" in text


def options(*arguments):
    return eval_.make_context("eval", ["tiny", "--benchmarks", "aime25", *map(str, arguments)]).params


def test_a_template_that_is_given_reaches_prompts_and_stop_ids(tmp_path):
    """Its end of turn is not an EOS of the model, and must end answers all the same."""
    subject = open_model("tiny", ())
    tokenizer = load_tokenizer(subject.recipe.model)
    end = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + end + "{% endif %};{% endfor %}"
    )
    lengths = ("--max-prompt-tokens", 100, "--max-tokens", 9)
    plain = subject.load(with_options(subject.recipe, options(*lengths)))
    given = options(*lengths, "--chat-template", file, "--system-prompt", "Add.")
    recipe = with_options(subject.recipe, given)
    policy = subject.load(recipe)
    assert tokenizer.convert_tokens_to_ids(end) not in plain.stop_ids
    assert policy.stop_ids == plain.stop_ids | {tokenizer.convert_tokens_to_ids(end)}
    problem = Problem(id="x", messages=({"role": "user", "content": "1 + 2?"},), answer="3")
    assert tokenizer.decode(Renderer(recipe, tokenizer).token_ids(problem)) == "Add.;1 + 2?;"
    file.write_bytes(b"\xff")
    with pytest.raises(UserInputError, match="cannot be read"):
        with_options(subject.recipe, given)


def test_what_the_command_line_leaves_out_is_the_recipes(tiny_recipe):
    recipe = tiny_recipe(
        "eval.temperature=0.6", "rollout.max_completion_length=50", "data.system_prompt=Add.", "rollout.engine=hf",
        "reward.functions=json:loads",
    )  # fmt: skip
    same = with_options(recipe, options())
    assert (same.eval.temperature, same.rollout.max_completion_length) == (0.6, 50)
    assert same.rollout.max_prompt_length == 2048
    assert (same.data.system_prompt, same.rollout.engine, same.grading.functions) == ("Add.", "hf", (MathFunction(),))
    other = with_options(
        recipe,
        options("--temperature", 0.7, "--max-tokens", 9, "--system-prompt", "", "--engine", "server"),
    )
    assert (other.eval.temperature, other.rollout.max_completion_length) == (0.7, 9)
    assert (other.data.system_prompt, other.rollout.engine) == (None, "server")


def test_the_time_for_an_answer_is_one_of_the_settings(tiny_recipe):
    subject = open_model("tiny", ())
    recipes = [tiny_recipe(f"reward.timeout_seconds={time}") for time in (5, 6)]
    settings = [settings_of(replace(subject, recipe=recipe), [], {}) for recipe in recipes]
    assert [found.pop("timeout_seconds") for found in settings] == [5.0, 6.0]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_with_other_files_is_another_model(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(TINY_FOLDER, folder)
    before = open_model(str(folder), ()).digests
    (folder / "notes.md").write_text("mine")
    assert open_model(str(folder), ()).digests == before
    (folder / name).write_text("{}")
    assert open_model(str(folder), ()).digests != before


def test_measuring_packs_no_rows(tiny_recipe):
    """So that a model is measured too that does not keep packed sequences apart."""
    recipe = tiny_recipe()
    assert load_policy(recipe).packing != "off"
    assert open_model("tiny", ()).load(recipe).packing == "off"


def test_the_base_of_a_run_needs_no_end_of_it(tiny_recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text(dump_recipe(tiny_recipe()))
    assert open_run(tmp_path, ["base"]).adapters == {"base": None}
    for wanted in (["base", "adapter"], []):
        with pytest.raises(CheckpointError, match="the run has not ended"):
            open_run(tmp_path, wanted)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_servers_receive_top_p(top_p):
    asked = []

    def answer(request):
        asked.append(json.loads(request.content))
        choice = {"token_ids": [5, 1], "logprobs": {"token_logprobs": [-0.1, -0.2]}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    async def complete():
        client = ServerClient("http://localhost")
        transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        client._client = client._client.with_options(http_client=transport)
        params = SamplingParams(temperature=0.7, top_p=top_p, max_completion_length=8)
        prompt = Prompt(problem=Problem(id="", messages=(), answer=""), token_ids=(3,))
        await client.complete(Request(prompt, seed=0, max_tokens=8), params, frozenset({1}))

    asyncio.run(complete())
    assert asked[0]["top_p"] == top_p
