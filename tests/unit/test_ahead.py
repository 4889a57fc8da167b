"""One step ahead: the order of events, lags, boundaries, errors, and runs that resume.

The fake server is a second copy of the model with its own adapter, in this process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import popo_lite.opening
from helpers import json_lines
from popo_lite.ahead import Rollouts, Start
from popo_lite.callbacks import EVENTS, Callback
from popo_lite.conversation import RolloutWorker
from popo_lite.distributed import join
from popo_lite.errors import EngineFailedError, GradingError, StalePolicyError
from popo_lite.metrics import sampler_summary
from popo_lite.policy.policy import load_policy
from popo_lite.recipe_file import load_recipe
from popo_lite.recipe_rules import impossible_combinations
from popo_lite.resuming import free_keys
from popo_lite.run_folder import RunFolder
from popo_lite.samplers.base import Sampler
from popo_lite.samplers.hf import HFSampler
from popo_lite.trainer import Trainer
from popo_lite.types import Outcome, Reward
from popo_lite.verdicts import Verdicts

ROOT = Path(__file__).parents[2]
SECONDS = 60  # how long a test waits for what must happen


class Twin(Sampler):
    """Samples like a server: from weights of its own, while the policy trains."""

    engine = "server"

    def _open(self):
        self.policy = load_policy(self._recipe)
        self.inner = HFSampler(self.policy, self._recipe, text=self._text)
        self.busy = False

    def _load(self, version):
        assert not self.busy, "the adapter changes while it samples"
        with torch.no_grad():
            pairs = zip(self.policy.adapter_parameters(), self._policy.adapter_parameters(), strict=True)
            for (_, mine), (_, theirs) in pairs:
                mine.copy_(theirs)

    def _complete(self, requests, params, finished):
        self.busy = True
        try:
            return self.inner._complete(requests, params, finished)
        finally:
            self.busy = False


def recipe_of(*overrides, level=1):
    return load_recipe("tiny_cpu", [
        'rollout.engine="server"', 'rollout.server.base_urls=["http://127.0.0.1:1"]', 'rollout.server.shared_dir="/x"',
        f"rollout.async_level={level}", "objective.importance_sampling_clip_max=2.0", "data.prompts_per_step=4",
        "rollout.num_generations=4", "train.steps=6", "train.save_steps=3", "eval.problems=0",
        "optimizer.warmup_ratio=0.0", *overrides,
    ])  # fmt: skip


class Events(Callback):
    """Notes the events of a run, and the thread that each comes from. `on[event]` is called with its first value."""

    def __init__(self, **on):
        self.seen, self.threads, self.on = [], set(), on
        for event in EVENTS:
            setattr(self, event, lambda *values, _event=event, **named: self.note(_event, values, named))

    def note(self, event, values, named):
        self.threads.add(threading.current_thread())
        self.seen.append((event, *values))
        if event in self.on:
            self.on[event](*values)

    def messages(self):
        return [text for event, text in ((one[0], one[-1]) for one in self.seen) if event == "message"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(name, recipe, events)`: the result, with the sampler's calls in `trainer.calls`."""
    monkeypatch.setattr(popo_lite.opening, "open_sampler", lambda recipe, policy, **more: Twin(policy, recipe, **more))

    def run(name, recipe, events=None, *, resume=False, before=lambda trainer: None):
        events, folder = events or Events(), RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        with Trainer(recipe, events) as trainer:
            trainer.calls, draw, sync = [], trainer.sampler.draw, trainer.sampler.sync
            main = threading.current_thread()

            def drawing(*arguments, **options):
                if options["stream"][0] == "rollout":
                    ahead = threading.current_thread() is not main
                    trainer.calls.append(("draw", options["stream"][-1], options["policy_version"], ahead))
                return draw(*arguments, **options)

            def syncing(version):
                trainer.calls.append(("sync", version))
                sync(version)

            trainer.sampler.draw, trainer.sampler.sync = drawing, syncing
            before(trainer)
            result = trainer.run(folder, resume=resume)
        assert events.threads == {threading.current_thread()}
        return SimpleNamespace(summary=result.summary, calls=trainer.calls, events=events)

    def lines(name):
        return json_lines(tmp_path / name / "metrics.jsonl")

    def learned(name):
        timed = ("seconds", "seconds_ahead", "tokens_per_second", "peak_memory_bytes")
        adapter = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        return [{key: value for key, value in line.items() if key not in timed} for line in lines(name)], adapter

    run.lines, run.learned = lines, learned
    return run


def lags(lines):
    return [line["lag"] for line in lines]


def test_the_next_step_is_sampled_by_the_adapter_before_the_update_while_it_runs(train):
    updating = threading.Event()
    overlapped = []

    def before(trainer):
        draw = trainer.sampler.draw

        def draws(*arguments, **options):
            if threading.current_thread() is not threading.main_thread():
                overlapped.append(updating.wait(SECONDS))  # the update of the step before has begun
            return draw(*arguments, **options)

        trainer.sampler.draw = draws

    def stage(name):
        updating.set() if name == "update" else updating.clear() if name == "sync" else None

    run = train("run", recipe_of(), Events(stage=stage), before=before)
    assert overlapped == [True] * 4
    rollouts = [call for call in run.calls if call[0] == "draw"]
    assert rollouts == [
        ("draw", 0, 0, False), ("draw", 1, 0, True), ("draw", 2, 1, True),
        ("draw", 3, 3, False), ("draw", 4, 3, True), ("draw", 5, 4, True),
    ]  # fmt: skip
    lines = train.lines("run")
    assert lags(lines) == [0, 1, 1, 0, 1, 1]
    assert [line["policy_version"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert (line["seconds_ahead"] is None) == (line["lag"] == 0)
        assert {"prompts", "rollout", "grade"} <= line["seconds"].keys()
        taken = line["seconds"]["rollout"] + (line["seconds_ahead"] or {"rollout": 0})["rollout"]
        assert line["tokens_per_second"]["rollout"] == pytest.approx(line["rollout_tokens"] / taken)
    stages = [one[1] for one in run.events.seen if one[0] == "stage"]
    assert (stages.count("prompts"), stages.count("rollout")) == (2, 2 + 6)  # else the run waits for rollouts


def test_without_it_every_step_is_sampled_by_the_current_policy(train):
    run = train("run", recipe_of(level=0))
    assert [call[1:] for call in run.calls if call[0] == "draw"] == [(step, step, False) for step in range(6)]
    assert lags(train.lines("run")) == [0] * 6
    assert "rollouts" not in {thread.name for thread in threading.enumerate()}


def test_draws_follow_from_the_recipe_and_the_first_step_is_the_same_at_both_levels(train):
    for name, level in (("once", 1), ("again", 1), ("none", 0)):
        train(name, recipe_of(level=level))
    assert train.learned("once") == train.learned("again")
    once, none = train.learned("once")[0], train.learned("none")[0]
    assert {**once[0], "lag": 0} == none[0]
    assert once[1]["logp_gap_mean"] > 100 * none[1]["logp_gap_mean"]  # one update lies between
    assert once[3]["logp_gap_mean"] == pytest.approx(none[3]["logp_gap_mean"], abs=1e-5)


@pytest.mark.parametrize("stops_in", [1, 2])
def test_a_run_that_stopped_at_a_checkpoint_ends_as_one_that_did_not(train, stops_in):
    train("whole", recipe_of())
    events = Events(step=lambda record: record["step"] == stops_in and trainers[0].interrupts.stop())
    trainers = []
    assert train("stopped", recipe_of(), events, before=trainers.append).summary is None
    done = lags(train.lines("stopped"))
    assert done == [0, 1, 1][: stops_in + 1]
    train("stopped", recipe_of(), resume=True)
    if stops_in == 2:  # at a multiple of save_steps
        assert train.learned("stopped") == train.learned("whole")
    else:
        assert lags(train.lines("stopped")) == [0, 1, 0, 0, 1, 1]


def test_evaluations_and_checkpoints_are_followed_by_rollouts_of_the_current_policy(train):
    run = train("run", recipe_of("eval.problems=4", "eval.every=2", "train.save_steps=5"))
    assert lags(train.lines("run")) == [0, 1, 0, 1, 0, 0]
    assert run.summary["steps"] == 6
    recipe = recipe_of()
    assert free_keys(recipe_of(level=0)) - free_keys(recipe) == {"train.save_steps", "eval.every"}


def test_requests_are_served_between_steps_and_change_no_draw(train):
    train("undisturbed", recipe_of())
    asked = {0: "sample", 1: "checkpoint", 3: "evaluate", 4: "pause"}

    def step(record):
        if action := asked.get(record["step"]):
            trainers[0].controls.request(action)
            if action == "pause":
                threading.Timer(0.5, trainers[0].controls.request, ["continue"]).start()

    trainers = []
    run = train("asked", recipe_of(), Events(step=step), before=trainers.append)
    assert train.learned("asked") == train.learned("undisturbed")
    assert [one[0] for one in run.events.seen].count("sampled") == 1
    assert any("continued" in text for text in run.events.messages())


def failing(trainer, at, error):
    """Let the draw ahead of step `at` fail once."""
    draw, left = trainer.sampler.draw, [at]

    def draws(*arguments, **options):
        if options["stream"][0] == "rollout" and options["stream"][-1] in left and left.pop() == at:
            raise error
        return draw(*arguments, **options)

    trainer.sampler.draw = draws


def test_an_engine_that_fails_ahead_is_opened_again_and_the_step_is_drawn_by_the_current_policy(train):
    run = train("run", recipe_of(), before=lambda trainer: failing(trainer, 2, EngineFailedError("it died")))
    assert lags(train.lines("run")) == [0, 1, 0, 0, 1, 1]
    assert any("it died; the engine is opened again" in text for text in run.events.messages())


def test_another_error_ahead_ends_the_run_after_the_step_that_trained(train):
    error = GradingError("no verdicts")
    with pytest.raises(GradingError, match="no verdicts; all 2 steps are saved"):
        train("run", recipe_of(), before=lambda trainer: failing(trainer, 2, error))
    assert lags(train.lines("run")) == [0, 1]
    train("run", recipe_of(), resume=True)
    assert lags(train.lines("run")) == [0, 1, 0, 0, 1, 1]


def test_a_second_interrupt_abandons_both_steps(train):
    def before(trainer):
        trainers.append(trainer)
        complete = trainer.sampler.inner._complete

        def endless(requests, params, finished):
            while threading.current_thread() is not threading.main_thread():
                finished(0)  # must raise
            return complete(requests, params, finished)

        trainer.sampler.inner._complete = endless

    def stage(name):
        if name == "update":
            trainers[0].interrupts.note(0, None)
            trainers[0].interrupts.note(0, None)

    trainers = []
    run = train("run", recipe_of(), Events(stage=stage), before=before)
    assert run.summary is None
    assert "step" not in {one[0] for one in run.events.seen}


def test_a_run_that_stops_does_not_wait_for_the_next_step(train):
    def before(trainer):
        trainers.append(trainer)
        complete = trainer.sampler.inner._complete

        def endless(requests, params, finished):
            while threading.current_thread() is not threading.main_thread():
                finished(0)
            return complete(requests, params, finished)

        trainer.sampler.inner._complete = endless

    trainers = []
    stop = Events(step=lambda _: trainers[0].interrupts.stop())
    assert train("run", recipe_of(), stop, before=before).summary is None
    assert lags(train.lines("run")) == [0]


def test_an_update_that_fails_leaves_nothing_in_flight(train):
    def before(trainer):
        trainers.append(trainer)
        backward = trainer.learner.backward

        def fails(*arguments, **options):
            if trainer.cursor.next_step == 1:
                raise EngineFailedError("it died in the update")
            return backward(*arguments, **options)

        trainer.learner.backward = fails

    trainers = []
    with pytest.raises(EngineFailedError, match="in the update"):
        train("run", recipe_of(), before=before)
    assert not trainers[0].sampler.busy
    assert trainers[0].rollouts.take(2, 2) is None


def test_what_the_sampler_says_ahead_is_passed_on_by_the_main_thread(train):
    def before(trainer):
        draw = trainer.sampler.draw

        def draws(*arguments, **options):
            if threading.current_thread() is not threading.main_thread():
                trainer.sampler._notify(f"server set aside before step {options['stream'][-1]}")
            return draw(*arguments, **options)

        trainer.sampler.draw = draws

    run = train("run", recipe_of("train.steps=3"), before=before)  # the fixture checks the thread
    said = [text for text in run.events.messages() if "set aside" in text]
    assert said == [f"server set aside before step {step}" for step in (1, 2)]


def test_a_level_counts_only_the_steps_drawn_at_it(train, tmp_path, monkeypatch):
    rows = [{"question": f"{n} + {n}", "answer": str(2 * n), "grade": n % 4} for n in range(10, 50)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = Reward(value=1.0, outcome=Outcome.CORRECT, positive=True)
    monkeypatch.setattr(RolloutWorker, "grade", lambda _, answers, **__: [right] * len(answers))
    recipe = recipe_of(
        f'data.dataset="{tmp_path / "sums.jsonl"}"', "data.curriculum.enabled=true", 'data.curriculum.column="grade"',
        "data.curriculum.window=1", "train.save_steps=6",
    )  # fmt: skip
    run = train("run", recipe)
    assert lags(train.lines("run")) == [0, 1, 1, 1, 1, 1]
    # Step 1 was drawn at level 0, before step 0 moved it to 1; and so on.
    assert [line["level"] for line in train.lines("run")] == [0, 0, 1, 1, 2, 2]
    moves = [text.partition("steps: ")[2] for text in run.events.messages() if "curriculum" in text]
    assert moves == ["on to level 2 of 4", "on to level 3 of 4", "on to level 4 of 4"]


def test_the_gap_of_rollouts_that_lag_is_not_judged(train):
    checked = []

    def before(trainer):
        check = trainer.guard.check
        trainer.guard.check = lambda step, *values: (checked.append(step), check(step, *values))

    train("run", recipe_of(), before=before)
    assert checked == [0, 3]
    recipe, lines = recipe_of(), train.lines("run")
    verdicts = Verdicts(recipe, "server")
    line = {**lines[0], "skipped_reason": None}
    for step in range(30):
        late = {**line, "step": step, "lag": int(step > 10), "logp_gap_mean": 0.5 if step > 10 else 1e-6}
        assert not [text for text in verdicts.of(late, planned=True, equals_base=False) if "log-probs of" in text]


def test_throughput_counts_the_seconds_ahead():
    ahead = {"seconds": {"rollout": 1.0}, "seconds_ahead": {"rollout": 3.0}}
    older = {"seconds": {"rollout": 4.0}}
    lines = [
        {**times, "logp_gap_mean": None, "prompts_with_positive": 1, "rollouts": 8, "rollout_tokens": 40}
        for times in (ahead, older, {**older, "seconds_ahead": None})
    ]
    assert sampler_summary("server", (), lines)["tokens_per_second"] == pytest.approx(120 / 12)


def test_rollouts_of_another_step_or_more_than_one_update_old_are_refused(monkeypatch):
    monkeypatch.setattr("popo_lite.ahead.choose_problems", lambda *_: SimpleNamespace(problems=()))
    monkeypatch.setattr("popo_lite.ahead.collect", lambda *_: [])
    worker = RolloutWorker(recipe=recipe_of(), renderer=None, sampler=None, grader=None)
    rollouts = Rollouts(worker.recipe, None, worker.ranks, say=print, check=lambda: None)

    def drawn_ahead():
        rollouts.start(Start(3, 0, {}, 0, 7), worker)
        rollouts.wait(lambda _: None, lambda: False)

    for version in (7, 8):
        drawn_ahead()
        assert rollouts.take(3, version).start.policy_version == 7
        assert rollouts.take(3, version) is None
    drawn_ahead()
    with pytest.raises(StalePolicyError, match="step 3 would train on rollouts of step 3, 2 optimizer steps old"):
        rollouts.take(3, 9)
    drawn_ahead()
    with pytest.raises(StalePolicyError, match="step 4 would train on rollouts of step 3, 1 optimizer"):
        rollouts.take(4, 8)
    drawn_ahead()
    rollouts.drop()
    assert rollouts.take(3, 8) is None


def test_the_recipe_needs_servers_and_truncated_weights():
    def wrong(recipe, **changes):
        values = {key.replace("__", "."): value for key, value in changes.items()}
        return [(keys[0], why) for keys, why in impossible_combinations(recipe.with_values(values))]

    recipe = recipe_of()
    assert wrong(recipe) == []
    [(key, why)] = wrong(recipe, rollout__engine="hf", rollout__server__base_urls=())
    assert key == "rollout.async_level"
    assert 'needs rollout.engine = "server"' in why
    [(key, why)] = wrong(recipe, objective__importance_sampling_clip_max=None)
    assert key == "objective.importance_sampling_clip_max"
    assert "set it to 2.0" in why
    grpo = load_recipe("tiny_cpu", ['objective.algorithm="grpo"'])  # clips by itself
    server = {"rollout__server__base_urls": ("http://127.0.0.1:1",), "rollout__server__shared_dir": "/x"}
    assert wrong(grpo, rollout__engine="server", rollout__async_level=1, **server) == []


@pytest.mark.slow
def test_several_ranks_draw_ahead_together(train, tmp_path):
    """Two processes sample and gather in their threads while both train."""
    train("alone", recipe_of())
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / f"rank{rank}")], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    alone, first, second = (train.lines(name) for name in ("alone", "rank0", "rank1"))
    for lines in (first, second):
        assert lags(lines) == lags(alone)
        assert "gather" in lines[1]["seconds"]
        for name in ("rollout_tokens", "positives", "prompts"):
            assert [line[name] for line in lines] == [line[name] for line in alone]
        gaps = [line["logp_gap_mean"] for line in lines]
        assert gaps == pytest.approx([line["logp_gap_mean"] for line in alone], rel=1e-3, abs=1e-5)


def rank(folder):
    """Train on this rank."""
    torch.set_num_threads(1)
    popo_lite.opening.open_sampler = lambda recipe, policy, **more: Twin(policy, recipe, **more)
    run = RunFolder(Path(folder))
    run.path.mkdir()
    with join() as ranks, Trainer(recipe_of(), Callback(), ranks=ranks) as trainer:
        trainer.run(run)


if __name__ == "__main__":
    rank(sys.argv[1])
