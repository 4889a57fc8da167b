"""`popo-lite bench` and benchmarks/update.py through the real commands, on the tiny shape."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from popo_lite.cli import main
from popo_lite.errors import UserInputError
from popo_lite.policy import device
from popo_lite.policy.policy import Policy, load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.bench import measure, synthetic
from popo_lite.tools.bench.command import bench as bench_command
from popo_lite.tools.bench.measure import bench_longest, longest, tensors_beside_plan
from popo_lite.tools.bench.report import bench_report, longest_report
from popo_lite.tools.bench.synthetic import BenchTrainer, Meter, OutOfMemoryError, random_policy, spread
from popo_lite.update import Learner

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
    for part in (
        "rollout",
        "weights",
        "siamese",
        "update",
        "optimizer",
        "sync",
        "2 prompts x 8 answers of 8 + 8 tokens",
    ):
        assert part in text
    assert "8 positives" in text
    assert "The whole run at this size" in text
    assert "60 steps" in text
    assert "Not counted" in text
    assert "measured on a GPU only" in text
    assert "warm-up step" in done.stderr


def test_bench_json_holds_every_figure_and_nothing_else(command):
    done = command("bench", "tiny_cpu", *SMALL, "--positives", "3", "--json", "--set", "model.dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] == {
        "prompts": 2, "num_generations": 8, "prompt_tokens": 8, "completion_tokens": 8, "positives": 3,
    }  # fmt: skip
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == list(measure.STAGES)
    assert stages["rollout"]["tokens"] == 2 * 8 * 8  # no answer ended early
    assert stages["update"]["tokens"] == 2 * 8 + 3 * 8  # each prompt once
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
        (("--memory-cap", "24GiB", "--prompts", "2"), [
            "--memory-cap", "CPU", "popo-lite plan tiny_cpu --vram 24GiB --set data.prompts_per_step=2 predicts"]),
        (("--memory-cap", "plenty"), ["plenty", "--memory-cap", "GiB"]),
        (("--longest",), ["--longest", "CPU", "popo-lite plan tiny_cpu predicts"]),
        (("--positives", "17", "--prompts", "2"), ["17 positives", "2 x 8 = 16", "next --positives 16"]),
        (("--completion-tokens", "3000", "--set", "rollout.max_completion_length=2000"), ["64 + 2000", "=960"]),
        (("--set", "objective.algorithm=grpo", *SMALL, "--positives", "16"),
         ["--positives", "16 positives", "no prompt had answers of different rewards"]),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_clear_message(command, options, expected):
    done = command("bench", "tiny_cpu", *options)
    assert done.returncode == 2, done.stderr
    message = " ".join(done.stderr.split())
    assert "Traceback" not in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("rollout.max_completion_length=2000", "train.tokens_per_microbatch=4096"),
         ["64 + 2000", "1024", "--set rollout.max_completion_length=960"]),
        (("rollout.engine=server", "rollout.server.base_urls=['http://localhost:1']", "rollout.server.shared_dir='.'"),
         ["random weights", "rollout.engine"]),
    ],
)  # fmt: skip
def test_what_the_recipe_forbids_is_refused_before_a_model_is_built_and_the_advice_lifts_it(
    monkeypatch, tiny_recipe, overrides, expected
):
    monkeypatch.setattr(synthetic, "BenchTrainer", lambda *_, **__: pytest.fail("a model is built"))
    with pytest.raises(UserInputError) as caught:
        run_bench(tiny_recipe(*overrides))
    for part in expected:
        assert part in str(caught.value)
    monkeypatch.setattr(synthetic, "BenchTrainer", reached)
    settings = [f"--set={override}" for override in overrides]
    with pytest.raises(ReachedError):
        invoke(["bench", "tiny_cpu", *settings, *shlex.split(caught.value.next_step)])


def test_a_cap_is_refused_with_vllm(monkeypatch, tiny_recipe):
    monkeypatch.setattr(measure, "pick_engine", lambda _: ("vllm", ""))
    with pytest.raises(UserInputError, match="cap") as caught:
        run_bench(tiny_recipe("rollout.engine=vllm"), memory_cap_bytes=2**30)
    assert caught.value.next_step == "--set rollout.engine=hf"


class ReachedError(Exception):
    """Nothing was refused: the model would be built now."""


def reached(*_, **__):
    raise ReachedError


def run_bench(recipe, *, positives=None, memory_cap_bytes=None):
    return measure.bench(recipe, steps=1, positives=positives, memory_cap_bytes=memory_cap_bytes, notify=lambda _: None)


def invoke(words):
    main(words, standalone_mode=False)


def documented(start):
    lines = (ROOT / "docs" / "benchmarks.md").read_text().splitlines()
    return [shlex.split(re.split(r"  +", line)[0]) for line in lines if line.startswith(start)]


@pytest.mark.parametrize("words", documented("popo-lite bench "), ids=" ".join)
def test_every_documented_bench_gets_as_far_as_its_model_on_a_gpu(monkeypatch, words):
    monkeypatch.setattr(device, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(measure, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(measure, "pick_engine", lambda recipe: (recipe.rollout.engine, ""))  # as if vLLM were there
    monkeypatch.setattr(measure, "cap_memory", lambda *_: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="", total_memory=80 * 2**30)
    )
    monkeypatch.setattr(synthetic, "BenchTrainer", reached)
    monkeypatch.setattr(synthetic, "random_policy", reached)
    with pytest.raises(ReachedError):
        invoke(words[1:])


def test_the_documented_benches_are_found():
    assert len(documented("popo-lite bench ")) >= 4


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(
    ("target", "stage", "load"),
    [
        ("popo_lite.tools.bench.synthetic.random_policy", "load", ""),
        ("popo_lite.samplers.hf.HFSampler.sample", "rollout", " of 16 sequences"),
        ("popo_lite.update.noisy_target", "siamese", ""),
        ("popo_lite.update.fused_loss", "update", " of 5 sequences"),
        ("popo_lite.update.move_state", "optimizer", ""),
    ],
)
def test_running_out_of_memory_is_a_result(monkeypatch, capsys, target, stage, load):
    monkeypatch.setattr(target, out_of_memory)
    arguments = ["bench", "tiny_cpu", *SMALL, "--positives", "5"]
    told = CliRunner().invoke(main, [*arguments, "--json"])
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert found["out_of_memory"] == f"out of memory in {stage}{load}"
    assert found["stages"] == []
    assert found["run"] is None
    assert f"out of memory in {stage}{load}" in as_text(bench_report, found, capsys)


@pytest.mark.parametrize(
    ("overrides", "siamese", "update"),
    [
        ((), 3, 3),
        (("objective.entropy_over=all",), 3, 16),
        (("objective.similarity_coef=0",), None, 3),
        (("objective.algorithm=mixed",), 3, 16),
        (("objective.algorithm=grpo",), None, 16),
        (("objective.algorithm=grpo", "objective.kl_coef=0.1"), 16, 16),
    ],
)
def test_tokens_are_those_that_the_step_forwards(monkeypatch, tiny_recipe, overrides, siamese, update):
    forwarded, by_step = [], []
    hidden_states, plan_update, apply_update = Policy.hidden_states, Learner.plan, Learner.apply

    def counting(policy, input_ids, row):
        forwarded.append(len(input_ids))
        return hidden_states(policy, input_ids, row)

    def plan(*arguments):
        forwarded.clear()  # what was forwarded while the model was loaded
        return plan_update(*arguments)

    def apply(*arguments):
        by_step.append(sum(forwarded))
        return apply_update(*arguments)

    recipe = tiny_recipe(
        "data.prompts_per_step=2", "rollout.max_prompt_length=8", "rollout.max_completion_length=8", *overrides
    )
    monkeypatch.setattr(Policy, "hidden_states", counting)
    monkeypatch.setattr(Learner, "plan", plan)
    monkeypatch.setattr(Learner, "apply", apply)
    found = run_bench(recipe, positives=3)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    tokens = {None: 0, 3: 2 * 8 + 3 * 8, 16: 2 * 8 + 16 * 8}  # by answers: each of two prompts once
    assert stages["update"]["tokens"] == tokens[update]
    assert ("siamese" in stages) == (siamese is not None)
    if siamese is not None:
        assert stages["siamese"]["tokens"] == tokens[siamese]
    assert by_step == [tokens[siamese] + tokens[update]] * 2


def test_an_error_that_is_not_about_memory_keeps_its_traceback(monkeypatch, tiny_recipe):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("popo_lite.update.fused_loss", broken)
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_length=8")
    with pytest.raises(RuntimeError, match="mat1"):
        run_bench(recipe, positives=1)


# ---------------------------------------------------------------------- its parts


def test_a_random_policy_is_a_run_s_policy_but_for_values_and_stop_ids(tiny_recipe):
    recipe = tiny_recipe("model.dtype=bfloat16", "train.gradient_checkpointing=true", "lora.init_from=/no/such/folder")
    true = load_policy(tiny_recipe("model.dtype=bfloat16", "train.gradient_checkpointing=true"))
    random = random_policy(recipe)
    assert [(n, p.shape, p.dtype) for n, p in random.trainable_parameters()] == [
        (n, p.shape, p.dtype) for n, p in true.trainable_parameters()
    ]
    differing = {"model", "tokenizer", "predictor", "head", "stop_ids", "sharded_over"}
    for field in set(vars(true)) - differing:
        assert getattr(random, field) == getattr(true, field), field
    assert random.stop_ids == frozenset()
    assert random.sharded_over.size == true.sharded_over.size == 1
    assert random.model.is_gradient_checkpointing


@pytest.mark.parametrize("positives", [1, 3, 8, 15, 16])
def test_verdicts_make_just_so_many_positives_and_spread_them(positives):
    rewards = spread(positives, 16)
    halves = [sum(rewards[:8]), sum(rewards[8:])]
    assert sum(halves) == positives
    assert abs(halves[0] - halves[1]) <= 1


def trainer_of(recipe, meter, **options):
    return BenchTrainer(recipe, random_policy(recipe), meter, **{"rewards": spread(8, 16), **options})


def test_a_step_of_the_bench_trains(tiny_recipe):
    recipe = tiny_recipe("data.prompts_per_step=2", "rollout.max_completion_length=8")
    meter = Meter(torch.device("cpu"))
    with trainer_of(recipe, meter) as trainer:
        before = {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters()}
        for step in range(2):
            trainer.train_step(step)
        assert all(not torch.equal(before[name], p) for name, p in trainer.policy.trainable_parameters())
        assert trainer.policy.version == 2
        assert all(p.grad is None for _, p in trainer.policy.trainable_parameters())
    for record in meter.records:
        assert record["grad_norm"] > 0
        assert (record["rollouts"], record["positives"], record["completion_tokens_mean"]) == (16, 8, 8)


def test_a_sequence_that_does_not_fit_alone_is_out_of_memory_in_its_stage(tiny_recipe, monkeypatch):
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_length=8")
    meter = Meter(torch.device("cpu"))
    monkeypatch.setattr("popo_lite.update.fused_loss", out_of_memory)
    with (
        trainer_of(recipe, meter, rewards=spread(4, 8)) as trainer,
        pytest.raises(OutOfMemoryError, match="out of memory in update of 4 sequences"),
    ):
        trainer.train_step(0)
    assert meter.notices  # it was split before it was given up
    assert meter.records == []


@pytest.mark.parametrize("limit", [511, 512, 513, 1023, 5000, 5120, 9999, 10_240, 10**6])
def test_the_longest_is_found_to_the_step_and_nothing_is_tried_twice(limit):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= limit

    found = longest(fits, last=10_240, step=512)
    assert found == (min(limit, 10_240) // 512 * 512 or None)
    assert len(tried) == len(set(tried)) <= 10
    assert all(512 <= tokens <= 10_240 and tokens % 512 == 0 for tokens in tried)


def test_the_longest_update_goes_on_over_the_same_base_after_running_out(tiny_recipe, monkeypatch):
    from popo_lite import update

    real = update.fused_loss

    def short_of_memory(hidden, *arguments, **options):
        return out_of_memory() if len(hidden) > 100 else real(hidden, *arguments, **options)

    monkeypatch.setattr(update, "fused_loss", short_of_memory)
    told = []
    found = bench_longest(tiny_recipe(), memory_cap_bytes=None, notify=told.append, resolution=32)
    assert found["longest_tokens"] == 160  # a prompt of 64, as the recipe has it, and an answer of 96
    assert told == [
        "32 tokens: fits", "64 tokens: fits", "128 tokens: fits", "256 tokens: out of memory",
        "192 tokens: out of memory", "160 tokens: fits",
    ]  # fmt: skip


def test_peaks_are_the_largest_of_any_pass_and_belong_to_the_stage_before(monkeypatch):
    """On a made-up GPU: a stage's peak is read when the next begins; the warm-up's is dropped."""
    readings = iter([(5, 9), (1, 1), (7, 8), (5, 20), (6, 3)])
    current = {}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: current.update(reading=next(readings)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: current["reading"][0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: current["reading"][1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(synthetic, "outside_bytes", lambda _: 100)
    meter = Meter(torch.device("cuda"))
    meter.stage("rollout")  # ends "load"
    meter.forget_step()
    assert meter.peaks == {"load": (5, 109)}
    meter.stage("update")
    assert meter.peaks["between steps"] == (7, 108)
    meter.stage("update")
    meter.stage("end")
    assert meter.peaks["update"] == (6, 120)


def test_paged_optimizer_state_is_counted_by_neither_side(tiny_recipe):
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_length=8")
    with trainer_of(recipe, Meter(torch.device("cpu")), rewards=spread(4, 8)) as trainer:
        trainer.train_step(0)
        learner = trainer.learner

    def count():
        return {line["kind"]: line["counted_bytes"] for line in tensors_beside_plan(learner, None)}

    before = count()
    state = next(iter(learner.optimizer.state.values()))
    state["exp_avg"].is_paged = True  # as bitsandbytes marks what the driver pages
    after = count()
    assert before["optimizer state"] - after["optimizer state"] == state["exp_avg"].nbytes
    assert {kind: size for kind, size in before.items() if kind != "optimizer state"} == {
        kind: size for kind, size in after.items() if kind != "optimizer state"
    }


# ---------------------------------------------------------------------- the report


def test_the_report_shows_measured_over_planned(capsys, tiny_recipe):
    recipe = tiny_recipe("data.prompts_per_step=1", "rollout.max_completion_length=8", "eval.problems=0")
    found = run_bench(recipe)
    phase = {
        "phase": "update", "tensor_bytes": 3 * 2**30, "planned_tensor_bytes": 4 * 2**30, "card_bytes": 5 * 2**30,
        "planned_card_bytes": None,
    }  # fmt: skip
    asleep = {**phase, "phase": "swap", "tensor_bytes": None, "planned_tensor_bytes": None,
              "planned_card_bytes": 10 * 2**30}  # fmt: skip
    text = as_text(bench_report, {**found, "memory": [phase, asleep], "memory_cap_bytes": 24 * 2**30}, capsys)
    assert "update 3.00 GiB 4.00 GiB 0.75 5.00 GiB - -" in text
    assert "swap - - - 5.00 GiB 10.00 GiB 0.50" in text
    assert "capped to 24.00 GiB" in text
    assert "0 evaluations" in text


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_no_figure_of_tensors_where_vllm_sleeps(tiny_recipe, engine):
    meter = Meter(torch.device("cpu"), engine=engine)
    meter.peaks = {"load": (5, 12)}
    plan = measure.plan_here(tiny_recipe(), torch.device("cpu"), None)
    (load,) = measure.peaks_beside_plan(meter, plan)
    (planned,) = (phase for phase in plan.phases if phase.name == "load")
    assert (load["card_bytes"], load["planned_card_bytes"]) == (12, planned.total_bytes)
    figures = (load["tensor_bytes"], load["planned_tensor_bytes"])
    assert figures == ((None, None) if engine == "vllm" else (5, planned.tensor_bytes))


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
    measured = []
    for loss in ("fused", "naive"):
        done, found = run_update(tmp_path, "--rivals", "none", "--lengths", "64", "--positives", "3", "--loss", loss)
        assert done.returncode == 0, done.stderr
        assert "says nothing about a GPU" in found["remark"]
        assert found["environment"]["gpu"] is None
        sides = found["lengths"][0]["sides"]
        assert [(side["side"], side["sequences_per_pass"], side["passes"]) for side in sides] == [
            ("ours", 1, 3), ("ours", 3, 1),
        ]  # fmt: skip
        for ours in sides:
            assert len(ours["seconds"]) == 2
            assert ours["tokens_per_second"] == pytest.approx(3 * 64 / ours["seconds_median"])
            assert set(ours["seconds_by_stage"]) == {"weights", "siamese", "update", "optimizer"}
            measured.append(ours)
    for other in measured[1:]:
        for figure in ("entropies", "grad_norms"):
            assert other[figure] == pytest.approx(measured[0][figure], rel=1e-3), figure


TRL_RUNS = all(importlib.util.find_spec(package) for package in ("trl", "triton"))


@pytest.mark.skipif(not TRL_RUNS, reason="TRL or triton is not installed")
def test_trl_trains_on_the_same_model_and_rollouts(tmp_path):
    done, found = run_update(tmp_path, "--lengths", "64", "--positives", "2")
    assert done.returncode == 0, done.stderr
    (line,) = found["lengths"]
    rivals = ["trl", "trl-liger"] if importlib.util.find_spec("liger_kernel") and torch.cuda.is_available() else ["trl"]
    sides = {(side["side"], side["sequences_per_pass"]): side for side in line["sides"]}
    assert list(sides) == [(name, count) for count in (1, 2) for name in ("ours", *rivals)]
    ours = sides["ours", 1]
    for (_, count), side in sides.items():
        assert side["entropies"] == pytest.approx(ours["entropies"], rel=1e-3)
        assert side["base_bytes"] == ours["base_bytes"] > 0
        assert side["passes"] == 2 // count
    assert "rival_over_ours" not in line


def test_the_rival_s_absence_is_one_clear_message(tmp_path):
    if TRL_RUNS:
        pytest.skip("TRL is installed")
    done, found = run_update(tmp_path)
    assert done.returncode == 2
    assert "pip install trl" in done.stderr
    assert found is None


def load_update():
    spec = importlib.util.spec_from_file_location("update", ROOT / "benchmarks" / "update.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    return update


def parsed(update, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks/update.py", *map(str, words)])
    return update.parse()


@pytest.mark.parametrize("words", documented("python benchmarks/update.py"), ids=" ".join)
def test_every_documented_update_is_one_that_the_script_takes(monkeypatch, words):
    update = load_update()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(update, "installed", lambda _: True)
    arguments, _ = parsed(update, monkeypatch, *words[2:])
    assert arguments.rivals == ([] if arguments.find_longest else ["trl", "trl-liger"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--shape", "deepseek-math-7b", "--lengths", "4096", "4097"), "4097 tokens are beyond the context"),
        (("--sequences-per-pass", "1", "3"), "3 does not go evenly into --positives 8"),
        (("--rivals", "trl-liger"), "pip install liger-kernel"),
        (("--memory-cap", "24GiB"), "only a GPU"),
        (("--find-longest",), "needs a GPU"),
    ],
)
def test_an_update_that_cannot_be_measured_is_refused_at_once(monkeypatch, capsys, words, expected):
    update = load_update()
    monkeypatch.setattr(update, "installed", lambda package: package != "liger_kernel")
    with pytest.raises(SystemExit) as stopped:
        parsed(update, monkeypatch, *words)
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_every_rival_is_compared_with_every_setting_of_ours_without_the_base():
    def side(name, count, seconds, peak):
        return {"side": name, "sequences_per_pass": count, "seconds": [seconds], "seconds_median": seconds,
                "peak_allocated_bytes": peak, "base_bytes": 100}  # fmt: skip

    failing = {"side": "trl-liger", "sequences_per_pass": 2, "out_of_memory": "out of memory in update"}
    sides = [side("ours", 1, 2.0, 150), side("trl", 1, 6.0, 300), side("ours", 2, 1.0, 200),
             side("trl", 2, 3.0, 500), failing]  # fmt: skip
    found = load_update().compare_all(sides)
    assert found["leanest_rival"] == {"side": "trl", "sequences_per_pass": 1}
    assert found["fastest_rival"] == {"side": "trl", "sequences_per_pass": 2}
    assert len(found["rival_over_ours"]) == 3 * 2
    assert found["rival_over_ours"][0] == {
        "rival": {"side": "trl", "sequences_per_pass": 1}, "ours": {"side": "ours", "sequences_per_pass": 1},
        "seconds": 3.0, "peak_allocated": 2.0, "peak_beyond_base": 4.0,
    }  # fmt: skip
    assert [found["rival_over_ours"][-1][key] for key in ("seconds", "peak_allocated", "peak_beyond_base")] == [
        None
    ] * 3


def test_what_was_measured_is_on_disk_when_the_rest_is_cut_short_or_fails(tmp_path, monkeypatch):
    update = load_update()
    path = tmp_path / "update.json"
    monkeypatch.setattr(update, "installed", lambda _: True)
    monkeypatch.setattr(update.metadata, "version", lambda _: "1.0")
    finished = {"seconds": [1.0], "seconds_median": 1.0, "peak_allocated_bytes": None}
    answers = [finished, {"failed": "Traceback: no such kernel"}, finished, KeyboardInterrupt()]

    def measured(*_):
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)

    monkeypatch.setattr(update, "in_own_process", measured)
    monkeypatch.setattr(sys, "argv", [
        "update.py", "--shape", "tiny", "--lengths", "64", "128", "--sequences-per-pass", "1", "--rivals", "trl",
        "--json", str(path),
    ])  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        update.main()
    lengths = json.loads(path.read_text())["lengths"]
    assert [[side["side"] for side in line["sides"]] for line in lengths] == [["ours", "trl"], ["ours"]]
    answers[:] = [finished, {"failed": "Traceback: no such kernel"}, finished, finished]
    with pytest.raises(SystemExit) as stopped:
        update.main()
    assert stopped.value.code == 1
    first, second = json.loads(path.read_text())["lengths"]
    assert first["sides"][1]["failed"].endswith("no such kernel")
    assert len(second["sides"]) == 2


def test_every_command_of_gpu_sh_is_one_that_its_script_takes(tmp_path, monkeypatch):
    update = load_update()
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
    monkeypatch.setattr(update, "installed", lambda _: True)
    written = set()
    for words in updates:
        monkeypatch.setattr(sys, "argv", words)
        arguments, _ = update.parse()
        assert arguments.memory_cap == "24GiB"
        written.add(arguments.json)
    assert len(written) == len(updates) == 7
    assert {"head_loss.py", "rollouts.py"} < {Path(words[0]).name for words in commands}
    benches = [words[3:] for words in commands if words[:3] == ["-m", "popo_lite", "bench"]]
    assert len(benches) == 2
    for words in benches:
        given = bench_command.make_context("bench", words).params
        assert given["as_json"]
        recipe = load_recipe(given["recipe"], given["overrides"])
        assert recipe.rollout.engine == ("vllm" if given["memory_cap"] is None else "hf")
