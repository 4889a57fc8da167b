"""`popo-lite eval` of several runs and models on the problems of one run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import popo_lite
from popo_lite.cli import main
from popo_lite.errors import CheckpointError, UserInputError
from popo_lite.policy.load import TINY_FOLDER
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tools.benchmarks.subject import Subject, open_subjects, task_recipe
from popo_lite.tools.export.pipeline import export_run
from popo_lite.types import EvalResult
from runs import finished_run

SIZE = {"problems": 12, "samples": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with a system prompt, a chat template and an export, which no test changes."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|assistant|>"
    prompts = (f'data.chat_template="{template}"', "data.system_prompt=Add.")
    run = finished_run(tmp_path_factory.mktemp("runs") / "one", "eval.problems=12", *prompts)
    export_run(run, prompts=2, problems=0)
    return run


@pytest.fixture(scope="module")
def results(run: RunFolder) -> dict[str, EvalResult]:
    """What several models give together, by their columns."""
    merged = run.path / "export" / "merged-policy"
    found = popo_lite.evaluate(run.path, merged, "tiny", **SIZE)
    return {result.weights: result for result in found}


def figures(result: EvalResult) -> tuple[object, ...]:
    return result.pass_rates, result.completion_tokens_mean, result.task_figures


def test_all_answer_the_same_problems_on_the_same_draws(results: dict[str, EvalResult]) -> None:
    assert list(results) == ["base", "adapter", "siamese", "merged-policy", "tiny"]
    assert {len(result.pass_rates) for result in results.values()} == {12}
    # The merged model is the policy, so its answers are the same ones.
    assert figures(results["merged-policy"]) == figures(results["adapter"])
    assert figures(results["siamese"]) != figures(results["adapter"]) != figures(results["base"])
    for result in results.values():
        assert result.pass_at_1 == pytest.approx(sum(result.pass_rates) / 12)


def test_a_model_is_asked_as_its_task_says(run: RunFolder, results: dict[str, EvalResult]) -> None:
    # An export alone finds its run; another model is told which.
    (alone,) = popo_lite.evaluate(run.path / "export" / "merged-policy", **SIZE)
    assert figures(alone) == figures(results["merged-policy"])
    (told,) = popo_lite.evaluate("tiny", task=run.path, **SIZE)
    assert figures(told) == figures(results["tiny"])
    # By a recipe without the run's prompts.
    (other,) = popo_lite.evaluate("tiny", task="tiny_cpu", **SIZE)
    assert figures(other) != figures(told)


def test_columns_have_unlike_names(run: RunFolder, tmp_path: Path) -> None:
    second = tmp_path / "two"
    shutil.copytree(run.path, second)
    merged = [str(path / "export" / "merged-policy") for path in (run.path, second)]
    models = [str(run.path), *merged, str(second), str(TINY_FOLDER), "org/model"]
    subjects = open_subjects(models, ["adapter"], run.recipe())
    names = [name for subject in subjects for name in subject.adapters]
    assert names == [f"{run.path} adapter", *merged, f"{second} adapter", "tiny", "org/model"]
    assert [subject.recipe.model.quantization for subject in subjects] == ["nf4", "none", "none", "nf4", "none", "none"]
    assert {subject.recipe.data.system_prompt for subject in subjects} == {"Add."}


def test_a_file_may_be_named(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.chdir(tmp_path)
    for name in (str(file), "model.gguf"):
        (subject,) = open_subjects([name], (), run.recipe())
        assert list(subject.adapters) == ["model.gguf"]
        assert subject.name == subject.recipe.model.id == str(file.resolve())


def test_the_command_prints_one_table(run: RunFolder) -> None:
    arguments = ["eval", str(run.path), "tiny", "--weights", "adapter", "--problems", "4", "--samples", "1"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert next(line for line in done.output.splitlines() if "difference" in line).split() == [
        "adapter", "tiny", "difference",
    ]  # fmt: skip
    assert "pass@1, tiny - adapter: " in done.output
    assert "(4 problems, same draws)." in done.output


def test_what_cannot_be_asked_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="is not the folder of a run") as caught:
        task_recipe(["tiny"], None)
    assert "--task tiny_cpu" in str(caught.value)
    assert caught.value.where == "tiny"
    with pytest.raises(CheckpointError, match="there is no run here"):
        task_recipe(["tiny"], str(tmp_path))
    with pytest.raises(UserInputError, match="is named twice"):
        open_subjects(["tiny", str(run.path), "tiny"], (), run.recipe())
    with pytest.raises(UserInputError, match="is a model, not a run, and has no base"):
        open_subjects(["tiny"], ["base"], run.recipe())
    for arguments, message in (
        (("tiny", str(run.path), "--benchmarks", "paper"), "one model at a time"),
        (("tiny", "my model", "--benchmarks", "paper"), " && popo-lite eval 'my model' --benchmarks paper"),
        (("tiny", "--task", "tiny_cpu", "--benchmarks", "paper"), "does not go with --benchmarks"),
        (("tiny", "--task", "tiny_cp"), "tiny_cpu"),
    ):
        done = CliRunner().invoke(main, ["eval", *arguments])
        assert done.exit_code == 2, done.output
        assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("limit", "overlong", "problems", "message"),
    [
        (14, "error", 4, "its prompt has 16 tokens, the limit is rollout.max_prompt_length = 14"),
        (14, "skip", 4, "every prompt is longer than rollout.max_prompt_length = 14"),
        (64, "error", 0, "problems = 0: must be at least 1"),
        (64, "error", 99999, "--problems 99999: only"),
    ],
)
def test_what_cannot_be_asked_of_one_model_is_refused_before_any_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, overlong: str, problems: int, message: str
) -> None:
    """The second model's template makes longer prompts than the first one's."""
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("a model was loaded"))
    longer = tmp_path / "longer"
    shutil.copytree(TINY_FOLDER, longer)
    (longer / "chat_template.jinja").write_text("{% for m in messages %}1 + 1 {{ m.content }}{% endfor %}<|assistant|>")
    task = tmp_path / "task.toml"
    overrides = [f"rollout.max_prompt_length={limit}", f"data.overlong_prompts={overlong}"]
    task.write_text(dump_recipe(load_recipe("tiny_cpu", overrides)))
    with pytest.raises(UserInputError) as caught:
        popo_lite.evaluate("tiny", longer, task=task, problems=problems)
    assert message in str(caught.value)
    assert ("longer" in str(caught.value.where)) == (limit == 14)
    assert "--set" not in str(caught.value)
