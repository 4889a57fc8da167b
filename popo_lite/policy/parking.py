"""Move everything that a run holds on the GPU to host memory and back, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Parked = list[tuple[Tensor, Tensor]]
"""Tensors that are on the GPU while a run trains, each with its copy in host memory."""


def move_to_host(*holders: Any) -> Parked:
    """Move the CUDA tensors in `holders` to host memory: modules, optimizer states, dicts. Return what to move back.

    `module.to("cpu")` would leave some behind: those that modules keep as plain attributes, and bitsandbytes would
    repack 4-bit weights for its CPU kernels. Every tensor stays the same object, so whatever refers to it sees the
    move. Paged optimizer state stays: the driver moves it. A sharded base stays too.
    """
    parked: Parked = []
    for tensor in _tensors(holders):
        if tensor.is_cuda and not getattr(tensor, "is_paged", False):
            host = tensor.data.to("cpu")
            tensor.data = host
            parked.append((tensor, host))
    return parked


def move_back(parked: Parked, device: torch.device) -> None:
    """Move tensors back to the GPU. If its memory runs out, raises OutOfMemoryError; a second call goes on."""
    while parked:
        tensor, host = parked[-1]
        tensor.data = host.to(device)
        parked.pop()


def _tensors(*holders: Any) -> Iterator[Tensor]:
    """Yield every tensor that is reached from `holders` through modules, containers and 4-bit quantisation states."""
    waiting, seen = list(holders), set[int]()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if type(found).__name__ == "DTensor":  # FSDP holds its memory as well
            continue
        if isinstance(found, Tensor):
            yield found
        if isinstance(found, Mapping):
            waiting += [*found.keys(), *found.values()]  # optimizers keep state by parameter
        elif isinstance(found, list | tuple):
            waiting += found
        elif isinstance(found, Tensor | nn.Module) or type(found).__name__ == "QuantState":
            waiting += vars(found).values()
