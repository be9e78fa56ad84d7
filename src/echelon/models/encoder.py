"""The native encoder on CPU: BERT, RoBERTa and XLM-RoBERTa classifiers without padding.

All tokens of a step are rows of one [tokens, hidden] matrix from the embeddings to the head; only
attention distinguishes pairs. Where the head reads no other, the last layer is computed for each
pair's first token only: the logits are the same.

Weights are loaded layer by layer: mapped, converted and dropped before the next layer is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.attention_cpu import AttentionLayout, attend, attend_first
from echelon.models.device import release_memory
from echelon.models.heads import Head, HeadProduct, load_chain
from echelon.models.jina import encoder_checkpoint
from echelon.models.layers import (
    ACTIVATIONS,
    FeedForward,
    Linear,
    Norm,
    Product,
    Rows,
    add_norm,
    materialize,
    values_of,
)
from echelon.models.loading import WeightLoader
from echelon.models.packed import PackedEncoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import Architecture, LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.gated import GatedWithResidual
    from echelon.types import IntArray, TokenBatch

    Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key and value
    Tensors = dict[str, Tensor]
    Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Word, position and segment tables as on disk, and their norm; on CPU the words are mapped."""

    words: Tensor
    positions: Tensor
    segments: Tensor
    norm: Norm


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer layer.

    ``qkv`` is fused, but the last layer has separate queries if the head reads first rows only.
    """

    queries: Linear | None
    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    feed_forward: FeedForward | GatedWithResidual
    output_norm: Norm


@dataclass(frozen=True, slots=True)
class Weights:
    """A loaded model; ``loaded_bytes`` does not count mapped tables."""

    embeddings: Embeddings
    layers: tuple[Layer, ...]
    head: Head
    head_shape: tuple[int, int]  # attention heads, width of one
    loaded_bytes: int


class PackedScorer(PackedEncoder["Architecture", Weights]):
    """A :class:`~echelon.models.base.Scorer` over packed rows on CPU."""

    def _logits(self, weights: Weights, batch: TokenBatch) -> Tensor:
        layout = AttentionLayout.of(batch.offsets)
        return run_layers(
            weights,
            Rows(self._embed(weights.embeddings, batch)),
            partial(attend, layout=layout),
            lambda rows: rows[layout.firsts],
            partial(attend_first, layout=layout),
            layout.offsets,
        )

    def _embed(self, embeddings: Embeddings, batch: TokenBatch) -> Tensor:
        """[tokens, hidden]; summed in fp32 in every precision."""
        rows = self._look_up(embeddings.words, batch.ids)
        rows += _rows_of(embeddings.positions, self._architecture.positions(batch))
        segments = batch.type_ids
        if segments is None or not self._architecture.reads_segments:
            rows += embeddings.segments[0].float()
        else:
            rows += _rows_of(embeddings.segments, segments)
        return embeddings.norm(rows).to(self._dtype)


def _rows_of(table: Tensor, indices: IntArray) -> Tensor:
    return functional.embedding(torch.from_numpy(indices), table).float()


def run_layers(
    weights: Weights,
    rows: Rows,
    attend_all: Attend,
    take_firsts: Callable[[Rows], Rows],
    attend_firsts: Attend,
    offsets: Tensor,
) -> Tensor:
    """Logits [pairs] of embedded rows, with a device's attention for the step.

    A last layer with separate queries computes keys and values for all rows, the rest for each
    pair's first row. ``offsets`` are those of the step.
    """
    for layer in weights.layers:
        if layer.queries is None:
            mixed = attend_all(*split_heads(layer.qkv(rows), 3, weights.head_shape))
        else:
            firsts = take_firsts(rows)
            (query,) = split_heads(layer.queries(firsts), 1, weights.head_shape)
            key, value = split_heads(layer.qkv(rows), 2, weights.head_shape)
            rows, mixed = firsts, attend_firsts(query, key, value)
        rows = finish(layer, mixed, rows)
    return weights.head(values_of(rows), offsets)


def split_heads(product: Product, parts: int, head_shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """[rows, parts × hidden] → ``parts`` of [rows, heads, size]."""
    values = materialize(product)
    return values.view(len(values), parts, *head_shape).unbind(1)


def finish(layer: Layer, mixed: Tensor, rows: Rows) -> Rows:
    """Attention output, feed-forward and both residuals."""
    product = layer.attention_out(Rows(mixed), rows.values)
    rows = add_norm(product, layer.attention_norm, quantized=layer.feed_forward.quantized)
    product = layer.feed_forward(rows, values_of(rows))
    return add_norm(product, layer.output_norm, quantized=layer.qkv.quantized)


def open_native(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model on CPU; ``label`` is the index of the head's output that is the score."""
    weights = load_weights(folder, architecture, device, plan, label)
    return PackedScorer(
        architecture,
        weights,
        words=weights.embeddings.words,
        loaded_bytes=weights.loaded_bytes,
        device=device,
        precision=plan.precision,
        threads=threads,
    )


def load_weights(
    folder: Path,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    label: int,
) -> Weights:
    """Load a native model; ``label`` is the index of the head's output that is the score."""
    checkpoint = encoder_checkpoint(folder)
    checkpoint.refuse_surplus(f"{architecture.root}encoder.layer.", architecture.layers)
    with torch.inference_mode():
        loader = _EncoderLoader(checkpoint, architecture, device, plan)
        embeddings = loader.embeddings()
        layers = tuple(loader.layer(i) for i in range(architecture.layers))
        chain = architecture.chain
        head = loader.head(label) if chain is None else load_chain(loader, folder, chain)
    return Weights(embeddings, layers, head, architecture.head_shape, loader.loaded_bytes)


class _EncoderLoader(WeightLoader):
    """Reads one part of the model after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        device: torch.device,
        plan: LayerPlan,
    ) -> None:
        self._architecture = architecture
        self._prefix, self._epsilon = architecture.root, architecture.epsilon
        super().__init__(checkpoint, device, plan, f"{self._prefix}encoder.")

    def embeddings(self) -> Embeddings:
        """The three tables as on disk, and their norm in fp32."""
        shape, root = self._architecture, f"{self._prefix}embeddings"
        tables = {
            f"{root}.word_embeddings.weight": (shape.vocabulary, shape.hidden),
            f"{root}.position_embeddings.weight": (shape.table_positions, shape.hidden),
            f"{root}.token_type_embeddings.weight": (shape.segments, shape.hidden),
        }
        tensors = self.checkpoint.read(tables)
        words, positions, segments = (tensors[name].to(self.device) for name in tables)
        if self.device.type != "cpu":
            self.loaded_bytes += words.nbytes + positions.nbytes + segments.nbytes
        name = f"{root}.LayerNorm"
        norm = self.norm(
            self.checkpoint.read(self._norm_shapes(name)), name, self._epsilon, torch.float32
        )
        return Embeddings(words, positions, segments, norm)

    def layer(self, index: int) -> Layer:
        """Layer ``index``."""
        root = f"{self._prefix}encoder.layer.{index}"
        wide, activation = self._architecture.intermediate, self._architecture.activation
        projections = [f"{root}.attention.self.{part}" for part in ("query", "key", "value")]
        mixed, up, down = (
            f"{root}.{part}.dense" for part in ("attention.output", "intermediate", "output")
        )
        norms = (f"{root}.attention.output.LayerNorm", f"{root}.output.LayerNorm")
        tensors = self.checkpoint.read(
            {
                **self._dense_shapes(*projections, mixed),
                **self._dense_shapes(up, out=wide),
                **self._dense_shapes(down, into=wide),
                **self._norm_shapes(*norms),
            }
        )
        last = index == self._architecture.layers - 1
        apart = last and self._architecture.reads_firsts
        layer = Layer(
            queries=self.linear(tensors, projections[0]) if apart else None,
            qkv=self.linear(tensors, *(projections[1:] if apart else projections)),
            attention_out=self.linear(tensors, mixed),
            attention_norm=self.norm(tensors, norms[0], self._epsilon),
            feed_forward=FeedForward(
                self.linear(tensors, up, activation=activation),
                self.linear(tensors, down, shift=ACTIVATIONS[activation].shift),
                activation,
            ),
            output_norm=self.norm(tensors, norms[1], self._epsilon),
        )
        # Else the C library keeps the freed copies: a third more memory than the weights.
        release_memory(self.device)
        return layer

    def head(self, label: int) -> Head:
        """The classifier, its projection cut to the chosen label."""
        dense, project = self._architecture.family.head
        labels = len(self._architecture.labels)
        shapes = self._dense_shapes(dense) | self._dense_shapes(project, out=labels)
        tensors = self.checkpoint.read(shapes)
        for part in ("weight", "bias"):
            tensors[f"{project}.{part}"] = tensors[f"{project}.{part}"][label : label + 1]
        layers = (
            HeadProduct(self.dense(tensors, dense, dtype=torch.float32), "tanh"),
            HeadProduct(self.dense(tensors, project, dtype=torch.float32)),
        )
        return Head(layers)

    def _dense_shapes(self, *names: str, out: int | None = None, into: int | None = None) -> Shapes:
        """Shapes of dense layers; both widths are the hidden one by default."""
        hidden = self._architecture.hidden
        shape: tuple[int, ...] = (out or hidden, into or hidden)
        biases = {f"{name}.bias": shape[:1] for name in names}
        return {f"{name}.weight": shape for name in names} | biases

    def _norm_shapes(self, *names: str) -> Shapes:
        shape = (self._architecture.hidden,)
        return {f"{name}.{part}": shape for name in names for part in ("weight", "bias")}
