"""Requests to a run that trains: they are served between steps and change nothing of what it learns."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

import popo_lite
from helpers import json_lines, record
from popo_lite import run_loop
from popo_lite.cli import main
from popo_lite.controls import Controls
from popo_lite.errors import EngineFailedError, UserInputError
from popo_lite.requests import Requests
from popo_lite.run_folder import RunFolder
from popo_lite.verdicts import WINDOW, Verdicts

SMALL = ("train.steps=4", "data.prompts_per_step=4", "rollout.num_generations=4", "eval.problems=4", "eval.every=2",
         "train.save_steps=2")  # fmt: skip


class Asking(popo_lite.Callback):
    """Ask for `wanted`, by the step after which; continue a pause soon."""

    def __init__(self, wanted, on_pause=None):
        self.wanted, self.said, self.answers = wanted, [], []
        self.on_pause = on_pause or (lambda: self.controls.request("continue"))

    def attach(self, controls):
        self.controls = controls

    def step(self, record):
        for action in self.wanted.get(record["step"] + 1, ()):
            self.controls.request(action)

    def sampled(self, samples):
        self.answers += samples

    def message(self, text):
        self.said.append(text)
        if text.startswith("paused"):
            threading.Timer(0.2, self.on_pause).start()


def learned(run: RunFolder):
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    lines = [{k: v for k, v in line.items() if k not in timed} for line in json_lines(run.metrics_path)]
    return lines, (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunFolder:
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    return popo_lite.train(recipe, output=tmp_path_factory.mktemp("undisturbed") / "run").folder


def test_requests_wait_and_count_once():
    stopped = []
    controls = Controls(lambda: stopped.append(1), print)
    for action in ("sample", "evaluate", "sample", "pause"):
        controls.request(action)
    assert controls.waiting == ("pause", "sample", "evaluate")
    controls.request("continue")
    assert [controls.take() for _ in range(3)] == ["sample", "evaluate", None]
    controls.request("stop")
    assert (stopped, controls.waiting, controls.pausing) == ([1], (), False)
    with pytest.raises(UserInputError, match="no control 'sleep'"):
        controls.request("sleep")


def test_what_is_asked_for_changes_nothing_of_the_run(undisturbed, tmp_path):
    asking = Asking({1: ["sample", "pause"], 2: ["evaluate", "sample", "checkpoint"], 3: ["checkpoint", "evaluate"]})
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    run = popo_lite.train(recipe, output=tmp_path / "run", callbacks=[asking]).folder
    assert learned(run) == learned(undisturbed)
    said = "\n".join(asking.said)
    for text in ("paused after step 1 of 4", "continued after step 1 of 4", "asked for after step 2: pass@1"):
        assert text in said
        assert text in run.log_path.read_text()
    assert len(asking.answers) == 6
    assert all(answer["question"] for answer in asking.answers)
    assert all((answer["right"] is None) != (answer["wrong"] is None) for answer in asking.answers)
    assert len({answer["question"] for answer in asking.answers}) == 4  # the next ones, then from the start again
    assert (run.checkpoints / "step-000003").is_dir()
    lines = json_lines(run.evaluations_path)
    assert [(line["when"], line["step"]) for line in lines if line["when"] == "asked"] == [("asked", 2), ("asked", 3)]
    planned = [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["when"] != "asked"]
    theirs = [{k: v for k, v in line.items() if k != "seconds"} for line in json_lines(undisturbed.evaluations_path)]
    assert planned == theirs
    # Resuming from the second step keeps what belongs to it, and goes on to the same end.
    (run.path / "summary.json").unlink()
    popo_lite.resume(run.path, checkpoint=2)
    assert learned(run) == learned(undisturbed)
    kept = [(line["when"], line["step"]) for line in json_lines(run.evaluations_path)]
    assert kept == [("before", 0), ("step 2", 2), ("asked", 2), ("after", 4)]


def test_a_signal_ends_a_pause_and_the_run(undisturbed, tmp_path, monkeypatch):
    asking = Asking({1: ["pause"]}, on_pause=lambda: os.kill(os.getpid(), signal.SIGTERM))
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    stopped = popo_lite.train(recipe, output=tmp_path / "run", callbacks=[asking])
    assert (stopped.summary, stopped.next_step) == (None, 1)
    assert (stopped.folder.checkpoints / "step-000001").is_dir()
    popo_lite.resume(stopped.folder.path)
    assert learned(stopped.folder) == learned(undisturbed)


def test_a_request_that_fails_costs_no_step(undisturbed, tmp_path, monkeypatch):
    save, sample = run_loop.save_checkpoint, Requests._show_samples

    def full(folder, learner, cursor, **options):
        if cursor.next_step == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(folder, learner, cursor, **options)

    def dies_once(loop):
        monkeypatch.setattr(Requests, "_show_samples", sample)
        raise EngineFailedError("the engine died", next_step="nothing")

    class AskingLate(Asking):
        def evaluated(self, record):
            if record["when"] == "after":
                self.controls.request("sample")

    monkeypatch.setattr(run_loop, "save_checkpoint", full)
    monkeypatch.setattr(Requests, "_show_samples", dies_once)
    asking = AskingLate({1: ["checkpoint"], 3: ["sample"]})
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    run = popo_lite.train(recipe, output=tmp_path / "run", callbacks=[asking]).folder
    assert learned(run) == learned(undisturbed)
    said = "\n".join(asking.said)
    assert "checkpoint: not done; [Errno 28] No space left on device" in said
    assert "sample: not done, because the engine failed" in said
    assert "sample: not done, because the last step is over" in said
    assert "OSError" in run.log_path.read_text()


def test_the_plain_view_shows_a_pause_and_answers(tmp_path, monkeypatch):
    from popo_lite.tools.console.views import PlainView

    def attach(view, controls):
        view.controls = controls
        controls.request("sample")

    def sampled(view, samples, *, shown=PlainView.sampled):
        shown(view, samples)
        view.controls.request("pause")
        threading.Timer(1, lambda: view.controls.request("stop")).start()

    monkeypatch.setattr(PlainView, "sampled", sampled)
    monkeypatch.setattr(PlainView, "attach", attach)
    options = [word for each in SMALL for word in ("--set", each)]
    done = CliRunner().invoke(main, ["train", "tiny_cpu", *options, "--output", str(tmp_path / "run")])
    assert done.exit_code == 130, done.output
    assert "paused after step 0 of 4; to continue" in done.output
    shown = re.findall(r"question: (.+) \(the answer is .+\)\n[0-9:]{8}    (?:right|wrong): ", done.output)
    assert len(shown) == 3


# --------------------------------------------------------------------------- verdicts


def told(tiny_recipe, changes, *, steps=2 * WINDOW, overrides=(), engine="hf", resumed_at=None) -> str:
    verdicts, texts, done = Verdicts(tiny_recipe(*overrides), engine), [], []
    for step in range(steps):
        if step == resumed_at:
            verdicts = Verdicts(tiny_recipe(*overrides), engine, done)
        done.append(record(step, **{"pass_rate": 0.5, "completion_tokens_mean": 20.0, **changes(step)}))
        texts += verdicts.of(done[-1], planned=True, equals_base=False)
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (lambda _: {"entropy_over_start": 0.05}, "raise objective.entropy_coef"),
        (lambda _: {"entropy_over_start": 4.0}, "answers become random"),
        (lambda _: {"pass_rate": 1.0}, "hardly anything left to learn"),
        (lambda _: {"truncated_ratio": 0.5}, "50% of the answers are cut off"),
        (lambda step: {"completion_tokens_mean": 20.0 + 3 * step}, "answers have grown to"),
        (lambda step: {"logp_gap_mean": 0.001 if step < WINDOW else 0.02}, "log-probs of sampler and trainer differ"),
        (lambda _: {"rewards": {"math": 0.5, "format": 0.0}}, "the reward function format has given 0 to every"),
    ],
)  # fmt: skip
def test_a_trend_is_told_once_with_what_to_do(tiny_recipe, changes, text):
    for resumed_at in (None, WINDOW + 1, 2 * WINDOW - 1):
        said = told(tiny_recipe, changes, resumed_at=resumed_at)
        assert said.count("\n") == 0, said
        assert text in said


def test_advice_names_only_what_can_be_changed(tiny_recipe):
    def explodes(_):
        return {"entropy_over_start": 4.0}

    def gap(step):
        return {"logp_gap_mean": 0.001 if step < WINDOW else 0.02}

    assert "objective.entropy_coef" in told(tiny_recipe, explodes)
    for algorithm in ("grpo", "raft"):
        assert "entropy_coef" not in told(tiny_recipe, explodes, overrides=[f"objective.algorithm={algorithm}"])
    assert "--set model.attn_implementation=eager" in told(tiny_recipe, gap)
    assert "--set rollout.engine=hf" in told(tiny_recipe, gap, engine="vllm")


def test_nothing_is_told_of_a_run_that_learns(tiny_recipe, undisturbed):
    fine = {"rewards": {"math": 0.5, "format": 1.0}}
    assert told(tiny_recipe, lambda step: fine if step % 5 else {"rewards": {"math": 0.4, "format": 0.9}}) == ""
    # As tiny_cpu ends: surer than at the start, because it has learned.
    assert told(tiny_recipe, lambda _: {"entropy_over_start": 0.3, "pass_rate": 0.97}) == ""
    assert told(tiny_recipe, lambda _: {"entropy_over_start": 0.05, "pass_rate": 0.95}) == ""
    assert "step 10" not in Path(undisturbed.log_path).read_text()
