"""Attention over packed rows on CUDA: one call for all pairs, told apart by where they begin.

Two kernels take the packed rows as they are. FlashAttention computes in half-width types and wants
compute capability 8.0; the memory-efficient kernel computes in fp32 too and runs on older cards.
Both read the offsets on the device alone, so nothing here waits for it, and both skip an empty
pair: its keys are none, and what comes out for its query is nobody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Kernel = Callable[[Tensor, Tensor, Tensor, "Spans", float], Tensor]
    """(query [queries, heads, size], key and value [tokens, heads, size], spans, scale) →
    [queries, heads, size]."""

    Attention = Callable[[Tensor, Tensor, Tensor, "Spans"], Tensor]
    """The same without a scale → [queries, heads × size]."""

FLASH_CAPABILITY = 8
"""Major compute capability of Ampere, the oldest that FlashAttention runs on and the oldest with
bf16 in its matrix units."""

MOST_FLASH_SIZE = 256
"""Widest head that FlashAttention takes."""

ALIGNED_SIZE = 8
"""Both kernels load this many half-width numbers at a time, and FlashAttention takes no head whose
width is not a multiple."""

NO_MASK = 0
"""The memory-efficient kernel's mask type for attention in both directions."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Which queries see which keys: both are cut into the same number of pairs.

    Attributes:
        query_offsets: int32 [pairs + 1] on the device; pair i's queries are these rows.
        key_offsets: int32 [pairs + 1] on the device; pair i's keys and values are these rows.
        most_queries: at least the queries of any pair. More costs a little, less is wrong.
        most_keys: at least the keys of any pair.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    most_queries: int
    most_keys: int


def choose_attention(device: torch.device, dtype: torch.dtype, size: int) -> Attention:
    """The fastest attention that a card has for a type and a width of heads."""
    major, _ = torch.cuda.get_device_capability(device)
    built = torch.backends.cuda.is_flash_attention_available()
    return attention_with(choose_kernel(major if built else 0, dtype, size))


def choose_kernel(major: int, dtype: torch.dtype, size: int) -> Kernel:
    """The kernel for a major compute capability, 0 where FlashAttention was not built.

    Args:
        major: 7 for a V100 or T4, 8 for an A100 or L4, 9 for an H100.
        dtype: what the layers compute in.
        size: width of a head.
    """
    if dtype != torch.float32 and major >= FLASH_CAPABILITY and size <= MOST_FLASH_SIZE:
        return flash
    if dtype == torch.bfloat16 and major < FLASH_CAPABILITY:
        return efficient_in_fp32  # there is none for bf16, and fp16 has not its range
    return efficient


def attention_with(kernel: Kernel) -> Attention:
    """Attention through a kernel, for any width of heads."""

    def attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        size = query.shape[-1]
        scale = size**-0.5
        short = -size % ALIGNED_SIZE
        if short:  # zeros move neither a product nor what is kept of a sum
            query, key, value = (functional.pad(part, (0, short)) for part in (query, key, value))
        mixed = kernel(query, key, value, spans, scale)
        return mixed.narrow(-1, 0, size).reshape(len(mixed), -1)

    return attend


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """FlashAttention, in fp16 or bf16."""
    from torch.nn.attention.varlen import varlen_attn

    mixed = varlen_attn(
        query,
        key,
        value,
        spans.query_offsets,
        spans.key_offsets,
        spans.most_queries,
        spans.most_keys,
        scale=scale,
    )
    return cast("Tensor", mixed)


def efficient(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """The memory-efficient kernel, which takes the packed rows as a batch of one."""
    mixed, *_ = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001 - no public name exists
        query.unsqueeze(0),
        key.unsqueeze(0),
        value.unsqueeze(0),
        None,
        spans.query_offsets,
        spans.key_offsets,
        spans.most_queries,
        spans.most_keys,
        0.0,
        NO_MASK,
        compute_log_sumexp=False,
        scale=scale,
    )
    return cast("Tensor", mixed).squeeze(0)


def efficient_in_fp32(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> Tensor:
    """The memory-efficient kernel in fp32, whatever the layers compute in."""
    mixed = efficient(query.float(), key.float(), value.float(), spans, scale)
    return mixed.to(query.dtype)
