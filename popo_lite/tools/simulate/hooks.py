"""Let a CPU build of torch run autograd on "cuda" without a GPU, through the tables that a CUDA build fills in.

Fake tensors need a device guard for "cuda", which a CPU build lacks, and autograd asks torch's CUDA hooks whether a GPU
exists. Nothing here calls a driver. It cannot be undone, so it belongs in a process of its own.

A CUDA build must see no GPU (`CUDA_VISIBLE_DEVICES=""`): only then does torch replace its real guard by one that does
nothing, and bitsandbytes leave its CUDA kernels to the simulation.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

CUDA = 1  # c10::DeviceType::CUDA
HOOKS = 82  # entries of the hooks' virtual table that are copied, two in front of the functions included
# Functions of at::CUDAHooksInterface and at::AcceleratorHooksInterface by their place in the virtual table.
IS_BUILT, IS_AVAILABLE, HAS_CONTEXT, DEVICE_COUNT, CURRENT_DEVICE, HAS_CUDA = 2, 3, 4, 6, 8, 16

_keep: list[Any] = []  # ctypes frees callbacks that nothing refers to


def install() -> None:
    """Claim that there is one CUDA device. Raises RuntimeError if torch's tables are laid out in another way."""
    folder = Path(torch.__file__).parent / "lib"
    guards = (ctypes.c_void_p * 32).in_dll(
        ctypes.CDLL(str(folder / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    if not guards[CUDA]:
        guards[CUDA] = ctypes.addressof(_guard())
    torch._C._ensureCUDADeviceGuardSet()
    get_hooks = ctypes.CDLL(str(folder / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(get_hooks())
    assert table.value is not None  # noqa: S101
    words = (ctypes.c_void_p * HOOKS).from_buffer_copy((ctypes.c_void_p * HOOKS).from_address(table.value - 16))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    is_first = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)(lambda _, index: index == 0)
    one, zero = (ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _, n=n: n) for n in (1, 0))
    answers: dict[int, Any] = {IS_BUILT: yes, IS_AVAILABLE: yes, HAS_CUDA: yes, HAS_CONTEXT: is_first}
    for place, answer in (answers | {DEVICE_COUNT: one, CURRENT_DEVICE: zero}).items():
        words[place + 2] = ctypes.cast(answer, ctypes.c_void_p).value
    _keep.extend((yes, is_first, one, zero, words))
    table.value = ctypes.addressof(words) + 16
    if torch.accelerator.current_accelerator() != torch.device("cuda"):
        raise RuntimeError(f"torch {torch.__version__} has other CUDA hooks than the simulation knows")


def _guard() -> Any:
    """Return a device guard of which every function returns 0. Fake mode replaces it by one that does nothing."""
    zero = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(functions))
    _keep.extend((zero, functions, guard))
    return guard
