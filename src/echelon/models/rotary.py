"""Rotary positions: queries and keys turned by angles that grow with a token's place.

Su and others, RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021; in the form of
transformers, where the first half of a head turns with the second.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from echelon.models.blocks import blocks

if TYPE_CHECKING:
    from torch import Tensor

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


def rotate(rows: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn [rows, heads, size] by the tables of their positions, computed in fp32."""
    wide = rows.float()
    half = rows.shape[-1] // 2
    return (wide * cosines).add_(wide.roll(half, -1) * sines).to(rows.dtype)


def rotate_in_place(heads: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn [rows, parts, heads, size] where they are, as :func:`rotate` does with each part."""
    for part in blocks(heads):
        turn = cosines[part].unsqueeze(1), sines[part].unsqueeze(1)
        heads[part] = rotate(heads[part], *turn)
