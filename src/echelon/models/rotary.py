"""Rotary positions: queries and keys turned by angles that grow with a token's place.

Su and others, RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021; in the form of
transformers, where the first half of a head turns with the second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from echelon.models.blocks import blocks, by_blocks
from echelon.models.card_kernels import turned_by_torch
from echelon.models.kernel_calls import call_kernel, has_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.layers import RmsNorm
    from echelon.models.llama import LlamaStretch


class Rotary:
    """The angles of one base; ``size`` is the width of a head, an even number.

    A ``factor`` stretches them by the fixed NTK rule of :mod:`echelon.models.gte`, a ``stretch``
    by Llama's rule. Tables on ``device``, if it is given, need no copy from the host.
    """

    def __init__(
        self,
        theta: float,
        size: int,
        factor: float = 1.0,
        device: torch.device | None = None,
        stretch: LlamaStretch | None = None,
    ) -> None:
        # As in transformers, in fp32 and in this order: the last bits are the same.
        powers = (theta * factor) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        frequencies = 1.0 / powers / factor ** (2 / size)
        if stretch is not None:
            frequencies = stretched(frequencies, stretch)
        self._frequencies = frequencies.to(device)

    def tables(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each [rows, 1, size], for positions [rows]."""
        frequencies = self._frequencies.to(positions.device)
        angles = positions.float().unsqueeze(1) * frequencies
        cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
        both = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
        return both[0].unsqueeze(1), both[1].unsqueeze(1)


def stretched(frequencies: Tensor, by: LlamaStretch) -> Tensor:
    """Frequencies by Llama 3.1's rule: long waves are stretched, short ones not, others between.

    See ``_compute_llama3_parameters`` in transformers.
    """
    waves = 2 * math.pi / frequencies
    longest, shortest = by.trained_tokens / by.low, by.trained_tokens / by.high
    share = (by.trained_tokens / waves - by.low) / (by.high - by.low)
    between = (1 - share) * frequencies / by.factor + share * frequencies
    long = torch.where(waves > longest, frequencies / by.factor, frequencies)
    return torch.where((waves < shortest) | (waves > longest), long, between)


def rotate(rows: Tensor, cosines: Tensor, sines: Tensor, norm: RmsNorm | None = None) -> Tensor:
    """Turn heads by the tables of their positions, computed in fp32.

    Args:
        rows: [rows, heads, size].
        cosines: float32 [rows, 1, size].
        sines: of the same form.
        norm: of each head, before it is turned.
    """
    if _fits_kernel(rows, cosines):
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _by_kernel(rows, out, cosines, sines, norm)
        return out
    if rows.device.type != "cpu":
        return _turned(rows, cosines, sines, norm)
    return by_blocks(
        rows, rows.dtype, lambda part: _turned(rows[part], cosines[part], sines[part], norm)
    )


def rotate_in_place(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn [rows, parts, heads, size] where they are, as :func:`rotate` does with each part."""
    rows = heads.view(len(heads), -1, heads.shape[-1])
    if _fits_kernel(rows, cosines):
        _by_kernel(rows, rows, cosines, sines, None)
        return
    for part in blocks(rows):
        rows[part] = _turned(rows[part], cosines[part], sines[part], None)


def _turned(rows: Tensor, cosines: Tensor, sines: Tensor, norm: RmsNorm | None) -> Tensor:
    weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
    return turned_by_torch(rows, cosines, sines, weight, epsilon)


def _fits_kernel(rows: Tensor, cosines: Tensor) -> bool:
    """Whether there is a kernel, and the heads of each row lie one after the other."""
    close = rows.stride()[1:] == (rows.shape[2], 1) and cosines.dtype == torch.float32
    return close and has_kernel("rotate", rows)


def _by_kernel(
    rows: Tensor, out: Tensor, cosines: Tensor, sines: Tensor, norm: RmsNorm | None
) -> None:
    weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
    call_kernel(
        "rotate",
        *(rows, rows.stride(0), out, out.stride(0), *rows.shape),
        *(cosines.contiguous(), sines.contiguous(), weight, epsilon),
    )
