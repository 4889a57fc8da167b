"""Formats of a run's files: stamps, runs of version 0, newer ones, and checkpoints that cannot be read.

tests/fixtures/run-version-0 was written before files had stamps: 4 steps of the tiny model, killed after the second.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import popo_lite
from helpers import json_lines
from popo_lite import formats
from popo_lite.cli import main
from popo_lite.errors import CheckpointError
from popo_lite.formats import checked, read_json, stamped
from popo_lite.policy.adapters import read_config
from popo_lite.recipe_file import load_recipe
from popo_lite.resuming import resumed_recipe
from popo_lite.run_folder import (
    CHECKSUMS,
    RunFolder,
    append_line,
    checkpoint_folders,
    checksums,
    is_sound,
    keep_lines,
    read_lines,
    write_json,
)

OLD = Path(__file__).parents[1] / "fixtures" / "run-version-0"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(OLD, tmp_path / "run")))


def test_a_run_without_stamps_is_evaluated_exported_and_resumed_and_has_them_then(run, capsys):
    assert "format" not in "".join(path.read_text() for path in run.path.glob("*.*"))
    results = popo_lite.evaluate(run.path, samples=1)
    assert [result.weights for result in results] == ["base", "adapter", "siamese"]
    assert "has not ended; these weights are of its newest checkpoint, after 2 of 4 steps" in capsys.readouterr().err
    exported = popo_lite.export(run.path, what="adapter")
    assert exported.folder == run.path / "export" / "adapter-policy-step-2"
    assert read_json(exported.folder / "export.json") == exported.content()
    assert "after 2 of 4 steps of" in (exported.folder / "README.md").read_text()
    result = popo_lite.resume(run.path)
    assert result.summary["steps"] == 4
    assert [line["step"] for line in read_lines(run.metrics_path)] == [0, 1, 2, 3]
    assert [line.get("format") for line in json_lines(run.metrics_path)] == [None, None, 1, 1]
    shutil.rmtree(run.path / "export")
    for path in run.path.rglob("*.json"):
        if path.name not in ("adapter_config.json", "environment.json"):
            assert json.loads(path.read_text())["format"] == 1, path
    assert tomllib.loads(run.recipe_path.read_text())["format"] == 1
    assert load_recipe(run.recipe_path) == run.recipe()


@pytest.mark.parametrize("name", ["recipe.toml", "data.json", "metrics.jsonl", "cursor.json"])
def test_a_file_of_a_newer_version_is_refused_and_left_alone(run, name):
    path = run.checkpoints / "step-000002" / name if name == "cursor.json" else run.path / name
    text = path.read_text()
    path.write_text(f"format = 2\n{text}" if name == "recipe.toml" else text.replace("{", '{"format": 2, ', 1))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="written by a newer popo-lite, in format 2") as caught:
        popo_lite.resume(run.path)
    assert (caught.value.where, caught.value.next_step) == (str(path), "update popo-lite")
    assert path.read_bytes() == before


def test_the_configuration_of_an_adapter_is_pefts_and_has_no_format_of_ours(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"format": "new in PEFT", "r": 4}')
    assert read_config(tmp_path) == {"format": "new in PEFT", "r": 4}
    (tmp_path / "adapter_config.json").write_text("[]]")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_config(tmp_path)


def test_what_an_older_version_wrote_is_upgraded_step_by_step(run, monkeypatch):
    def drop_the_cap(content, name):
        if name == "recipe.toml":
            content["rollout"].pop("beam_width", None)
        return content

    def rename(content, name):
        return {"pass_rate" if key == "rate" else key: value for key, value in content.items()}

    run.recipe_path.write_text(run.recipe_path.read_text().replace("[rollout]", "[rollout]\nbeam_width = 3"))
    append_line(run.metrics_path, {"rate": 0.5})  # in format 1
    monkeypatch.setattr(formats, "UPGRADES", (formats._unchanged, drop_the_cap, rename))
    assert run.recipe().rollout.num_generations == 4
    assert resumed_recipe(run) == (run.recipe(), [])
    assert read_lines(run.metrics_path)[-1] == {"pass_rate": 0.5}
    assert checked({"format": 3, "rate": 1}, run.metrics_path) == {"rate": 1}


@pytest.mark.parametrize("content", [[], 3, None, {"format": "1"}, {"format": True}, {"format": -1}])
def test_a_file_that_is_none_of_a_run_is_an_error_and_no_crash(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_json(tmp_path / "x.json")
    assert checked(stamped({"a": 1}), tmp_path) == {"a": 1}


def two_checkpoints(run: RunFolder) -> Path:
    """Give the run an older checkpoint; return the newest."""
    older = shutil.copytree(run.checkpoints / "step-000002", run.checkpoints / "step-000001")
    content = json.loads((older / "cursor.json").read_text())
    content["cursor"] |= {"next_step": 1, "next_problem": 2}
    (older / "cursor.json").write_text(json.dumps(content))
    return run.checkpoints / "step-000002"


def change_cursor(checkpoint: Path, change) -> None:
    path = checkpoint / "cursor.json"
    content = json.loads(path.read_text())
    change(content["cursor"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["changes", "start_shapes", "lowered_budget"])
def test_a_key_that_an_older_version_did_not_write_takes_its_default(run, key):
    change_cursor(run.checkpoints / "step-000002", lambda cursor: cursor.pop(key, None))
    assert popo_lite.resume(run.path).summary["steps"] == 4


def test_a_key_that_this_version_does_not_know_is_ignored(run):
    change_cursor(run.checkpoints / "step-000002", lambda cursor: cursor.update(mood="good"))
    assert popo_lite.resume(run.path).summary["steps"] == 4


@pytest.mark.parametrize("damage", ["next_step", "entropy_coef", "optimizer.safetensors", "cursor.json", "adapter",
                                    "adapter/adapter_model.safetensors"])  # fmt: skip
def test_a_damaged_checkpoint_names_the_one_to_go_on_from_and_the_command(run, damage):
    newest = two_checkpoints(run)
    if "." in damage:
        (newest / damage).write_bytes((newest / damage).read_bytes()[:-40])
    elif damage == "adapter":
        shutil.rmtree(newest / damage)
    else:
        change_cursor(newest, lambda cursor: cursor.pop(damage))
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        popo_lite.resume(run.path)
    assert caught.value.where == str(newest)
    command = f"popo-lite resume {run.path} --checkpoint 1"
    assert caught.value.next_step == f"go on from an older one: {command}"
    assert newest.is_dir()
    done = CliRunner().invoke(main, [*command.split()[1:], "--json"])
    assert done.exit_code == 0, done.output
    assert read_json(run.summary_path)["steps"] == 4
    assert [line["step"] for line in read_lines(run.metrics_path)] == [0, 1, 2, 3]
    assert newest.with_name("step-000002-set-aside").is_dir()


def test_without_a_sound_checkpoint_no_other_is_named(run):
    newest = two_checkpoints(run)
    for checkpoint in checkpoint_folders(run.checkpoints):
        write_json(checkpoint / CHECKSUMS, {"files": checksums(checkpoint)})
        assert is_sound(checkpoint)
        (checkpoint / "siamese.safetensors").write_bytes(b"torn")
        assert not is_sound(checkpoint)
        if checkpoint != newest:  # a run that cannot go back to it can still go on
            with pytest.raises(CheckpointError, match="cannot be read"):
                popo_lite.resume(run.path, checkpoint=1)
            assert newest.is_dir()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        popo_lite.resume(run.path)
    assert caught.value.where == str(newest)
    assert f"or start again: popo-lite train {run.recipe_path}" in caught.value.next_step


ENDED = {"steps": 4, "doubts": []}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", {}),
        ("summary.json", {"steps": "many"}),
        ("summary.json", ENDED | {"doubts": 3}),
        ("data.json", {}),
        ("data.json", {"training": [1], "held_out": {}}),
        ("metrics.jsonl", {"x": 1}),
        ("evaluations.jsonl", {"x": 1}),
        ("checkpoints/step-000002/cursor.json", {"cursor": {"best": "x"}}),
        ("checkpoints/step-000002/cursor.json", {"cursor": {"best": {"step": []}}}),
        ("checkpoints/step-000002/cursor.json", {"cursor": 3}),
    ],
)
def test_a_file_with_other_content_than_a_run_writes_is_an_error_that_names_it(run, name, content):
    (run.path / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        if name.startswith("checkpoints"):
            run.find_checkpoint("best")
        elif "doubts" in content:
            run.notices(None, run.find_checkpoint())
        else:
            popo_lite.resume(run.path)
    assert caught.value.where.startswith(str(run.path / name))


def test_changes_are_recorded_once_and_survive_a_second_resume(run):
    class Stop(popo_lite.Callback):
        def start(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        popo_lite.resume(run.path, ["objective.entropy_coef=0.5", "train.save_steps=1"], callbacks=[Stop()])
    change = {"key": "objective.entropy_coef", "before": 0.01, "now": 0.5, "step": 2}
    assert run.summary(run.find_checkpoint())["changes"] == [change]
    assert run.recipe().objective.entropy_coef == 0.5
    result = popo_lite.resume(run.path)
    assert result.summary["changes"] == [change]
    assert [line["entropy_coef"] for line in read_lines(run.metrics_path)] == [0.01, 0.01, 0.5, 0.5]


def test_a_run_that_has_ended_trains_on_and_keeps_its_adapter_until_the_new_end(run):
    popo_lite.resume(run.path)
    first = (run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="the run has ended after 4 steps"):
        popo_lite.resume(run.path)

    class Look(popo_lite.Callback):
        def step(self, record):
            assert (run.adapter / "adapter_model.safetensors").read_bytes() == first
            assert read_json(run.summary_path)["steps"] == 4
            assert not run.ended
            if record["step"] == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        popo_lite.resume(run.path, ["train.steps=6"], callbacks=[Look()])
    assert run.find_checkpoint() is not None  # not the old end
    assert popo_lite.resume(run.path).summary["steps"] == 6
    assert run.ended
    second = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert second != first
    weights = run.checkpoints / "step-000006" / "siamese.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert not is_sound(weights.parent)
    assert popo_lite.resume(run.path, checkpoint=4).summary["steps"] == 6
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == second


def test_a_run_without_checkpoints_says_that_it_starts_again(run):
    shutil.rmtree(run.checkpoints)
    keep_lines(run.metrics_path, lambda line: line["step"] == 0)
    assert popo_lite.resume(run.path).summary["steps"] == 4
    assert "there is no checkpoint: the run starts again at step 1" in run.log_path.read_text()
