"""Stand-ins for CUDA kernels: they allocate what the real ones do, and SDPA chooses among them as a CUDA build does."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.nn import functional

aten = torch.ops.aten
Kernels = dict[Any, Callable[..., Any]]

_library = torch.library.Library("aten", "IMPL")


def claim_cuda_kernels() -> None:
    """Keep operators whole that have a CUDA kernel: a CPU build would take those with a decomposition apart."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the simulated device computes nothing")

    for name in torch._C._dispatch_get_all_op_names():
        composite = name.startswith("aten::") and has(name, "CompositeImplicitAutograd")
        if composite and has(name, "CPU") and not has(name, "CUDA"):
            _library.impl(name.removeprefix("aten::"), never, "CUDA")


# ---------------------------------------------------------------------- bitsandbytes


class _Library:
    """bitsandbytes' C library: it has every function, and they do nothing."""

    compiled_with_cuda = True

    def __init__(self) -> None:
        self.pages: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*_: Any) -> None:
            pass

        self.__dict__[name] = call
        return call

    __getitem__ = __getattr__

    def cget_managed_ptr(self, size: Any) -> int:
        """Return memory that host and GPU share; here it is the host's."""
        self.pages.append((ctypes.c_uint8 * size.value)())
        return ctypes.addressof(self.pages[-1])


def bitsandbytes_kernels() -> Kernels:
    """Return the kernels of bitsandbytes' CUDA backend, which allocate in Python, over a library that does nothing."""
    library, kernels = _Library(), dict[Any, Callable[..., Any]]()
    bnb, operators, utils = map(import_module, ("bitsandbytes", "bitsandbytes._ops", "transformers.utils.import_utils"))
    for name in ("bitsandbytes.cextension", "bitsandbytes.functional"):
        vars(import_module(name))["lib"] = library
    register = operators.register_kernel

    def collect(name: str, _: str) -> Any:
        packet, _, overload = name.removeprefix("bitsandbytes::").partition(".")
        operator = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")
        return lambda function: kernels.setdefault(operator, function)

    vars(operators)["register_kernel"] = collect
    import_module("bitsandbytes.backends.cuda.ops")
    vars(operators)["register_kernel"] = register
    # Otherwise transformers takes the run for a trace, and writes out masks that a run leaves out.
    vars(utils)["is_fake_tensor"] = lambda _: False
    make_real = bnb.nn.Params4bit.__new__

    def make(cls: Any, data: Any = None, requires_grad: bool = False, **settings: Any) -> Any:
        if not isinstance(data, FakeTensor):
            return make_real(cls, data, requires_grad, **settings)
        return _fake_params_4bit(data, settings)

    bnb.nn.Params4bit.__new__ = staticmethod(make)
    return kernels


_PARAMS_4BIT: dict[str, Any] = {
    "blocksize": 64, "compress_statistics": True, "quant_type": "fp4", "quant_storage": torch.uint8, "module": None,
    "bnb_quantized": False, "quant_state": None,
}  # fmt: skip
_class: Any = None


def _fake_params_4bit(data: FakeTensor, settings: dict[str, Any]) -> Any:
    """Return a `Params4bit` over the storage of a fake tensor."""
    global _class
    if _class is None:
        import bitsandbytes as bnb

        class Params4bit(FakeTensor, bnb.nn.Params4bit):  # PEFT asks for the class by its name
            __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

            @staticmethod
            def __new__(cls: Any, mode: Any, elem: Any, device: Any) -> Any:
                return FakeTensor.__new__(cls, mode, elem, device)

            def __init__(self, *_: Any, **__: Any) -> None:
                pass

            def __deepcopy__(self, memo: Any) -> Any:
                made = _fake_params_4bit(self.detach().clone(), vars(self))  # type: ignore[arg-type]
                made.quant_state = copy.deepcopy(self.quant_state)
                return made

        _class = Params4bit
    mode = data.fake_mode
    with torch.no_grad(), in_kernel_invocation_manager(mode):
        elem = aten.alias.default(data)
    made = _class(mode, elem, data.fake_device)
    made._is_param = True
    for name, default in _PARAMS_4BIT.items():
        value = settings.get(name)
        setattr(made, name, default if value is None else value)
    return made


# ---------------------------------------------------------------------- attention


def attention_kernels(capability: Callable[[], tuple[int, int]]) -> Kernels:
    """Replace SDPA on "cuda" by torch's choice for a GPU of that capability; return FlashAttention's kernels."""
    import torch.nn.attention.varlen  # registers its operators

    real = functional.scaled_dot_product_attention

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if not query.is_cuda:
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return _sdpa(real, capability(), query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    for name in ("torch.nn.functional", "popo_lite.policy.attention"):  # the latter has imported it by name
        vars(import_module(name))["scaled_dot_product_attention"] = attend
    # A mask by its name, which is a class of tensor that no fake tensor can be.
    vars(import_module("popo_lite.policy.attention"))["causal_lower_right"] = lambda *_: _LOWER_RIGHT
    return {
        torch.ops.torch_attn._varlen_attn.default: _varlen_forward,
        torch.ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    }


_LOWER_RIGHT: Any = object()


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_varlen(q: Tensor, k: Tensor, v: Tensor, q_edges: Tensor, k_edges: Tensor) -> None:
    """Raise RuntimeError for what FlashAttention refuses."""
    _check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    for part in (q, k, v):
        _check(part.dtype == q.dtype, "query, key and value must have the same dtype")
        _check(part.is_cuda and part.dim() == 3, "operands must be [tokens, heads, width] on CUDA")
        _check(part.stride(-1) == 1, "operands must have a contiguous last dimension")
    for edges in (q_edges, k_edges):
        _check(edges.dtype == torch.int32 and edges.is_cuda and edges.is_contiguous(), "edges must be int32 on CUDA")
    _check(q.shape[2] <= 256 and q.shape[2] % 8 == 0, "the head width must be a multiple of 8 up to 256")
    _check(q.shape[1] % k.shape[1] == 0, "the number of query heads must be a multiple of that of key heads")


def _varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, q_edges: Tensor, k_edges: Tensor, *_: Any, **__: Any
) -> Any:
    _check_varlen(query, key, value, q_edges, k_edges)
    log_sums = query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)
    return torch.empty_like(query), log_sums, torch.empty(2, dtype=torch.uint64, device=query.device)


def _varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, _: Tensor, q_edges: Tensor,
    k_edges: Tensor, *__: Any, **___: Any,
) -> Any:  # fmt: skip
    _check_varlen(query, key, value, q_edges, k_edges)
    _check(grad.dtype == query.dtype, "query and the gradient must have the same dtype")
    padded = query.shape[0] + 128 * (q_edges.numel() - 1)  # each sequence may end within a block of 128 queries
    return _flash_gradients(grad, query, key, value, out, padded=(padded,))


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *_: Any, **__: Any) -> Any:
    """Operands are [B, H, T, d]; FlashAttention works on [B, T, H, d]."""
    grad, query, key, value, out = (part.transpose(1, 2) for part in (grad, query, key, value, out))
    padded = (query.shape[0], _rounded(query.shape[1], 128))
    return tuple(part.transpose(1, 2) for part in _flash_gradients(grad, query, key, value, out, padded=padded))


def _flash_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, *, padded: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of [..., H, d], and allocate the accumulators of FlashAttention's backward pass meanwhile."""
    contiguous = grad.contiguous(), out.contiguous()
    heads, width = query.shape[-2:]
    gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    accumulators = [query.new_empty((heads, *padded), dtype=torch.float32)]
    wide = _rounded(width, 32 if width <= 128 else 64)
    accumulators.append(query.new_empty((*padded, heads, wide), dtype=torch.float32))
    if key.shape[-2] != heads:  # every query head has gradients of its keys and values, which are summed
        accumulators += [key.new_empty((*key.shape[:-2], heads, width)) for _ in range(2)]
    del contiguous, accumulators
    return gradients


def _sdpa(
    real: Any, capability: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    dropout: float, causal: bool, scale: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """Attend by the kernel that torch chooses: FlashAttention, memory-efficient, or the one that writes T x T."""
    lower_right = mask is _LOWER_RIGHT
    mask, causal = (None, True) if lower_right else (mask, causal)
    if torch.is_autocast_enabled("cuda") and not lower_right:  # attention is on autocast's list
        narrow = torch.get_autocast_dtype("cuda")
        query, key, value = (part.to(narrow) for part in (query, key, value))
        mask = mask.to(narrow) if mask is not None and mask.is_floating_point() else mask
    _check(query.dtype == key.dtype == value.dtype, "query, key and value must have the same dtype")
    _check(mask is None or mask.dtype in (torch.bool, query.dtype), "attn_mask must be bool or of the query's dtype")
    width, ampere = query.shape[-1], capability >= (8, 0)
    half = query.dtype == torch.float16 or (query.dtype == torch.bfloat16 and ampere)
    alike = query.shape[1] == key.shape[1]
    aligned = not causal or lower_right or query.shape[2] == key.shape[2]
    if half and ampere and mask is None and width <= 256 and (alike or grouped) and aligned:
        parts = [functional.pad(part, (0, -width % 8)) if width % 8 else part for part in (query, key, value)]
        scale = width**-0.5 if scale is None else scale
        output: Tensor = aten._scaled_dot_product_flash_attention(*parts, dropout, causal, scale=scale)[0]
        return output[..., :width]
    if alike and (half or query.dtype == torch.float32) and width % (8 if half else 4) == 0:
        bias = None if mask is None else _bias(mask, query, key)
        graph = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        efficient: Any = aten._scaled_dot_product_efficient_attention
        found: Tensor = efficient(query, key, value, bias, graph, dropout, causal, scale=scale)[0]
        return found
    if lower_right:  # torch writes it out
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask, causal = mask.tril(key.shape[2] - query.shape[2]), False
    written: Tensor = real(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return written


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask as the memory-efficient kernel reads it: added to the scores, with rows aligned to 16 elements."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    keys = mask.shape[-1]
    if any(stride % 16 for stride in mask.stride()[:-1]):
        mask = functional.pad(mask, (0, 16 - keys % 16))[..., :keys]
    return mask.expand(*query.shape[:3], key.shape[2])
