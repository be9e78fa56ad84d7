"""gte's multilingual rerankers on packed rows: BERT's layers with rotary positions and a gate.

The last layer is computed for each pair's first token only, whose position is 0: it is not turned.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.architecture import positions_from_zero
from echelon.models.attention_cpu import AttentionLayout, attend_first
from echelon.models.checkpoint import Checkpoint
from echelon.models.device import release_memory
from echelon.models.encoder import Embeddings, Layer, Weights, run_layers
from echelon.models.gated import GatedWithResidual
from echelon.models.heads import Head, HeadProduct
from echelon.models.layers import Rows
from echelon.models.loading import WeightLoader
from echelon.models.local_attention import attend_pairs
from echelon.models.packed import PackedEncoder
from echelon.models.rotary import Rotary, rotate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.gte import GteArchitecture
    from echelon.types import TokenBatch

    Shapes = dict[str, tuple[int, ...]]

FP32 = torch.float32  # of norms of embeddings and of heads

ROOT = "new."
"""Beginning of the tensors' names; of the classifier's projection, none."""


class GteScorer(PackedEncoder["GteArchitecture", Weights]):
    """A :class:`~echelon.models.base.Scorer` over packed rows, on CPU and CUDA."""

    def _logits(self, weights: Weights, batch: TokenBatch) -> Tensor:
        layout, shape = AttentionLayout.of(batch.offsets), self._architecture
        positions = torch.from_numpy(positions_from_zero(batch)).to(self._device)
        rotary = Rotary(shape.theta, shape.head_shape[1], shape.factor)
        cosines, sines = rotary.tables(positions)
        turn = partial(rotate, cosines=cosines, sines=sines)
        firsts = layout.firsts.to(self._device)
        return run_layers(
            weights,
            Rows(self._embed(weights.embeddings, batch)),
            lambda query, key, value: attend_pairs(turn(query), turn(key), value, layout),
            lambda rows: rows[firsts],
            lambda query, key, value: _attend_firsts(query, turn(key), value, layout),
            layout.offsets.to(self._device),
        )

    def _embed(self, embeddings: Embeddings, batch: TokenBatch) -> Tensor:
        """[tokens, hidden]; summed in fp32 in every precision."""
        rows = self._look_up(embeddings.words, batch.ids)
        if batch.type_ids is not None and self._architecture.reads_segments:
            types = torch.from_numpy(batch.type_ids).to(self._device)
            rows += functional.embedding(types, embeddings.segments)
        elif self._architecture.segments:
            rows += embeddings.segments[0]
        return embeddings.norm(rows).to(self._dtype)


def _attend_firsts(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """:func:`~echelon.models.attention_cpu.attend_first` on any device."""
    if query.device.type == "cpu":
        return attend_first(query, key, value, layout)
    mixed = []
    for run in layout.runs:
        rows = slice(run.row, run.row + run.count * run.length)
        k, v = (
            part[rows].view(run.count, run.length, *part.shape[1:]).transpose(1, 2)
            for part in (key, value)
        )
        one = query[run.pair : run.pair + run.count].unsqueeze(2)
        mixed.append(functional.scaled_dot_product_attention(one, k, v).flatten(1))
    return torch.cat(mixed)


def open_native(
    *,
    folder: Path,
    architecture: GteArchitecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model; ``label`` is the index of the head's output that is the score."""
    with torch.inference_mode():
        weights = _GteLoader(Checkpoint(folder), architecture, device, plan).weights(label)
    return GteScorer(
        architecture,
        weights,
        words=weights.embeddings.words,
        loaded_bytes=weights.loaded_bytes,
        device=device,
        precision=plan.precision,
        threads=threads,
    )


class _GteLoader(WeightLoader):
    """Reads one part of the model after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: GteArchitecture,
        device: torch.device,
        plan: LayerPlan,
    ) -> None:
        self._shape = architecture
        super().__init__(checkpoint, device, plan, f"{ROOT}encoder.")

    def weights(self, label: int) -> Weights:
        """All parts."""
        shape = self._shape
        self.checkpoint.refuse_surplus(f"{ROOT}encoder.layer.", shape.layers)
        embeddings = self._embeddings()
        layers = tuple(self._layer(index) for index in range(shape.layers))
        head = self._head(label)
        return Weights(embeddings, layers, head, shape.head_shape, self.loaded_bytes)

    def _embeddings(self) -> Embeddings:
        shape, root = self._shape, f"{ROOT}embeddings"
        words, segments = f"{root}.word_embeddings.weight", f"{root}.token_type_embeddings.weight"
        shapes: Shapes = {words: (shape.vocabulary, shape.hidden)}
        if shape.segments:
            shapes[segments] = (shape.segments, shape.hidden)
        tensors = self.checkpoint.read(shapes)
        table = tensors[words].to(self.device)
        types = tensors.get(segments, torch.zeros(0, shape.hidden)).to(self.device).float()
        if self.device.type != "cpu":
            self.loaded_bytes += table.nbytes + types.nbytes
        norm = f"{root}.LayerNorm"
        found = self.norm(self.checkpoint.read(self._norms(norm)), norm, shape.epsilon, FP32)
        return Embeddings(table, types[:0], types, found)

    def _layer(self, index: int) -> Layer:
        """Layer ``index``; the last one has separate queries."""
        shape, root = self._shape, f"{ROOT}encoder.layer.{index}"
        hidden, wide = shape.hidden, shape.intermediate
        qkv, mixed = f"{root}.attention.qkv_proj", f"{root}.attention.o_proj"
        up, down = f"{root}.mlp.up_gate_proj", f"{root}.mlp.down_proj"
        norms = (f"{root}.attn_ln", f"{root}.mlp_ln")
        tensors = self.checkpoint.read(
            {
                **_dense(qkv, 3 * hidden, hidden),
                **_dense(mixed, hidden, hidden),
                f"{up}.weight": (2 * wide, hidden),
                **_dense(down, hidden, wide),
                **self._norms(*norms),
            }
        )
        # The gate's other part comes first here.
        other, active = tensors.pop(f"{up}.weight").chunk(2)
        tensors |= {f"{up}.active.weight": active, f"{up}.other.weight": other}
        queries = None
        if index == shape.layers - 1:
            for kind in ("weight", "bias"):
                whole = tensors[f"{qkv}.{kind}"]
                tensors[f"{qkv}.queries.{kind}"] = whole[:hidden]
                tensors[f"{qkv}.{kind}"] = whole[hidden:]
            queries = self.linear(tensors, f"{qkv}.queries")
        layer = Layer(
            queries=queries,
            qkv=self.linear(tensors, qkv),
            attention_out=self.linear(tensors, mixed),
            attention_norm=self.norm(tensors, norms[0], shape.epsilon),
            feed_forward=GatedWithResidual(
                self.gate(tensors, f"{up}.active", f"{up}.other", activation=shape.activation),
                self.linear(tensors, down),
            ),
            output_norm=self.norm(tensors, norms[1], shape.epsilon),
        )
        release_memory(self.device)
        return layer

    def _head(self, label: int) -> Head:
        """Pooler and classifier, its projection cut to the chosen label."""
        shape, pooler = self._shape, f"{ROOT}pooler.dense"
        shapes = _dense(pooler, shape.hidden, shape.hidden)
        shapes |= _dense("classifier", len(shape.labels), shape.hidden)
        tensors = self.checkpoint.read(shapes)
        for part in ("classifier.weight", "classifier.bias"):
            tensors[part] = tensors[part][label : label + 1]
        pooled = HeadProduct(self.dense(tensors, pooler, dtype=FP32), "tanh")
        return Head((pooled, HeadProduct(self.dense(tensors, "classifier", dtype=FP32))))

    def _norms(self, *names: str) -> Shapes:
        parts = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
        return dict.fromkeys(parts, (self._shape.hidden,))


def _dense(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
