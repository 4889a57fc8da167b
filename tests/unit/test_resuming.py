"""Which keys may change when a run is resumed, and that every advice of the program is one that may."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from popo_lite.errors import CheckpointError, EngineError, RecipeError
from popo_lite.recipe import OBJECTIVES
from popo_lite.recipe_file import dump_recipe, load_recipe, schema_of
from popo_lite.resuming import FREE, NOTED, RULES, free_keys, resumed_recipe, resumed_run
from popo_lite.run_folder import RunFolder, append_line, write_json

PACKAGE = Path(__file__).parents[2] / "popo_lite"
KEYS = {key for algorithm in OBJECTIVES for key in schema_of(algorithm)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu", ["train.steps=60", "data.date=2026-01-31"])))
    return run


def test_every_key_of_the_schema_has_a_rule_and_no_other():
    assert RULES.keys() == KEYS
    assert all(rule in (FREE, NOTED) or len(rule) > 20 for rule in RULES.values())


def test_a_changed_key_is_free_noted_or_refused_with_the_reason(run):
    recipe, changes = resumed_recipe(run, ["rollout.max_num_seqs=7", "optimizer.learning_rate=1e-6", "lora.rank=16",
                                           "objective.target_entropy=0.5", "data.dataset=mine.jsonl",
                                           "lora.dropout=0.1"])  # fmt: skip
    assert recipe.rollout.max_num_seqs == 7
    assert changes == [
        {"key": "data.dataset", "before": "arithmetic", "now": "mine.jsonl"},
        {"key": "lora.dropout", "before": 0.0, "now": 0.1},
        {"key": "objective.target_entropy", "before": None, "now": 0.5},
        {"key": "optimizer.learning_rate", "before": 0.002, "now": 1e-06},
    ]
    assert resumed_recipe(run) == (run.recipe(), [])


@pytest.mark.parametrize(
    ("override", "before", "why"),
    [
        ("model.id=Qwen/Qwen2.5-0.5B", "'tiny'", "belongs to the base"),
        ("lora.rank=4", "16", "would not fit"),
        ("lora.init_from=runs/x/adapter", "None", "only at the start"),
        ("optimizer.name=adamw8bit", "'adamw'", "state of the optimizer"),
        ("train.seed=1", "0", "another one"),
        ("objective.algorithm=grpo", "'popo'", "different methods"),
        ('objective.algorithm = "grpo"', "'popo'", "different methods"),
        ("reward.functions=exact", "None", "graded differently"),
        ("data.system_prompt=Think.", "None", "prompts differ"),
        ("data.date=", "'2026-01-31'", "prompts differ"),
        ("eval.problems=3", "200", "before and after training"),
    ],
)
def test_what_would_be_another_experiment_is_refused_with_a_command_that_works(run, override, before, why):
    with pytest.raises(CheckpointError, match=why) as caught:
        resumed_recipe(run, [override, "rollout.max_num_seqs=7"])
    key = override.partition("=")[0].strip()
    assert f"{key} was {before} and cannot become" in caught.value.what
    arguments = shlex.split(caught.value.next_step.partition("popo-lite train ")[2])
    if key != "objective.algorithm":
        assert override.partition("=")[2] in str(load_recipe(arguments[0], arguments[2::2]).to_dict())


def test_splitting_a_step_otherwise_is_recorded_if_there_are_dropout_masks(run):
    assert resumed_recipe(run, ["train.packing=false"])[1] == []
    run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu", ["lora.dropout=0.1"])))
    assert resumed_recipe(run, ["train.packing=false"])[1] == [{"key": "train.packing", "before": True, "now": False}]
    assert "train.packing" not in free_keys(run.recipe())


def test_a_wrong_value_is_an_error_of_the_recipe(run):
    with pytest.raises(RecipeError, match="a whole number"):
        resumed_recipe(run, ["train.steps=many"])


def test_a_run_that_has_ended_trains_on_for_more_steps_alone(run):
    write_json(run.summary_path, {"steps": 60})
    for overrides in ([], ["optimizer.learning_rate=1e-6"], ["train.steps=60"]):
        with pytest.raises(CheckpointError, match="ended after 60 steps") as caught:
            resumed_recipe(run, overrides)
        assert f"popo-lite resume {run.path} --set train.steps=120" in caught.value.next_step
    with pytest.raises(CheckpointError, match="checkpoints are gone") as caught:
        resumed_recipe(run, ["train.steps=80"])
    assert f"--set lora.init_from={run.adapter}" in caught.value.next_step
    for step in (40, 60):
        (run.checkpoints / f"step-{step:06}").mkdir(parents=True)
    assert resumed_recipe(run, ["train.steps=80"])[1] == [{"key": "train.steps", "before": 60, "now": 80}]
    assert resumed_recipe(run, checkpoint=40) == (run.recipe(), [])
    with pytest.raises(CheckpointError, match="ended after 60 steps"):
        resumed_recipe(run, checkpoint=60)


def test_a_run_whose_checkpoints_were_deleted_keeps_its_metrics_and_is_refused(run):
    saved_every = run.recipe().train.save_steps
    for step in range(saved_every):  # killed before its first checkpoint was written
        append_line(run.metrics_path, {"step": step})
    assert resumed_recipe(run) == (run.recipe(), [])
    append_line(run.metrics_path, {"step": saved_every})
    with pytest.raises(CheckpointError, match="the checkpoints are gone") as caught:
        resumed_recipe(run, ["train.save_steps=1000"])
    assert f"start a new run: popo-lite train {run.recipe_path}" in caught.value.next_step


@pytest.mark.parametrize(
    ("advice", "shown"),
    [
        ("--set rollout.engine=hf samples slower", "--set rollout.engine=hf samples slower"),
        ("--set lora.rank=4 --set 'model.dtype=\"float16\"'", "(lora.rank, model.dtype: only in a new run)"),
        ("in a new run --set lora.rank=4", "in a new run --set lora.rank=4"),
        (None, ""),
    ],
)
def test_advice_to_a_resumed_run_says_what_needs_a_new_one(run, advice, shown):
    with pytest.raises(EngineError) as caught, resumed_run(run.path):
        raise EngineError("does not fit", next_step=advice)
    assert (caught.value.next_step or "").split("\n")[-1] == shown


# Advice. Modules whose errors and messages come from a run that has started.
WHILE_RUNNING = (
    "trainer.py",
    "run_loop.py",
    "verdicts.py",
    "faults.py",
    "update.py",
    "micro_batches.py",
    "host_memory.py",
    "samplers/*.py",
    "grading/grader.py",
)
KEY = re.compile("|".join(sorted(map(re.escape, KEYS), key=len, reverse=True)))
ADVICE = re.compile(r"--set |lower|raise|set |smaller|larger|fewer|help|easier|use ")


def advice() -> list[tuple[str, str]]:
    """Every text in these modules that tells to change a key: (module, text)."""
    found = []
    for path in (path for pattern in WHILE_RUNNING for path in sorted(PACKAGE.glob(pattern))):
        tree = ast.parse(path.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and id(node) not in documentation else None
            if isinstance(text, str) and KEY.search(text) and ADVICE.search(text):
                found.append((path.name, text))
    return found


def test_what_messages_advise_for_a_run_that_has_started_is_accepted_by_resume():
    texts = advice()
    assert len(texts) > 10
    assert {"rollout.engine", "rollout.vllm.base", "rollout.max_gap"} <= {
        key for _, text in texts for key in KEY.findall(text)
    }
    for module, text in texts:
        for clause in text.split("; "):
            for key in KEY.findall(clause) if "new run" not in clause else ():
                assert RULES[key] in (FREE, NOTED), (module, text)
