"""Less memory for what a layer keeps for its backward pass: checkpoints, tiles of its tokens, and host memory.

MLPs and norms compute each token for itself, and their activations are the widest of a layer. In tiles they take the
memory of one tile, however long the sequence is, an idea of ALST (arXiv 2506.13996). Here an MLP is computed no more
often than by checkpointing alone, unless a norm follows it: see `_Input`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from popo_lite.chunks import TILE_TOKENS
from popo_lite.policy.memory import is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = re.compile(r"mlp|feed_forward|.*norm")
"""Names of modules in transformers' decoders that compute each token for itself."""


def checkpoint_layers(model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]] | None = None) -> None:
    """Keep only the layers' inputs for the backward pass, and compute MLPs and norms in tiles of TILE_TOKENS.

    `modules` are those of `model` by name, by default all. Left out are modules that do not compute each token for
    itself.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need it: the embeddings would get a gradient that nothing uses, and stay alive.
    model.disable_input_require_grads()
    model.eval()  # nothing is dropped while modules are tried
    for name, module in model.named_modules() if modules is None else modules:
        hidden = cast("Tensor", model.get_input_embeddings().weight)[None, 1:9]
        if PARTS.fullmatch(name.rpartition(".")[2]) and _computes_tokens_apart(module, hidden):
            module.forward = _tiled(module, module.forward)


@torch.no_grad()
def _computes_tokens_apart(module: nn.Module, hidden: Tensor) -> bool:
    try:
        whole = module(hidden)
    except (RuntimeError, TypeError) as error:  # it has another width, as norms of heads, or takes more than one tensor
        if is_out_of_memory(error):
            raise
        return False
    if not isinstance(whole, Tensor):
        return False
    gap = torch.cat([module(part) for part in hidden.split(3, dim=-2)], dim=-2) - whole
    return float(gap.float().norm()) <= 0.05 * float(whole.float().norm())


def _tiled(module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(hidden: Tensor, *others: Any, **options: Any) -> Tensor:
        """Return `forward(hidden)` for `hidden` [..., T, D]; with more arguments it is computed whole."""
        if hidden.shape[-2] <= TILE_TOKENS or others or options:
            return forward(hidden, *others, **options)
        if not torch.is_grad_enabled():
            return _in_tiles(forward, hidden)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        saved: Any = _Input.apply(hidden, hidden.new_empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
        return cast("Tensor", _Tiles.apply(forward, saved.grad_fn, hidden, *trained))  # type: ignore[no-untyped-call]

    return run


def tiles(tokens: int) -> list[tuple[int, int]]:
    """Return (start, length) of each tile of `tokens` tokens."""
    return [(start, min(TILE_TOKENS, tokens - start)) for start in range(0, tokens, TILE_TOKENS)]


def _in_tiles(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    output: Tensor | None = None
    for tile in tiles(hidden.shape[-2]):
        part = forward(hidden.narrow(-2, *tile).clone())  # some routers change their input in place
        if output is None:
            output = part.new_empty((*hidden.shape[:-1], part.shape[-1]))
        output.narrow(-2, *tile).copy_(part)
    assert output is not None  # noqa: S101
    return output


class _Input(torch.autograd.Function):
    """Save an MLP's input, and return nothing of use.

    It is the last tensor that a checkpointed layer saves if no norm follows the MLP. A layer that is computed again for
    its backward pass stops once it has saved that, before the MLP: its tiles alone compute the MLP again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return anchor.view_as(anchor)


class _Tiles(torch.autograd.Function):
    """The MLP in tiles: forward without a graph, backward tile by tile."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], saved: Any, hidden: Tensor, *trained: Tensor) -> Tensor:
        kind = hidden.device.type
        ctx.mlp, ctx.saved, ctx.trained = forward, saved, trained
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.random = torch.get_rng_state(), *get_device_states(hidden)  # dropout draws the same in the backward pass
        return _in_tiles(forward, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (hidden,) = ctx.saved.saved_tensors
        ctx.saved = None  # autograd does not free it
        host_state, devices, states = ctx.random
        with torch.random.fork_rng(devices, device_type=hidden.device.type), torch.autocast(*ctx.autocast):
            torch.set_rng_state(host_state)
            set_device_states(devices, states)
            return None, None, *_gradients(ctx.mlp, hidden, ctx.needs_input_grad[2], ctx.trained, gradient)


def _gradients(
    forward: Callable[[Tensor], Tensor],
    hidden: Tensor,
    wants_input: bool,
    trained: Sequence[Tensor],
    gradient: Tensor,
) -> Iterator[Tensor | None]:
    """Yield the gradients of `hidden`, if it is wanted, and of the `trained` weights."""
    of_input = torch.empty_like(hidden) if wants_input else None
    of_trained: list[Tensor | None] = [None] * len(trained)
    for part in tiles(hidden.shape[-2]):
        tile = hidden.narrow(-2, *part).detach().requires_grad_(wants_input)
        with torch.enable_grad():
            output = forward(tile.clone())
        inputs = [tile, *trained] if wants_input else trained
        found = torch.autograd.grad(output, inputs, gradient.narrow(-2, *part), allow_unused=True)
        if of_input is not None:
            of_input.narrow(-2, *part).copy_(found[0])
        for index, new in enumerate(found[wants_input:]):
            before = of_trained[index]
            of_trained[index] = new if before is None else before if new is None else before.add_(new)
    yield of_input
    yield from of_trained


@contextmanager
def offloaded(device: torch.device, elements: int) -> Iterator[None]:
    """Keep what the block saves in tensors of `elements` elements, the layers' inputs, in host memory.

    For one forward and one backward pass. Copies run beside the computation, on a stream of their own: into host memory
    while the next layer runs, and back while the layer above is in its backward pass. Two layers' inputs are on the
    device at a time.
    """
    copies = _HostCopies(device, elements)
    with torch.autograd.graph.saved_tensors_hooks(copies.pack, copies.unpack):
        yield


class _HostCopies:
    """No memory is freed before the main stream, which may reuse it, has waited for the copy that reads or writes it.

    `record_stream` would keep it until the GPU has caught up with Python, and so many layers' inputs at once.
    """

    def __init__(self, device: torch.device, elements: int) -> None:
        self._device, self._elements = device, elements
        self._streams: Any = torch.get_device_module(device)
        self._main, self._side = self._streams.current_stream(), self._streams.Stream()
        self._saved: list[Tensor | None] = []  # in host memory
        self._leaving: tuple[Tensor, Any] | None = None  # on the device, with the event of its copy
        self._fetched: dict[int, tuple[Tensor, Any]] = {}

    def __del__(self) -> None:
        # A pass that failed may leave copies behind. What they read and write is freed after this.
        self._main.wait_stream(self._side)

    def pack(self, tensor: Tensor) -> Tensor | int:
        """Start the copy of a layer's input into host memory; return its number. Other tensors stay."""
        if tensor.numel() != self._elements:
            return tensor
        if self._leaving is not None:
            self._main.wait_event(self._leaving[1])
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        self._leaving = tensor, self._copy(tensor, host)
        self._saved.append(host)
        return len(self._saved) - 1

    def unpack(self, packed: Tensor | int) -> Tensor:
        """Return what was packed, and start to fetch what was packed before it."""
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed)
        tensor, event = self._fetched.pop(packed)
        self._main.wait_event(event)
        self._saved[packed] = self._leaving = None
        if packed:
            self._fetch(packed - 1)
        return tensor

    def _fetch(self, index: int) -> None:
        host = self._saved[index]
        if host is not None and index not in self._fetched:
            tensor = torch.empty_like(host, device=self._device)
            self._fetched[index] = tensor, self._copy(host, tensor)

    def _copy(self, source: Tensor, target: Tensor) -> Any:
        """Start a copy once the main stream's work so far is done; return the event of its end."""
        self._side.wait_stream(self._main)
        with self._streams.stream(self._side):
            target.copy_(source, non_blocking=True)
        return self._side.record_event()
