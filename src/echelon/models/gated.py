"""Parts of newer transformers: feed-forwards with a gate, and RMSNorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.card_kernels import GATES, has_card_kernels
from echelon.models.layers import ACTIVATIONS, Rows, materialize

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.layers import Linear


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Division by the root mean square of a row (Zhang and Sennrich, 2019): no mean, no bias."""

    weight: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise the last axis; the sums are in fp32."""
        return functional.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, slots=True)
class GatedFeedForward:
    """``down(activation(a) · b)``, where ``up`` gives a and b (Shazeer, GLU Variants, 2020)."""

    up: Linear  # [hidden] → [2 × wide]: the part with the activation, then the gate
    down: Linear
    activation: str

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, hidden] → [rows, hidden]."""
        return materialize(
            self.down(Rows(gated(materialize(self.up(Rows(rows))), self.activation)))
        )


def gated(both: Tensor, activation: str) -> Tensor:
    """The activation of the first half of each row times its second half."""
    used = ACTIVATIONS[activation]
    if used.code in GATES and has_card_kernels(both):
        found: Tensor = torch.ops.echelon.gate(both, used.code)
        return found
    active, gate = both.chunk(2, -1)
    return used.function(active).mul_(gate)
