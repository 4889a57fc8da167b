"""The memory of the GPU that a run here would take, asked of the driver's own command. Free of torch."""

from __future__ import annotations

import os
import subprocess

NVIDIA_SMI_SECONDS = 5.0


def installed_vram_bytes() -> int | None:
    """Total memory of the first visible GPU as nvidia-smi reports it; None where it reports none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    only = [f"--id={visible.split(',')[0].strip()}"] if visible is not None else []
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits", *only],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
            check=True,
        )
        return int(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
