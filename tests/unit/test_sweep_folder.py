"""A sweep's folder: which of its runs are done, and what it refuses to become."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from popo_lite.errors import PopoError, UserInputError
from popo_lite.recipe_file import dump_recipe
from popo_lite.run_folder import append_line, dated, new_run, read_lines
from popo_lite.tools.sweep.folder import Sweep, SweepFolder, SweepRun, load_sweep, refuse_other_sweep
from popo_lite.tools.sweep.runner import train_command

TWO = '[variants.a]\n[variants.b]\nobjective.entropy_coef = 0.0\ndata.system_prompt = "count, don\'t guess"\n'


def asked(tmp_path: Path, text: str = TWO, seeds: str = "0-1", *overrides: str) -> Sweep:
    path = tmp_path / "x.toml"
    path.write_text(f'recipe = "tiny_cpu"\n{text}')
    return load_sweep(path, overrides, seeds)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweep")
    folder.start_files(asked(tmp_path))
    return folder


@pytest.mark.parametrize(
    ("text", "seeds", "overrides", "told"),
    [
        (TWO, "0-1", ("lora.rank=4",), [f"variant {name}: lora.rank was 16 and is 4" for name in "ab"]),
        (TWO.replace("0.0", "0.1"), "0-1", (), ["variant b: objective.entropy_coef was 0.0 and is 0.1"]),
        (TWO, "1-4", (), ["seeds: 0 gone"]),
        ("[variants.b]\nobjective.entropy_coef = 0.0\n", "0-1", (), ["variant a: gone", "variant b: "
         "data.system_prompt was \"count, don't guess\" and is None"]),
    ],
)  # fmt: skip
def test_another_sweep_is_refused_with_the_difference(tmp_path, folder, text, seeds, overrides, told):
    with pytest.raises(UserInputError) as caught:
        refuse_other_sweep(folder, asked(tmp_path, text, seeds, *overrides))
    assert caught.value.what.split("\n")[1:] == told
    assert f"popo-lite sweep {folder.sweep_path} --output {folder.path}" in caught.value.next_step


@pytest.mark.parametrize(
    ("text", "seeds", "overrides"),
    [
        (TWO, "0-1", ()),
        (TWO, "0-5", ()),
        (TWO + "[variants.c]\nlora.rank = 4\n", "0-1", ()),
        (TWO, "0-1", ("rollout.max_num_seqs=8", "train.tokens_per_microbatch=4096")),
    ],
)
def test_more_variants_and_seeds_and_what_changes_speed_alone_are_welcome(tmp_path, folder, text, seeds, overrides):
    more = asked(tmp_path, text, seeds, *overrides)
    refuse_other_sweep(folder, more)
    folder.start_files(more)
    refuse_other_sweep(folder, load_sweep(folder.sweep_path))
    assert load_sweep(folder.sweep_path).variants == more.variants


def test_the_cut_may_not_change_where_dropout_hangs_on_it(tmp_path):
    with_dropout = "[set]\nlora.dropout = 0.1\n" + TWO
    folder = SweepFolder(tmp_path / "dropout")
    folder.start_files(asked(tmp_path, with_dropout))
    refuse_other_sweep(folder, asked(tmp_path, with_dropout, "0-1", "rollout.max_num_seqs=8"))
    with pytest.raises(UserInputError, match="variant a: train.tokens_per_microbatch was 16384 and is 4096"):
        refuse_other_sweep(folder, asked(tmp_path, with_dropout, "0-1", "train.tokens_per_microbatch=4096"))


def test_what_a_sweep_that_was_killed_at_its_start_leaves_is_no_hindrance(tmp_path):
    folder, sweep = SweepFolder(tmp_path / "sweep"), asked(tmp_path)
    with folder.locked():
        pass
    refuse_other_sweep(folder, sweep)
    folder.recipe_path.write_text("[train]")
    (folder.path / ".sweep.toml.partial").touch()
    refuse_other_sweep(folder, sweep)
    folder.lock_path.unlink()  # then the recipe is somebody's own
    with pytest.raises(UserInputError, match="not empty and holds no sweep"):
        refuse_other_sweep(folder, sweep)


def test_what_a_run_that_was_killed_at_its_start_leaves_is_no_hindrance(tmp_path, folder):
    run = folder.runs(asked(tmp_path))[0]
    run.folder.path.mkdir(parents=True)
    (run.folder.path / ".recipe.toml.partial").touch()
    run.folder.lock_path.touch()
    assert run.state == "new"
    with new_run(run.variant.recipe, "x", run.folder.path) as started:
        assert started.path == run.folder.path
        (run.folder.path / ".notes").touch()
    with pytest.raises(UserInputError, match="not empty"), new_run(run.variant.recipe, "x", run.folder.path):
        pass


def test_what_cannot_be_written_is_told_with_path_and_reason(tmp_path, folder):
    folder.results_path.mkdir()
    with pytest.raises(PopoError) as caught:
        folder.write_results([])
    assert (caught.value.where, caught.value.what) == (str(folder.results_path), "cannot be written: Is a directory")
    occupied = tmp_path / "occupied"
    occupied.touch()
    with pytest.raises(PopoError, match="cannot be written: File exists"), SweepFolder(occupied).locked():
        pass


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    refuse_other_sweep(SweepFolder(other), asked(tmp_path))
    (other / "thesis.tex").touch()
    with pytest.raises(UserInputError, match="not empty and holds no sweep"):
        refuse_other_sweep(SweepFolder(other), asked(tmp_path))


def test_every_variant_has_the_first_seed_before_the_next(tmp_path, folder):
    runs = folder.runs(asked(tmp_path))
    assert [run.name for run in runs] == ["a seed 0", "b seed 0", "a seed 1", "b seed 1"]
    assert runs[3].folder.path == folder.path / "b" / "seed-1"


def finish(run: SweepRun) -> None:
    run.folder.path.mkdir(parents=True)
    run.folder.recipe_path.write_text("train.steps = 3")
    summary = {
        "before": {"pass_at_1": 0.25},
        "after": {"pass_at_1": 0.5, "pass_at_k": {"1": 0.5}, "completion_tokens_mean": 9},
        "steps": 3, "rollouts": 12, "rollout_tokens": 100, "trained_tokens": 50, "seconds": {"total": 2.5},
        "peak_memory_bytes": 1,
    }  # fmt: skip
    run.folder.summary_path.write_text(json.dumps(summary))


def test_results_are_the_finished_runs(tmp_path, folder):
    runs = folder.runs(asked(tmp_path))
    finish(runs[3])
    assert [run.state for run in runs] == ["new", "new", "new", "finished"]
    folder.write_results(runs)
    assert json.loads(folder.results_path.read_text())["format"] == 1
    (line,) = read_lines(folder.results_path)
    assert (line["variant"], line["seed"], line["run"]) == ("b", 1, "b/seed-1")
    assert line["overrides"] == {"objective.entropy_coef": 0.0, "data.system_prompt": "count, don't guess"}
    assert (line["pass_at_1_before"], line["pass_at_1"], line["trained_tokens"], line["seconds"]) == (
        0.25,
        0.5,
        50,
        2.5,
    )


def test_a_failure_is_forgotten_when_its_run_is_tried_again(tmp_path, folder):
    runs = folder.runs(asked(tmp_path))
    for run in runs[:2]:
        append_line(folder.failures_path, {"variant": run.variant.name, "seed": run.seed})
    folder.forget_failure(runs[0])
    assert read_lines(folder.failures_path) == [{"variant": "b", "seed": 0}]


def test_an_unfinished_run_is_resumed_with_the_same_settings(tmp_path, folder):
    run = folder.runs(asked(tmp_path, TWO, "0-1", "lora.rank=4"))[1]
    command = train_command(folder, run)
    assert command[1:6] == ["-P", "-m", "popo_lite", "train", str(folder.recipe_path)]
    options = [
        "--seed",
        "0",
        "--output",
        str(run.folder.path),
        "--view",
        "plain",
        "--set",
        "lora.rank=4",
        "--set",
        "objective.entropy_coef=0.0",
        "--set",
        'data.system_prompt="count, don\'t guess"',
    ]
    assert command[6:] == options
    run.folder.path.mkdir(parents=True)
    run.folder.recipe_path.write_text(dump_recipe(dated(run.variant.recipe)))
    command = [*command[:4], "resume", str(run.folder.path), "--view", "plain"]
    assert train_command(folder, run) == command
    faster = folder.runs(asked(tmp_path, TWO, "0-1", "lora.rank=4", "rollout.max_num_seqs=8"))[1]
    assert train_command(folder, faster, ignore_plan=True) == [
        *command, "--set", "rollout.max_num_seqs=8", "--ignore-plan"]  # fmt: skip


def test_a_run_goes_on_after_its_checkpoint_and_not_its_last_line(tmp_path, folder):
    run = folder.runs(asked(tmp_path))[0]
    assert run.steps_saved == 0
    for name in ("step-000002", "step-000010", ".step-000012.partial"):
        (run.folder.checkpoints / name).mkdir(parents=True)
    for step in range(12):
        append_line(run.folder.metrics_path, {"step": step})
    assert run.steps_saved == 10


def test_runs_import_nothing_by_chance_from_the_working_folder(tmp_path, folder):
    (tmp_path / "click.py").write_text("raise SystemExit('this is not click')")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sitecustomize.py").write_text("print('PYTHONPATH counts')")
    interpreter = train_command(folder, folder.runs(asked(tmp_path))[0])[:4]
    done = subprocess.run(
        [*interpreter, "--version"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("PYTHONPATH counts\npopo-lite")


def test_two_sweeps_do_not_share_a_folder(folder):
    with folder.locked(), pytest.raises(UserInputError, match="at work in this folder"), folder.locked():
        pass
    with folder.locked():
        pass
