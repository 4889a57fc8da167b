"""Check what a run does with rows that nobody can be right about, and with data that change before it is resumed."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import chat_template_utils

import popo_lite
import popo_lite.api
import popo_lite.cli.train
from popo_lite import run_folder
from popo_lite.callbacks import Callback
from popo_lite.cli import main
from popo_lite.errors import CheckpointError, DataError
from popo_lite.policy.load import load_tokenizer
from popo_lite.recipe import Recipe
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder, start_files
from popo_lite.tasks.rendering import Renderer
from popo_lite.types import Problem

UNREADABLE = r"\frac{1}{"


class Messages(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)

    def of(self, part: str) -> str:
        """Return the one message that contains `part`."""
        (text,) = [text for text in self.texts if part in text]
        return text


def write(path: Path, answers: dict[int, str]) -> Path:
    """Write 20 sums, in which `answers` take the place of the right ones."""
    rows = [{"prompt": f"What is {n} + 11?", "answer": answers.get(n, str(n + 11))} for n in range(10, 30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    def recipe(*overrides: str) -> Recipe:
        sizes = ("train.steps=1", "data.prompts_per_step=2", "rollout.num_generations=2", "eval.problems=5")
        return tiny_recipe(*sizes, *overrides)

    return recipe


def test_what_cannot_be_graded_is_not_trained_on_and_counts_as_not_solved(tmp_path, small):
    training = write(tmp_path / "train.jsonl", {13: UNREADABLE, 20: UNREADABLE})
    held_out = write(tmp_path / "eval.jsonl", dict.fromkeys(range(10, 18), UNREADABLE))
    recipe = small(f'data.dataset="{training}"', f'eval.dataset="{held_out}"', "eval.problems=20")
    messages = Messages()
    result = popo_lite.train(recipe, output=tmp_path / "run", callbacks=[messages])
    assert messages.of("training rows").startswith(
        "2 of 20 training rows cannot be graded and are left out:\n    row 4: the reference answer"
    )
    assert messages.of("held-out problems cannot").startswith(
        "8 of 20 held-out problems cannot be graded and count as not solved:\n    problem eval.jsonl/"
    )
    assert result.summary["before"]["unreadable"] == result.summary["after"]["unreadable"] == 8
    results = popo_lite.evaluate(tmp_path / "run", weights=["base", "adapter"], samples=1)
    assert [found.unreadable for found in results] == [8, 8]
    assert [len(found.pass_rates) for found in results] == [20, 20]


@pytest.mark.parametrize(("name", "section"), [("train", "data"), ("eval", "eval")])
def test_most_of_them_unreadable_is_the_wrong_column(tmp_path, small, name, section):
    wrong = dict.fromkeys(range(10, 21), UNREADABLE)
    files = {one: write(tmp_path / f"{one}.jsonl", wrong if one == name else {}) for one in ("train", "eval")}
    recipe = small(f'data.dataset="{files["train"]}"', f'eval.dataset="{files["eval"]}"', "eval.problems=20")
    with pytest.raises(DataError, match="11 of 20 .* cannot be graded") as caught:
        popo_lite.train(recipe, output=tmp_path / "run")
    assert caught.value.where == f"{section}.dataset"
    assert f"{section}.answer_column" in caught.value.next_step
    assert not (tmp_path / "run").exists()


def test_training_rows_that_change_before_a_run_is_resumed_are_said(tmp_path, small):
    training = write(tmp_path / "train.jsonl", {})
    recipe = small(f'data.dataset="{training}"', "eval.dataset=arithmetic")
    popo_lite.train(recipe, output=tmp_path / "run")
    found = []
    known = {f"train.jsonl/{row}": [4, 4, 0] for row in (5, 6, 7)}
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    content = json.loads((checkpoint / "cursor.json").read_text())
    content["cursor"]["history"] = known
    (checkpoint / "cursor.json").write_text(json.dumps(content))
    for answers in ({}, {15: "1"}, {15: "1", 16: UNREADABLE}):
        write(training, answers)
        (tmp_path / "run" / "summary.json").unlink()
        messages = Messages()
        popo_lite.resume(tmp_path / "run", callbacks=[messages])
        found.append([text for text in messages.texts if "since the run began" in text])
    said = "the training rows changed since the run began: {}; it goes on with those now"
    assert found == [[], [said.format("1 changed")], [said.format("1 gone")]]
    # Saved at once, because a second resume finds nothing changed.
    assert json.loads((checkpoint / "cursor.json").read_text())["cursor"]["history"].keys() == {"train.jsonl/5"}


def test_held_out_problems_that_change_before_a_run_is_resumed_are_refused(tmp_path, small, capsys):
    data = write(tmp_path / "rows.jsonl", {})
    recipe = small(f'data.dataset="{data}"')
    popo_lite.train(recipe, output=tmp_path / "run")
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    before, rows = (run / "data.json").read_text(), data.read_text()
    held_out = next(iter(json.loads(before)["held_out"]))
    lines = rows.splitlines(keepends=True)
    row = int(held_out.partition("/")[2]) - 1
    data.write_text("".join([*lines[:row], lines[row].replace('"answer": "', '"answer": "1'), *lines[row + 1 :]]))
    with pytest.raises(CheckpointError, match=r"held-out problems changed since training began \(1 changed\)"):
        popo_lite.resume(run)
    assert (run / "data.json").read_text() == before
    popo_lite.evaluate(run, weights=["base"], problems=1, samples=1)
    assert f"1 of 5 held-out problems changed or are gone since {run} was trained" in capsys.readouterr().err
    data.write_text(rows)
    popo_lite.evaluate(run, weights=["base"], problems=1, samples=1)
    assert "held-out problems changed" not in capsys.readouterr().err
    assert popo_lite.resume(run).summary is not None


class Loaded(Exception):
    """The recipe with which a run was about to load its model."""


@pytest.mark.parametrize("command", [False, True])
def test_a_run_has_the_prompts_of_the_day_on_which_it_started(tmp_path, small, monkeypatch, command):
    def on(day: int) -> None:
        now = datetime.datetime(2026, 1, day)
        monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(date=SimpleNamespace(today=now.date)))
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: now))

    def prompt(*arguments: str) -> str:
        """Start or resume a run up to the loading of its model."""
        with pytest.raises(Loaded) as caught:
            if command:
                main(list(arguments), standalone_mode=False)
            elif arguments[0] == "resume":
                popo_lite.resume(arguments[1])
            else:
                popo_lite.train(load_recipe(file), output=tmp_path / "run")
        recipe = caught.value.args[0]
        start_files(RunFolder(tmp_path / "run"), recipe, torch.device("cpu"))
        return text_of(recipe)

    def text_of(recipe: Recipe) -> str:
        tokenizer = load_tokenizer(recipe.model)
        return tokenizer.decode(Renderer(recipe, tokenizer).token_ids(problem))

    def load(recipe: Recipe, *_: object, **__: object) -> None:
        raise Loaded(recipe)

    monkeypatch.setattr(popo_lite.api, "load_trainer", load)
    monkeypatch.setattr(sys.modules["popo_lite.cli.train"], "load_trainer", load)
    problem = Problem(id="x", messages=({"role": "user", "content": "1"},), answer="1")
    template = "{{ strftime_now('%d') }}+{{ messages[0].content }}"
    file = tmp_path / "mine.toml"
    file.write_text(dump_recipe(small(f'data.chat_template="{template}"')))
    run = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    on(17)
    assert prompt("train", str(file), "--output", run) == "17+1"
    on(18)
    assert prompt("resume", run) == text_of(RunFolder(tmp_path / "run").recipe()) == "17+1"
    with pytest.raises(CheckpointError, match="data.date was '2026-01-17' and cannot become '2026-01-19'"):
        popo_lite.resume(run, ["data.date=2026-01-19"])
