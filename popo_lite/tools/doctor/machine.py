"""Check the machine and its NVIDIA driver, without torch."""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from popo_lite import host_memory
from popo_lite.redaction import without_home
from popo_lite.tools.console.words import memory as size
from popo_lite.tools.doctor.findings import Finding

GIB = 2**30
LITTLE_MEMORY, TOO_LITTLE_MEMORY = 6 * GIB, 2 * GIB
"""Host memory: loading a 1.5B model and keeping vLLM's weights asleep takes some 6 GiB, `tiny_cpu` some 1 GiB."""
LITTLE_CACHE, LITTLE_WORK, FULL = 8 * GIB, 2 * GIB, GIB // 4
"""Disk: a 1.5B model takes 3 GiB, and as much again dequantised for vLLM; a run some 100 MiB."""
LITTLE_SHARED = GIB
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
PCI_DEVICES, KERNEL = Path("/sys/bus/pci/devices"), Path("/proc/sys/kernel/osrelease")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # measured only
DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""There if a driver is loaded, in Linux and in WSL."""
NVIDIA, DISPLAY = "0x10de", "0x03"
DRIVERS = "https://www.nvidia.com/drivers"
QUERY_SECONDS = 20
DAMAGED_INFOROM = 14
"""Exit code of nvidia-smi with which all that it prints is right."""


def system() -> Iterator[Finding]:
    """Yield the operating system and Python."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    count = f"{cpus} CPUs" + (f", limited to {quota:g}" if quota is not None and quota < cpus else "")
    machine, wsl = platform.machine(), in_wsl()
    found = f"{_distribution()}, kernel {platform.release()}, {machine}, {count}" + (", in WSL" if wsl else "")
    facts = {"system": platform.system(), "wsl": wsl, "container": in_container(), "cpus": cpus, "cpu_quota": quota}
    if facts["container"]:
        found += ", in a container"
    name, advice = (
        "system",
        "use Linux, or WSL 2 on Windows (https://learn.microsoft.com/windows/wsl/install), for a GPU",
    )
    if platform.system() != "Linux":
        yield Finding(name=name, status="warning", what=f"{found}: trains on the CPU", next_step=advice, facts=facts)
    elif wsl and "WSL2" not in platform.release() and not Path("/dev/dxg").exists():
        next_step = "in PowerShell: wsl --update, then wsl --shutdown; the GPU then is /dev/dxg"
        yield Finding(name=name, status="warning", what=f"{found}, without a GPU", next_step=next_step, facts=facts)
    else:
        yield Finding(name=name, status="ok", what=found, facts=facts)
    bits = 64 if sys.maxsize > 2**32 else 32
    where = "a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = f"{platform.python_implementation()} {platform.python_version()}, {bits} bit, {where}"
    if bits == 32 or platform.python_implementation() != "CPython" or getattr(sys, "abiflags", "") == "t":
        next_step = "install popo-lite with 64-bit CPython 3.12: uv venv --python 3.12"
        yield Finding(name="python", status="failed", what=f"{found}: torch has no build for it", next_step=next_step)
    else:
        yield Finding(name="python", status="ok", what=found)


def in_wsl() -> bool:
    """Return True in the Windows Subsystem for Linux."""
    return KERNEL.is_file() and "microsoft" in KERNEL.read_text().lower()


def in_container() -> bool:
    """Return True in a container of Docker, Podman or Kubernetes."""
    return (
        any(Path(path).exists() for path in ("/.dockerenv", "/run/.containerenv"))
        or "KUBERNETES_SERVICE_HOST" in os.environ
    )


def _distribution() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return f"{platform.system()} {platform.version()}" if platform.system() == "Windows" else platform.system()


def _cpu_quota() -> float | None:
    """Return the CPUs that a container may use (cgroup v2), or None."""
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        return int(quota) / int(period)
    return None


def memory() -> Iterator[Finding]:
    """Yield the host memory, the container's if that is limited."""
    total, available = host_memory.total_bytes(), host_memory.available_bytes()
    facts = {"total_bytes": total, "available_bytes": available}
    found = f"{size(available)} of {size(total)} available"
    limited = total < psutil.virtual_memory().total
    found += ", the limit of the container" if limited else ""
    raise_limit = "raise the container's limit (docker run --memory)" if limited else "close other programs"
    if in_wsl():
        raise_limit = "set memory= under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown"
    if available < TOO_LITTLE_MEMORY:
        what = f"{found}; even the smallest run takes some 1 GiB"
        yield Finding(name="memory", status="failed", what=what, next_step=raise_limit, facts=facts)
    elif available < LITTLE_MEMORY:
        what = f"{found}; a model of 1.5 billion parameters takes some {size(LITTLE_MEMORY)}"
        next_step = f"{raise_limit}; popo-lite plan RECIPE says what a run needs"
        yield Finding(name="memory", status="warning", what=what, next_step=next_step, facts=facts)
    else:
        yield Finding(name="memory", status="ok", what=found, facts=facts)


def disk() -> Iterator[Finding]:
    """Yield the free space where models, runs and temporary files are written."""
    from huggingface_hub import constants

    places = (
        ("models", Path(constants.HF_HUB_CACHE), LITTLE_CACHE, "HF_HOME"),
        ("runs", Path.cwd(), LITTLE_WORK, "output.dir"),
        ("temporary files", Path(tempfile.gettempdir()), GIB, "TMPDIR"),
    )
    for purpose, folder, little, setting in places:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found, facts = f"{size(free)} free for {purpose} in {without_home(str(folder))}", {"free_bytes": free}
        elsewhere = f"free some space there, or point {setting} at a disk with more"
        if not os.access(existing, os.W_OK):
            what, next_step = (
                f"{without_home(str(existing))} is not writable, for {purpose}",
                f"point {setting} elsewhere",
            )
            yield Finding(name="disk", status="failed", what=what, next_step=next_step, facts=facts)
        elif free < FULL:
            yield Finding(name="disk", status="failed", what=found, next_step=elsewhere, facts=facts)
        elif free < little:
            what = f"{found}; {size(little)} are soon used"
            yield Finding(name="disk", status="warning", what=what, next_step=elsewhere, facts=facts)
        else:
            yield Finding(name="disk", status="ok", what=found, facts=facts)


def shared_memory() -> Iterator[Finding]:
    """Yield the size of /dev/shm, through which adapters pass to vLLM."""
    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        yield Finding(
            name=name, status="skipped", what=f"not checked: there is no {SHARED_MEMORY}; the temporary folder is used"
        )
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    found, facts = f"{size(usage.free)} of {size(usage.total)} free in {SHARED_MEMORY}", {"free_bytes": usage.free}
    if usage.free < LITTLE_SHARED:
        what = f"{found}; larger adapters pass to vLLM through the temporary folder"
        next_step = (
            "docker run --shm-size=2g (or --ipc=host)" if in_container() else f"delete old files in {SHARED_MEMORY}"
        )
        yield Finding(name=name, status="warning", what=what, next_step=next_step, facts=facts)
    else:
        yield Finding(name=name, status="ok", what=found, facts=facts)


def terminal() -> Iterator[Finding]:
    """Yield what the terminal can show."""
    stream = sys.__stdout__ or sys.stdout  # the latter is a stand-in while a spinner turns
    encoding, columns = stream.encoding or "unknown", shutil.get_terminal_size().columns
    kind = os.environ.get("TERM", "not set")
    if not stream.isatty():
        what = f"not checked: the output is not a terminal ({encoding})"
        yield Finding(name="terminal", status="skipped", what=what)
        return
    found, facts = f"{kind}, {encoding}, {columns} columns", {"encoding": encoding, "columns": columns, "TERM": kind}
    problems = []
    if not encoding.lower().replace("-", "").startswith("utf"):
        problems.append("export PYTHONUTF8=1 LANG=C.UTF-8, for signs and graphs")
    if kind == "dumb" or (kind == "not set" and os.name != "nt"):
        problems.append("export TERM=xterm-256color, for the live view")
    if columns < 80:
        problems.append("widen the window to 80 columns")
    if problems:
        yield Finding(name="terminal", status="warning", what=found, next_step="; ".join(problems), facts=facts)
    else:
        yield Finding(name="terminal", status="ok", what=found, facts=facts)


# ---------------------------------------------------------------------- the driver


class Gpu(NamedTuple):
    """A GPU as the driver sees it."""

    number: int
    name: str
    total_bytes: int
    used_bytes: int
    driver: str


def driver() -> Iterator[Finding]:
    """Yield the NVIDIA driver, or why there is none, and who uses its GPUs."""
    name, tool = "driver", shutil.which("nvidia-smi")
    if tool is None:
        if any(device.exists() for device in DEVICES):
            yield Finding(name=name, status="skipped", what="not checked: nvidia-smi is not here; torch is asked below")
        elif not nvidia_hardware():
            yield Finding(name=name, status="skipped", what="not checked: no NVIDIA GPU")
        elif in_container():
            what = "an NVIDIA GPU is in this machine, and the container has no access to it"
            next_step = "docker run --gpus all, with the NVIDIA Container Toolkit on the host"
            yield Finding(name=name, status="warning", what=what, next_step=next_step)
        else:
            what = "an NVIDIA GPU is in this machine, and nvidia-smi, which comes with its driver, is not installed"
            yield Finding(
                name=name, status="failed", what=what, next_step=f"install the driver: {DRIVERS}, then reboot"
            )
        return
    try:
        gpus, damaged = installed_gpus(tool)
    except (OSError, subprocess.SubprocessError) as error:
        if not nvidia_hardware() and not any(device.exists() for device in DEVICES):
            yield Finding(name=name, status="skipped", what="not checked: nvidia-smi is here, and no NVIDIA GPU")
            return
        printed = str(getattr(error, "stdout", None) or getattr(error, "stderr", None) or error).strip()
        reason = printed.splitlines()[0] if printed else type(error).__name__
        next_step = f"reboot; if it stays, reinstall the driver: {DRIVERS}"
        if in_wsl():
            next_step = f"install the newest driver in Windows, none in Linux: {DRIVERS}; then wsl --shutdown"
        yield Finding(name=name, status="failed", what=f"nvidia-smi fails: {reason}", next_step=next_step)
        return
    if not gpus:
        yield Finding(name=name, status="skipped", what="not checked: nvidia-smi lists no GPU")
        return
    names = ", ".join(f"{gpu.number}: {gpu.name} ({size(gpu.total_bytes)})" for gpu in gpus)
    facts = {"driver": gpus[0].driver, "gpus": [gpu._asdict() for gpu in gpus]}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        what = f"NVIDIA driver {gpus[0].driver}: {names}, hidden by CUDA_VISIBLE_DEVICES={visible}"
        yield Finding(name=name, status="warning", what=what, next_step="unset CUDA_VISIBLE_DEVICES", facts=facts)
        return
    yield Finding(name=name, status="ok", what=f"NVIDIA driver {gpus[0].driver}: {names}", facts=facts)
    if damaged:
        what = "the infoROM of a GPU is damaged; it holds the card's settings and counts of errors, and runs work"
        yield Finding(name=name, status="warning", what=what, next_step="nvidia-smi -q names it; ask the seller")
    if len(gpus) > 1:
        first = f"CUDA_VISIBLE_DEVICES={visible}" if visible else "the first one, CUDA_VISIBLE_DEVICES=0"
        what = f"{len(gpus)} GPUs, and a run uses one: {first}"
        yield Finding(name=name, status="ok", what=what, facts={"visible": visible})


def installed_gpus(tool: str) -> tuple[list[Gpu], bool]:
    """Return the GPUs that nvidia-smi lists, and whether one's infoROM is damaged.

    Raises OSError or SubprocessError if it fails or hangs.
    """
    rows, code = _ask(tool, "--query-gpu=index,name,memory.total,memory.used,driver_version")
    found = []
    for index, name, total, used, version in rows:
        total_bytes, used_bytes = (int(mib) * 2**20 if mib.isdigit() else 0 for mib in (total, used))  # or [N/A]
        found.append(Gpu(int(index), name, total_bytes, used_bytes, version))
    return found, code == DAMAGED_INFOROM


def gpu_users(uuid: str) -> list[str]:
    """Return the processes that compute on the GPU of this id, by nvidia-smi, as `NAME (pid N, SIZE)`.

    Not this process and its family, nor those of which the driver knows no size, as in WSL. A container sees only its
    own.
    """
    with suppress(OSError, subprocess.SubprocessError, ValueError, psutil.Error):
        rows, _ = _ask("nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory")
        own = psutil.Process()
        family = {str(one.pid) for one in (own, *own.parents(), *own.children(recursive=True))}
        return [
            f"{Path(name).name} (pid {pid}, {used} MiB)"
            for gpu, pid, name, used in rows
            if gpu.endswith(uuid) and pid not in family and used.isdigit()
        ]
    return []


def _ask(tool: str, query: str) -> tuple[list[list[str]], int]:
    """Return the rows that nvidia-smi prints, and its exit code. Raises OSError or SubprocessError if it fails."""
    command = [tool, query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=QUERY_SECONDS)
    if done.returncode not in (0, DAMAGED_INFOROM):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    rows = [row for row in csv.reader(io.StringIO(done.stdout), skipinitialspace=True) if len(row) > 1]
    return rows, done.returncode


def nvidia_hardware() -> bool:
    """Return True if an NVIDIA GPU is on the PCI bus, whether or not a driver is installed."""
    for device in PCI_DEVICES.glob("*"):
        with suppress(OSError):
            if (device / "vendor").read_text().strip() == NVIDIA and (device / "class").read_text().startswith(DISPLAY):
                return True
    return False
