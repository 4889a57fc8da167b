"""`popo-lite doctor` as a command, and a bug report with planted secrets, prompts and answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from e2e.test_secrets import SECRETS
from helpers import record
from popo_lite.recipe_file import dump_recipe, load_recipe
from popo_lite.run_folder import RunFolder
from popo_lite.tools.doctor import bundle
from popo_lite.tools.doctor.findings import CHECKS
from popo_lite.tools.doctor.processes import Worker

PLANTED = ("planted-question", "planted-answer", "planted-system", "planted-shape", "planted-dataset-folder")
LOG = """2026-11-30 10:00:00,123 INFO loading tiny
2026-11-30 10:00:01,123 INFO 2 of 9 training rows cannot be graded and are left out:
    problem 7: the reference answer is not a number: 'planted-answer'
2026-11-30 10:00:02,123 INFO step 3: 90% of the right answers look alike: "the planted-shape is _"
(_ is copied from the question.)
"planted-answer 17" counts as right; the reference is 17
2026-11-30 10:00:03,123 ERROR the run ends with an error
Traceback (most recent call last):
  File "HOME/project/popo_lite/trainer.py", line 7, in train_step
    clock = StageClock(self.callback)
ValueError: the value of 'train.steps' for planted-question what is 1 + 1? at https://me:planted-password@host
    planted-answer in a second line
2026-11-30 10:00:04,123 ERROR 4 answers could not be graded; the first: KeyError: planted-answer
"""


def write_run(home: Path) -> RunFolder:
    """A run folder of the planted home folder."""
    run = RunFolder(home / "runs" / "mine")
    run.path.mkdir(parents=True)
    values = {"data.system_prompt": "planted-system", "data.dataset": f"{home}/planted-dataset-folder/rows.jsonl"}
    values |= {"data.prompt_column": "q", "data.answer_column": "a"}
    run.recipe_path.write_text(dump_recipe(load_recipe("tiny_cpu").with_values(values)))
    run.environment_path.write_text(json.dumps({"python": "3.12.1", "processor": f"from {home}"}))
    run.log_path.write_text(LOG.replace("HOME", str(home)))
    lines = [record(step, top_shape="planted-shape _") | {"extra": "planted-answer"} for step in range(30)]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": "half')
    run.samples_path.write_text('{"prompt": "planted-question", "answers": ["planted-answer"]}\n')
    run.evaluations_path.write_text('{"question": "planted-question"}\n')
    return run


@pytest.fixture(scope="module")
def doctored(tmp_path_factory):
    """The command with planted secrets, a home folder and a run in it: what it printed, and the bug report."""
    home = tmp_path_factory.mktemp("planted-home")
    run = write_run(home)
    (home / "hub").mkdir()
    (home / "hub" / "token").write_text("hf_saved_planted_token")
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    secrets = SECRETS | {
        "POPO_SHORT_TOKEN": "abc",
        "POPO_LOGIN": "alice:hunter2",
        "HF_HOME": str(home / "hub"),
        "HOME": str(home),
    }
    done = subprocess.run(
        [sys.executable, "-m", "popo_lite", "doctor", "--quick", "--json", "--bundle", "report.zip", "--run", run.path],
        cwd=home, env={**known, **secrets, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return home, done, home / "report.zip"


@pytest.mark.slow
def test_every_check_is_one_line_or_more(doctored):
    _, done, _ = doctored
    result = json.loads(done.stdout)
    statuses: dict[str, set[str]] = {}
    for finding in result["findings"]:
        statuses.setdefault(finding["name"], set()).add(finding["status"])
    assert {check.name for check in CHECKS} <= statuses.keys()
    for name in ("system", "python", "packages", "torch", "nf4", "attention", "update"):
        assert statuses[name] <= {"ok", "skipped", "warning"}
        assert "ok" in statuses[name]
    assert statuses["hub"] == statuses["vllm"] == statuses["measured step"] == {"skipped"}
    assert "popo-lite train tiny_cpu" in result["next"]
    assert sum(result["counts"].values()) == len(result["findings"])


@pytest.mark.slow
def test_a_bug_report_holds_no_secret_and_no_data(doctored):
    home, done, path = doctored
    with zipfile.ZipFile(path) as report:
        files = {name: report.read(name) for name in report.namelist()}
    assert files.keys() == {
        "doctor.json", "packages.txt", "variables.txt", "run/recipe.toml", "run/environment.json", "run/log.txt",
        "run/metrics.jsonl",
    }  # fmt: skip
    tokens = [value for name, value in SECRETS.items() if "proxy" not in name]
    secrets = [*tokens, "planted-password", "hf_saved_planted_token", str(home), *PLANTED]
    for name, content in {
        **files,
        "the zip": path.read_bytes(),
        "printed": (done.stdout + done.stderr).encode(),
    }.items():
        for secret in (
            secrets if name != "printed" else [*tokens, "planted-password", "hf_saved_planted_token", *PLANTED]
        ):
            assert secret.encode() not in content, f"{name}: {secret}"
    variables = files["variables.txt"].decode()
    assert "HF_TOKEN=***\n" in variables
    assert "POPO_SHORT_TOKEN=***\n" in variables
    assert "https_proxy=http://***@127.0.0.1:9\n" in variables
    assert "POPO_LOGIN=***\n" in variables
    assert "HF_HOME=~/hub\n" in variables
    assert "WANDB" not in variables
    assert "torch==" in files["packages.txt"].decode()
    recipe = files["run/recipe.toml"].decode()
    assert 'dataset = "rows.jsonl"' in recipe
    assert f'system_prompt = "{bundle.LEFT_OUT}"' in recipe
    assert json.loads(files["doctor.json"])["findings"]


@pytest.mark.slow
def test_the_log_keeps_what_happened_and_the_metrics_their_numbers(doctored):
    path = doctored[2]
    with zipfile.ZipFile(path) as report:
        log, metrics = (report.read(f"run/{name}").decode() for name in ("log.txt", "metrics.jsonl"))
    assert "2 of 9 training rows cannot be graded" in log
    assert '  File "~/project/popo_lite/trainer.py", line 7, in train_step\n    clock = StageClock' in log
    assert "ValueError: [left out]" in log
    lines = metrics.splitlines()
    assert len(lines) == bundle.METRIC_LINES
    assert lines[-1] == f"{bundle.LEFT_OUT}: damaged"
    last = json.loads(lines[-2])
    assert (last["step"], last["loss"], last["seconds"]["rollout"]) == (29, 0.4312, 8.2)
    assert "top_shape" not in last


def test_apostrophes_are_no_quotation():
    line = "2026-11-30 10:00:00,123 WARNING the trainer's own model isn't the engine's: 'a b' and 'model.id'"
    assert bundle.without_quotations([line]) == [line.replace("'a b'", "'[left out]'")]


def test_a_damaged_run_can_be_reported(tmp_path):
    run = RunFolder(tmp_path)
    run.recipe_path.write_text("[model\n")
    run.environment_path.write_text("{")
    files = bundle.run_files(run)
    assert files["recipe.toml"].startswith("# ")
    assert files["environment.json"].startswith("damaged")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--run", "."], "give --bundle FILE.zip as well"),
        (["--bundle", "x.zip", "--run", "."], "there is no run here"),
        (["--bundle", "no/such/x.zip"], "a folder that does not exist"),
        (["--bundle", "."], "is there already"),
    ],
)
def test_refused_before_anything_is_checked(command, options, said):
    done = command("doctor", *options, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_is_started_proven_and_closed():
    check = next(check for check in CHECKS if check.name == "vllm")
    with Worker() as worker:
        (found,) = worker.run(check)
    assert found.status == "ok", found
    assert "sampler proven" in found.what
