"""Heads of encoders, in fp32: what they read of a pair, and the layers down to its logit.

A head is a model's own classifier, or modules of sentence-transformers beside the model. A
half-width logit has too few digits, so that different documents would tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from echelon.models.checkpoint import Checkpoint
from echelon.models.layers import ACTIVATIONS, Norm, Rows, materialize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.layers import Linear
    from echelon.models.loading import WeightLoader
    from echelon.models.modules import Chain, HeadLayer

CHAIN_EPSILON = 1e-5  # of torch's LayerNorm, which sentence-transformers does not change


@dataclass(frozen=True, slots=True)
class HeadProduct:
    """A product and its activation."""

    linear: Linear
    activation: str = "none"

    def __call__(self, rows: Tensor) -> Tensor:
        """[pairs, into] → [pairs, out]."""
        product = materialize(self.linear(Rows(rows)))
        if self.activation == "tanh":  # of heads alone
            return product.tanh()
        return ACTIVATIONS[self.activation].function(product)


@dataclass(frozen=True, slots=True)
class Head:
    """Pooling and layers; the last one gives one number."""

    layers: tuple[HeadProduct | Norm, ...]
    pooling: str = "cls"  # ``cls`` reads each pair's first row, ``mean`` the mean of all

    def __call__(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Logits [pairs].

        Args:
            rows: the pairs' first rows [pairs, hidden] for ``cls``, else all [tokens, hidden].
            offsets: int [pairs + 1], each pair's first row; rows behind the last belong to none.
        """
        rows = mean_rows(rows, offsets) if self.pooling == "mean" else rows.float()
        for layer in self.layers:
            rows = layer(rows)
        return rows.squeeze(-1)


def mean_rows(rows: Tensor, offsets: Tensor) -> Tensor:
    """[tokens, hidden] → float32 [pairs, hidden]: the mean of each pair's rows.

    It never waits for the device. Rows of no pair are summed apart: they may be no numbers.
    """
    pairs = len(offsets) - 1
    places = torch.arange(len(rows), device=rows.device, dtype=offsets.dtype)
    pair = torch.searchsorted(offsets.narrow(0, 1, pairs).contiguous(), places, right=True)
    sums = torch.zeros(pairs + 1, rows.shape[1], device=rows.device)
    sums.index_add_(0, pair, rows.float())
    return sums.narrow(0, 0, pairs) / offsets.diff().clamp(min=1).unsqueeze(1)


def load_chain(loader: WeightLoader, folder: Path, chain: Chain) -> Head:
    """The head beside the model in ``folder``."""
    layers = tuple(_of_chain(loader, folder, layer) for layer in chain.layers)
    return Head(layers, chain.pooling)


def _of_chain(loader: WeightLoader, folder: Path, layer: HeadLayer) -> HeadProduct | Norm:
    checkpoint = Checkpoint(folder / layer.folder)
    if layer.kind == "norm":
        tensors = checkpoint.read({f"norm.{part}": (layer.out,) for part in ("weight", "bias")})
        return loader.norm(tensors, "norm", CHAIN_EPSILON, torch.float32)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (layer.out, layer.into)}
    if layer.bias:
        shapes["linear.bias"] = (layer.out,)
    linear = loader.dense(checkpoint.read(shapes), "linear", dtype=torch.float32)
    return HeadProduct(linear, layer.activation)
