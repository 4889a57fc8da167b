"""Inject faults. Whatever ends a run, the last whole step is saved, and resumed it ends as an undisturbed one."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from helpers import json_lines
from popo_lite import checkpoint
from popo_lite.callbacks import Callback, CallbackList, TerminalGone
from popo_lite.errors import EngineError, EngineFailedError, NotFiniteError, PopoError
from popo_lite.events import LOG_BYTES, RunEvents
from popo_lite.metrics import make_record
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder, checkpoint_folders
from popo_lite.tools.console.views import PlainView
from popo_lite.trainer import Trainer
from popo_lite.update import gradient_problem
from popo_lite.verdicts import ADVISE_AFTER, Verdicts

STEPS, SAVED, BROKEN = 5, 2, 3
"""Steps of the run; a checkpoint is due after two and four of them; the fault comes in the fourth."""


class Messages(Callback):
    """Keep the messages."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


class Run:
    """A small run, whose trainer `disturb` may change before it starts."""

    def __init__(self, path, *overrides):
        self.recipe = load_recipe(
            "tiny_cpu",
            [f"train.steps={STEPS}", f"train.save_steps={SAVED}", "data.prompts_per_step=8", "eval.problems=0",
             "rollout.num_generations=4", "optimizer.warmup_ratio=0.0", "siamese.head_width=64", *overrides],
        )  # fmt: skip
        path.mkdir(exist_ok=True)
        self.folder = RunFolder(path)
        self.view = Messages()

    def __call__(self, disturb=lambda _: None, *, resume=False, overrides=(), **options):
        recipe = self.recipe.with_values(dict(overrides))
        with Trainer(recipe, self.view) as trainer:
            disturb(trainer)
            return trainer.run(self.folder, resume=resume, **options)

    @property
    def saved(self):
        return [folder.name for folder in checkpoint_folders(self.folder.checkpoints)]

    @property
    def cursor(self):
        newest = checkpoint_folders(self.folder.checkpoints)[-1]
        return json.loads((newest / "cursor.json").read_text())["cursor"]

    @property
    def log(self):
        return self.folder.log_path.read_text()

    def outcome(self):
        """What the run learned: weights, and metrics without times and memory."""
        timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
        lines = [{k: v for k, v in line.items() if k not in timed} for line in json_lines(self.folder.metrics_path)]
        weights = {}
        for folder in (self.folder.adapter, self.folder.siamese):
            tensors = load_file(folder / "adapter_model.safetensors")
            weights |= {f"{folder.name} {name}": tensor.tolist() for name, tensor in tensors.items()}
        return lines, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    run()
    return run.outcome()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def at_step(trainer, owner, name, fault, step=BROKEN, times=1):
    """Let `fault` take the place of a method of `owner` the first `times` it is called in `step`."""
    method, left = getattr(owner, name), [times]

    def broken(*arguments, **options):
        if trainer.cursor.next_step == step and left[0]:
            left[0] -= 1
            return fault(*arguments, **options)
        return method(*arguments, **options)

    setattr(owner, name, broken)


def raising(error):
    def fault(*_, **__):
        raise error

    return fault


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("where", "error", "shown", "text"),
    [
        (("grader", "grade"), ValueError("bad reward"), ValueError, "bad reward"),
        (("sampler", "sample"), RuntimeError("CUDA error: device-side assert"), RuntimeError, "device-side assert"),
        (("learner", "siamese_targets"), AssertionError("no"), AssertionError, "no"),
        (("learner", "backward"), MemoryError(), PopoError, "the computer ran out of memory"),
        (("learner", "backward"), torch.OutOfMemoryError("CUDA out of memory"), EngineError, "the GPU ran out of"),
        (("learner", "prepare"), KeyboardInterrupt("keys"), KeyboardInterrupt, "keys"),
        (("guard", "check"), EngineError("gap"), EngineError, "gap"),
    ],
)  # fmt: skip
def test_any_error_saves_the_last_whole_step(run, undisturbed, where, error, shown, text):
    owner, method = where
    with pytest.raises(shown, match=text) as caught:
        run(lambda trainer: at_step(trainer, getattr(trainer, owner), method, raising(error)))
    assert run.saved == ["step-000002", "step-000003"]
    said = f"all {BROKEN} steps are saved in {run.folder.checkpoints / 'step-000003'}"
    if isinstance(caught.value, PopoError):
        assert said in caught.value.what
    else:
        assert said in caught.value.__notes__[0]
        assert f"{shown.__name__}: {said}" in run.view.messages
    assert "Traceback" in run.log
    assert said in run.log
    run(resume=True)
    assert run.outcome() == undisturbed


def test_an_error_between_optimizer_and_record_loses_what_was_not_saved_and_says_so(run, undisturbed):
    with pytest.raises(ValueError, match="half") as caught:
        run(lambda trainer: at_step(trainer, trainer.learner.siamese, "update", raising(ValueError("half"))))
    assert "in the middle of an update" in caught.value.__notes__[0]
    assert f"the newest checkpoint is {run.folder.checkpoints / 'step-000002'}" in caught.value.__notes__[0]
    assert run.saved == ["step-000002"]
    run(resume=True)
    assert run.outcome() == undisturbed


@pytest.mark.parametrize(("method", "done"), [("step", 3), ("message", 4), ("stage", 3)])
def test_a_callback_that_fails_ends_the_run_and_hinders_no_save(run, undisturbed, method, done):
    with pytest.raises(ValueError, match="dashboard"):
        run(lambda trainer: at_step(trainer, run.view, method, raising(ValueError("dashboard")), done, times=99))
    assert run.saved[-1] == f"step-{done:06d}"
    run.view = Messages()
    run(resume=True)
    assert run.outcome() == undisturbed


class Stream(io.StringIO):
    """A terminal, which fails once `code` is set."""

    code = 0

    def write(self, text):
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE])
@pytest.mark.parametrize("ignores_hangup", [False, True])
def test_a_terminal_that_is_gone_ends_the_run_or_not_and_no_other_callback(run, undisturbed, code, ignores_hangup):
    stream, tracker = Stream(), Messages()
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)
    try:
        with CallbackList([PlainView(stream, heartbeat_seconds=0.1), tracker]) as run.view:
            result = run(lambda trainer: at_step(trainer, trainer, "_report", lambda *_: setattr(stream, "code", code)))
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert run.log.count("the terminal is gone") == 1
    assert tracker.messages[-1] == f"checkpoint: {run.folder.checkpoints / run.saved[-1]}"
    assert (result.summary is not None) == ignores_hangup
    run.view = Messages()
    run(resume=True)
    assert run.outcome() == undisturbed


def test_a_broken_pipe_of_another_callback_is_an_error(run):
    with pytest.raises(BrokenPipeError, match="tracker") as caught:
        run(lambda trainer: at_step(trainer, run.view, "step", raising(BrokenPipeError(errno.EPIPE, "tracker")), 4))
    assert not isinstance(caught.value, TerminalGone)


# --------------------------------------------------------------------- disk


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_TENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_from(monkeypatch, write, within=""):
    """Let every write of a checkpoint after the first `write` find the disk full; return how many there were."""
    calls = [0]

    def failing(method, error):
        def write_or_fail(*arguments, **options):
            if method is os.fsync or within in " ".join(map(str, arguments)):
                calls[0] += 1
                if calls[0] > write:
                    raise error
            return method(*arguments, **options)

        return write_or_fail

    monkeypatch.setattr(checkpoint, "save_adapter", failing(checkpoint.save_adapter, FULL_TENSORS))
    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, FULL_TENSORS))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, FULL))
    return calls


def test_whichever_write_of_a_checkpoint_fails_the_older_one_stays_whole(run, tmp_path, monkeypatch):
    with Trainer(run.recipe, Callback()) as trainer:
        cursor, save = trainer.cursor, partial(checkpoint.save_checkpoint, base_id="tiny", keep=2)
        save(tmp_path / "saved", trainer.learner, cursor)
        cursor.next_step = 1
        with monkeypatch.context() as patch:
            calls = full_from(patch, 999)
            save(tmp_path / "another", trainer.learner, cursor)
        assert calls[0] > 10  # four files of tensors, and every file and folder is synced
        for write in range(calls[0] - 2):  # the last two sync the folders around a checkpoint that is complete
            with monkeypatch.context() as patch:
                full_from(patch, write)
                with pytest.raises((OSError, SafetensorError)):
                    save(tmp_path / "saved", trainer.learner, cursor)
            assert [path.name for path in (tmp_path / "saved").iterdir()] == ["step-000000"], write
        checkpoint.load_checkpoint(tmp_path / "saved" / "step-000000", trainer.learner)


def test_a_full_disk_is_an_error_with_the_place_and_the_next_step(run, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        full_from(patch, 0, within="step-000004")
        patch.setattr(os, "fsync", os.fsync)
        with pytest.raises(PopoError, match="the disk is full; saving failed, too") as caught:
            run()
    assert caught.value.where == str(run.folder.path)
    assert f"then continue: {run.folder.resume_command}" in caught.value.next_step
    assert f"the newest checkpoint is {run.folder.checkpoints / 'step-000002'}" in caught.value.what
    assert run.saved == ["step-000002"]
    run(resume=True)
    assert run.outcome() == undisturbed


def test_lines_that_found_the_disk_full_are_written_before_the_checkpoint(run, undisturbed, monkeypatch):
    def disturb(trainer):
        at_step(trainer, trainer, "_write_lines", raising(FULL), step=BROKEN + 1)

    with pytest.raises(PopoError, match="the disk is full"):
        run(disturb)
    assert len(json_lines(run.folder.metrics_path)) == BROKEN + 1
    run(resume=True)
    assert run.outcome() == undisturbed


@pytest.mark.skipif(sys.platform != "linux", reason="/proc names the file of a descriptor")
def test_the_adapters_are_on_the_disk_before_the_summary_says_so(run, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(str(Path(f"/proc/self/fd/{file}").readlink())), sync(file))
    )
    run(overrides={"train.steps": 1})
    before = synced[: synced.index(str(run.folder.path / ".summary.json.partial"))]
    for folder in (run.folder.adapter, run.folder.siamese):
        assert {str(path) for path in (folder, *folder.iterdir())} <= set(before)


# --------------------------------------------------------------------- engine and proof


@pytest.mark.parametrize("method", ["_complete", "_load"])
def test_an_engine_that_dies_is_opened_again_and_no_step_is_lost(run, undisturbed, method):
    opened = []

    def disturb(trainer):
        at_step(trainer, trainer.sampler, method, raising(EngineFailedError("died")))
        trainer.sampler._open = lambda opening=trainer.sampler._open: opened.append(opening())

    assert run(disturb).summary["steps"] == STEPS
    assert len(opened) == 1
    assert any("the engine is opened again, and the run goes on after step 3" in text for text in run.view.messages)
    assert run.outcome() == undisturbed


def test_an_engine_that_dies_twice_in_a_step_ends_the_run(run, undisturbed):
    died = raising(EngineFailedError("died", next_step="use hf"))
    with pytest.raises(EngineFailedError, match="all 3 steps are saved"):
        run(lambda trainer: at_step(trainer, trainer.sampler, "_complete", died, times=2))
    run(resume=True)
    assert run.outcome() == undisturbed


def test_a_failed_proof_leaves_a_checkpoint_its_doubts_and_a_way_on(run, undisturbed):
    def disturb(trainer):
        at_step(trainer, trainer.guard, "prove", raising(EngineError("stale")), step=4, times=9)

    with pytest.raises(EngineError, match="stale; all 4 steps are saved"):
        run(disturb)
    with pytest.raises(EngineError, match="stale"):
        run(disturb, resume=True)
    assert run.saved[-1] == "step-000004"
    [doubt] = run.cursor["doubts"]
    assert doubt.startswith("steps 3 to 4 are in doubt")
    summary = run(resume=True, changes=[{"key": "rollout.engine", "before": "vllm", "now": "hf"}]).summary
    assert doubt in run.view.messages
    assert summary["doubts"] == [doubt]
    assert summary["changes"] == [{"key": "rollout.engine", "before": "vllm", "now": "hf", "step": 4}]
    assert run.outcome() == undisturbed


# --------------------------------------------------------------------- numbers


def bad_gradients(*steps, norm=math.nan, scales=(1.0,)):
    """Let gradients of these steps go wrong while the learning rate is scaled so."""

    def disturb(trainer):
        backward = trainer.learner.backward

        def broken(*arguments, **options):
            result = backward(*arguments, **options)
            bad = trainer.cursor.next_step in steps and trainer.cursor.learning_rate_scale in scales
            return replace(result, grad_norm=norm) if bad else result

        trainer.learner.backward = broken

    return disturb


@pytest.mark.parametrize("norm", [math.nan, 1e9])
def test_a_bad_gradient_is_skipped_and_counted(run, norm):
    def disturb(trainer):
        trainer.cursor.recent_grad_norms = [1.0] * 10
        bad_gradients(1, 2, 4, norm=norm)(trainer)

    summary = run(disturb).summary
    assert summary["not_finite_steps"] == 3
    assert summary["rollbacks"] == 0
    reasons = [line["skipped_reason"] for line in json_lines(run.folder.metrics_path)]
    assert [reason is not None for reason in reasons] == [False, True, True, False, True]
    assert reasons[1].startswith("the gradient is not finite" if math.isnan(norm) else "the gradient explodes: its")
    assert len(run.cursor["recent_grad_norms"]) == 12


def test_three_bad_gradients_in_a_row_go_back_with_half_the_learning_rate_and_a_kill_changes_nothing(tmp_path):
    options = ("train.steps=9", "train.save_steps=3")
    whole, killed = Run(tmp_path / "whole", *options), Run(tmp_path / "killed", *options)
    disturb = bad_gradients(4, 5, 6)  # a checkpoint is due among them

    def dying_at(step):
        def disturb_and_kill(trainer):
            disturb(trainer)
            at_step(trainer, trainer.grader, "grade", raising(SystemExit("killed")), step=step, times=1)
            trainer._save_after_error = lambda _: ""

        return disturb_and_kill

    summary = whole(disturb).summary
    assert "step-000006-set-aside" in [path.name for path in whole.folder.checkpoints.iterdir()]
    for step in (5, 7, 8):
        with pytest.raises(SystemExit):
            killed(dying_at(step), resume=step > 5)
    assert killed(disturb, resume=True).summary["rollbacks"] == summary["rollbacks"] == 1
    assert summary["learning_rate_scale"] == 0.5
    assert killed.outcome() == whole.outcome()
    lines = json_lines(whole.folder.metrics_path)
    assert [line["step"] for line in lines] == list(range(9))
    assert lines[-1]["learning_rate"] < 0.5 * lines[0]["learning_rate"]
    assert any("back from step 7 to 3, and on with 0.5 times" in text for text in whole.view.messages)


def stopping_at(*steps):
    """Press Ctrl-C in each of these steps, once."""
    left = set(steps)

    def disturb(trainer):
        grade = trainer.grader.grade

        def pressed(*arguments, **options):
            if trainer.cursor.next_step in left:
                left.remove(trainer.cursor.next_step)
                trainer.interrupts.note(signal.SIGINT, None)
            return grade(*arguments, **options)

        trainer.grader.grade = pressed

    return disturb


@pytest.mark.parametrize("limit", [1, 2])
def test_ctrl_c_around_and_among_bad_gradients_changes_nothing(tmp_path, limit):
    options = ("train.steps=9", "train.save_steps=3", f"train.save_total_limit={limit}", "eval.every=5",
               "eval.problems=4")  # fmt: skip
    whole, stopped = Run(tmp_path / "whole", *options), Run(tmp_path / "stopped", *options)
    bad = bad_gradients(4, 5, 6)
    assert whole(bad).summary["rollbacks"] == 1  # the best checkpoint is saved among them
    stop = stopping_at(3, 4, 5, 6, 7)
    ends = []
    while not ends or ends[-1] is None:
        ends.append(stopped(lambda trainer: (bad(trainer), stop(trainer)), resume=bool(ends)).summary)
    assert len(ends) == 5  # the one "in step 5" comes in the evaluation before it, and abandons that
    assert ends[-1]["rollbacks"] == 1
    assert stopped.outcome() == whole.outcome()


def test_a_callback_that_fails_after_the_third_bad_gradient_changes_nothing(tmp_path):
    options = ("train.steps=9", "train.save_steps=3")
    whole, failed = Run(tmp_path / "whole", *options), Run(tmp_path / "failed", *options)
    bad = bad_gradients(4, 5, 6)
    whole(bad)
    with pytest.raises(ValueError, match="tracker"):
        failed(lambda trainer: (bad(trainer), at_step(trainer, failed.view, "step", raising(ValueError("tracker")), 7)))
    failed.view = Messages()
    failed(bad, resume=True)
    assert failed.outcome() == whole.outcome()


def test_changes_outlive_a_rollback_and_a_new_learning_rate_is_not_halved(tmp_path):
    run = Run(tmp_path / "run", "train.steps=9", "train.save_steps=3", "optimizer.schedule=constant")
    coef = {"key": "objective.entropy_coef", "before": 0.01, "now": 0.5}
    run(lambda trainer: (bad_gradients(4)(trainer), stopping_at(4)(trainer)))
    changed = {"overrides": {"objective.entropy_coef": 0.5}, "changes": [coef]}
    assert run(bad_gradients(5, 6), resume=True, **changed).summary["changes"] == [{**coef, "step": 3}]
    coefs = [line["entropy_coef"] for line in json_lines(run.folder.metrics_path)]
    assert coefs == [coefs[0]] * 3 + [0.5] * 6
    assert run.cursor["learning_rate_scale"] == 0.5
    rate = {"key": "optimizer.learning_rate", "before": 1.0, "now": 0.001}
    longer = {"objective.entropy_coef": 0.5, "optimizer.learning_rate": 0.001, "train.steps": 10}
    run(resume=True, overrides=longer, changes=[rate])
    assert json_lines(run.folder.metrics_path)[-1]["learning_rate"] == 0.001


def test_changes_after_the_evaluation_before_the_first_step_count(tmp_path):
    run = Run(tmp_path / "run", "eval.problems=4")

    def disturb(trainer):
        evaluate = trainer.evaluate
        trainer.evaluate = lambda when: (trainer.interrupts.note(signal.SIGINT, None), evaluate(when))[1]

    assert run(disturb).next_step == 0
    changes = [{"key": "objective.entropy_coef", "before": 0.01, "now": 0.5}]
    summary = run(resume=True, overrides={"objective.entropy_coef": 0.5}, changes=changes).summary
    assert summary["changes"] == [{**changes[0], "step": 0}]
    assert {line["entropy_coef"] for line in json_lines(run.folder.metrics_path)} == {0.5}


@pytest.mark.parametrize("scales", [(1.0, 0.5), (1.0,)])
def test_after_one_way_back_the_run_stops_with_advice(tmp_path, scales):
    run = Run(tmp_path / "run", "train.steps=9", "train.save_steps=2")
    disturb = bad_gradients(3, 4, 5, scales=scales)
    if len(scales) == 1:
        assert run(disturb).summary["rollbacks"] == 1
        return
    with pytest.raises(NotFiniteError, match="3 updates in a row") as caught:
        run(disturb)
    assert "a lower --set optimizer.learning_rate" in caught.value.next_step
    assert run.saved[-1] == "step-000006"  # their weights are whole


@pytest.mark.parametrize(
    ("method", "step", "value", "said"),
    [
        ("optimizer", 3, math.nan, "the trained weights are not finite; back from step 3 to 2"),
        ("sync", 3, 1e30, "log-probs are not finite, so its weights or activations are not either; back from step 3"),
        ("sync", 4, 1e30, "activations are not either; back from step 4 to 2"),  # found after the checkpoint is saved
    ],
)
def test_numbers_that_are_not_finite_go_back_and_are_never_saved(run, method, step, value, said):
    def disturb(trainer):
        def spoil(*_, **__):
            for _, weight in trainer.policy.adapter_parameters():
                weight.data.fill_(value)

        owner, name = {"optimizer": (trainer.learner.optimizer, "step"), "sync": (trainer.sampler, "_load")}[method]
        at_step(trainer, owner, name, spoil, step=step)

    summary = run(disturb).summary
    assert summary["rollbacks"] == 1
    assert any(said in text for text in run.view.messages)
    assert summary["steps"] == STEPS
    for file in run.folder.path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point()), file


def test_without_a_checkpoint_there_is_no_way_back_and_whole_weights_are_saved(run):
    with pytest.raises(NotFiniteError, match="all 3 steps are saved") as caught:
        run(bad_gradients(0, 1, 2), overrides={"train.save_steps": 100})
    assert f"{run.folder.resume_command} with an earlier --checkpoint" in caught.value.next_step


def test_weights_that_are_not_finite_are_not_saved_after_an_error_either(run):
    def disturb(trainer):
        def spoil(*_, **__):
            trainer.policy.adapter_parameters()[0][1].data.fill_(math.nan)
            raise ValueError("first")

        at_step(trainer, trainer.grader, "grade", spoil)

    with pytest.raises(ValueError, match="first") as caught:
        run(disturb)
    assert "saving failed, too (NotFiniteError: the trained weights are not finite)" in caught.value.__notes__[0]
    assert run.saved == ["step-000002"]


def test_what_counts_as_an_exploding_gradient():
    usual = [0.02] * 10
    assert gradient_problem(math.inf, [], 1.0) == "the gradient is not finite"
    assert gradient_problem(1e9, usual[1:], 1.0) is None  # too few to know
    assert "explodes: its norm is 25" in gradient_problem(25.0, usual, 1.0)
    assert gradient_problem(19.0, usual, 1.0) is None
    assert gradient_problem(0.9, [1e-9] * 10, 1.0) is None  # a saturated policy may find something to learn again
    assert gradient_problem(1e3, [*usual, *[2.0] * 20], 1.0) is None


# --------------------------------------------------------------------- best, log, verdicts


def test_the_best_checkpoint_stays(tmp_path):
    run = Run(tmp_path / "run", "eval.every=1", "eval.problems=4", "train.save_total_limit=1", "train.steps=4")

    def disturb(trainer):
        rates = iter((0.1, 0.5, 0.2))
        evaluate = trainer.evaluate
        trainer.evaluate = lambda when: replace(
            evaluate(when), **{} if "step" not in when else {"pass_at_1": next(rates)}
        )

    assert run(disturb).summary["best"] == {"step": 2, "pass_at_1": 0.5}
    assert run.saved == ["step-000002", "step-000004"]


def test_a_callback_that_fails_is_logged_and_disconnects_no_other(tmp_path):
    class Broken(Messages):
        def message(self, text):
            super().message(text)
            raise KeyError(text)

    broken, sound = Broken(), Messages()
    events = RunEvents(CallbackList([broken, sound]), lambda: None)
    events.open_log(tmp_path / "log.txt")
    with pytest.raises(KeyError):
        events.message("one")
    events.message("two")
    assert (broken.messages, sound.messages) == (["one"], ["one", "two"])
    assert "KeyError: 'one'" in (tmp_path / "log.txt").read_text()


def test_the_log_has_early_messages_and_no_secrets_and_rotates(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_secret")
    events = RunEvents(Callback(), lambda: None)
    events.message("before the folder is there")
    path = tmp_path / "log.txt"
    events.open_log(path)
    events.message("http://user:password@host says hf_secret_secret\x1b[2J\nsecond line")
    text = path.read_text()
    assert "before the folder is there" in text
    assert "secret" not in text
    assert "password" not in text
    assert "\\x1b[2J\nsecond line" in text
    for _ in range(45):
        events.message("x" * 100_000)
    events.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log.txt", "log.txt.1", "log.txt.2"]
    assert all(file.stat().st_size <= LOG_BYTES for file in files)


RECORD = make_record(
    {
        "rewards": {},
        "step": 0,
        "skipped_reason": None,
        "pass_rate": 0.5,
        "grad_norm": 0.5,
        "update_norm": 0.1,
        "loss": 0.3,
    }
)


@pytest.mark.parametrize(
    ("values", "equals_base", "said"),
    [
        ({}, False, ""),
        ({"grad_norm": 0.0, "update_norm": 0.0}, False, "the gradient is exactly zero"),
        ({"update_norm": 0.0}, False, "the weights do not move"),
        ({}, True, "the adapter still equals the base"),
        ({"loss": 1e-9}, False, "a loss of 0 is normal for grpo"),
    ],
)
def test_verdicts_when_nothing_is_learned(values, equals_base, said):
    algorithm = "grpo" if "loss" in values else "popo"
    verdicts = Verdicts(load_recipe("tiny_cpu", [f"objective.algorithm={algorithm}"]), "hf")
    texts = [
        text for _ in range(3) for text in verdicts.of({**RECORD, **values}, planned=True, equals_base=equals_base)
    ]
    assert len(texts) == bool(said)
    assert all(said in text for text in texts)


@pytest.mark.parametrize(("pass_rate", "advice"), [(0.0, "easier problems"), (1.0, "harder problems")])
def test_a_run_whose_groups_teach_nothing_says_so(pass_rate, advice):
    record = {**RECORD, "skipped_reason": "no", "pass_rate": pass_rate, "grad_norm": None, "update_norm": None}
    verdicts = Verdicts(load_recipe("tiny_cpu"), "hf")
    bad_gradients = [verdicts.of(record, planned=True, equals_base=True) for _ in range(ADVISE_AFTER)]
    assert bad_gradients == [[]] * ADVISE_AFTER
    texts = [verdicts.of(record, planned=False, equals_base=True) for _ in range(ADVISE_AFTER)]
    assert texts[:-1] == [[]] * (ADVISE_AFTER - 1)
    assert f"5 steps changed nothing: no; {advice}" in texts[-1][0]


def test_a_run_with_a_learning_rate_of_almost_nothing_says_that_weights_do_not_move(run):
    run(overrides={"optimizer.learning_rate": 1e-40, "optimizer.head_learning_rate": 1e-40, "train.steps": 1})
    assert any("step 1: the weights do not move" in text for text in run.view.messages)
