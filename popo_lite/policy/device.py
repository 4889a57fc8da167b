"""Choose the device, and refuse what it cannot train before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch

from popo_lite.errors import UserInputError
from popo_lite.policy.load import can_be_built, empty_base, load_config
from popo_lite.policy.memory import bound_cpu_caches, prefer_expandable_segments
from popo_lite.recipe import ModelRecipe, Recipe
from popo_lite.recipe_rules import refuse_emulated_bfloat16

OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Oldest NVIDIA driver for a major version of CUDA."""

LARGEST_ON_CPU = 1_000_000_000
"""Parameters of the largest base that is trained on a CPU without being asked to."""


def pick_device(wanted: str) -> torch.device:
    """Return the device for `train.device`. Raises UserInputError if it is a CUDA GPU and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        what, next_step = cuda_problem() or ("no CUDA GPU is visible to torch", 'set train.device to "auto"')
        raise UserInputError(what, where='train.device = "cuda"', next_step=next_step)
    if wanted == "cpu" or not torch.cuda.is_available():
        bound_cpu_caches()
        return torch.device("cpu")
    prefer_expandable_segments()
    return torch.device("cuda")


def cuda_problem() -> tuple[str, str] | None:
    """Return why torch cannot use the NVIDIA GPU that is here, and what to do; None if there is no such GPU.

    `nvidia-smi` comes with the driver, and works if torch does not.
    """
    tool = shutil.which("nvidia-smi")
    if torch.cuda.is_available() or tool is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    try:
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):  # no driver is loaded, or it hangs
        return None
    found, build = f"NVIDIA driver {driver.strip()}", torch.version.cuda
    if build is None:
        what = f"torch {torch.__version__} is built without CUDA and cannot use the GPU ({found})"
        return what, "install a CUDA build of torch: https://pytorch.org/get-started/locally"
    try:
        torch.cuda.init()
        reason = "it finds no GPU"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split(". ")[0].splitlines()[0]
    what = f"torch {torch.__version__}, built for CUDA {build}, cannot use the GPU ({found}): {reason}"
    needed = OLDEST_DRIVERS.get(int(build.split(".")[0]))
    newer = f" to {needed} or newer" if needed else ""
    return (
        what,
        f"update the driver{newer}, or install torch for an older CUDA: https://pytorch.org/get-started/locally",
    )


def computes_bfloat16(device: torch.device) -> bool:
    """Return False for GPUs that only emulate bfloat16 (compute capability below 8.0)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def check_dtype(recipe: ModelRecipe, device: torch.device) -> None:
    """Raise UserInputError for bfloat16 on a GPU that only emulates it."""
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        refuse_emulated_bfloat16(recipe, capability, name)


def check_cpu_size(recipe: Recipe, device: torch.device) -> None:
    """Raise UserInputError if a large base would be trained on the CPU only because no GPU was found."""
    if device.type != "cpu" or recipe.train.device == "cpu":
        return
    config = load_config(recipe.model)
    if not can_be_built(recipe.model, config):
        return
    if (count := empty_base(recipe.model, config).num_parameters()) > LARGEST_ON_CPU:
        what, fix = cuda_problem() or ("torch finds no CUDA GPU", "use a machine with an NVIDIA GPU")
        what = f"{recipe.model.id} has {count / 1e9:.1f} billion parameters, and it would be trained on the CPU: {what}"
        next_step = f"{fix}; --set train.device=cpu trains on the CPU all the same"
        raise UserInputError(what, where='train.device = "auto"', next_step=next_step)
