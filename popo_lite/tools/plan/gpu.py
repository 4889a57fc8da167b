"""The memory of the GPU that a run here would take, asked of the driver's own command. Free of torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

NVIDIA_SMI_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """A GPU's whole memory, and what is in use on it."""

    total_bytes: int
    used_bytes: int


def installed_gpu() -> GpuMemory | None:
    """Memory of the first visible GPU as nvidia-smi reports it; None where it reports none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    only = [f"--id={visible.split(',')[0].strip()}"] if visible is not None else []
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits", *only],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
        )
        total, used = (int(mib) * 2**20 for mib in answer.stdout.splitlines()[0].split(","))
        return GpuMemory(total_bytes=total, used_bytes=used)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
