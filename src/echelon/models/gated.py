"""Feed-forwards with a gate, of newer transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from echelon.models.blocks import by_blocks
from echelon.models.card_kernels import GATES, has_card_kernels
from echelon.models.layers import ACTIVATIONS, Rows, materialize

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.layers import Linear, PrepackedLinear, Product


class Gate(Protocol):
    """``activation(a) · b`` of two products (Shazeer, GLU Variants Improve Transformer, 2020)."""

    @property
    def quantized(self) -> bool:
        """Whether it multiplies codes, and uses the rows' codes if they have any."""

    def __call__(self, rows: Rows) -> Tensor:
        """[rows, hidden] → [rows, wide]."""


@dataclass(frozen=True, slots=True)
class StackedGate:
    """Both products at once, in any precision; the rest in passes of its own."""

    linear: Linear  # [hidden] → [2 × wide]: the part with the activation, then the gate
    activation: str

    @property
    def quantized(self) -> bool:
        """See :class:`Gate`."""
        return self.linear.quantized

    def __call__(self, rows: Rows) -> Tensor:
        """See :class:`Gate`."""
        both, used = materialize(self.linear(rows)), ACTIVATIONS[self.activation]
        if used.code in GATES and has_card_kernels(both):
            found: Tensor = torch.ops.echelon.gate(both, used.code)
            return found
        active, gate = both.chunk(2, -1)
        function = used.function
        if both.device.type != "cpu":
            return function(active).mul_(gate)
        return by_blocks(active, active.dtype, lambda p: function(active[p]).mul_(gate[p]))


@dataclass(frozen=True, slots=True)
class PackedGate:
    """One product with its activation inside, and one that multiplies by it: no other pass."""

    active: PrepackedLinear
    gate: PrepackedLinear

    @property
    def quantized(self) -> bool:
        """See :class:`Gate`."""
        return False

    def __call__(self, rows: Rows) -> Tensor:
        """See :class:`Gate`."""
        return self.gate.times(rows, materialize(self.active(rows)))


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """Up through a gate, and down."""

    up: Gate
    down: Linear

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden]."""
        return materialize(self.down(Rows(self.up(Rows(rows)))))


@dataclass(frozen=True, slots=True)
class GatedWithResidual:
    """The same in the form of :class:`~echelon.models.layers.FeedForward`, for norms behind it."""

    up: Gate
    down: Linear

    @property
    def quantized(self) -> bool:
        """Whether its first layer multiplies codes."""
        return self.up.quantized

    def __call__(self, rows: Rows, residual: Tensor) -> Product:
        """[rows, hidden] → [rows, hidden], the residual added or pending."""
        return self.down(Rows(self.up(rows)), residual)
