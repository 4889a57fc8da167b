"""benchmarks/study.py: a small study by the real command, and the shipped page against its files."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from helpers import json_lines
from popo_lite.tools.sweep.compare import compare
from popo_lite.tools.sweep.report import tables

ROOT = Path(__file__).parents[2]
SMALL = """
recipe = "tiny_cpu"
seeds = [0, 1]
[set]
train.steps = 6
data.prompts_per_step = 4
rollout.num_generations = 4
eval.problems = 8
[variants.popo]
[variants.grpo]
objective.algorithm = "grpo"
"""


@pytest.fixture
def study():
    spec = importlib.util.spec_from_file_location("study", ROOT / "benchmarks" / "study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_files_say(study):
    page = study.PAGE.read_text(encoding="utf-8")
    assert study.written(page) == page
    for name in study.SWEEPS:
        sweep = study.load(name)
        assert len(sweep.seeds) >= 5
        runs = [(line["seed"], line["variant"]) for line in study.stored(name)]
        assert runs == [(seed, variant.name) for seed in sweep.seeds for variant in sweep.variants]
    plots = set(re.findall(r"\(study/(\w+\.png)\)", page))
    assert plots == {path.name for path in (study.PAGE.parent / "study").iterdir()}
    assert len(plots) == len(study.DIFFICULTIES) * len(study.PLOTS)


def test_a_page_without_a_place_for_a_table_is_refused(study):
    with pytest.raises(ValueError, match="<!-- study_3_digits -->"):
        study.written(study.PAGE.read_text(encoding="utf-8").replace("<!-- study_3_digits -->", ""))


def test_a_study_trains_what_is_missing_and_writes_its_page(study, tmp_path, monkeypatch, capfd):
    (tmp_path / "small.toml").write_text(SMALL)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- summary -->\nold\n<!-- end -->\nbefore\n<!-- small -->\nold\n<!-- end -->\nafter\n")
    for name, value in {
        "SWEEP_FILES": tmp_path,
        "RESULTS": tmp_path / "results",
        "PAGE": page,
        "SWEEPS": ("small",),
        "DIFFICULTIES": ("small",),
        "SUMMARY": ("popo", "grpo"),
        "PLOTS": {"objectives": ("popo", "grpo")},
        "REACH": 0.2,
    }.items():
        monkeypatch.setattr(study, name, value)
    arguments = ["study.py", "--jobs", "2", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    first = page.read_text()
    assert first.startswith("<!-- summary -->\n\n**small, pass@1 at the start ")
    assert "| popo | " in first.partition("<!-- end -->")[0]
    assert "\nbefore\n<!-- small -->\n\n**Held-out problems, at the end**\n" in first
    assert "old" not in first
    assert first.endswith("\n<!-- end -->\nafter\n")
    assert (page.parent / "study" / "small_objectives.png").stat().st_size > 10_000
    for table in tables(compare([tmp_path / "runs" / "small"], reach=0.2), study.SHOWN):
        assert study.markdown(table) in first
    for seed in (0, 1):
        popo, grpo = json_lines(tmp_path / "results" / "small" / f"seed-{seed}.jsonl")
        assert [popo["variant"], grpo["variant"]] == ["popo", "grpo"]
        steps = json_lines(tmp_path / "runs" / "small" / "popo" / f"seed-{seed}" / "metrics.jsonl")
        assert [part["trained_tokens"] for part in popo["parts"]] == [
            sum(line["trained_tokens"] for line in steps[start : start + 2]) for start in (0, 2, 4)
        ]
        whole = {key: sum(line[key] for line in steps) for key in ("tokens_of_positives", "tokens_of_all")}
        assert popo["figures"]["trained_ratio"] == whole["tokens_of_positives"] / whole["tokens_of_all"]
    last = first.rpartition("**Tokens to train on, of the rollouts of popo**")[2].splitlines()
    assert [row.split("|")[1].strip() for row in last if row.startswith("| ")][2:] == [
        "1 to 2", "3 to 4", "5 to 6", "1 to 6",
    ]  # fmt: skip

    capfd.readouterr()
    study.main()
    assert "starts" not in capfd.readouterr().out
    assert page.read_text() == first


def test_a_study_whose_runs_fail_ends_with_their_code(study, tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL.replace("train.steps = 6", "train.steps = 0"))
    monkeypatch.setattr(study, "SWEEP_FILES", tmp_path)
    with pytest.raises(SystemExit) as left:
        study.train("small", tmp_path / "runs" / "small", 1)
    assert left.value.code == 2
