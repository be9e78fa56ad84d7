"""The native encoder's pass on CUDA: packed rows, and attention without padding.

:mod:`echelon.models.cuda_scorer` runs it, :mod:`echelon.models.attention_cuda` has its attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.attention_cuda import Spans
from echelon.models.cuda_scorer import CardParts, CudaScorer
from echelon.models.device import DTYPES
from echelon.models.encoder import Embeddings, Weights, load_weights, run_layers
from echelon.models.layers import Rows, values_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import Architecture, LayerPlan
    from echelon.models.attention_cuda import Attention
    from echelon.models.base import Scorer
    from echelon.models.cuda_steps import StepInputs


class EncoderPass:
    """A pass of the encoder over a step on the device; no operation in it waits for the device."""

    def __init__(self, weights: Weights, attend: Attention, precision: str) -> None:
        self._weights = weights
        self._attend = attend
        self._dtype = getattr(torch, DTYPES[precision])

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Logits, float32 [pairs]."""
        rows = Rows(self._embed(self._weights.embeddings, inputs))
        all_rows = Spans(inputs.offsets, inputs.offsets, inputs.longest, inputs.longest)
        firsts = Spans(inputs.singles, inputs.offsets, 1, inputs.longest)
        return run_layers(
            self._weights,
            rows,
            lambda query, key, value: self._attend(query, key, value, all_rows),
            lambda rows: Rows(values_of(rows).index_select(0, inputs.firsts)),
            lambda query, key, value: self._attend(query, key, value, firsts),
            inputs.offsets,
        )

    def _embed(self, embeddings: Embeddings, inputs: StepInputs) -> Tensor:
        """[tokens, hidden]; summed in fp32 in every precision."""
        rows = functional.embedding(inputs.ids, embeddings.words).float()
        rows += functional.embedding(inputs.positions, embeddings.positions)
        if inputs.segments is None:
            rows += embeddings.segments.select(0, 0)
        else:
            rows += functional.embedding(inputs.segments, embeddings.segments)
        return embeddings.norm(rows).to(self._dtype)


def open_native(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model on a card, where no CPU ``threads`` are used; else as on CPU."""
    del threads
    weights = load_weights(folder, architecture, device, plan, label)
    parts = CardParts.of(device, plan.precision, architecture.head_shape[1])
    run = EncoderPass(weights, parts.attend, plan.precision)
    return CudaScorer(architecture, run, device, plan.precision, parts, weights.loaded_bytes)
