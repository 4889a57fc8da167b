"""The real command on the real tiny model: learning, interruption, resumption, and everything a run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from helpers import json_lines

SMALL = (
    "--set", "train.steps=6", "--set", "train.save_steps=2", "--set", "data.prompts_per_step=8",
    "--set", "rollout.num_generations=4", "--set", "eval.problems=20", "--set", "optimizer.warmup_ratio=0.0",
    "--set", "eval.every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run of the shipped recipe, as a new user makes it."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, "-m", "popo_lite", "train", "tiny_cpu"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny_cpu-seed0", done


@pytest.mark.slow
def test_training_learns_to_work_step_by_step(trained):
    run, done = trained
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert before["problems"] == after["problems"] == 200
    assert 0.20 <= before["pass_at_1"] <= 0.50
    assert after["pass_at_1"] >= 0.85
    assert after["task_figures"]["step_by_step_ratio"] > before["task_figures"]["step_by_step_ratio"] + 0.3
    assert summary["quantized_modules"] == 14
    assert summary["steps"] == 60
    metrics = json_lines(run / "metrics.jsonl")
    for key in ("rollout_tokens", "trained_tokens"):
        assert summary[key] == sum(line[key] for line in metrics) > 0
    assert "Traceback" not in done.stderr
    assert "pass@1" in done.stdout
    assert f"popo-lite export {run.relative_to(run.parent.parent)}" in done.stdout


@pytest.mark.slow
def test_the_run_folder_holds_what_it_should(trained):
    run, _ = trained
    assert {path.name for path in run.iterdir()} == {
        "recipe.toml", "environment.json", "data.json", "metrics.jsonl", "samples.jsonl", "evaluations.jsonl",
        "checkpoints", "adapter", "siamese", "summary.json", "log.txt", ".lock",
    }  # fmt: skip
    metrics = json_lines(run / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(60))
    for line in metrics:
        assert sum(line["outcomes"].values()) == line["rollouts"]
        groups = ("groups_none_right", "groups_some_right", "groups_all_right", "groups_ungraded")
        assert sum(line[name] for name in groups) == line["prompts"]
        assert 0 <= line["siamese_drift_over_bound"] <= 1
        assert line["logp_gap_max"] < 1e-3
        assert 0 < line["effective_sample_ratio"] <= 1 + 1e-9
    assert metrics[0]["siamese_cosine"] == pytest.approx(1, abs=2e-3)
    samples = json_lines(run / "samples.jsonl")
    assert all(len(sample["answers"]) == 8 for sample in samples)
    trained_weights = load_file(run / "adapter" / "adapter_model.safetensors")
    average = load_file(run / "siamese" / "adapter_model.safetensors")
    assert trained_weights.keys() == average.keys()
    assert any((trained_weights[name] != average[name]).any() for name in average)
    head = 128 * 128 * 2 + 128 * 2 + 128 * 2
    adapter = sum(tensor.size for tensor in trained_weights.values())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["siamese_extra_bytes"] == 4 * (adapter + head)


@pytest.mark.slow
def test_eval_compares_base_adapter_and_siamese(trained, command):
    run, _ = trained
    done = command("eval", run, "--problems", "60", "--samples", "4", "--json")
    assert done.returncode == 0, done.stderr
    results = {result["weights"]: result for result in json.loads(done.stdout)["results"]}
    assert set(results) == {"base", "adapter", "siamese"}
    assert results["base"]["pass_at_1"] < 0.5 < 0.85 <= results["adapter"]["pass_at_1"]
    assert set(results["adapter"]["pass_at_k"]) == {"1", "2", "4"}
    assert results["adapter"]["pass_at_k"]["4"] >= results["adapter"]["pass_at_1"]
    table = command("eval", run, "--problems", "10", "--weights", "siamese", "--samples", "1")
    assert "siamese" in table.stdout


@pytest.mark.slow
def test_generate_answers_a_question(trained, command):
    run, _ = trained
    done = command("generate", run, "What is 17 + 25?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7+5=12, 1+2+1=4, so \\boxed{42}"
    several = command("generate", run, "What is 17 + 25?", "--samples", "3", "--json", "--weights", "siamese")
    assert len(json.loads(several.stdout)["answers"]) == 3


def weights_of(run: Path):
    return {
        (name, key): tensor
        for name in ("adapter", "siamese")
        for key, tensor in load_file(run / name / "adapter_model.safetensors").items()
    }


def learned(run: Path):
    """What metrics.jsonl says apart from times and memory."""
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in timed} for line in json_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A small run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = subprocess.run(
        [sys.executable, "-m", "popo_lite", "train", "tiny_cpu", *SMALL, "--output", "run", "--json"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    return folder / "run"


def stop_at(folder: Path, step: int, *signals: int, options: tuple[str, ...] = SMALL) -> subprocess.Popen[str]:
    """Start the small run in `folder`/run and send `signals` once step `step` is on record."""
    process = subprocess.Popen(
        [sys.executable, "-m", "popo_lite", "train", "tiny_cpu", *options, "--output", "run", "--view", "plain"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("step", "signals"),
    [
        (1, (signal.SIGKILL,)),  # before the first checkpoint
        (3, (signal.SIGKILL,)),
        (3, (signal.SIGINT,)),
        (3, (signal.SIGINT, signal.SIGINT, signal.SIGINT)),
        (6, (signal.SIGTERM,)),  # after the last step
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path, command, step, signals):
    process = stop_at(tmp_path, step, *signals)
    out, err = process.communicate(timeout=120)
    if signal.SIGKILL not in signals:
        assert process.returncode == 130, err
        assert "popo-lite resume run" in out
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = command("resume", "run", "--view", "plain")
    assert resumed.returncode == 0, resumed.stderr
    assert learned(tmp_path / "run") == learned(unbroken)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in json_lines(run / name)]
                 for run in (tmp_path / "run", unbroken)]  # fmt: skip
        assert lines[0] == lines[1], name
    ours, theirs = weights_of(tmp_path / "run"), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor == theirs[key]).all(), key
    first, second = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", unbroken))
    for key in ("before", "after", "steps", "rollout_tokens", "trained_tokens"):
        kept = [{k: v for k, v in (s[key] or {}).items() if k != "seconds"} if isinstance(s[key], dict) else s[key]
                for s in (first, second)]  # fmt: skip
        assert kept[0] == kept[1], key


def test_a_killed_run_remembers_what_it_knew_of_its_problems(tmp_path, command):
    """Adaptive budget and skipping, on a file so small that every problem comes up again and again."""
    pairs = [(a, a + 7) for a in range(20, 32)] + [(a, a + 7) for a in range(2000, 2012)]  # can be, and hopeless
    rows = [json.dumps({"prompt": f"What is {a} + {b}?", "answer": a + b}) for a, b in pairs]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows) + "\n")
    options = (
        "--set", f"data.dataset={tmp_path / 'sums.jsonl'}", "--set", "data.prompts_per_step=8",
        "--set", "rollout.adaptive.enabled=true", "--set", "rollout.skip_known=true",
        "--set", "rollout.num_generations=6", "--set", "rollout.adaptive.max_rollouts=12", "--set", "train.steps=8",
        "--set", "train.save_steps=3",
        "--set", "eval.problems=0", "--set", "optimizer.warmup_ratio=0.0",
    )  # fmt: skip
    whole = command("train", "tiny_cpu", *options, "--output", "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    process = stop_at(tmp_path, 5, signal.SIGKILL, options=options)
    process.communicate(timeout=120)
    resumed = command("resume", "run", "--view", "plain")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (learned(tmp_path / name) for name in ("run", "whole"))
    assert ours == theirs
    assert len({line["rollouts"] / line["prompts"] for line in ours}) > 1
    assert sum(line["prompts_skipped"] for line in ours[3:]) > 0
    for (key, tensor), other in zip(weights_of(tmp_path / "run").items(), weights_of(tmp_path / "whole").values(),
                                    strict=True):  # fmt: skip
        assert (tensor == other).all(), key
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")]
    for key in ("rollouts", "rollout_tokens", "prompts_with_positive", "prompts_skipped"):
        assert summaries[0][key] == summaries[1][key] == sum(line[key] for line in ours), key


def test_of_two_runs_started_at_once_in_one_folder_one_trains(tmp_path, command):
    with ThreadPoolExecutor() as both:
        arguments = ("train", "tiny_cpu", *SMALL, "--output", "run", "--json")
        done = list(both.map(lambda _: command(*arguments), range(2)))
    done.sort(key=lambda each: each.returncode)
    assert [each.returncode for each in done] == [0, 2], [each.stderr for each in done]
    assert "another process trains in this folder: process " in " ".join(done[1].stderr.split())
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(6))


def test_only_the_same_unfinished_run_can_be_resumed(unbroken, command):
    done = command("resume", unbroken)
    assert done.returncode == 2
    assert "the run has ended" in done.stderr
    done = command("resume", unbroken, "--set", "lora.rank=4")
    assert done.returncode == 2
    assert "lora.rank was 16 and cannot become 4" in done.stderr
    done = command("train", "tiny_cpu", *SMALL, "--output", unbroken)
    assert done.returncode == 2
    assert f"popo-lite resume {unbroken} continues it" in " ".join(done.stderr.split())


def test_a_run_from_the_users_own_file_and_function(tmp_path, command):
    """JSONL problems, columns by name, a filter, and a reward function of the user's own."""
    rows = [{"q": f"What is {a} + {b}?", "gold": a + b, "level": a % 2} for a in range(10, 30) for b in range(10, 13)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(
        "def close(text, problem):\n"
        "    import re\n"
        "    found = re.search(r'boxed\\{(\\d+)\\}', text)\n"
        "    return None if found is None else float(abs(int(found[1]) - int(problem['answer'])) <= 10)\n"
    )
    recipe = """
[model]
dtype = "float32"
[data]
dataset = "sums.jsonl"
prompt_column = "q"
answer_column = "gold"
filter = { level = 1 }
prompts_per_step = 4
[rollout]
max_prompt_length = 32
max_completion_length = 40
num_generations = 4
[reward]
functions = "my_rewards:close"
[train]
steps = 2
cpu_threads = 1
[eval]
problems = 5
"""
    (tmp_path / "mine.toml").write_text(recipe)
    done = command("train", "mine.toml", "--trust")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine-seed0"
    lines = json_lines(run / "samples.jsonl")
    asked = {int(line["question"].split()[2]) % 2 for line in lines}
    assert asked == {1}
    metrics = json_lines(run / "metrics.jsonl")
    assert all(line["outcomes"]["error"] == 0 for line in metrics)
    assert all(line["task_figures"] == {} for line in metrics)
