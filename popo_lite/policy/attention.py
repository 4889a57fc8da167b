"""Attention over packed rows: several sequences in one row, each attending only to itself.

The mask of such a row is block-diagonal and causal, and would take T x T bytes for T tokens. Models get the row's block
boundaries in its place: transformers passes a 4D mask unchanged to every attention layer, also when a checkpointed
layer is recomputed.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "popo_packed"
"""The implementation's name in transformers' registry. Without boundaries it is transformers' SDPA."""

VARLEN_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""False before torch 2.12: fewer key and value heads than query heads must be repeated there."""


def enable_packing(model: PreTrainedModel) -> None:
    """Make `model`, loaded with SDPA attention, accept boundaries in place of a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def boundaries(lengths: Sequence[int]) -> Tensor:
    """Return where a row's sequences begin and end, shaped like a mask: int32 [1, 1, 1, B + 1], on the host."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)[None, None, None]


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return position ids [1, T] that count every sequence of a row from 0."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def kernel_of(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Return the attention for packed rows: "varlen" (FlashAttention over unequal lengths) or "sdpa" for each sequence.

    FlashAttention needs 16-bit operands, a GPU of compute capability 8.0, and a head width that is a multiple of 8 up
    to 256.
    """
    fits = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and head_width in range(8, 257, 8)
    return "varlen" if fits and torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Implement transformers' interface: `query` [1, H, T, d], `key`, `value` [1, H_kv, T, d] -> ([1, T, H, d], None).

    A sliding window is ignored in packed rows.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale, dropout = options.get("scaling"), options.get("dropout", 0.0)
    edges, groups_heads = attention_mask.flatten(), query.shape[1] != key.shape[1]
    lengths = edges.diff().tolist()
    if not dropout and kernel_of(query.device, query.dtype, query.shape[-1]) == "varlen":
        parts = [part[0].transpose(0, 1) for part in (query, key, value)]  # [T, H, d]
        extra: dict[str, Any] = {"enable_gqa": groups_heads} if VARLEN_GROUPS_HEADS else {}
        if groups_heads and not VARLEN_GROUPS_HEADS:
            parts[1:] = [part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in parts[1:]]
        (q, k, v), edges, longest = parts, edges.to(query.device, non_blocking=True), max(lengths)
        output = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=(-1, 0), **extra)
        return cast("Tensor", output)[None], None
    outputs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=groups_heads)
        for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None
