"""Linear layers in eight-bit floating point, for cards that multiply it (Ada, Hopper and newer).

Weights are scaled by output, rows of activations by row, each so that its largest number is the
largest of the format (Micikevicius and others, FP8 Formats for Deep Learning, 2022). Sums are in
fp32, results in bf16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.card_kernels import to_float8
from echelon.models.layers import Product, values_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from echelon.models.layers import Rows

MULTIPLE = 16
"""Widths of both sides of a product must be multiples; other layers stay in bf16."""


def fits(weights: Sequence[Tensor]) -> bool:
    """Whether a card multiplies by these weights, each [out, in], stacked."""
    widths = sum(len(weight) for weight in weights), weights[0].shape[1]
    return all(width % MULTIPLE == 0 for width in widths)


class Float8Linear:
    """A product in float8 of weight [out, in] and bias [out], or no bias; results in bf16."""

    quantized = False  # the codes of :class:`Rows` are integers
    activated = False

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
        codes, scales = to_float8(weight.to(device))
        self._weight, self._scales = codes.t(), scales.t()
        self._bias = None if bias is None else bias.to(device, torch.bfloat16, copy=True)

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        parts = (self._weight, self._scales, self._bias)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`~echelon.models.layers.Linear`."""
        codes, scales = to_float8(values_of(rows))
        product = torch._scaled_mm(  # noqa: SLF001 - no public name exists
            codes, self._weight, scales, self._scales, self._bias, out_dtype=torch.bfloat16
        )
        return Product(product, residual=residual)
