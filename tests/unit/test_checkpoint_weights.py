"""The weights of a checkpoint: found by number, as the best or the newest, and the same as those of the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import popo_lite
from popo_lite.checkpoint import sync_folder
from popo_lite.cli import main
from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.formats import read_json
from popo_lite.recipe_file import load_recipe
from popo_lite.run_folder import RunFolder

SMALL = ["train.steps=3", "train.save_steps=1", "train.save_total_limit=3", "data.prompts_per_step=2",
         "rollout.num_generations=4", "rollout.max_completion_length=24", "rollout.engine=hf", "lora.rank=2",
         "siamese.head_width=8", "eval.problems=2"]  # fmt: skip


@pytest.fixture(scope="module", params=[(), ("lora.dora=true",), ("lora.rslora=true",)], ids=["lora", "dora", "rslora"])
def ended(request, tmp_path_factory) -> RunFolder:
    path = tmp_path_factory.mktemp("ended") / "run"
    popo_lite.train(load_recipe("tiny_cpu", [*SMALL, *request.param]), output=path)
    return RunFolder(path)


@pytest.mark.parametrize("weights", ["policy", "siamese"])
def test_the_last_checkpoint_has_the_weights_of_the_end_in_the_same_format(ended, weights):
    end, copy = ended.trained_adapter(weights), ended.trained_adapter(weights, ended.find_checkpoint(3))
    assert end == ended.path / {"policy": "adapter", "siamese": "siamese"}[weights]
    assert copy.parent.parent != ended.path
    assert {path.name for path in copy.iterdir()} == {path.name for path in end.iterdir()}
    assert read_json(copy / "adapter_config.json") == read_json(end / "adapter_config.json")
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (end, copy))
    assert theirs.keys() == ours.keys()
    assert all((theirs[name] == ours[name]).all() and theirs[name].dtype == ours[name].dtype for name in theirs)
    earlier = load_file(ended.trained_adapter(weights, ended.find_checkpoint(1)) / "adapter_model.safetensors")
    assert any((earlier[name] != ours[name]).any() for name in ours)


def unfinished(ended: RunFolder, tmp_path: Path, **cursor: object) -> RunFolder:
    run = RunFolder(Path(shutil.copytree(ended.path, tmp_path / "run")))
    run.summary_path.unlink()
    path = run.checkpoints / "step-000003" / "cursor.json"
    content = json.loads(path.read_text())
    content["cursor"] |= cursor
    path.write_text(json.dumps(content))
    return run


def test_the_checkpoint_is_chosen_by_number_as_the_best_or_the_newest(ended, tmp_path):
    assert ended.find_checkpoint() is None
    run = unfinished(ended, tmp_path, best={"step": 2, "pass_at_1": 0.5}, doubts=["steps 1-2 were not proven"])
    found = {which: run.find_checkpoint(which).name for which in (None, 1, "best")}
    assert found == {None: "step-000003", 1: "step-000001", "best": "step-000002"}
    newest = run.find_checkpoint()
    unasked = "the run has not ended; these weights are of its newest checkpoint, after 3 of 3 steps"
    assert run.notices(None, newest) == [unasked, "steps 1-2 were not proven"]
    assert run.notices(3, newest) == ["steps 1-2 were not proven"]
    summary = run.summary(newest)
    assert (summary["steps"], summary["of_steps"], summary["after"]) == (3, 3, None)
    assert summary["before"]["problems"] == 2
    with pytest.raises(CheckpointError, match="no checkpoint after 7 steps; there are 1, 2, 3"):
        run.find_checkpoint(7)
    with pytest.raises(CheckpointError, match="no evaluation during training has found a best checkpoint"):
        ended.find_checkpoint("best")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(CheckpointError, match="has deleted this checkpoint meanwhile"):
        run.trained_adapter("policy", newest)
    with pytest.raises(CheckpointError, match="has not ended and has no checkpoint yet") as caught:
        run.find_checkpoint()
    assert caught.value.next_step == f"popo-lite resume {run.path}"


def test_the_commands_take_a_checkpoint(ended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = unfinished(ended, tmp_path, best={"step": 2, "pass_at_1": 0.5})

    def call(*arguments: str):
        return CliRunner().invoke(main, [arguments[0], str(run.path), *arguments[1:]])

    for choice, said in ((), "newest checkpoint, after 3 of 3"), (("--checkpoint", "1"), ""):
        done = call("generate", "1 + 1", *choice, "--json")
        assert done.exit_code == 0, done.output
        assert said in done.stderr
    exported = call("export", "--checkpoint", "best", "--problems", "0", "--prompts", "2", "--json")
    assert exported.exit_code == 0, exported.output
    report = json.loads(exported.stdout)
    assert report["folder"] == str(run.path / "export" / "merged-policy-step-2")
    assert (report["checkpoint"], report["of_steps"]) == (2, 3)
    assert "after 2 of 3 steps" in (Path(report["folder"]) / "README.md").read_text()
    pushed = call("push", "me/it", "--dry-run", "--json")
    assert json.loads(pushed.stdout)["folder"] == report["folder"], pushed.output
    measured = call("eval", "--checkpoint", "1", "--weights", "siamese", "--samples", "1", "--json")
    assert [result["weights"] for result in json.loads(measured.stdout)["results"]] == ["siamese"]
    for arguments in (("generate", "1 + 1"), ("export",), ("eval",)):
        refused = call(*arguments, "--checkpoint", "9")
        assert refused.exit_code == 2
        assert "there are 1, 2, 3" in refused.output
        assert call(*arguments, "--checkpoint", "last").exit_code == 2
    with pytest.raises(UserInputError, match="is a model, not a run, and has no checkpoints"):
        popo_lite.evaluate("tiny", task=run.path, checkpoint=1)


@pytest.mark.skipif(os.name != "posix", reason="only there folders are written through to the disk")
def test_what_goes_away_while_a_run_ends_does_not_stop_it(tmp_path, monkeypatch):
    """As the partial files of a report and the hidden folder of an export do."""
    for name in ("a/partial", "b/partial", "c/d/partial"):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        (tmp_path / "run" / name).touch()
    synced = []

    def others_go_away(descriptor: int) -> None:
        synced.append(descriptor)
        for path in (tmp_path / "run").iterdir():
            shutil.rmtree(path)

    monkeypatch.setattr(os, "fsync", others_go_away)
    sync_folder(tmp_path / "run")
    assert len(synced) == 2  # the first file, and the folder itself
