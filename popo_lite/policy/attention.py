"""Attention over packed rows: several sequences one behind another, each attending to itself alone.

A row's mask is block-diagonal and causal. Written out it would take T x T bytes for T tokens, so the models are given
its block boundaries in the mask's place: a 4D mask goes through transformers' mask code untouched and reaches every
attention layer, in the recomputation of a checkpointed layer as well.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "popo_packed"
"""The implementation's name in transformers' registry. Without boundaries it is transformers' SDPA."""


def enable_packing(model: PreTrainedModel) -> None:
    """Let `model`, loaded with SDPA attention, take boundaries in place of a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def boundaries(lengths: Sequence[int]) -> Tensor:
    """The stand-in for a row's mask: where its sequences begin and end, int32 [1, 1, 1, B + 1], on the host."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)[None, None, None]


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Position ids [1, T] that count every sequence of a row from 0."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def window_of(config: Any) -> int | None:
    """The fewest tokens that a layer looks back on, by a sliding window or chunks; None where all layers see all.

    Some models window by their mask alone, so the boundaries that take the mask's place would undo it.
    """
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((size for size in sizes if size), default=None)


def kernel_of(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Which attention serves packed rows: "varlen" (FlashAttention over unequal lengths) or "sdpa" (length by length).

    FlashAttention wants 16-bit operands, a GPU of compute capability 8.0 and heads of up to 256 in eights.
    """
    flash = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_width <= 256
        and head_width % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return "varlen" if flash and _varlen() is not None else "sdpa"


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface: `query` [1, H, T, d], `key` and `value` [1, H_kv, T, d] -> ([1, T, H, d], None).

    A packed row knows no sliding window: `window_of` says where that would matter.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    edges = attention_mask.flatten()
    lengths = tuple(edges.diff().tolist())
    if not dropout and kernel_of(query.device, query.dtype, query.shape[-1]) == "varlen":
        return _by_varlen(query, key, value, edges, max(lengths), scaling), None
    if len(lengths) == 1:
        return _causal(query, key, value, scaling, dropout).transpose(1, 2), None
    classes, back = _alike(lengths, query.device)
    found = []
    for rows in classes:
        # What pads a shorter sequence comes behind it, where causality hides it.
        q, k, v = (part[0].transpose(0, 1)[rows.clamp(min=0)].transpose(1, 2) for part in (query, key, value))
        found.append(_causal(q, k, v, scaling, dropout).transpose(1, 2)[rows >= 0])
    return torch.cat(found)[back][None], None


def _by_varlen(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, longest: int, scaling: float | None) -> Tensor:
    attend = _varlen()
    assert attend is not None  # noqa: S101  # kernel_of has asked
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(attend).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    edges = edges.to(query.device, non_blocking=True)
    return cast("Tensor", attend(q, k, v, edges, edges, longest, longest, **options))[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@lru_cache(maxsize=8)
def _alike(lengths: tuple[int, ...], device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """The row's sequences in classes whose lengths share a power of two, so that at most half is padding.

    Token indices [b, L] of each class, -1 behind the shorter sequences; and where each token of the row [T] is in the
    classes' tokens, one behind another.
    """
    starts = [0, *itertools.accumulate(lengths)]
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault((length - 1).bit_length(), []).append(index)
    classes = []
    for indices in members.values():
        rows = torch.full((len(indices), max(lengths[index] for index in indices)), -1)
        for row, index in zip(rows, indices, strict=True):
            row[: lengths[index]] = torch.arange(starts[index], starts[index + 1])
        classes.append(rows)
    order = torch.cat([rows[rows >= 0] for rows in classes])
    return tuple(rows.to(device) for rows in classes), order.argsort().to(device)


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """Torch's attention over unequal lengths; None where this release has it in an earlier form."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters) else None
