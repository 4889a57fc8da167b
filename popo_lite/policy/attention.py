"""Attention over packed rows: several sequences in one row, each attending only to itself, a shared prompt once.

The mask of such a row would take T x T bytes for T tokens. Models get the row's layout in its place: transformers
passes a 4D mask unchanged to every attention layer, also when a checkpointed layer is recomputed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "popo_packed"
"""The implementation's name in transformers' registry. Without a layout it is transformers' SDPA."""

Row = Sequence[Sequence[int]]
"""The lengths in a packed row, block by block: (14, 5, 7) is a prompt of 14 tokens with two answers to it, of 5 and 7
tokens. Each answer sees the prompt and itself. (12,) is a sequence of its own."""


def enable_packing(model: PreTrainedModel) -> None:
    """Make `model`, loaded with SDPA attention, accept a layout in place of a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def layout(row: Row) -> Tensor:
    """Return the segments of a row, shaped like a mask: int32 [1, 1, S, 2], on the host.

    A segment is a whole sequence, a prompt that answers share, or such an answer. Each has its length, and the number
    of the segment that it continues, or -1.
    """
    segments: list[tuple[int, int]] = []
    for prompt, *answers in row:
        if len(answers) < 2:
            segments.append((prompt + sum(answers), -1))
        else:
            segments += [(prompt, -1), *((answer, len(segments)) for answer in answers)]
    return torch.tensor(segments, dtype=torch.int32)[None, None]


def positions(row: Row, device: torch.device) -> Tensor:
    """Return position ids [1, T]: every prompt counts from 0, and each of its answers goes on from the prompt's end."""
    spans = []
    for prompt, *answers in row:
        spans += [(0, prompt), *((prompt, prompt + answer) for answer in answers)]
    return torch.cat([torch.arange(*span, device=device) for span in spans])[None]


def kernel_of(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """Return the attention for packed rows: "varlen" (FlashAttention over unequal lengths) or "sdpa" for like segments.

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
    segments: list[tuple[int, int]] = attention_mask[0, 0].tolist()
    if not dropout and kernel_of(query.device, query.dtype, query.shape[-1]) == "varlen":
        return _varlen(query, key, value, segments, scale), None
    if query.device.type == "cuda":
        # There only FlashAttention groups heads; the other kernel without a T x T matrix wants them repeated.
        if (times := query.shape[1] // key.shape[1]) > 1:
            key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
        if torch.is_autocast_enabled("cuda"):  # which knows SDPA, but not with that mask of an answer
            query, key, value = (part.to(torch.get_autocast_dtype("cuda")) for part in (query, key, value))
    lengths = [length for length, _ in segments]
    queries, keys, values = (part[0].split(lengths, dim=1) for part in (query, key, value))  # [heads, length, d] each
    alike: dict[tuple[int, int], list[int]] = {}  # segments by their own length and that of their prompt
    for number, (length, prompt) in enumerate(segments):
        alike.setdefault((length, lengths[prompt] if prompt >= 0 else 0), []).append(number)
    outputs: list[Tensor] = [query] * len(segments)
    for (_, before), members in alike.items():
        q = torch.stack([queries[number] for number in members])
        k, v = (torch.stack([part[number] for number in members]) for part in (keys, values))
        if before:
            prompts = [segments[number][1] for number in members]
            k = torch.cat([torch.stack([keys[prompt] for prompt in prompts]), k], dim=2)
            v = torch.cat([torch.stack([values[prompt] for prompt in prompts]), v], dim=2)
        visible = {"attn_mask": _answers_mask(q, before)} if before else {"is_causal": True}
        gqa = q.shape[1] != k.shape[1]
        found = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale, enable_gqa=gqa, **visible)
        for number, output in zip(members, found, strict=True):
            outputs[number] = output
    return torch.cat([output.transpose(0, 1) for output in outputs])[None], None


def _answers_mask(query: Tensor, prompt: int) -> Tensor:
    """Return the mask of answers [N, H, answer, d] that see a prompt before themselves.

    On a GPU SDPA has kernels for this mask: as a matrix it would grow with the square of the answer.
    """
    answer = query.shape[2]
    if query.device.type == "cuda":
        return causal_lower_right(answer, prompt + answer)
    return query.new_full((answer, prompt + answer), float("-inf")).triu(prompt + 1)


def _seen(part: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """Return what the segments see of `part`, the keys or values [1, H_kv, T, d], in a row: prompts before answers."""
    own = part.split([length for length, _ in segments], dim=2)
    parts = [[mine] if prompt < 0 else [own[prompt], mine] for mine, (_, prompt) in zip(own, segments, strict=True)]
    return torch.cat(list(itertools.chain.from_iterable(parts)), dim=2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[tuple[int, int]], scale: Any) -> Tensor:
    """Return [1, T, H, d] by one call of FlashAttention, in which a segment's last query sees all its keys."""
    grouped = query.shape[1] != key.shape[1]
    lengths = [length for length, _ in segments]
    seen = [length if prompt < 0 else lengths[prompt] + length for length, prompt in segments]
    if seen != lengths:
        key, value = (_seen(part, segments) for part in (key, value))
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [T, H, d]
    edges = torch.tensor([[0, *itertools.accumulate(counts)] for counts in (lengths, seen)], dtype=torch.int32)
    of_queries, of_keys = edges.to(query.device, non_blocking=True)
    output = varlen_attn(
        q, k, v, of_queries, of_keys, max(lengths), max(seen), scale=scale, window_size=(-1, 0), enable_gqa=grouped
    )
    return cast("Tensor", output)[None]
