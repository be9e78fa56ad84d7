"""The native encoder with padding, for devices whose attention takes no packed rows: Apple's GPUs.

Metal compiles and keeps a graph for each shape, so that memory grows with each new one: steps are
rounded up to few sizes. Steps run one at a time in a process, since torch's MPS backend aborts when
two threads use it at once. Tested on CPU against the reference; it has not run on an Apple GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from echelon.errors import UnsupportedModel
from echelon.models.base import pad, rounded_shape
from echelon.models.device import DTYPES, one_at_a_time, release_memory, run_step
from echelon.models.encoder import Weights, load_weights, run_layers
from echelon.models.layers import Rows, values_of
from echelon.models.loading import native_info

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import Architecture, LayerPlan
    from echelon.models.base import Scorer
    from echelon.types import FloatArray, TokenBatch


class PaddedScorer:
    """A :class:`~echelon.models.base.Scorer` over padded pairs, on any device."""

    def __init__(
        self, architecture: Architecture, weights: Weights, device: torch.device, precision: str
    ) -> None:
        self._architecture = architecture
        self._weights: Weights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        info = native_info(architecture, weights.loaded_bytes, device, precision, threads=0)
        self.info = replace(info, padding="rectangular")

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        self._architecture.check_ids(batch.ids)
        with one_at_a_time(self._device):
            return run_step(lambda: self._forward(batch)[: len(batch)])

    def release(self) -> None:
        """Free cached memory."""
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = None
        self.release()

    def _forward(self, batch: TokenBatch) -> Tensor:
        """Logits [pairs], those of filler pairs last."""
        if self._weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        # Of the embedding's tables row 0 is as good as any for padding: attention never reads it.
        padded = pad(batch, 0, rounded_shape(batch))
        mask = self._there(padded["attention_mask"] > 0)[:, None, None, :]
        pairs, longest = padded["input_ids"].shape
        shape = (pairs, longest, *self._architecture.head_shape)

        def heads(part: Tensor) -> Tensor:
            return part.view(pairs, -1, *shape[2:]).transpose(1, 2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            mixed = functional.scaled_dot_product_attention(
                heads(query), heads(key), heads(value), attn_mask=mask
            )
            return mixed.transpose(1, 2).reshape(len(query), -1)

        def firsts(rows: Rows) -> Rows:
            return Rows(values_of(rows).view(pairs, longest, -1)[:, 0].contiguous())

        rows = Rows(self._embed(self._weights, batch, padded))
        # A head that reads first rows needs none, and no other is opened.
        offsets = torch.zeros(1, dtype=torch.int32, device=self._device)
        return run_layers(self._weights, rows, attend, firsts, attend, offsets)

    def _embed(self, weights: Weights, batch: TokenBatch, padded: dict[str, np.ndarray]) -> Tensor:
        """[pairs × longest, hidden]; summed in fp32 in every precision."""
        tables = weights.embeddings
        positions = np.zeros_like(padded["input_ids"])
        real = padded["attention_mask"][: len(batch)] > 0
        positions[: len(batch)][real] = self._architecture.positions(batch)
        rows = functional.embedding(self._there(padded["input_ids"]), tables.words).float()
        rows += functional.embedding(self._there(positions), tables.positions)
        types = padded["token_type_ids"]
        if not self._architecture.reads_segments:
            types = np.zeros_like(types)
        rows += functional.embedding(self._there(types), tables.segments)
        return tables.norm(rows.flatten(0, 1)).to(self._dtype)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def open_native(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model; no CPU ``threads`` are used, else as on CPU."""
    del threads
    weights = load_weights(folder, architecture, device, plan, label)
    if weights.head.pooling != "cls":
        raise UnsupportedModel(
            f"{folder}: its head reads the mean of all tokens, which is not built for {device}. "
            "Use device='cpu'."
        )
    return PaddedScorer(architecture, weights, device, plan.precision)
