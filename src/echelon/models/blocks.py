"""Passes over rows a block at a time: on CPU a block stays in cache between a pass's operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.card_kernels import has_card_kernels
from echelon.models.kernel_calls import call_kernel, has_kernel
from echelon.models.layers import BLOCK, Norm, RmsNorm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def blocks(rows: Tensor) -> Iterator[slice]:
    """The rows in blocks of some :data:`~echelon.models.layers.BLOCK` numbers; on a card, one."""
    step = max(1, BLOCK // rows[0].numel()) if rows.device.type == "cpu" else len(rows)
    for first in range(0, len(rows), step):
        yield slice(first, first + step)


def by_blocks(rows: Tensor, dtype: torch.dtype, function: Callable[[slice], Tensor]) -> Tensor:
    """A result in the form of ``rows``, computed for a block of rows at a time."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    for part in blocks(rows):
        out[part] = function(part)
    return out


def add_and_norm(
    rows: Tensor,
    product: Tensor | None,
    norm: Norm | RmsNorm | None,
    dtype: torch.dtype,
) -> Tensor:
    """Add a layer's output to the rows, in place, and normalise them for the next layer.

    Args:
        rows: float32 [rows, hidden], the sum of all layers so far; it is changed.
        product: [rows, hidden] in any dtype, or None for nothing.
        norm: the next layer's; None leaves the rows as they are.
        dtype: of the result.
    """
    if norm is not None and product is not None and product.dtype == dtype:
        if has_kernel("accumulate_norm", product):
            out = torch.empty_like(product)
            call_kernel("accumulate_norm", rows, product, *rows.shape, *_parts(norm), out)
            return out
        if has_card_kernels(rows):
            found: Tensor = torch.ops.echelon.accumulate_norm(rows, product, *_parts(norm))
            return found
    if rows.device.type != "cpu":
        if product is not None:
            rows.add_(product)
        return (rows if norm is None else norm(rows)).to(dtype)

    def added(part: slice) -> Tensor:
        block = rows[part] if product is None else rows[part].add_(product[part])
        return block if norm is None else norm(block)

    return by_blocks(rows, dtype, added)


def _parts(norm: Norm | RmsNorm) -> tuple[Tensor, Tensor | None, float, bool]:
    """Weight, bias and epsilon, and whether the mean is taken off."""
    if isinstance(norm, Norm):
        return norm.weight, norm.bias, norm.epsilon, True
    return norm.weight, None, norm.epsilon, False
