"""popo-lite as a library: the names that `import popo_lite` offers, and the example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import popo_lite
from popo_lite.errors import UserInputError

ROOT = Path(__file__).parents[2]
SMALL = ("train.steps=2", "data.prompts_per_step=4", "rollout.num_generations=4", "eval.problems=4")


def test_importing_the_package_does_not_import_torch():
    code = "import popo_lite, sys; popo_lite.load_recipe('tiny_cpu'); print('torch' in sys.modules, dir(popo_lite))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False ")
    for name in popo_lite.__all__:
        assert f"'{name}'" in done.stdout
        assert getattr(popo_lite, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = popo_lite.tarin


class Watcher(popo_lite.Callback):
    def __init__(self):
        self.steps, self.messages, self.closed = [], [], False

    def step(self, record):
        self.steps.append((record["step"], record["loss"]))

    def message(self, text):
        self.messages.append(text)

    def close(self):
        self.closed = True


def test_train_evaluate_and_export_as_functions(tmp_path):
    recipe = popo_lite.load_recipe("tiny_cpu", SMALL)
    watchers = [Watcher(), Watcher()]
    result = popo_lite.train(recipe, output=tmp_path / "run", callbacks=watchers)
    assert isinstance(result, popo_lite.RunResult)
    assert (result.next_step, result.summary["steps"]) == (2, 2)
    assert result.folder.path == tmp_path / "run"
    assert [step for step, _ in watchers[0].steps] == [0, 1]
    assert watchers[0].steps == watchers[1].steps
    assert all(watcher.closed for watcher in watchers)
    assert any("checkpoint" in message for message in watchers[0].messages)

    (evaluated,) = popo_lite.evaluate(result.folder.path, weights=["adapter"], problems=4, samples=2)
    assert isinstance(evaluated, popo_lite.EvalResult)
    assert (evaluated.weights, evaluated.problems, evaluated.samples_per_problem) == ("adapter", 4, 2)

    report = popo_lite.export(result.folder.path, what="adapter", output=tmp_path / "adapter")
    assert (report.folder / "adapter_model.safetensors").is_file()
    for wrong in ("siamese", ["policy"]):
        with pytest.raises(popo_lite.PopoError, match="a run has no weights"):
            popo_lite.evaluate(result.folder.path, weights=wrong)
    with pytest.raises(popo_lite.PopoError, match='no weights "siamse"'):
        popo_lite.export(result.folder.path, weights="siamse")
    with pytest.raises(UserInputError, match='there is no export "mergd"') as refused:
        popo_lite.export(result.folder.path, what="mergd")
    assert refused.value.next_step == "use one of merged, adapter"
    assert not (result.folder.path / "export").exists()
    with pytest.raises(popo_lite.PopoError, match="the run has ended"):
        popo_lite.resume(result.folder.path)


ON_RANKS = """
import json, os, sys
from pathlib import Path
import popo_lite

class Watcher(popo_lite.Callback):
    steps = 0
    def step(self, record):
        self.steps += 1

folder, watcher = Path(sys.argv[1]), Watcher()
recipe = popo_lite.load_recipe("tiny_cpu", sys.argv[2:])
result = popo_lite.train(recipe, output=folder / "run", callbacks=[watcher])
assert result.folder.summary_path.is_file()
found = [str(result.folder.path), result.folder.resume_command, result.next_step, watcher.steps]
(folder / f"rank-{os.environ['RANK']}").write_text(json.dumps(found))
"""


def test_every_rank_gets_the_run_and_rank_0_alone_calls_the_callbacks(tmp_path):
    (tmp_path / "on_ranks.py").write_text(ON_RANKS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        sys.executable,
        *torchrun,
        str(tmp_path / "on_ranks.py"),
        str(tmp_path),
        *SMALL,
        "train.steps=1",
        "eval.problems=0",
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    found = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    command = f"torchrun --nproc-per-node N -m popo_lite resume {run}"
    assert found == [[str(run), command, 1, steps] for steps in (1, 0)]


def test_the_minimal_example_learns():
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text().splitlines()) <= 150
    done = subprocess.run([sys.executable, script, "3"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rates = [float(line.split()[2].rstrip("%")) for line in done.stdout.splitlines()]
    assert len(rates) == 3
    assert rates[-1] > rates[0] + 10
