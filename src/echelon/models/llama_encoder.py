"""Llama on packed rows, every token of a pair seeing every other, as NVIDIA's rerankers do.

The layers are those of :mod:`echelon.models.decoder_weights`. Rows stay in fp32 between layers, as
in :mod:`echelon.models.decoder`. A pair's tokens depend on all others, so nothing is shared between
the documents of a query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.architecture import positions_from_zero
from echelon.models.attention_cpu import AttentionLayout
from echelon.models.blocks import add_and_norm
from echelon.models.checkpoint import Checkpoint
from echelon.models.decoder_weights import DecoderWeights, load_weights
from echelon.models.heads import mean_rows
from echelon.models.layers import Rows, materialize
from echelon.models.local_attention import attend_pairs
from echelon.models.packed import PackedEncoder
from echelon.models.rotary import Rotary, rotate

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.decoder_weights import DecoderLayer
    from echelon.models.llama import LlamaArchitecture
    from echelon.types import TokenBatch


class LlamaScorer(PackedEncoder["LlamaArchitecture", DecoderWeights]):
    """A :class:`~echelon.models.base.Scorer` over packed rows, on CPU and CUDA."""

    def _logits(self, weights: DecoderWeights, batch: TokenBatch) -> Tensor:
        shape = self._architecture
        rows = self._look_up(weights.words, batch.ids)
        layout = AttentionLayout.of(batch.offsets)
        positions = torch.from_numpy(positions_from_zero(batch)).to(self._device)
        turn = Rotary(shape.theta, shape.head_size, stretch=shape.stretch).tables(positions)
        product = None
        for layer in weights.layers:
            normed = add_and_norm(rows, product, layer.attention_norm, self._dtype)
            mixed = self._attention(layer, normed, turn, layout)
            product = materialize(layer.attention_out(Rows(mixed)))
            normed = add_and_norm(rows, product, layer.feed_forward_norm, self._dtype)
            product = layer.feed_forward(normed)
        found = add_and_norm(rows, product, weights.norm, torch.float32)
        if shape.pooling == "mean":
            pooled = mean_rows(found, layout.offsets.to(self._device))
        else:
            pooled = found[layout.firsts.to(self._device)]
        return (pooled @ weights.head) / shape.temperature

    def _attention(
        self,
        layer: DecoderLayer,
        normed: Tensor,
        turn: tuple[Tensor, Tensor],
        layout: AttentionLayout,
    ) -> Tensor:
        """[tokens, hidden] → [tokens, query heads × size]."""
        shape = self._architecture
        parts = materialize(layer.qkv(Rows(normed))).view(len(normed), -1, shape.head_size)
        queries, keys = shape.query_heads, shape.key_heads
        key, value = rotate(parts[:, queries : queries + keys], *turn), parts[:, -keys:]
        key, value = (part.repeat_interleave(queries // keys, 1) for part in (key, value))
        return attend_pairs(rotate(parts[:, :queries], *turn), key, value, layout)


def open_native(
    *,
    folder: Path,
    architecture: LlamaArchitecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model; ``label`` is the index of the head's output that is the score."""
    weights = load_weights(Checkpoint(folder), architecture, device, plan, label, None)
    return LlamaScorer(
        architecture,
        weights,
        words=weights.words,
        loaded_bytes=weights.loaded_bytes,
        device=device,
        precision=plan.precision,
        threads=threads,
    )
