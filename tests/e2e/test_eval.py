"""`popo-lite eval --benchmarks`, the real command: known scores, every kind of model, a kill in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from helpers import json_lines
from popo_lite.cli import main
from popo_lite.grading import Grader
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.samplers import vllm
from popo_lite.tools.benchmarks.command import eval_, pick_k
from popo_lite.tools.benchmarks.run import EvaluationFolder
from popo_lite.types import Outcome, Reward

SUMS = ((17, 25), (12, 34), (40, 41), (23, 58), (11, 88), (36, 47), (64, 29), (35, 35))


def question(a, b):
    return f"What is {a} + {b}?"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def greedy():
    """The tiny model's likeliest answer to each sum, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    model = AutoModelForCausalLM.from_pretrained(TINY_FOLDER, dtype=torch.float32).eval()
    found = {}
    for a, b in SUMS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question(a, b)}], add_generation_prompt=True, return_tensors="pt",
            return_dict=False,
        )  # fmt: skip
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
        found[a, b] = int(tokenizer.decode(output, skip_special_tokens=True).rpartition("{")[2].rstrip("}"))
    return found


def rows_of(name, answers):
    """Rows as the benchmark publishes them, with these whole numbers for answers."""
    for number, ((a, b), answer) in enumerate(answers.items()):
        asked = question(a, b)
        yield {
            "math500": {"problem": asked, "solution": "...", "answer": f"\\frac{{{2 * answer}}}{{2}}",
                        "subject": "Algebra", "level": 1, "unique_id": f"test/algebra/{number}.json"},
            "amc23": {"id": number, "answer": float(answer), "question": asked, "url": "https://example.org"},
            "aime24": {"id": number, "problem": asked, "solution": "...", "answer": f"{answer:03}", "url": "u",
                       "year": "2024"},
            "aime25": {"problem": asked, "answer": str(answer), "id": str(number)},
            "olympiadbench": {"id": number, "context": None, "question": asked, "solution": ["..."],
                              "final_answer": [f"$\\sqrt{{{answer * answer}}}$"], "is_multiple_answer": False,
                              "unit": None, "answer_type": "Numerical", "error": None, "subfield": "Algebra"},
            "gsm8k": {"question": asked, "answer": f"It is <<{a}+{b}={answer}>>{answer}.\n#### {answer}"},
        }[name]  # fmt: skip


RIGHT = {
    "math500": "rrrrrrww", "amc23": "wrwwwwww", "aime24": "rwrwrwrw", "aime25": "wwwwwwww", "olympiadbench": "rrrrrrrr",
    "gsm8k": "rrrwwwww",
}  # fmt: skip


@pytest.mark.slow
def test_hand_written_files_give_the_known_score(greedy, command, tmp_path):
    """A nucleus of one token leaves the likeliest answer, and the model is right where that is the reference."""
    options = []
    for name, verdicts in RIGHT.items():
        answers = {
            sum_: said if verdict == "r" else said + 300
            for (sum_, said), verdict in zip(greedy.items(), verdicts, strict=True)
        }
        rows = list(rows_of(name, answers))
        if name == "olympiadbench":  # right within its tolerance; and wrong, as a second answer is asked for
            rows[1] |= {"final_answer": [f"${greedy[SUMS[1]]}.1$"], "error": "1e-1"}
            rows[2] |= {"final_answer": [f"${greedy[SUMS[2]]}$", "$-1$"], "is_multiple_answer": True}
        options += ["--data", f"{name}={jsonl(tmp_path / f'{name}.jsonl', rows)}"]
    done = command(
        "eval", "tiny", "--benchmarks", "paper,gsm8k", *options, "--top-p", "0.001", "--samples", "4", "--k", "2",
        "--max-tokens", "60", "--output", "out", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert [line["answers"] for line in json_lines(tmp_path / "out/problems.jsonl")] == 6 * [
        [str(said)] * 4 for said in greedy.values()
    ]
    expected = {name: verdicts.count("r") / 8 for name, verdicts in RIGHT.items()} | {"olympiadbench": 7 / 8}
    expected["average"] = sum(expected.values()) / 6
    results = {result["benchmark"]: result for result in content["results"]}
    assert list(results) == ["math500", "amc23", "aime24", "aime25", "olympiadbench", "gsm8k", "average"]
    for name, result in results.items():
        score = result["pooled"]
        for figure in (score["average"], score["pass_at_k"]["2"], score["majority_at_k"]["2"]):
            assert figure == pytest.approx(expected[name], abs=1e-12), name
        assert score["ungraded_ratio"] == score["truncated_ratio"] == 0
        low, high = score["intervals"]["average"]
        assert low <= expected[name] <= high
        assert (low == high) == (expected[name] in (0, 1))
    assert json.loads((tmp_path / "out/results.json").read_text())["results"] == content["results"]


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "popo_lite", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_evaluation_resumes_and_equals_an_unbroken_one(command, tmp_path):
    sums = [(a, b) for a in range(10, 22) for b in range(30, 34)]
    file = jsonl(tmp_path / "amc.jsonl", rows_of("amc23", {(a, b): a + b for a, b in sums}))
    arguments = [
        "eval", "tiny", "--benchmarks", "amc23", "--data", f"amc23={file}", "--samples", "64", "--seeds", "0,3",
        "--top-p", "0.95", "--temperature", "0.7", "--max-tokens", "40", "--json", "--output",
    ]  # fmt: skip
    unbroken = command(*arguments, "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    process = start(tmp_path, *arguments, "killed")
    answers = tmp_path / "killed/problems.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (answers.is_file() and answers.read_text().count("\n") >= 12):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    lines = answers.read_text().count("\n")
    assert 12 <= lines < 96
    assert not (tmp_path / "killed/results.json").exists()
    # As a kill inside a chunk of 4 leaves it: a chunk that is not whole, and half a line.
    kept = answers.read_text().splitlines(keepends=True)[: lines - lines % 4 - 2]
    answers.write_text("".join(kept) + '{"weights": "mod')
    # Other settings are another evaluation.
    other = command(*[("32" if one == "64" else one) for one in arguments], "killed")
    assert other.returncode == 2
    assert "samples was 64 and is 32" in other.stderr.replace("\n", " ")
    resumed = command(*arguments, "killed")
    assert resumed.returncode == 0, resumed.stderr
    assert "parts are in killed already" in resumed.stderr
    for name in ("problems.jsonl", "results.json", "settings.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    # Finished: nothing is sampled again, and another k is another reading of the same answers.
    again = command(*arguments, "killed", "--k", "16")
    assert again.returncode == 0, again.stderr
    assert "16" in json.loads(again.stdout)["results"][0]["pooled"]["majority_at_k"]
    assert answers.read_bytes() == (tmp_path / "unbroken/problems.jsonl").read_bytes()
    # The two seeds drew other answers.
    found = json_lines(answers)
    assert [line["answers"] for line in found[:48]] != [line["answers"] for line in found[48:]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of four steps that learn much, so that its weights differ."""
    folder = tmp_path_factory.mktemp("run")
    process = start(
        folder, "train", "tiny_cpu", "--output", "run", "--set", "train.steps=4", "--set", "eval.problems=0",
        "--set", "optimizer.warmup_ratio=0.0", "--set", "optimizer.learning_rate=1e-2", "--set", "siamese.tau=0.5",
    )  # fmt: skip
    _, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    return folder / "run"


@pytest.mark.slow
def test_a_run_is_measured_in_all_its_weights_and_so_is_its_export(run_folder, command, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    sums = {(a, b): a + b for a, b in SUMS}
    file = jsonl(tmp_path / "aime.jsonl", rows_of("aime25", sums))
    common = ("--benchmarks", "aime25", "--data", f"aime25={file}", "--samples", "32", "--max-tokens", "40")
    done = command("eval", run, *common)
    assert done.returncode == 0, done.stderr
    assert "AIME25 has 30 problems; 8 were measured." in done.stdout
    lines = json_lines(run / "benchmarks/problems.jsonl")
    answers = {name: [line["answers"] for line in lines if line["weights"] == name] for name in RUN_WEIGHTS}
    assert all(len(found) == 8 for found in answers.values())
    assert answers["base"] != answers["adapter"] != answers["siamese"] != answers["base"]
    results = json.loads((run / "benchmarks/results.json").read_text())["results"]
    shares = {result["weights"]: result["pooled"]["average"] for result in results}
    for name in RUN_WEIGHTS:
        right = [answer == str(a + b) for (a, b), found in zip(sums, answers[name], strict=True) for answer in found]
        assert shares[name] == pytest.approx(sum(right) / len(right), abs=1e-12)
    alone = command("eval", run, *common, "--weights", "siamese", "--output", "alone", "--json")
    assert alone.returncode == 0, alone.stderr
    # What else is measured changes no answer.
    assert json_lines(tmp_path / "alone/problems.jsonl") == [line for line in lines if line["weights"] == "siamese"]
    exported = command("export", run, "--output", "merged", "--prompts", "8", "--problems", "0")
    assert exported.returncode == 0, exported.stderr
    merged = command("eval", "merged", *common, "--json")
    assert merged.returncode == 0, merged.stderr
    (result,) = json.loads(merged.stdout)["results"]
    assert result["weights"] == "model"
    # It is the trained policy, beyond rounding.
    assert result["pooled"]["average"] == pytest.approx(shares["adapter"], abs=0.02)
    # Without benchmarks, the run's held-out problems.
    held_out = command("eval", run, "merged", "--problems", "4", "--samples", "2", "--json")
    found = {result["weights"]: result["pass_rates"] for result in json.loads(held_out.stdout)["results"]}
    assert list(found) == [*RUN_WEIGHTS, "merged"]
    assert found["merged"] == found["adapter"]
    # A run that was trained on is another model.
    adapter = run / "adapter/adapter_model.safetensors"
    shutil.copy(run / "siamese/adapter_model.safetensors", adapter)
    changed = command("eval", run, *common)
    assert changed.returncode == 2
    assert "digests.adapter was" in changed.stderr


RUN_WEIGHTS = ("base", "adapter", "siamese")


def refused(*arguments):
    done = CliRunner().invoke(main, ["eval", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--benchmarks", "aime26"), 'no benchmark "aime26"'),
        (("tiny", "--benchmarks", "aime25", "--problems", "5"), "does not go with --benchmarks"),
        (("tiny", "--preset", "paper"), "--preset"),
        (("tiny", "--top-p", "0.9"), "is for benchmarks, and none is named"),
        (("tiny", "--benchmarks", "aime25", "--samples", "4", "--k", "8"), "pass@8 cannot be estimated from 4 samples"),
        (("tiny", "--benchmarks", "aime25", "--seeds", "0,0"), "different whole numbers"),
        (("tiny", "--benchmarks", "aime25", "--data", "amc23=x.jsonl"), "NAME=FILE of a benchmark in --benchmarks"),
        (("tiny", "--benchmarks", "aime25", "--weights", "base"), "is a model, not a run, and has no base"),
        (("tiny",), "recipe.toml is missing"),
        (("tiny", "other", "--benchmarks", "aime25"), "one model at a time"),
        (("tiny", "--benchmarks", "aime25", "--data", "aime25=aime25"), "is not a file of a known kind"),
        ((".", "--benchmarks", "aime25"), "holds neither a run (recipe.toml) nor a model (config.json)"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert list(Path.cwd().iterdir()) == []


def test_three_percent_of_malformed_rows_fail_with_their_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(rows_of("aime25", {(a, b): a + b for a in range(10, 30) for b in range(40, 50)}))
    lines = [json.dumps(row) for row in rows]
    for number in (7, 31, 90, 91, 133, 200):
        lines[number - 1] = lines[number - 1].replace('"answer"', '"reply"')
    Path("aime.jsonl").write_text("\n".join(lines))
    message = refused("tiny", "--benchmarks", "aime25", "--data", "aime25=aime.jsonl", "--output", "out")
    assert "6 of 200 rows are not AIME25's" in message
    assert [f"line {number}: " in message for number in (7, 31, 90, 91, 133, 200)] == [True] * 6
    assert "--data aime25=aime.jsonl" in message
    assert not Path("out").exists()


def test_problems_whose_references_cannot_be_read_count_as_not_solved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = list(rows_of("math500", {(a, 40): a + 40 for a in range(10, 20)}))
    rows[2]["answer"] = rows[8]["answer"] = "\\frac{1}{"
    jsonl(Path("math.jsonl"), rows)
    arguments = ("--data", "math500=math.jsonl", "--samples", "1", "--max-tokens", "9", "--output", "out", "--json")
    done = CliRunner().invoke(main, ["eval", "tiny", "--benchmarks", "math500", *arguments])
    assert done.exit_code == 0, done.output
    assert "math500: 2 of 10 problems cannot be graded and count as not solved" in done.stderr
    assert "problem math500/3: the reference answer" in done.stderr
    content = json.loads(Path("out/results.json").read_text())
    assert list(content["benchmarks"]["math500"]["unreadable"]) == ["math500/3", "math500/9"]
    assert content["results"][0]["unreadable"] == 2
    outcomes = [line["outcomes"] for line in json_lines(Path("out/problems.jsonl"))]
    assert [number for number, found in enumerate(outcomes, 1) if found == ["error"]] == [3, 9]


@pytest.mark.slow
def test_answers_that_cannot_be_graded_are_not_kept(tmp_path, monkeypatch):
    """Eight problems in chunks of 2; grading is broken from the third chunk on, and works again when it resumes."""
    monkeypatch.chdir(tmp_path)
    rows = list(rows_of("aime25", {(a, 40): a + 40 for a in range(10, 18)}))
    rows[7] = rows[0] | {"answer": "1"}
    arguments = [
        "eval", "tiny", "--benchmarks", "aime25", "--data", f"aime25={jsonl(tmp_path / 'aime.jsonl', rows)}",
        "--samples", "128", "--k", "1", "--max-tokens", "2", "--json", "--output",
    ]  # fmt: skip
    run = CliRunner().invoke
    whole = run(main, [*arguments, "whole"])
    assert whole.exit_code == 0, whole.output
    assert json.loads(whole.stdout)["benchmarks"]["aime25"] == {
        "rows": 8, "published": 30, "skipped": 0, "unreadable": {}, "repeats": {"aime25/8": "aime25/1"},
    }  # fmt: skip
    assert "aime25: was published with 30 problems, and has 8 here" in whole.stderr
    assert "1 of 8 questions repeat an earlier one, and count each time: aime25/8 is aime25/1" in whole.stderr
    grade, calls = Grader.grade, []

    def breaking(self, requests):
        calls.append(len(requests))
        failed = [Reward(value=0.0, outcome=Outcome.TIMEOUT)] * len(requests)
        return failed if calls.count(256) > 2 else grade(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(Grader, "grade", breaking)
        broken = run(main, [*arguments, "out"])
    assert broken.exit_code == 1
    assert "25% of the answers to aime25 could not be graded" in " ".join(broken.output.split())
    assert len(json_lines(tmp_path / "out/problems.jsonl")) == 4
    resumed = run(main, [*arguments, "out"])
    assert resumed.exit_code == 0, resumed.output
    assert (tmp_path / "out/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def test_a_folder_that_is_at_work_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = jsonl(tmp_path / "aime.jsonl", rows_of("aime25", {(17, 25): 42}))
    with EvaluationFolder(tmp_path / "out").locked():
        message = refused("tiny", "--benchmarks", "aime25", "--data", f"aime25={file}", "--output", "out")
    assert "another evaluation is running in this folder" in message


def test_engine_errors_end_in_an_option_that_there_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "why_not", lambda _: "vLLM is not installed")
    file = jsonl(tmp_path / "aime.jsonl", rows_of("aime25", {(17, 25): 42}))
    done = CliRunner().invoke(
        main, ["eval", "tiny", "--benchmarks", "aime25", "--data", f"aime25={file}", "--engine", "vllm"]
    )
    assert done.exit_code == 1
    assert "--engine hf" in done.output
    assert "--set" not in done.output


def test_the_preset_is_the_published_one_and_other_options_override_it():
    def params(*arguments):
        return eval_.make_context("eval", ["tiny", "--benchmarks", "paper", *arguments]).params

    names = ("samples", "k", "temperature", "top_p", "max_tokens", "system_prompt", "seeds", "seed")
    prompt = "Please reason step by step, and put your final answer within \\boxed{}."
    preset = params("--preset", "paper")
    assert [preset[name] for name in names] == [128, None, 0.7, 0.95, 4096, prompt, None, 0]
    # Before and after the preset.
    fewer = params("--samples", "4", "--preset", "paper", "--temperature", "1", "--system-prompt", "")
    assert [fewer[name] for name in names] == [4, None, 1.0, 0.95, 4096, "", None, 0]
    plain = params("--seed", "7")
    assert [plain[name] for name in names] == [8, None, None, 1.0, None, None, None, 7]
    assert [pick_k(None, 128), pick_k(None, 4), pick_k(2, 4)] == [8, 4, 2]
