"""Attention over packed rows on a card: one launch for all pairs, and no waiting.

Two kernels of torch take packed rows. FlashAttention computes in fp16 and bf16 and needs compute
capability 8.0; the memory-efficient kernel also computes in fp32 and runs on older cards. Both read
the offsets on the device, so the host does not wait, and both skip empty pairs.
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
"""Major compute capability of Ampere, the oldest with FlashAttention and with bf16 matrix units."""

MAX_FLASH_SIZE = 256  # widest head of FlashAttention

ALIGNED_SIZE = 8
"""Both kernels load this many half-width numbers at a time; FlashAttention needs a multiple of
it."""

NO_MASK = 0  # the memory-efficient kernel's mask type for attention in both directions


@dataclass(frozen=True, slots=True)
class Spans:
    """Which queries attend to which keys: both are cut into the same number of pairs."""

    query_offsets: Tensor  # int32 [pairs + 1] on the device, first query row of each pair
    key_offsets: Tensor  # int32 [pairs + 1] on the device, first row of its keys and values
    max_queries: int  # upper bound of a pair's queries; a higher one is slower, a lower one wrong
    max_keys: int  # upper bound of a pair's keys
    reach: int = -1  # keys that a query sees on either side; -1: all. Only FlashAttention knows it


def choose_attention(device: torch.device, dtype: torch.dtype, size: int) -> Attention:
    """The fastest attention of a card for a dtype and a width of heads."""
    return attention_with(_kernel_of(device, dtype, size))


def sees_windows(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether a card's attention can be limited by :attr:`Spans.reach`."""
    return _kernel_of(device, dtype, size) in {flash, flash_by_public_name}


def _kernel_of(device: torch.device, dtype: torch.dtype, size: int) -> Kernel:
    major, _ = torch.cuda.get_device_capability(device)
    built = torch.backends.cuda.is_flash_attention_available()
    return choose_kernel(major if built else 0, dtype, size)


def choose_kernel(major: int, dtype: torch.dtype, size: int) -> Kernel:
    """The kernel for a major compute capability (0 if FlashAttention was not built)."""
    if dtype != torch.float32 and major >= FLASH_CAPABILITY and size <= MAX_FLASH_SIZE:
        operator = torch.ops.aten._flash_attention_forward.default  # noqa: SLF001 - no public name exists
        return flash if takes_packed_rows(operator) else flash_by_public_name
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


FLASH_ARGUMENTS = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
FLASH_OPTIONS = {"scale", "window_size_left", "window_size_right"}


def takes_packed_rows(operator: torch._ops.OpOverload) -> bool:
    """Whether torch's operator for FlashAttention has the arguments that :func:`flash` gives."""
    arguments = operator._schema.arguments  # noqa: SLF001 - no public name exists
    placed = tuple(argument.name for argument in arguments if not argument.kwarg_only)
    named = {argument.name for argument in arguments if argument.kwarg_only}
    return placed == FLASH_ARGUMENTS and named >= FLASH_OPTIONS


def flash(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """FlashAttention, in fp16 or bf16.

    ``varlen_attn`` calls the same operator, after 53 µs of checks and with a fill of its own.
    """
    mixed, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - no public name exists
        *(query, key, value, spans.query_offsets, spans.key_offsets),
        *(spans.max_queries, spans.max_keys, 0.0, False, False),
        scale=scale,
        window_size_left=spans.reach,
        window_size_right=spans.reach,
    )
    return cast("Tensor", mixed)


def flash_by_public_name(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> Tensor:
    """The same where torch has changed the operator's arguments."""
    from torch.nn.attention.varlen import varlen_attn

    limits = (spans.query_offsets, spans.key_offsets, spans.max_queries, spans.max_keys)
    window = (spans.reach, spans.reach)
    return cast("Tensor", varlen_attn(query, key, value, *limits, scale=scale, window_size=window))


def efficient(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """The memory-efficient kernel, which takes the packed rows as a batch of one."""
    mixed, *_ = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001 - no public name exists
        *(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), None),
        *(spans.query_offsets, spans.key_offsets, spans.max_queries, spans.max_keys),
        *(0.0, NO_MASK),
        compute_log_sumexp=False,
        scale=scale,
    )
    return cast("Tensor", mixed).squeeze(0)


def efficient_in_fp32(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> Tensor:
    """The memory-efficient kernel in fp32, for any dtype of the layers."""
    mixed = efficient(query.float(), key.float(), value.float(), spans, scale)
    return mixed.to(query.dtype)
