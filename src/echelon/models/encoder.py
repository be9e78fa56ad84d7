"""The native encoder on CPU: BERT, RoBERTa and XLM-RoBERTa classifiers without padding.

All tokens of a step stand in one [tokens, hidden] matrix from the embeddings to the head. Only
attention looks at where pairs begin and end. The last layer is computed for each pair's first token
only, since the head reads nothing else: the same logits for less work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from echelon.models.attention_cpu import AttentionLayout, attend, attend_first
from echelon.models.checkpoint import MappedPages
from echelon.models.device import DTYPES, device_name, release_memory, run_step
from echelon.models.fused import Norm, Product, Rows, add_norm, settle, values_of
from echelon.types import ModelInfo, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.architecture import Architecture
    from echelon.models.layers import FeedForward, Linear
    from echelon.types import FloatArray, IntArray


LEAST_ROWS = 16
"""Rows that a matrix unit works on at a time."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Word, position and segment tables, kept as they are on disk, and their norm.

    On CPU the word table is a view of the checkpoint file: only the rows that texts touch are
    ever read into memory.
    """

    words: Tensor
    positions: Tensor
    segments: Tensor
    norm: Norm


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer.

    ``qkv`` is fused, except in the last layer, which keeps its query projection apart.
    """

    queries: Linear | None
    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    feed_forward: FeedForward
    output_norm: Norm


@dataclass(frozen=True, slots=True)
class Head:
    """Dense, tanh, and the projection to the chosen label, all in fp32."""

    dense: Linear
    project: Linear

    def __call__(self, firsts: Tensor) -> Tensor:
        """[pairs, hidden] to logits, [pairs]."""
        pooled = torch.tanh(self.dense(Rows(firsts.float())).values)
        return self.project(Rows(pooled)).values.squeeze(-1)


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that was loaded."""

    embeddings: Embeddings
    layers: tuple[Layer, ...]
    head: Head
    loaded_bytes: int


def native_facts(
    architecture: Architecture,
    weights: Weights,
    device: torch.device,
    precision: str,
    threads: int,
) -> ModelInfo:
    """What a native model is, on any device."""
    return ModelInfo(
        family=architecture.family,
        device=str(device),
        device_name=device_name(device),
        precision=precision,
        max_tokens=architecture.max_tokens,
        padding="none",
        weights_bytes=weights.loaded_bytes,
        threads=threads,
    )


class PackedScorer:
    """A :class:`~echelon.models.base.Scorer` over packed rows.

    Args:
        architecture: the model's shape.
        weights: loaded tensors.
        device: where they are.
        precision: what the layers compute in.
        threads: CPU threads in use; 0 on other devices.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        device: torch.device,
        precision: str,
        threads: int,
    ) -> None:
        self._shape = architecture
        self._weights: Weights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        self._mapped = MappedPages.of(weights.embeddings.words)
        self.info = native_facts(architecture, weights, device, precision, threads)

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`.

        Raises:
            BadCheckpoint: a token id that the model has no embedding for.
        """
        self._shape.check_ids(batch.ids)
        step = with_filler(batch)
        return run_step(lambda: self._forward(step)[: len(batch)])

    def release(self) -> None:
        """Give cached memory back to the device."""
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = self._mapped = None
        self.release()

    def _forward(self, batch: TokenBatch) -> Tensor:
        """Logits, [pairs]."""
        if self._weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        layout = AttentionLayout.of(batch.offsets)
        rows = Rows(self._embed(self._weights.embeddings, batch))
        *layers, last = self._weights.layers
        for layer in layers:
            rows = self._layer(layer, rows, layout)
        return self._weights.head(values_of(self._last_layer(last, rows, layout)))

    def _embed(self, embeddings: Embeddings, batch: TokenBatch) -> Tensor:
        """[tokens, hidden]; summed in fp32 whatever the layers compute in."""
        positions = self._shape.positions(batch)
        rows = self._look_up(embeddings.words, batch.ids)
        if self._mapped is not None:
            self._mapped.count_rows(len(batch.ids))
        rows += self._look_up(embeddings.positions, positions)
        segments = batch.type_ids
        if segments is None or not self._shape.reads_segments:
            rows += embeddings.segments[0].float()
        else:
            rows += self._look_up(embeddings.segments, segments)
        return embeddings.norm(rows).to(self._dtype)

    def _look_up(self, table: Tensor, indices: IntArray) -> Tensor:
        on_device = torch.from_numpy(indices).to(self._device)
        return functional.embedding(on_device, table).float()

    def _layer(self, layer: Layer, rows: Rows, layout: AttentionLayout) -> Rows:
        query, key, value = heads(layer.qkv(rows), 3, self._shape)
        return finish(layer, attend(query, key, value, layout), rows)

    def _last_layer(self, layer: Layer, rows: Rows, layout: AttentionLayout) -> Rows:
        """Keys and values for all rows, everything else for each pair's first row."""
        if layer.queries is None:
            raise RuntimeError("This is a bug: the last layer was loaded like the others.")
        firsts = rows[layout.firsts]
        (query,) = heads(layer.queries(firsts), 1, self._shape)
        key, value = heads(layer.qkv(rows), 2, self._shape)
        return finish(layer, attend_first(query, key, value, layout), firsts)


def heads(product: Product, parts: int, shape: Architecture) -> tuple[Tensor, ...]:
    """[rows, parts × hidden] to ``parts`` of [rows, heads, size]."""
    values = settle(product)
    return values.view(len(values), parts, *shape.head_shape).unbind(1)


def finish(layer: Layer, mixed: Tensor, rows: Rows) -> Rows:
    """Attention output, feed-forward and both residuals."""
    product = layer.attention_out(Rows(mixed), rows.values)
    rows = add_norm(product, layer.attention_norm, quantized=layer.feed_forward.quantized)
    product = layer.feed_forward(rows, values_of(rows))
    return add_norm(product, layer.output_norm, quantized=layer.qkv.quantized)


def with_filler(batch: TokenBatch) -> TokenBatch:
    """Append pairs of one filler token that bring the step to a round number of rows.

    oneDNN compiles and keeps code for every number of rows it meets, 2 MB for a small model: a
    process that sees all lengths grew by 770 MB in 600 steps (docs/LOG.md). Multiples of 16, and
    above 1,024 rows of 1/32 of the next lower power of two, keep that bounded. Matrix units work
    on 16 rows at a time, so small steps pay nothing.
    """
    rows = len(batch.ids)
    filler = -rows % max(LEAST_ROWS, 1 << max(0, rows.bit_length() - 6))
    if filler == 0:
        return batch
    types = None if batch.type_ids is None else np.pad(batch.type_ids, (0, filler))
    ends = np.arange(rows + 1, rows + filler + 1, dtype=np.int32)
    offsets = np.concatenate((batch.offsets, ends))
    return TokenBatch(np.pad(batch.ids, (0, filler)), types, offsets)
