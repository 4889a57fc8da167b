"""Test `popo-lite plan`: its output and exit codes, and that it never imports torch."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from popo_lite.errors import UserInputError
from popo_lite.recipe_file import load_recipe
from popo_lite.tools.plan import command as plan_command
from popo_lite.tools.plan.advice import advice_for
from popo_lite.tools.plan.command import parse_size, plan
from popo_lite.tools.plan.report import plan_report
from popo_lite.tools.plan.shapes import load_shape
from popo_lite.tools.plan.vram import plan_memory


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(plan, arguments)


def planned(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(invoke(*arguments, "--json").stdout)
    return found


def test_json_holds_every_phase_in_bytes() -> None:
    data = planned("qwen_1_5b_lora", "--vram", "24GiB")
    assert data["vram_bytes"] == 24 * 2**30
    assert data["vram_source"] == "--vram"
    assert data["fits"] is True
    assert [phase["name"] for phase in data["phases"]][-1] == "export"
    for phase in data["phases"]:
        assert phase["total_bytes"] == sum(phase["bytes"].values())
    assert data["peak_bytes"] == max(phase["total_bytes"] for phase in data["phases"][:-1])
    assert data["advice"] == {"overrides": [], "changes": [], "smallest_vram_bytes": None, "smallest_host_bytes": None}


def test_the_exit_code_says_whether_it_fits() -> None:
    assert invoke("qwen_1_5b_lora", "--vram", "24GiB").exit_code == 0
    refused = invoke("qwen_7b_lora", "--vram", "8GiB")
    assert refused.exit_code == 1
    assert "It does not fit" in refused.stdout


def test_it_plans_a_rank_of_several_and_prints_the_command_that_starts_them() -> None:
    sizes = ("qwen_1_5b_lora", "--vram", "24GiB", "--host", "64GiB")
    data = planned(*sizes, "--ranks", "8", "--machines", "2")
    assert (data["ranks"], data["ranks_here"]) == (8, 4)
    alone = planned(*sizes)
    assert (alone["ranks"], alone["ranks_here"]) == (1, 1)
    assert data["host"]["total_bytes"] == 4 * alone["host"]["total_bytes"]
    starts = {(): "popo-lite train", ("--ranks", "2"): "torchrun --nproc-per-node 2 -m popo_lite train"}
    starts["--ranks", "8", "--machines", "2"] = (
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29400 "
        "--nproc-per-node 4 -m popo_lite train"
    )
    for ranks, start in starts.items():
        shown = invoke(*sizes, *ranks, "--set", "lora.rank=16").stdout
        assert shown.splitlines()[-1] == f"  {start} qwen_1_5b_lora --set lora.rank=16"
        assert ("one of 8 ranks" in shown) == (len(ranks) == 4)
    refused = invoke("qwen_7b_lora", "--vram", "12GiB", "--ranks", "2").stdout
    assert "popo-lite plan qwen_7b_lora --vram 12GiB --ranks 2 --set" in refused
    assert invoke("tiny_cpu", "--ranks", "0").exit_code == 2
    odd = invoke("tiny_cpu", "--ranks", "3", "--machines", "2").exception
    assert isinstance(odd, UserInputError)
    assert str(odd.where) == "--ranks"
    idle = invoke("tiny_cpu", "--ranks", "3", "--set", "data.prompts_per_step=2").stdout
    assert "1 of 3 ranks has no prompts: data.prompts_per_step = 2." in idle


@pytest.mark.parametrize("others", [(), ("--others", "512MiB")])
def test_the_command_it_advises_fits(others: tuple[str, ...]) -> None:
    refused = invoke("qwen_7b_lora", "--vram", "12GiB", *others, "--set", "lora.rank=64")
    [command] = [line for line in refused.stdout.splitlines() if line.strip().startswith("popo-lite plan")]
    words = shlex.split(command)
    given = ["popo-lite", "plan", "qwen_7b_lora", "--vram", "12GiB", *others, "--set"]
    assert words[: len(given)] == given
    assert invoke(*words[2:]).exit_code == 0


def test_nothing_that_helps_is_said_with_what_it_takes() -> None:
    refused = invoke("qwen_7b_lora", "--vram", "4GiB")
    assert refused.exit_code == 1
    assert "no setting makes it fit; with every reduction it takes a GPU of " in refused.stdout


def test_without_a_gpu_24_gib_are_assumed_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    data = planned("qwen_1_5b_lora")
    assert data["vram_bytes"] == 24 * 2**30
    assert data["vram_source"].startswith("assumed")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 24 GiB, 3 of them in use, by the driver's own command."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--query-gpu=memory.total,memory.used,compute_cap" in command
        return subprocess.CompletedProcess(command, 0, stdout="24576, 3072, 8.9\n")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(plan_command, "available_bytes", lambda: 32 * 2**30)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("options", "gib", "source"),
    [
        ((), 3, "nvidia-smi"),
        (("--others", "1GiB"), 1, "--others"),
        (("--others", "0GiB"), 0, "--others"),
        (("--vram", "24GiB"), 0, "none counted"),
        (("--vram", "24GiB", "--others", "2GiB"), 2, "--others"),
    ],
)
def test_what_others_hold_comes_from_the_driver_or_the_command_line(
    options: tuple[str, ...], gib: int, source: str
) -> None:
    data = planned("qwen_1_5b_lora", *options)
    assert data["vram_bytes"] == 24 * 2**30
    assert data["others_bytes"] == gib * 2**30
    assert data["others_source"] == source
    assert all(phase["bytes"].get("other processes", 0) == gib * 2**30 for phase in data["phases"])
    said = " ".join(invoke("qwen_1_5b_lora", *options).stdout.split())
    assert (f"Other processes hold {gib}.00 GiB ({source})." in said) is (gib > 0)


@pytest.mark.usefixtures("gpu")
def test_a_gpus_memory_says_nothing_of_a_run_on_the_cpu() -> None:
    data = planned("tiny_cpu")
    assert data["vram_source"] == "available here; the recipe runs on the CPU"
    assert data["others_bytes"] == 0


@pytest.mark.usefixtures("gpu")
def test_host_memory_is_shown_and_judged_on_this_machine_or_by_the_option() -> None:
    here, elsewhere = planned("qwen_7b_lora"), planned("qwen_7b_lora", "--vram", "24GiB")
    assert here["host"]["available_bytes"] == 32 * 2**30
    assert here["host"]["total_bytes"] == sum(here["host"]["bytes"].values())
    assert (elsewhere["host"]["available_bytes"], elsewhere["host_source"]) == (None, "not judged")
    said = " ".join(invoke("qwen_7b_lora").stdout.split())
    assert " of 32.00 GiB (available here): process 3.00 GiB, engine asleep 9.91 GiB, adapters " in said
    refused = invoke("qwen_7b_lora", "--vram", "24GiB", "--host", "12GiB")
    assert refused.exit_code == 1
    said = " ".join(refused.stdout.split())
    assert "It does not fit (--host): the run is planned to need 14." in said
    assert "rollout.vllm.enable_sleep_mode = false: host memory from 14." in said
    command = next(line for line in refused.stdout.splitlines() if line.strip().startswith("popo-lite plan"))
    assert invoke(*shlex.split(command)[2:]).exit_code == 0


def test_the_longest_sequence_is_no_longer_than_the_context() -> None:
    said = " ".join(invoke("qwen_1_5b_lora", "--vram", "24GiB").stdout.split())
    assert "Longest prompt with answer: 4,096 tokens (memory would hold" in said
    said = " ".join(invoke("r1_distill_1_5b_lora", "--vram", "24GiB").stdout.split())
    assert "the model's context 131,072); this recipe's: 32,768." in said


def test_each_change_says_which_phase_it_eases() -> None:
    refused = invoke("qwen_7b_lora", "--vram", "8GiB").stdout
    changes = planned("qwen_7b_lora", "--vram", "8GiB")["advice"]["changes"]
    assert len(changes) > 1
    for change in changes:
        phase = f"phase {change['eases']} from {change['before_bytes'] / 2**30:.2f} GiB to "
        assert phase + f"{change['after_bytes'] / 2**30:.2f} GiB" in refused
    assert "train.tokens_per_microbatch = 1536: phase update" in refused
    short = invoke("qwen_1_5b_lora", "--vram", "8GiB").stdout
    assert "rollout.vllm.gpu_memory_utilization = 0.5: the engine's share lacks nothing, before " in short


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("24GiB", 24 * 2**30), ("24 gib", 24 * 2**30), ("0.5GiB", 2**29), ("16GB", 16 * 10**9), ("512MiB", 2**29)],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["24", "GiB", "-1GiB", "0GiB", "24 GiB of it", "24TiB", "", "0.0000000001MiB", "9" * 400 + "GiB"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserInputError, match="is no amount of memory"):
        parse_size(text)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_report_keeps_to_its_width_and_encoding(width: int, encoding: str) -> None:
    recipe = load_recipe("qwen_7b_lora")
    large = plan_memory(recipe, load_shape(recipe.model), vram_bytes=8 * 2**30)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=stream, width=width, highlight=False)
    plan_report(
        large,
        advice_for(large),
        ("--vram", "none counted", "not judged"),
        "popo-lite plan x",
        "popo-lite train x",
        console,
    )
    stream.flush()
    text = raw.getvalue().decode(encoding)
    *lines, command = text.splitlines()
    assert max(map(len, lines)) <= width
    assert command.startswith("  popo-lite plan x --set ")  # never folded: it is copied
    row = next(line for line in lines if line.startswith("base linears"))
    assert row.replace("|", " ").split()[2:] == ["3.14"] * 6
    assert sum("peak: " in line for line in lines) == 1
    assert "popo-lite export, later and alone" in " ".join(lines)


def test_the_command_answers_without_torch(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert command("plan", "qwen_1_5b_lora", "--vram", "24GiB").returncode == 0
    assert command("plan", "qwen_1_5b_lora", "--vram", "much").returncode == 2
    assert "--others" in command("plan", "qwen_1_5b_lora", "--others", "much").stderr
    program = (
        "import sys\n"
        "from popo_lite.cli import main\n"
        "try:\n"
        "    main(['plan', 'qwen_7b_lora', '--vram', '8GiB'])\n"
        "except SystemExit as left:\n"
        "    assert left.code == 1, left.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'bitsandbytes', 'huggingface_hub', 'datasets', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
