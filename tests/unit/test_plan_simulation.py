"""Test what `popo-lite plan --simulate` and `train` make of a simulation's result, without a simulation."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from popo_lite.errors import EngineError, UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import command, simulation
from popo_lite.tools.plan.advice import refuse_without_room
from popo_lite.tools.simulate import Simulator, refuse

GIB = 2**30
PHASE = {
    "allocated_bytes": 7 * GIB,
    "requested_bytes": 7 * GIB - 1,
    "reserved_bytes": 9 * GIB,
    "holders": [["f, mm", GIB]],
}
FOUND = {"phases": {"load": PHASE | {"allocated_bytes": GIB}, "update": PHASE},
         "smallest_bytes": {"default": 8 * GIB, "expandable": 7 * GIB}}  # fmt: skip


class FakeSimulator:
    error: Exception | None = None
    options: dict[str, Any]

    def __enter__(self) -> FakeSimulator:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, *_: Any, **options: Any) -> dict[str, Any]:
        FakeSimulator.options = options
        if self.error is not None:
            raise self.error
        return json.loads(json.dumps(FOUND))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command.plan, [*arguments, "--simulate"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ('train.device="cpu"', "train.device"),
        ('model.backend="unsloth"', "model.backend"),
        ('model.attn_implementation="flash_attention_2"', "model.attn_implementation"),
        ('model.id="some.gguf"', "model.id"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_a_model_is_looked_for(override, key):
    recipe = load_recipe("qwen_1_5b_lora", (override, 'rollout.engine="hf"', "train.offload_activations=false"))
    with pytest.raises(UserInputError) as refused:
        refuse(recipe)
    assert refused.value.where == key
    assert refused.value.next_step


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "Simulator", FakeSimulator)


@pytest.fixture
def gemma(tmp_path: Path) -> tuple[str, ...]:
    """Overrides with a model of an architecture that the plan does not know."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    return (f'model.id="{tmp_path}"',)


@pytest.mark.usefixtures("simulated")
def test_simulated_peaks_stand_beside_planned_ones():
    shown = invoke("qwen_1_5b_lora", "--vram", "24GiB")
    assert shown.exit_code == 0
    assert "7.00 GiB" in shown.stdout
    assert "Smallest GPU for the trainer alone: about 7.59 GiB; 8.59 GiB without" in shown.stdout
    data = json.loads(invoke("qwen_1_5b_lora", "--vram", "24GiB", "--json").stdout)
    update = data["simulation"]["phases"]["update"]
    assert update["allocated_bytes"] == 7 * GIB
    planned = {phase["name"]: phase["tensor_bytes"] for phase in data["phases"]}
    assert 0 < update["planned_bytes"] < planned["update"]  # without the engine


@pytest.mark.usefixtures("simulated")
def test_an_architecture_unknown_to_the_plan_is_judged_by_simulation_alone(gemma):
    of_folder = ("qwen_1_5b_lora", "--set", *gemma)
    shown = CliRunner().invoke(command.plan, [*of_folder, "--vram", "24GiB"])
    assert shown.exit_code == 0
    assert "'gemma3_text', an architecture that the memory plan does not know; simulating" in shown.stderr
    data = json.loads(CliRunner().invoke(command.plan, [*of_folder, "--vram", "24GiB", "--json"]).stdout)
    assert data["simulation"]["fits"] is True
    assert "phases" not in data
    assert "It fits" not in shown.stdout
    assert "7.00 GiB" in shown.stdout
    assert invoke(*of_folder, "--vram", "8GiB").exit_code == 0  # with expandable segments
    assert invoke(*of_folder, "--vram", "7GiB").exit_code == 1


def test_the_plan_says_what_it_cannot_simulate_before_it_looks_for_the_model():
    missing = CliRunner().invoke(command.plan, ["tiny_cpu", "--simulate", "--set", "model.id=nobody/nothing"]).exception
    assert isinstance(missing, UserInputError)
    assert missing.what == "it cannot be simulated: the recipe trains on a CPU"


@pytest.mark.usefixtures("simulated")
def test_what_can_neither_be_planned_nor_simulated_says_both(gemma):
    on_cpu = ("qwen_1_5b_lora", "--set", *gemma, "--set", "train.device=cpu", "--set", "rollout.engine=hf")
    refused = CliRunner().invoke(command.plan, on_cpu).exception
    assert isinstance(refused, UserInputError)
    assert "'gemma3_text'" in refused.what
    assert "the recipe trains on a CPU" in refused.what
    assert refused.next_step == "--set train.device=auto"


@pytest.mark.usefixtures("simulated")
def test_the_plan_simulates_no_divided_base(gemma):
    sharded = ("--vram", "24GiB", "--set", "distributed.strategy=fsdp2", "--set", "rollout.engine=hf")
    assert invoke("qwen_1_5b_lora", *sharded).exit_code == 0
    refused = invoke("qwen_1_5b_lora", *sharded, "--ranks", "2").exception
    assert isinstance(refused, UserInputError)
    assert refused.what == "it cannot be simulated: its base is divided over ranks (fsdp2)"
    assert refused.next_step == "leave out --ranks"
    unknown = CliRunner().invoke(command.plan, ["qwen_1_5b_lora", *sharded, "--set", *gemma, "--ranks", "2"]).exception
    assert isinstance(unknown, UserInputError)
    assert "'gemma3_text'" in unknown.what


# ---------------------------------------------------------------------- before a run


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, simulated: None, gemma: tuple[str, ...]) -> Callable[..., list[str]]:
    """`starts(GiB, used GiB, overrides)`: what a run of that architecture says before it loads, on such a card."""

    def start(total: float, used: float = 0, *overrides: str) -> list[str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (round((total - used) * GIB), round(total * GIB)))
        messages: list[str] = []
        refuse_without_room(load_recipe("qwen_1_5b_lora", (*gemma, *overrides)), messages.append)
        return messages

    return start


def test_a_run_of_an_unknown_architecture_is_simulated(starts):
    begins, ends = starts(8)
    assert "'gemma3_text'" in begins
    assert "20 seconds" in begins
    assert "without rollouts, needs 7.59 GiB, and there are 8.00 GiB" in ends
    assert FakeSimulator.options["capability"] == (7, 5)


def test_a_run_that_does_not_fit_by_simulation_is_refused(starts):
    with pytest.raises(UserInputError, match=r"needs 7\.59 GiB, and there are 7\.00 GiB") as caught:
        starts(7)
    assert caught.value.where == "phase update"
    options = caught.value.next_step.partition(": ")[2].split(", ")
    assert "--set train.offload_activations=true" in options
    for option in options:
        load_recipe("qwen_1_5b_lora", shlex.split(option)[1::2])
    with pytest.raises(UserInputError, match=r"needs 7\.59 GiB beside 1\.41 GiB of other processes"):
        starts(8, used=2)


@pytest.mark.parametrize(
    "error", [EngineError("its process ended"), RuntimeError("Traceback:\n  a line\nKeyError: its process ended\n")]
)
def test_a_run_goes_on_unplanned_if_the_simulation_fails(starts, monkeypatch, error):
    monkeypatch.setattr(FakeSimulator, "error", error)
    last = starts(7)[-1]
    assert last.startswith("no memory plan: model_type is 'gemma3_text'")
    assert ", and the simulation failed: " in last
    assert last.endswith("its process ended; the run goes on without a check")
    assert "a line" not in last


def test_a_base_that_ranks_divide_is_not_simulated(starts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    sharded = ("distributed.strategy=fsdp2", "rollout.engine=hf")
    [said] = starts(7, 0, *sharded)  # a whole base would be refused
    assert said.startswith("no memory plan: model_type is 'gemma3_text'")
    assert said.endswith("its base is divided over ranks (fsdp2); the run goes on without a check")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserInputError, match=r"there are 7\.00 GiB"):
        starts(7, 0, *sharded)


def test_one_rank_simulates_for_all(starts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserInputError, match=r"there are 7\.00 GiB"):
        starts(7)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(simulation, "Simulator", pytest.fail)
    assert starts(7) == []


def test_a_run_that_cannot_be_simulated_goes_on_at_once(starts):
    [said] = starts(7, 0, 'model.backend="unsloth"')
    assert said.startswith("no memory plan")


def test_the_simulation_sees_no_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started(["env"], **options))
    with Simulator() as simulator:
        seen = simulator._process.stdout.read()
    assert b"CUDA_VISIBLE_DEVICES=\n" in seen
