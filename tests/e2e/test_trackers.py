"""Trackers get what the run folder has, under our names and TRL's; and whatever they do, the run goes on."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import popo_lite
from helpers import json_lines, record
from popo_lite.callbacks import Callback
from popo_lite.cli import main
from popo_lite.controls import Controls
from popo_lite.errors import UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tools.reporting import child, trackers
from popo_lite.tools.reporting.reporter import Reporters
from popo_lite.tools.reporting.trackers import Tracker, evaluation_scalars, open_trackers, step_scalars

SECRET = "hunter2-hunter2"
SHORT = (
    "train.steps=3",
    "train.save_steps=1",
    "train.save_total_limit=9",
    "eval.problems=8",
    "data.prompts_per_step=4",
    "rollout.max_completion_length=24",
)


class Asks(Callback):
    """Asks for an evaluation after the third step."""

    def attach(self, controls):
        self.controls = controls

    def step(self, record):
        if record["step"] == 2:
            self.controls.request("evaluate")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of three steps; then back to its first, and on to its fourth. All of it in all trackers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tracked"))
        patch.setenv("TRACKIO_DIR", str(Path.cwd() / "trackio"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("SOME_TOKEN", SECRET)
        patch.setenv("OMP_NUM_THREADS", "1")
        keys = [
            *SHORT,
            "output.dir=private/place",
            f"data.system_prompt=Add. {SECRET}",
            'output.report_to=["trackio", "wandb", "tensorboard"]',
        ]
        settings = [part for key in keys for part in ("--set", key)]
        command = [sys.executable, "-m", "popo_lite", "train", "tiny_cpu", "--output", "runs/one", *settings]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert "nothing more" not in shown.stdout
        assert "trackio show --project popo-lite" in shown.stdout
        assert shown.stderr == ""
        popo_lite.resume("runs/one", ["train.steps=4"], checkpoint=1, callbacks=[Asks()])
        assert "nothing more" not in Path("runs/one/log.txt").read_text()
        yield RunFolder(Path.cwd() / "runs" / "one")


def expected(run):
    """Steps done -> name -> value, of the steps that count in the end."""
    tokens, steps = 0, {}
    for line in json_lines(run.metrics_path):
        tokens += line["tokens_of_all"]
        steps[line["step"] + 1] = step_scalars(line, tokens)
    assert list(steps) == [1, 2, 3, 4]
    assert [line["when"] for line in json_lines(run.evaluations_path)] == ["before", "asked", "after"]
    for line in json_lines(run.evaluations_path):
        steps.setdefault(line["step"], {}).update(evaluation_scalars(without_format(line)))
    return steps


def without_format(line):
    return {key: value for key, value in line.items() if key != "format"}


def test_trackio_has_every_value(tracked):
    with sqlite3.connect(tracked.path.parent.parent / "trackio" / "popo-lite.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
        ids = database.execute("select distinct run_id, run_name from metrics").fetchall()
        configs = database.execute("select config from configs").fetchall()
    found: dict[int, dict] = {}
    for step, metrics in rows:
        found.setdefault(step, {}).update(json.loads(metrics))
    for step, values in expected(tracked).items():
        assert {name: found[step][name] for name in values} == values
    assert len(ids) == 1  # the resumed run is the same one
    assert ids[0][1].startswith("one-")
    config = json.loads(configs[0][0])
    assert config["lora.rank"] == 16
    assert "private/place" not in json.dumps(config)
    samples = found[4]["samples"]["_value"]
    assert {"question", "reference", "right", "wrong"} == samples[0].keys()
    assert samples[0]["question"] in {line["question"] for line in json_lines(tracked.samples_path)}


def test_tensorboard_has_every_value_once(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[int, dict] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found.setdefault(event.step, {})
            found[event.step][tag] = event.value
    for step, values in expected(tracked).items():
        assert {name: found[step][name] for name in values} == pytest.approx(values, rel=1e-6)  # float32
    assert {"samples", "recipe"} <= {tag.removesuffix("/text_summary") for tag in events.Tags()["tensors"]}
    text = events.Tensors("samples")[-1].tensor_proto.string_val[0].decode()
    assert text.startswith("**question**\n\n    ")


def test_wandb_has_every_value(tracked):
    files = sorted(tracked.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2  # both parts of the run
    assert len({path.name for path in files}) == 1  # under the same id
    found: dict[int, dict] = {}
    for path in files:
        for item in wandb_history(path):
            found.setdefault(item["train/global_step"], {}).update(item)
    for step, values in expected(tracked).items():
        assert {name: found[step][name] for name in values} == values
    table = next(tracked.path.glob("wandb/offline-run-*/files/media/table/*.json"))
    assert json.loads(table.read_text())["columns"] == ["question", "reference", "right", "wrong"]


def wandb_history(path):
    """The history in a .wandb file, which has LevelDB's log format: records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            history = Record.FromString(b"".join(parts)).history
            parts = []
            if history.item:
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}


def test_no_tracker_gets_a_secret(tracked):
    kept = [tracked.path.parent.parent / "trackio", tracked.path / "wandb", tracked.path / "tensorboard"]
    files = [path for folder in kept for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


# --------------------------------------------------------------------------- what is sent


def test_names_of_trl_stand_for_the_same_quantities():
    """As TRL 1.15's GRPOTrainer and transformers' Trainer log them, with the trackers' prefix."""
    values = step_scalars(record(4, reward_mean=0.3, equal_rewards_ratio=0.5), 1_000)
    same = {
        "train/reward": 0.3,
        "train/rewards/math/mean": 0.11,
        "train/frac_reward_zero_std": 0.5,
        "train/completions/mean_length": 143.25,
        "train/completions/clipped_ratio": 0.023,
        "train/loss": 0.4312,
        "train/grad_norm": 0.83,
        "train/learning_rate": 2e-5,
        "train/entropy_coef": 0.01,
        "train/sampling/sampling_logp_difference/mean": 0.0012,
        "train/sampling/sampling_logp_difference/max": 0.031,
        "train/step_time": 8.2 + 0.3 + 0.6 + 3.1,
        "train/num_tokens": 1_000,
    }
    assert {name: value for name, value in values.items() if name.startswith("train/")} == same
    assert values["seconds/rollout"] == 8.2
    assert values["outcomes/timeout"] == 3
    assert "top_shape" not in values


def test_every_name_of_trl_is_in_trl():
    """What GRPOTrainer logs under another name would be compared with nothing."""
    from importlib.util import find_spec

    from popo_lite.metrics import METRICS

    spec = find_spec("trl")
    assert spec is not None
    folder = Path(spec.submodule_search_locations[0])
    source = (folder / "trainer" / "grpo_trainer.py").read_text()
    transformers = {"loss", "grad_norm", "learning_rate"}  # Trainer's own
    for name in {metric.trl for metric in METRICS.values()} - {None} - transformers:
        assert f'"{name.replace("{}", "{reward_func_name}")}"' in source


def test_an_evaluation_has_intervals():
    values = evaluation_scalars(
        {"when": "before", "step": 0, "problems": 200, "pass_at_1": 0.3, "pass_at_k": {1: 0.3, 8: 0.6},
         "task_figures": {"steps": 0.5}, "truncated_ratio": 0.0, "weights": "policy"}
    )  # fmt: skip
    assert values["eval/pass@8"] == 0.6
    assert values["eval/pass@1_low"] == pytest.approx(0.2407, abs=1e-4)  # Wilson's, of 60 in 200
    assert values["eval/pass@1_high"] == pytest.approx(0.3669, abs=2e-4)
    assert values["eval/task_figures/steps"] == 0.5
    assert all(isinstance(value, float | int) for value in values.values())


# --------------------------------------------------------------------------- trackers that fail

FAILING = {
    "raises when it starts": "def init(*_, **__):\n    raise RuntimeError('no such server')\n",
    "raises later": "class Run:\n    def log(self, *_, **__):\n        raise RuntimeError('no such server')\n"
    "    def finish(self):\n        pass\n\ndef init(*_, **__):\n    return Run()\n",
    "ends its process": "import os\nprint('no such server', file=__import__('sys').stderr, flush=True)\nos._exit(3)\n",
    "hangs": "import time\n\ndef init(*_, **__):\n    time.sleep(1000)\n",
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(source)`: install a trackio that consists of `source`, for this test and its processes."""

    def install(source):
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "trackio.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    return install


def opened(folder, patience=10.0):
    """A tracker of a run that begins, what closes it, and what it says."""
    said: list[str] = []
    tracker = Tracker("trackio", RunFolder(folder), load_recipe("tiny_cpu"), "trackio")
    tracker.patience = patience
    closing = Reporters([tracker])
    closing.attach(Controls(print, said.append))
    closing.start(title="one", facts={}, total_steps=9, first_step=0)
    return tracker, closing, said


@pytest.mark.parametrize("kind", FAILING)
def test_a_tracker_that_fails_is_reported_once(kind, fake, tmp_path):
    fake(FAILING[kind])
    tracker, closing, said = opened(tmp_path, 0.5 if kind == "hangs" else 10.0)
    with closing:
        began = time.perf_counter()
        for step in range(9):
            tracker.step(record(step))
        assert time.perf_counter() - began < 1
        process = tracker._child._process
    notices = [text for text in said if "trackio gets nothing more: " in text or "may lack the end" in text]
    assert len(notices) == 1
    assert said[-1] == notices[0]
    assert ("not finished in 0.5 s" if kind == "hangs" else "no such server") in notices[0]
    assert process.poll() is not None


def test_a_tracker_that_falls_behind_is_given_up(fake, tmp_path, monkeypatch):
    fake(FAILING["hangs"])
    monkeypatch.setattr(child, "QUEUED", 20)
    tracker, closing, said = opened(tmp_path)
    with closing:
        for step in range(100):  # more than the pipe holds, too
            tracker.step(record(step, rewards={f"reward_{i}": 0.5 for i in range(99)}))
        began = time.perf_counter()
    assert time.perf_counter() - began < 1
    assert [text for text in said if "events wait to be sent" in text] == said[1:]


def test_a_run_with_a_tracker_that_hangs_is_as_any_other(tracked, fake, tmp_path, monkeypatch):
    fake(FAILING["hangs"])
    monkeypatch.setattr(Tracker, "patience", 0.3)
    changes = ["train.steps=1", "eval.problems=0", 'output.report_to=["trackio"]']
    hanging = popo_lite.train(load_recipe(tracked.recipe_path, changes), output=tmp_path / "hanging").folder
    losses = [json_lines(run.metrics_path)[0]["loss"] for run in (tracked, hanging)]
    assert losses[0] == losses[1]
    assert "trackio may lack the end of the run: it was not finished in 0.3 s" in hanging.log_path.read_text()


def test_ctrl_c_ends_the_wait_for_all_trackers(fake, tmp_path, monkeypatch):
    fake(FAILING["hangs"])
    said: list[str] = []
    trackers = [Tracker(name, RunFolder(tmp_path), load_recipe("tiny_cpu"), name) for name in ("trackio", "wandb")]
    (tmp_path / "fake" / "wandb.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(Tracker, "patience", 60.0)
    closing = Reporters(trackers)
    closing.attach(Controls(print, said.append))
    closing.start(title="one", facts={}, total_steps=9, first_step=0)
    processes = [tracker._child._process for tracker in trackers]
    timer = threading.Timer(1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    began = time.perf_counter()
    closing.close()
    assert time.perf_counter() - began < 5
    waiting, trackio, wandb = said[2:]
    assert waiting == "waiting at most 60 s for trackio, wandb; Ctrl-C ends the wait"
    assert trackio == "trackio may lack the end of the run: Ctrl-C ended the wait; the run's folder has everything"
    assert wandb.endswith(f"To send what wandb has: wandb sync {tmp_path}/wandb/run-*")
    assert all(process.poll() is not None for process in processes)


def test_a_tracker_that_hangs_ends_after_a_killed_run(fake, tmp_path):
    fake(FAILING["hangs"])
    source = f"""
import sys, time
sys.path[:] = {sys.path!r}
from pathlib import Path
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tools.reporting import child
from popo_lite.tools.reporting.trackers import Tracker
child.LAST_SECONDS = 0.5
tracker = Tracker("trackio", RunFolder(Path({str(tmp_path)!r})), load_recipe("tiny_cpu"), "trackio")
tracker.start(title="one", facts={{}}, total_steps=9, first_step=0)
print(tracker._child._process.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as run:
        pid = int(run.stdout.readline())
        time.sleep(1)  # it hangs inside `init`
        assert is_running(pid)
        run.kill()
    end = time.monotonic() + 15
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(pid)


def is_running(pid):
    """Whether a process runs: nobody may collect one whose parent was killed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_end_of_a_killed_run_is_kept(tmp_path):
    first = {"path": sys.path, "parent": os.getpid(), "last_seconds": 60}
    calls = [["open", {"folder": str(tmp_path), "first_step": 0, "config": {}}],
             ["scalars", {"step": 1, "values": {"loss": 0.5}}]]  # fmt: skip
    lines = "\n".join(map(json.dumps, [first, *calls]))
    command = [sys.executable, "-P", str(child.MAIN), "tensorboard"]
    subprocess.run(command, input=lines + "\n", text=True, check=True, timeout=60)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in file.read_bytes()


# --------------------------------------------------------------------------- before anything is loaded


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    done = CliRunner().invoke(main, ["train", "tiny_cpu", "--set", 'output.report_to=["trackio"]'])
    assert done.exit_code == 2
    assert "[trackio]" in done.output
    assert not list(tmp_path.iterdir())


def test_wandb_without_a_login_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    recipe = load_recipe("tiny_cpu", ['output.report_to=["wandb"]'])
    with pytest.raises(UserInputError, match="wandb has no login"):
        open_trackers(RunFolder(tmp_path), recipe)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert [tracker._view for tracker in open_trackers(RunFolder(tmp_path), recipe)] == ["wandb"]
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert [tracker._view for tracker in open_trackers(RunFolder(tmp_path), recipe)] == ["wandb offline"]
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")  # as `wandb disabled` writes it
    assert [tracker._view for tracker in open_trackers(RunFolder(tmp_path), recipe)] == ["wandb disabled"]
