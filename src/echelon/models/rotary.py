"""Rotary positions: queries and keys turned by angles that grow with a token's place.

Su and others, RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021; in the form of
transformers, where the first half of a head turns with the second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.blocks import blocks

if TYPE_CHECKING:
    from torch import Tensor


class Rotary:
    """The angles of one base; ``size`` is the width of a head, an even number.

    A ``factor`` stretches them by the fixed NTK rule of :mod:`echelon.models.gte`. Tables on
    ``device``, if it is given, need no copy from the host.
    """

    def __init__(
        self, theta: float, size: int, factor: float = 1.0, device: torch.device | None = None
    ) -> None:
        # As in transformers, in fp32 and in this order: the last bits are the same.
        powers = (theta * factor) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        self._frequencies = (1.0 / powers / factor ** (2 / size)).to(device)

    def tables(
        self, positions: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each [rows, 1, size], for positions [rows]."""
        frequencies = self._frequencies.to(positions.device)
        angles = positions.float().unsqueeze(1) * frequencies
        cosines, sines = angles.cos().to(dtype), angles.sin().to(dtype)
        both = torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1)
        return both[0].unsqueeze(1), both[1].unsqueeze(1)


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
