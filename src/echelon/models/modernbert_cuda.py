"""ModernBERT's pass on a card whose attention can be limited to a window: see CudaScorer.

Older cards, and fp32, run :mod:`echelon.models.modernbert_encoder` as a CPU does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models import modernbert_encoder
from echelon.models.attention_cuda import Spans, sees_windows
from echelon.models.blocks import add_and_norm
from echelon.models.card_kernels import turned
from echelon.models.cuda_scorer import CardParts, CudaScorer
from echelon.models.device import DTYPES
from echelon.models.layers import Rows, materialize
from echelon.models.modernbert_encoder import load_weights
from echelon.models.rotary import Rotary

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.attention_cuda import Attention
    from echelon.models.base import Scorer
    from echelon.models.cuda_steps import StepInputs
    from echelon.models.modernbert import ModernBertArchitecture
    from echelon.models.modernbert_encoder import ModernBertLayer, ModernBertWeights

    Tables = tuple[Tensor, Tensor]


class ModernBertPass:
    """A pass over a step on the device; no operation in it waits for the device."""

    def __init__(
        self,
        architecture: ModernBertArchitecture,
        weights: ModernBertWeights,
        attend: Attention,
        precision: str,
    ) -> None:
        self._shape = architecture
        self._weights = weights
        self._attend = attend
        self._dtype = getattr(torch, DTYPES[precision])
        size = architecture.head_shape[1]
        device = weights.words.device  # a copy from the host would end a capture
        self._rotaries = [Rotary(theta, size, device=device) for theta in architecture.thetas]

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [pairs]."""
        weights, shape = self._weights, self._shape
        tables = [rotary.tables(inputs.positions) for rotary in self._rotaries]
        everywhere = Spans(inputs.offsets, inputs.offsets, inputs.longest, inputs.longest)
        spans = (everywhere, replace(everywhere, reach=shape.reach))
        words = functional.embedding(inputs.ids, weights.words).float()
        total, product = weights.words_norm(words), None
        firsts = inputs.firsts if weights.head.pooling == "cls" else None
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            local = shape.local[index]
            normed = add_and_norm(total, product, layer.attention_norm, self._dtype)
            mixed = self._mixed(layer, normed, tables[local], spans[local])
            if index == last and firsts is not None:
                mixed, total = mixed.index_select(0, firsts), total.index_select(0, firsts)
            product = materialize(layer.attention_out(Rows(mixed)))
            normed = add_and_norm(total, product, layer.feed_forward_norm, self._dtype)
            product = layer.feed_forward(normed)
        found = add_and_norm(total, product, weights.final_norm, torch.float32)
        return weights.head(found, inputs.offsets)

    def _mixed(self, layer: ModernBertLayer, rows: Tensor, tables: Tables, spans: Spans) -> Tensor:
        """Attention of all rows: [tokens, hidden] → the same."""
        count, size = self._shape.head_shape
        heads = materialize(layer.qkv(Rows(rows))).view(len(rows), 3 * count, size)
        both = turned(heads.narrow(1, 0, 2 * count), tables)
        query, key = both.narrow(1, 0, count), both.narrow(1, count, count)
        return self._attend(query, key, heads.narrow(1, 2 * count, count), spans)


def open_native(
    *,
    folder: Path,
    architecture: ModernBertArchitecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model on a card; the arguments are those on a CPU."""
    size, precision = architecture.head_shape[1], plan.precision
    if not sees_windows(device, getattr(torch, DTYPES[precision]), size):
        return modernbert_encoder.open_native(
            folder=folder,
            architecture=architecture,
            device=device,
            plan=plan,
            threads=threads,
            label=label,
        )
    weights = load_weights(folder, architecture, device, plan, label)
    parts = CardParts.of(device, precision, size)
    run = ModernBertPass(architecture, weights, parts.attend, precision)
    return CudaScorer(architecture, run, device, precision, parts, weights.loaded_bytes)
