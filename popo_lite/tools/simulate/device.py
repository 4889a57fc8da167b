"""A simulated CUDA device: tensors have shapes, dtypes, strides and storages, and no values.

Operators that touch "cuda" run through torch's FakeTensorMode; all others compute as usual. A storage on "cuda" is an
allocation in a model of torch's caching allocator from its creation to its collection.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from popo_lite.policy import activations
from popo_lite.tools.plan.vram import CUDA_CONTEXT_BYTES
from popo_lite.tools.simulate import hooks, kernels
from popo_lite.tools.simulate.allocator import EMPTY_CACHE, CachingAllocator, CapacityError, Event

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
MOST_VALUES, MOST_FLOATS = 2**22, 8  # tensors up to these sizes have a twin with values
CUBLAS_WORKSPACE_BYTES = {9: 32 * 2**20}  # by the major compute capability; each thread that multiplies has one
OTHER_WORKSPACE_BYTES = 8_519_680
WORKSPACE = "cuBLAS workspace"
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.mm.dtype,
    aten.mm.dtype_out,
    aten.linear.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class _DriverlessMode(FakeTensorMode):
    """Fake mode that knows there is no driver, although `torch.cuda.is_available` answers yes."""

    @property
    def avoid_device_init(self) -> bool:
        return True

    @avoid_device_init.setter
    def avoid_device_init(self, _: bool) -> None:
        pass


class SimulatedDevice(TorchDispatchMode):
    """The one CUDA device of this process, of `vram_bytes`, inside `installed`.

    `events` are all allocations in order, `places` where in the code each was made. With `enforce` memory runs out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = _DriverlessMode(allow_non_fake_inputs=True)
        self._live: dict[
            int, Any
        ] = {}  # a storage's address -> its block, its key, and a reference that tells when it dies
        self._dead: list[int] = []  # addresses of storages that are not in use any more, and not freed yet
        self._workspaces: dict[bool, Tensor] = {}
        self._kernels: dict[Any, Callable[..., Any]] = {}
        self.allocator = CachingAllocator()
        self.reset()

    def reset(
        self,
        *,
        vram_bytes: int = 24 * 2**30,
        capability: tuple[int, int] = (8, 9),
        enforce: bool = False,
    ) -> None:
        """Become another card, which is empty: tensors that are still alive on this one no longer count."""
        self._workspaces.clear()
        self._live.clear()  # with the references that would free them
        self._dead.clear()
        self.vram_bytes, self.capability = vram_bytes, capability
        self.allocator = CachingAllocator(vram_bytes - CUDA_CONTEXT_BYTES if enforce else None)
        self.events: list[Event] = []
        self.places: list[str] = []

    # ------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        on_cuda = device is not None and torch.device(device).type == "cuda"
        if not on_cuda and not kwargs.get("pin_memory") and not any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # most of all calls
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return _scalar(args[0])
        if func is aten.is_pinned.default:
            return False
        if func is aten.equal.default:
            return True
        if func in PRODUCTS:
            self._take_workspace()
        kernel = self._kernels.get(func)
        if kernel is not None:
            given = (tensor for tensor in _leaves(*args, *kwargs.values()) if isinstance(tensor, FakeTensor))
            if any(tensor.is_cuda for tensor in given):
                with self, torch.no_grad():
                    return kernel(*args, **kwargs)
        if on_cuda:
            kwargs = {**kwargs, "device": CUDA}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        by_mask = func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or func in (aten.nonzero.default, aten.repeat_interleave.Tensor):
            return self._shaped_by_values(func, args, kwargs)
        result = self._fake.dispatch(func, types, args, kwargs)
        made = [tensor for tensor in _leaves(result) if isinstance(tensor, FakeTensor)]
        for tensor in made:
            if tensor.fake_device.type == "cuda":
                self._track(tensor, func)
        _update_twins(func, args, kwargs, made)
        return result

    def _shaped_by_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator whose result's shape depends on values, which must be known."""
        with self, torch.no_grad():
            if func not in INDEXING:
                found = func(_values(args[0]), *args[1:], **{k: v for k, v in kwargs.items() if k != "device"})
                return aten._to_copy.default(found, device=CUDA)
            indices: list[Any] = []
            for index in args[1]:
                if index is None or index.dtype != torch.bool:
                    indices.append(index)
                else:
                    columns = _values(index).nonzero().T
                    indices += [aten._to_copy.default(column.contiguous(), device=CUDA) for column in columns]
            return func(args[0], indices, *args[2:], **kwargs)

    # ------------------------------------------------------------------ memory

    def _track(self, tensor: FakeTensor, func: Any) -> None:
        self._free_dead()
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._live or not size:
            return
        try:
            block = self.allocator.allocate(size)
        except CapacityError as error:
            what = f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB on the simulated GPU"
            raise torch.OutOfMemoryError(what) from error
        key = len(self.places)
        self._live[address] = block, key, weakref.ref(storage, partial(self._died, address))
        self.events.append((key, size))
        self.places.append(_place(func))

    def _died(self, address: int, _: Any) -> None:
        # Python's collector calls this at any time: while a block is being allocated, too.
        self._dead.append(address)

    def _free_dead(self) -> CachingAllocator:
        while self._dead:
            block, key, _ = self._live.pop(self._dead.pop(0))
            self.allocator.free(block)
            self.events.append((key, -1))
        return self.allocator

    def _empty_cache(self) -> None:
        self._free_dead()
        self.events.append((EMPTY_CACHE, 0))
        self.allocator.empty_cache()

    def _take_workspace(self) -> None:
        """Allocate cuBLAS's workspace at a thread's first product, as torch does: backward passes have their own."""
        backward = torch._C._current_graph_task_id() >= 0
        if backward not in self._workspaces:
            size = CUBLAS_WORKSPACE_BYTES.get(self.capability[0], OTHER_WORKSPACE_BYTES)
            with self:
                self._workspaces[backward] = torch.empty(size, dtype=torch.uint8, device=CUDA)
            self.places[-1] = WORKSPACE

    # ------------------------------------------------------------------ the process

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make this the process's CUDA device. The process keeps what this changes."""
        # bitsandbytes would compile kernels for CPUs, which imports torch's inductor.
        torch.compile = lambda function=None, **_: function or (lambda given: given)  # type: ignore[assignment]
        import bitsandbytes  # noqa: F401  # before `is_available` answers yes: it would look for its CUDA library

        hooks.install()
        torch._C._set_only_lift_cpu_tensors(True)
        kernels.claim_cuda_kernels()
        self._answer_for_cuda()
        self._kernels = kernels.bitsandbytes_kernels() | kernels.attention_kernels(lambda: self.capability)
        fake: Any = FakeTensor
        fake.tolist = _tolist
        fake.data_ptr = lambda tensor: tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
        fake.numpy = lambda tensor, **_: torch.zeros(tensor.shape).numpy()
        every = activations.tiles  # those between the second and the last tile take the same memory
        activations.tiles = lambda tokens: every(tokens)[:2] + every(tokens)[2:][-1:]
        torch.Generator = _Generator  # type: ignore[misc]
        nn.Module._apply = _apply  # type: ignore[method-assign]
        torch.autograd.set_multithreading_enabled(False)  # coverage and profilers do not see autograd's threads
        with self:
            yield

    def _answer_for_cuda(self) -> None:
        """Replace the functions of torch.cuda that would ask the driver."""
        answers = {
            "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
            "is_bf16_supported": True, "get_device_name": "simulated GPU", "is_current_stream_capturing": False,
            "_is_in_bad_fork": False, "_is_compiled": True,
            **dict.fromkeys(("synchronize", "_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all",
                             "ipc_collect", "set_rng_state")),
        }  # fmt: skip
        cuda: Any = torch.cuda
        for name, answer in answers.items():
            setattr(cuda, name, lambda *_, answer=answer, **__: answer)
        for name in ("Stream", "stream", "current_stream"):  # those of torch.cpu do nothing
            setattr(cuda, name, getattr(torch.cpu, name))
        cuda.get_device_capability = lambda *_: self.capability
        cuda.get_device_properties = lambda *_: SimpleNamespace(
            name="simulated GPU", total_memory=self.vram_bytes, major=self.capability[0], minor=self.capability[1],
            multi_processor_count=128, gcnArchName="", warp_size=32,
        )  # fmt: skip
        for module in (cuda, cuda.memory):
            module.memory_allocated = lambda *_: self._free_dead().allocated
            module.max_memory_allocated = lambda *_: self._free_dead().peak_allocated
            module.memory_reserved = lambda *_: self._free_dead().reserved
            module.max_memory_reserved = lambda *_: self._free_dead().peak_reserved
            module.reset_peak_memory_stats = lambda *_: self._free_dead().reset_peaks()
            module.empty_cache = self._empty_cache
            module.mem_get_info = lambda *_: (
                self.vram_bytes - CUDA_CONTEXT_BYTES - self._free_dead().reserved,
                self.vram_bytes,
            )
        state = torch.get_rng_state()
        cuda.get_rng_state = lambda *_, **__: state
        cuda.device = cuda.device_of = lambda *_: nullcontext()
        cuda._initialized = True
        torch._C._cuda_getCurrentRawStream = lambda *_: 0


# ---------------------------------------------------------------------- values of small tensors


def _update_twins(func: Any, args: Any, kwargs: Any, made: list[FakeTensor]) -> None:
    """Compute the result on the CPU too, if it is a small tensor and the inputs' values are known.

    Integers and booleans decide shapes and branches: lengths, positions, masks.
    """
    changes = func._schema.is_mutable
    if not made and not changes:
        return
    given = [t for t in _leaves(*args, *kwargs.values()) if isinstance(t, Tensor)]
    known = not any(isinstance(t, FakeTensor) and getattr(t, "_twin", None) is None for t in given)
    small = not any(t.numel() > (MOST_FLOATS if t.is_floating_point() else MOST_VALUES) or t.is_complex() for t in made)
    if known and small and "set_" not in str(func):
        found = func(*tree_map(_twin, args), **tree_map(_twin, kwargs))
        for tensor, twin in zip(made, (t for t in _leaves(found) if isinstance(t, Tensor)), strict=True):
            tensor._twin = twin  # type: ignore[attr-defined]
        return
    forgotten = list(made)
    if changes:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                forgotten += [tensor for tensor in _leaves(value) if isinstance(tensor, FakeTensor)]
    for tensor in forgotten:
        tensor._twin = None  # type: ignore[attr-defined]


def _leaves(*values: Any) -> Iterator[Any]:
    """Yield an operator's arguments or results and the elements of lists among them; torch's `tree_iter` is slow."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _twin(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return getattr(value, "_twin", None)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _values(tensor: Tensor) -> Tensor:
    values = _twin(tensor)
    if values is None:
        raise RuntimeError("the shape of a result depends on values that the simulation does not have")
    return values  # type: ignore[no-any-return]


def _scalar(tensor: Tensor) -> Any:
    """Return what is read from the device: the value if it is known, else True or 0."""
    values = _twin(tensor)
    if values is not None:
        return values.item()
    return True if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _tolist(tensor: Tensor) -> Any:
    values = _twin(tensor)
    if values is None:
        values = torch.full(tensor.shape, _scalar(tensor), dtype=tensor.dtype, device="cpu")
    return values.tolist()


# ---------------------------------------------------------------------- torch's own parts that need a device


class _Generator(torch.Generator):
    """A CPU generator that may claim to be the GPU's: fake kernels draw nothing."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        made.wanted = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")  # type: ignore[attr-defined]
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.wanted  # type: ignore[attr-defined, no-any-return]


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replace `nn.Module._apply`, which would give a parameter on the CPU fake data without changing its class."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                applied = function(parameter)
            if isinstance(applied, FakeTensor) and not isinstance(parameter, FakeTensor):
                module._parameters[name] = nn.Parameter(applied, parameter.requires_grad)
            elif applied is not parameter:
                parameter.data = applied
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _place(func: Any) -> str:
    """Return where an allocation is made: the innermost function of the model, PEFT or this package, or autograd."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        path = code.co_filename
        if ("/popo_lite/" in path and "/tools/simulate/" not in path) or "/transformers/" in path or "/peft/" in path:
            return f"{code.co_qualname}, {func._schema.name.partition('::')[2]}"
        if code.co_name == "_engine_run_backward":
            break
        frame = frame.f_back
    return f"backward pass, {func._schema.name.partition('::')[2]}"
