"""Test `popo-lite plan --simulate` without a simulation: what it refuses, and what it prints of a result."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from popo_lite.errors import UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import command
from popo_lite.tools.simulate import refuse

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
    def __enter__(self) -> FakeSimulator:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, *_: Any, **__: Any) -> dict[str, Any]:
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
    monkeypatch.setattr(command, "Simulator", FakeSimulator)


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
def test_an_architecture_unknown_to_the_plan_is_judged_by_simulation_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    of_folder = ("qwen_1_5b_lora", "--set", f'model.id="{tmp_path}"')
    assert CliRunner().invoke(command.plan, of_folder).exit_code != 0
    shown = invoke(*of_folder, "--vram", "24GiB")
    assert shown.exit_code == 0
    assert "It fits" not in shown.stdout
    assert "7.00 GiB" in shown.stdout
    assert invoke(*of_folder, "--vram", "8GiB").exit_code == 0  # with expandable segments
    assert invoke(*of_folder, "--vram", "7GiB").exit_code == 1
