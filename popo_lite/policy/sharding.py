"""The frozen base divided over ranks, layer by layer: each rank keeps its part, and gathers a layer to compute it.

By torch's `fully_shard` (FSDP2). Accelerate's `prepare` cannot do it: it leaves 4-bit weights whole, because it cannot
keep their quantisation state, and it gathers at `model.forward`, while here the trunk is called. What is outside the
layers stays whole on every rank: embeddings, LM head, the last norm; and so does all that is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from popo_lite.distributed import Ranks
from popo_lite.errors import ModelError
from popo_lite.policy.load import move_quantized
from popo_lite.policy.parts import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_of(trunk: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder: the members of its lists of modules, but not of lists within these."""
    layers: list[nn.Module] = []
    for module in trunk.children():
        layers += module if isinstance(module, nn.ModuleList) else layers_of(module)
    return layers


def shard(base: PreTrainedModel, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Divide the layers of `base` over all ranks, and move it to `device`, one whole layer at a time.

    Yields the modules with their names, whole and on the device; a layer is divided after its last one. The base is
    ready once the iterator is exhausted. Ranks do not communicate before the first pass. Raises ModelError if the
    layers are not found, or if two of them share weights.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    trunk = decoder_of(base)
    layers, why = layers_of(trunk), ""
    owners = Counter(weight for layer in layers for weight in layer.parameters())  # one layer names each weight once
    if not layers:
        why = "holds its layers in no list"
    elif max(owners.values()) > 1:
        why = "has layers that share weights"  # torch would refuse them in the first pass
    if why:
        what = f"{type(trunk).__name__} {why}, so they cannot be divided over ranks"
        raise ModelError(what, where='distributed.strategy = "fsdp2"', next_step='--set distributed.strategy="ddp"')
    within = {module for layer in layers for module in layer.modules()}
    around = [(name, module) for name, module in base.named_modules() if module not in within]
    for _, module in around:
        module._apply(lambda tensor: tensor.to(device), recurse=False)
    yield from around
    group: Any = distributed.group.WORLD
    mesh = DeviceMesh.from_group(group, device.type)
    for layer in layers:
        move_quantized(layer, device)
        yield from layer.named_modules()
        _forget_classes(layer)
        whole = {weight for weight in layer.parameters() if weight.requires_grad or weight.ndim == 0}
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # It has nothing to divide itself: as the root it lets the layers' copies overlap with computation.
    fully_shard(trunk, mesh=mesh, ignored_params=set(trunk.parameters()))
    trunk.register_forward_pre_hook(_layout_on_host, with_kwargs=True)


def _layout_on_host(_: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Move the layout of a packed row back, which FSDP moves to the GPU: every layer reads it."""
    mask = options.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.int32:
        options = {**options, "attention_mask": mask.cpu()}
    return arguments, options


def _forget_classes(layer: nn.Module) -> None:
    """Replace 4-bit weights by plain tensors of bytes. Their modules keep the quantisation state, and restore it."""
    import bitsandbytes as bnb

    for module in layer.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)


@contextmanager
def gathered(trunk: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Keep the whole base of a sharded `trunk` on every rank for the block. All ranks enter it together.

    Within it they may run different numbers of passes without gradients.
    """
    from torch.distributed.fsdp import FSDPModule

    root: Any = trunk
    layers: list[Any] = [module for module in trunk.modules() if isinstance(module, FSDPModule)]
    root.set_reshard_after_forward(False)
    with ranks.together():
        for layer in layers:
            layer.unshard()
    try:
        yield
    finally:
        root.set_reshard_after_forward(True)
        root.reset_iter_state()  # divides the layers again


def start_passes(trunk: nn.Module) -> None:
    """Let a sharded `trunk` forget earlier passes without gradients, from which it would foresee what comes next."""
    root: Any = trunk
    root.reset_iter_state()
