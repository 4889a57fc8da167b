"""`popo-lite bench` and benchmarks/update.py through the real commands, on the tiny shape."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from popo_lite.bench import measure
from popo_lite.bench.measure import at_length
from popo_lite.bench.meter import Meter, OutOfMemoryError, StageCost, cap_memory, longest
from popo_lite.bench.synthetic import random_groups, random_policy, random_prompts, rewarded, step_size
from popo_lite.bench.updates import UPDATE_STAGES, longest_update, train_once
from popo_lite.console.bench_report import bench_report, longest_report
from popo_lite.errors import UserInputError
from popo_lite.policy.policy import load_policy
from popo_lite.training.learner import Learner
from popo_lite.types import Completion, FinishReason

ROOT = Path(__file__).parents[2]
SMALL = ("--prompts", "2", "--prompt-tokens", "8", "--completion-tokens", "8", "--steps", "1")


def as_text(report, result, capsys):
    report(json.loads(json.dumps(result)))  # as a script sees it
    return " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------- the command


def test_bench_prints_stages_tensors_beside_the_plan_and_the_whole_run(command):
    done = command("bench", "tiny_cpu", *SMALL)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for part in ("rollout", "weights", "siamese", "update", "step", "swap", "2 prompts x 8 answers of 8 + 8 tokens"):
        assert part in text
    assert "8 positives" in text
    assert "The whole run at this size" in text
    assert "60 steps" in text
    assert "Not counted" in text
    assert "measured on a GPU alone" in text
    assert "warm-up step" in done.stderr


def test_bench_json_holds_every_figure_and_nothing_else(command):
    done = command("bench", "tiny_cpu", *SMALL, "--positives", "3", "--json", "--set", "model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] == {
        "prompts": 2, "group_size": 8, "prompt_tokens": 8, "completion_tokens": 8, "positives": 3,
    }  # fmt: skip
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == list(measure.STAGES)
    assert stages["rollout"]["tokens"] == 2 * 8 * 8  # no answer ended early
    assert stages["update"]["tokens"] == 3 * 16
    for stage in ("rollout", "siamese", "update"):
        assert stages[stage]["tokens_per_second"] == pytest.approx(stages[stage]["tokens"] / stages[stage]["seconds"])
    assert found["step_seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["run"]["steps_seconds"] == pytest.approx(60 * found["step_seconds"])
    assert found["run"]["evaluations"] == 2
    assert found["run"]["evaluations_seconds"] == pytest.approx(2 * 200 * stages["rollout"]["seconds"] / 16)
    assert found["memory"] == []
    assert found["out_of_memory"] is None
    counted, planned = (
        {one["kind"]: one[figure] for one in found["tensors"]} for figure in ("counted_bytes", "planned_bytes")
    )
    assert sum(counted.values()) == pytest.approx(sum(planned.values()), rel=0.02)
    for kind in ("adapters", "predictor head", "siamese average", "optimizer state"):
        assert counted[kind] == pytest.approx(planned[kind], rel=0.02), kind


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--memory-cap", "24GiB"), ["--memory-cap", "CPU", "popo-lite plan"]),
        (("--memory-cap", "plenty"), ["plenty", "--memory-cap", "GiB"]),
        (("--longest",), ["--longest", "CPU"]),
        (("--positives", "17", "--prompts", "2"), ["17 positives", "2 x 8 = 16"]),
        (("--completion-tokens", "2000", "--set", "train.tokens_per_microbatch=4096"), ["64 + 2000", "1024"]),
        (("--set", "rollout.engine=server", "--set", "rollout.servers=['http://localhost:1']",
          "--set", "rollout.shared_dir='.'"), ["random weights", "rollout.engine"]),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_clear_message(command, options, expected):
    done = command("bench", "tiny_cpu", *options)
    assert done.returncode == 2, done.stderr
    message = " ".join(done.stderr.split())
    assert "Traceback" not in message
    for part in expected:
        assert part in message


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("target", "stage", "load"),
    [
        ("popo_lite.bench.measure.random_policy", "load", "the base itself"),
        ("popo_lite.samplers.hf.HFSampler.sample", "rollout", "16 x 16 tokens"),
        ("popo_lite.training.learner.noisy_target", "siamese", "5 x 16 tokens"),
        ("popo_lite.training.learner.weighted_token_logprobs", "update", "5 x 16 tokens"),
        ("popo_lite.training.learner.move_state", "step", "5 x 16 tokens"),
    ],
)
def test_running_out_of_memory_is_a_result(monkeypatch, capsys, target, stage, load):
    from click.testing import CliRunner

    from popo_lite.cli import main

    monkeypatch.setattr(target, out_of_memory)
    arguments = ["bench", "tiny_cpu", *SMALL, "--positives", "5"]
    told = CliRunner().invoke(main, [*arguments, "--json"])
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert found["out_of_memory"] == f"out of memory in {stage} at {load}"
    assert found["stages"] == []
    assert found["run"] is None
    assert f"out of memory in {stage} at {load}" in as_text(bench_report, found, capsys)


def test_an_error_that_is_not_about_memory_keeps_its_traceback(monkeypatch, tiny_recipe):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("popo_lite.training.learner.weighted_token_logprobs", broken)
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_tokens=8")
    with pytest.raises(RuntimeError, match="mat1"):
        measure.bench(recipe, steps=1, positives=1, memory_cap_bytes=None, notify=lambda _: None)


# ---------------------------------------------------------------------- its parts


def test_a_random_policy_is_a_run_s_policy_but_for_values_and_stop_ids(tiny_recipe):
    recipe = tiny_recipe("model.dtype=bfloat16", "train.gradient_checkpointing=true", "lora.init_from=/no/such/folder")
    true = load_policy(tiny_recipe("model.dtype=bfloat16", "train.gradient_checkpointing=true"))
    random = random_policy(recipe)
    assert [(n, p.shape, p.dtype) for n, p in random.trainable_parameters()] == [
        (n, p.shape, p.dtype) for n, p in true.trainable_parameters()
    ]
    differing = {"model", "tokenizer", "predictor", "head", "stop_ids"}
    for field in set(vars(true)) - differing:
        assert getattr(random, field) == getattr(true, field), field
    assert random.stop_ids == frozenset()
    assert random.model.is_gradient_checkpointing


@pytest.mark.parametrize("positives", [1, 3, 8, 15, 16])
def test_rewards_make_just_so_many_positives_and_spread_them(tiny_recipe, positives):
    size = step_size(tiny_recipe("data.prompts_per_step=2"), positives)
    prompts = random_prompts(size, 320)
    answer = Completion(token_ids=(1,), sampler_logps=(-1.0,), finish_reason=FinishReason.LENGTH, text="")
    groups = rewarded(prompts, [[answer] * 8] * 2, positives)
    counts = [len(group.positives(0.5)) for group in groups]
    assert sum(counts) == positives
    assert max(counts) - min(counts) <= 1
    assert {len(prompt.token_ids) for prompt in prompts} == {64}


def test_an_update_of_the_bench_trains(tiny_recipe):
    recipe = tiny_recipe("data.prompts_per_step=2", "rollout.max_completion_tokens=8")
    policy = random_policy(recipe)
    meter = Meter(device=policy.device)
    learner = Learner(recipe, policy, notify=lambda _: None, relief=meter.exhausted)
    before = {name: p.detach().clone() for name, p in policy.trainable_parameters()}
    for step in range(2):
        figures = train_once(learner, meter, step, random_groups(step_size(recipe), policy, seed=step))
        assert figures.grad_norm > 0
    assert all(not torch.equal(before[name], p) for name, p in policy.trainable_parameters())
    assert policy.version == 2
    assert all(p.grad is None for _, p in policy.trainable_parameters())
    assert {stage: len(costs) for stage, costs in meter.costs.items()} == dict.fromkeys(UPDATE_STAGES, 2)


def test_a_sequence_that_does_not_fit_alone_is_out_of_memory_in_its_stage(tiny_recipe, monkeypatch):
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_tokens=8")
    policy = random_policy(recipe)
    meter = Meter(device=policy.device)
    notices = []
    learner = Learner(recipe, policy, notify=notices.append, relief=meter.exhausted)
    monkeypatch.setattr("popo_lite.training.learner.weighted_token_logprobs", out_of_memory)
    with pytest.raises(OutOfMemoryError) as caught:
        train_once(learner, meter, 0, random_groups(step_size(recipe), policy))
    assert caught.value.stage == "update"
    assert notices  # it was cut before it was given up
    assert set(meter.costs) == {"weights", "siamese"}


@pytest.mark.parametrize("limit", [511, 512, 513, 1023, 5000, 5120, 9999, 10_240, 10**6])
def test_the_longest_is_found_to_the_step_and_nothing_is_tried_twice(limit):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= limit

    found = longest(fits, first=512, last=10_240, step=512)
    assert found == (min(limit, 10_240) // 512 * 512 or None)
    assert len(tried) == len(set(tried)) <= 10
    assert all(512 <= tokens <= 10_240 and tokens % 512 == 0 for tokens in tried)


def test_the_longest_update_goes_on_over_the_same_base_after_running_out(tiny_recipe, monkeypatch):
    from popo_lite.training import learner

    real = learner.weighted_token_logprobs

    def short_of_memory(hidden, *arguments, **options):
        return out_of_memory() if len(hidden) > 100 else real(hidden, *arguments, **options)

    monkeypatch.setattr(learner, "weighted_token_logprobs", short_of_memory)
    recipe = tiny_recipe()
    told = []
    found = longest_update(
        random_policy(recipe), lambda tokens: at_length(recipe, tokens), resolution=32, notify=told.append
    )
    assert found == 160  # a prompt of 64, as the recipe has it, and an answer of 96
    assert told == [
        "32 tokens: fits", "64 tokens: fits", "128 tokens: fits", "256 tokens: out of memory",
        "192 tokens: out of memory", "160 tokens: fits",
    ]  # fmt: skip


def test_peaks_are_the_largest_of_any_pass():
    costs = [
        StageCost(seconds=1, allocated_bytes=5, card_bytes=9),
        StageCost(seconds=3, allocated_bytes=7, card_bytes=8),
    ]
    meter = Meter(device=torch.device("cpu"), costs={"a": costs, "b": [replace(costs[0], card_bytes=20)]})
    assert meter.peak(["a"]) == (7, 9)
    assert meter.peak(["a", "b"]) == (7, 20)
    assert meter.peak(["c"]) is None
    assert meter.seconds("a") == 2


def test_no_cap_on_a_cpu():
    with pytest.raises(UserInputError, match="CPU"):
        cap_memory(torch.device("cpu"), 2**30)


# ---------------------------------------------------------------------- the report


def test_the_report_shows_measured_over_planned(capsys, tiny_recipe):
    from dataclasses import asdict

    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_tokens=8", "eval.problems=0")
    found = measure.bench(recipe, steps=1, positives=None, memory_cap_bytes=None, notify=lambda _: None)
    phase = measure.PhaseMemory(
        phase="update", tensor_bytes=3 * 2**30, planned_tensor_bytes=4 * 2**30, card_bytes=5 * 2**30,
        planned_card_bytes=None,
    )  # fmt: skip
    text = as_text(bench_report, asdict(replace(found, memory=(phase,), memory_cap_bytes=24 * 2**30)), capsys)
    assert "update 3.00 GiB 4.00 GiB 0.75 5.00 GiB - -" in text
    assert "capped to 24.00 GiB" in text
    assert "0 evaluations" in text


@pytest.mark.parametrize(
    ("longest_tokens", "expected"),
    [
        (12_288, "12,288 tokens planned, rollouts included: 11,000 tokens"),
        (None, "not even 512 tokens fit"),
        (32_768, "whole context"),
    ],
)
def test_the_longest_is_told_beside_the_plan_s(capsys, longest_tokens, expected):
    result = {
        "longest_tokens": longest_tokens, "planned_tokens": 11_000, "context_tokens": 32_768, "resolution_tokens": 512,
    }  # fmt: skip
    assert expected in as_text(longest_report, result, capsys)


# ---------------------------------------------------------------------- benchmarks/update.py


def run_update(tmp_path, *options):
    result = tmp_path / "update.json"
    script = ROOT / "benchmarks" / "update.py"
    done = subprocess.run(
        [sys.executable, script, "--shape", "tiny", "--updates", "2", "--json", result, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done, json.loads(result.read_text()) if result.exists() else None


def test_the_update_benchmark_on_the_tiny_shape_with_either_loss(tmp_path):
    entropies = []
    for loss in ("fused", "naive"):
        done, found = run_update(tmp_path, "--rival", "none", "--lengths", "64", "--positives", "3", "--loss", loss)
        assert done.returncode == 0, done.stderr
        assert "says nothing about a GPU" in found["remark"]
        assert found["environment"]["gpu"] is None
        ours = found["lengths"][0]["ours"]
        assert len(ours["seconds"]) == 2
        assert ours["tokens_per_second"] == pytest.approx(3 * 64 / ours["seconds_median"])
        assert set(ours["seconds_by_stage"]) == set(UPDATE_STAGES)
        entropies.append(ours["entropies"])
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_trains_on_the_same_model_and_rollouts(tmp_path):
    done, found = run_update(tmp_path, "--lengths", "64", "--positives", "2")
    assert done.returncode == 0, done.stderr
    (line,) = found["lengths"]
    assert line["trl"]["entropies"] == pytest.approx(line["ours"]["entropies"], rel=1e-3)
    assert "rival_over_ours" not in line


def test_the_rival_s_absence_is_one_clear_message(tmp_path):
    if importlib.util.find_spec("trl") is not None:
        pytest.skip("TRL is installed")
    done, found = run_update(tmp_path)
    assert done.returncode == 2
    assert "pip install trl" in done.stderr
    assert found is None


def test_every_command_of_gpu_sh_is_one_that_its_script_takes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("update", ROOT / "benchmarks" / "update.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    listed = tmp_path / "commands"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {listed}\n')
    stand_in.chmod(0o755)
    subprocess.run(
        ["sh", "benchmarks/gpu.sh"], cwd=ROOT, env={**os.environ, "PYTHON": str(stand_in), "RESULTS": str(tmp_path)},
        check=True, capture_output=True,
    )  # fmt: skip
    commands = [line.split() for line in listed.read_text().splitlines() if not line.startswith("-c ")]
    updates = [words for words in commands if words[0] == "benchmarks/update.py"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(update.util, "find_spec", lambda _: object())
    written = set()
    for words in updates:
        monkeypatch.setattr(sys, "argv", words)
        arguments, _ = update.parse()
        assert arguments.memory_cap == "24GiB"
        written.add(arguments.json)
    assert len(written) == len(updates) >= 8
    assert {"head_loss.py", "rollouts.py"} < {Path(words[0]).name for words in commands}
    (bench,) = (words[2:] for words in commands if words[:2] == ["-m", "popo_lite"])
    from popo_lite.cli.bench import bench as bench_command

    assert bench[0] == "bench"
    assert bench_command.make_context("bench", bench[1:]).params["as_json"]
