"""Test that the difficulty follows the pass rate, and that a resumed run has the same levels."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from popo_lite.callbacks import Callback
from popo_lite.curriculum import Choice, level_pass_rate, next_level
from popo_lite.errors import DataError
from popo_lite.recipe import CurriculumRecipe
from popo_lite.run_folder import RunFolder, read_lines
from popo_lite.tasks import ArithmeticTask, open_tasks
from popo_lite.trainer import Trainer

BAND = CurriculumRecipe(enabled=True, low=0.3, high=0.7, window=3)


@pytest.mark.parametrize(
    ("level", "rates", "after"),
    [
        (0, [0.9, 0.9], (0, [0.9, 0.9])),  # the window is not full
        (0, [0.9, 0.9, 0.9], (1, [])),
        (0, [0.0, 0.8, 0.8, 0.8], (1, [])),  # the latest count
        (2, [1.0, 1.0, 1.0], (2, [1.0, 1.0, 1.0])),  # the hardest of three
        (1, [0.0, 0.0, 0.8], (0, [])),
        (0, [0.0, 0.0, 0.0], (0, [0.0, 0.0, 0.0])),
        (1, [0.5, 0.5, 0.5, 0.5], (1, [0.5, 0.5, 0.5])),
        (1, [0.7, 0.7, 0.7], (1, [0.7, 0.7, 0.7])),
    ],
)
def test_the_level_moves_if_the_mean_of_a_whole_window_leaves_the_band(level, rates, after):
    assert next_level(level, rates, BAND, levels=3) == after


def test_skipped_problems_count_with_what_is_known_of_them():
    problem = ArithmeticTask(2).train_problem(0, 0)
    choice = Choice(problems=(problem,) * 4, skipped=12, skipped_right=10, next_problem=16)
    assert level_pass_rate(choice, 0.5) == (4 * 0.5 + 10) / 16
    assert level_pass_rate(Choice(problems=(problem,), skipped=0, next_problem=1), 0.25) == 0.25


@pytest.fixture
def sums(tmp_path):
    """`sums(values)`: a file of sums with as many digits as their level, written as one of `values`."""

    def write(values):
        pairs = [(values[n], a, a + 3) for n in range(3) for a in range(2 * 10**n, 2 * 10**n + 7)]
        rows = [{"id": f"{a}", "prompt": f"What is {a} + {b}?", "answer": a + b, "level": v} for v, a, b in pairs]
        path = tmp_path / "sums.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def recipe_of(tiny_recipe, path, *overrides):
    enabled = ("data.curriculum.enabled=true", "data.curriculum.column=level")
    return tiny_recipe(f'data.dataset="{path}"', "eval.problems=0", *enabled, *overrides)


@pytest.mark.parametrize("values", [[3, 9, 10], ["3", "9", "10"], [0.5, 2, 11], ["a", "b", "c"]])
def test_levels_are_the_sorted_values_of_a_column(tiny_recipe, sums, values):
    task, _ = open_tasks(recipe_of(tiny_recipe, sums(values)))
    assert task.levels == 3
    for level in range(3):
        assert {task.train_problem(0, index, level).meta["level"] for index in range(14)} == {values[level]}
        epochs = [{task.train_problem(0, 7 * epoch + index, level).id for index in range(7)} for epoch in (0, 1)]
        assert len(epochs[0]) == 7
        assert epochs[0] == epochs[1]
    task.drop_training(lambda problem: problem.meta["level"] == values[1])
    assert task.levels == 2
    assert task.train_problem(0, 0, 1).meta["level"] == values[2]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("levle", [1, 2, 3], r'has no column "levle".*in data\.curriculum\.column, perhaps "level"'),
        ("level", [1, 1, 1], r'all rows have "1" in column "level"'),
        ("level", [1, None, 2], r'row 8 and 6 others have no value in column "level".*data\.filter'),
    ],
)
def test_a_column_without_levels_is_refused(tiny_recipe, sums, column, values, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_tasks(recipe_of(tiny_recipe, sums(values), f"data.curriculum.column={column}"))


class Watch(Callback):
    """Ask the trainer to stop after a step."""

    def __init__(self, stop_after=None):
        self.stop_after, self.messages, self.trainer = stop_after, [], None

    def step(self, record):
        if record["step"] + 1 == self.stop_after:
            self.trainer.interrupts.requested = True

    def message(self, text):
        self.messages.append(text)


def run(recipe, folder, watch, *, resume=False):
    with Trainer(recipe, watch) as watch.trainer:
        watch.trainer.run(folder, resume=resume)
    return [{k: v for k, v in r.items() if "second" not in k and k != "peak_memory_bytes"}
            for r in read_lines(folder.metrics_path)]  # fmt: skip


@pytest.mark.parametrize("overrides", [(), ("rollout.skip_known=true", "rollout.adaptive.enabled=true")])
def test_a_resumed_run_has_the_same_levels_and_weights(tiny_recipe, sums, tmp_path, overrides):
    band = ("data.curriculum.window=2", "data.curriculum.low=0.15", "data.curriculum.high=0.2")
    small = ("data.prompts_per_step=5", "rollout.num_generations=6", "train.steps=8", "train.save_steps=50")
    path = sums([1, 2, 3])
    recipe = recipe_of(tiny_recipe, path, *band, *small, "rollout.adaptive.max_rollouts=6", *overrides)
    whole, broken = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "broken")
    for folder in (whole, broken):
        folder.path.mkdir()
    watch = Watch()
    expected = run(recipe, whole, watch)
    levels = [record["level"] for record in expected]
    assert len(set(levels)) > 1
    moved = [text for text in watch.messages if text.startswith("pass rate ")]
    assert len(moved) >= sum(a != b for a, b in pairwise(levels)) > 0
    assert "of 3" in moved[0]
    # In the middle of a window, which the checkpoint has to hold.
    assert len(run(recipe, broken, Watch(stop_after=3))) == 3
    cursor = json.loads(next(broken.checkpoints.glob("*/cursor.json")).read_text("utf-8"))["cursor"]
    assert (cursor["level"], len(cursor["level_rates"])) != (0, 0)
    assert run(recipe, broken, Watch(), resume=True) == expected
    weights = [(folder.adapter / "adapter_model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]
