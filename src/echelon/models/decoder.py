"""Qwen3 and Qwen2 decoders that score pairs, without padding and with each query computed once.

The score is a number at a pair's last token: a classifier's label, or how likely a language model
answers yes, mostly against no. That is one product with one vector, never with the vocabulary.

All tokens of a step are rows of one matrix. Pairs that begin alike share the rows of their common
beginning, whose keys and values later steps use again. The last layer is computed for each pair's
last token only. Rows stay in fp32 between layers, since some of their numbers are far larger than
what a layer adds to them; products are in the model's precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from echelon.models.base import MIN_ROWS
from echelon.models.blocks import add_and_norm
from echelon.models.card_kernels import has_card_kernels, turned
from echelon.models.causal_attention import CausalAttention, KeysAndValues
from echelon.models.checkpoint import Checkpoint, MappedPages
from echelon.models.decoder_weights import load_weights
from echelon.models.device import DTYPES, release_memory, run_step
from echelon.models.layers import Rows, materialize
from echelon.models.loading import native_info
from echelon.models.prefix_cache import PrefixCache
from echelon.models.prefixes import lay_out, without_padding
from echelon.models.rotary import Rotary, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.decoder_weights import DecoderLayer, DecoderWeights
    from echelon.models.layers import Linear, RmsNorm
    from echelon.models.prefix_cache import CachedPrefix
    from echelon.models.prefixes import Prefix, StepLayout
    from echelon.models.prompts import Answers
    from echelon.models.qwen import DecoderArchitecture
    from echelon.types import FloatArray, IntArray, TokenBatch


class DecoderScorer:
    """A :class:`~echelon.models.base.Scorer` over packed rows with shared prefixes."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        weights: DecoderWeights,
        device: torch.device,
        precision: str,
        threads: int,
    ) -> None:
        self._architecture = architecture
        self._weights: DecoderWeights | None = weights
        self._device = device
        self._dtype = getattr(torch, DTYPES[precision])
        self._mapped = MappedPages.of(weights.words)
        self._rotary = Rotary(architecture.theta, architecture.head_size)
        self._prefixes = PrefixCache()
        self._token_bytes = 2 * architecture.layers * architecture.key_heads
        self._token_bytes *= architecture.head_size * self._dtype.itemsize
        self.info = native_info(architecture, weights.loaded_bytes, device, precision, threads)

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step; see :class:`~echelon.models.base.Scorer`."""
        self._architecture.check_ids(batch.ids)
        texts = np.split(batch.ids, batch.offsets[1:-1])
        if self._architecture.classifies:
            texts = [without_padding(text, self._architecture.padding_id) for text in texts]
        return run_step(lambda: self._forward(texts))

    def release(self) -> None:
        """Free cached memory, that of prefixes too."""
        self._prefixes.clear()
        release_memory(self._device)

    def close(self) -> None:
        """Free the weights."""
        self._weights = self._mapped = None
        self.release()

    def _forward(self, texts: Sequence[IntArray]) -> Tensor:
        """Logits [pairs] of pairs as token ids."""
        if self._weights is None:
            raise RuntimeError("This is a bug: a closed scorer was asked to score.")
        layout = lay_out(texts, [self._prefixes.known(text) for text in texts])
        cached = [self._prefixes.find(p.ids) if p.known else None for p in layout.prefixes]
        step = _DecoderStep(self._architecture, layout, self._rotary, self._device, self._dtype)
        rows = self._embed(self._weights.words, layout.ids)
        kept = [self._room_for(prefix) for prefix in layout.prefixes]
        lasts = step.run(self._weights.layers, rows, cached, kept)
        logits = self._weights.norm(lasts) @ self._weights.head
        for prefix, layers in zip(layout.prefixes, kept, strict=True):
            if layers is not None:
                self._prefixes.keep(prefix.ids, layers)
        return logits[torch.from_numpy(np.argsort(layout.order)).to(self._device)]

    def _room_for(self, prefix: Prefix) -> list[KeysAndValues] | None:
        """A list for the keys and values to keep of a prefix; None if they are or do not fit."""
        fits = len(prefix.ids) * self._token_bytes <= self._prefixes.max_bytes
        return [] if fits and prefix.known < len(prefix.ids) else None

    def _embed(self, words: Tensor, ids: IntArray) -> Tensor:
        """float32 [rows, hidden]."""
        rows = functional.embedding(torch.from_numpy(ids).to(self._device), words).float()
        if self._mapped is not None:
            self._mapped.count_rows(len(ids))
        return rows


class _DecoderStep:
    """One step through the layers."""

    def __init__(
        self,
        architecture: DecoderArchitecture,
        layout: StepLayout,
        rotary: Rotary,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._size = architecture.head_size
        self._heads = (architecture.query_heads, architecture.key_heads)
        self._dtype = dtype
        self._attention = CausalAttention(layout, self._heads, device, dtype)
        positions = torch.from_numpy(layout.positions).to(device)
        self._turn = rotary.tables(positions)
        # A round number of rows here too; see `with_filler`.
        filler = -len(layout.lasts) % MIN_ROWS
        lasts = np.pad(layout.lasts, (0, filler), mode="edge")
        self._lasts = torch.from_numpy(lasts).to(device)

    def run(
        self,
        layers: Sequence[DecoderLayer],
        rows: Tensor,
        cached: Sequence[CachedPrefix | None],
        kept: Sequence[list[KeysAndValues] | None],
    ) -> Tensor:
        """Embedded rows → the pairs' last rows and filler, [pairs or more, hidden].

        Keys and values of prefixes are taken from ``cached`` and appended to ``kept``, layer by
        layer, where these are not None.
        """
        product = None
        for index, layer in enumerate(layers):
            normed = add_and_norm(rows, product, layer.attention_norm, self._dtype)
            query, own = self._project(layer, normed)
            past = [None if prefix is None else prefix.layers[index] for prefix in cached]
            beginnings = self._attention.beginnings(own, past)
            for beginning, copies in zip(beginnings, kept, strict=True):
                if copies is not None:
                    copies.append(beginning.map(torch.clone))
            if layer.queries is None:
                mixed = self._attention.attend(query, own, beginnings)
            else:
                rows = rows[self._lasts]
                mixed = self._attention.attend_last(query, own, beginnings)
            product = materialize(layer.attention_out(Rows(mixed)))
            normed = add_and_norm(rows, product, layer.feed_forward_norm, self._dtype)
            product = layer.feed_forward(normed)
        return rows if product is None else rows + product

    def _project(self, layer: DecoderLayer, rows: Tensor) -> tuple[Tensor, KeysAndValues]:
        """Queries [rows, heads, size], and keys and values, at their positions."""
        queries, keys = self._heads
        parts = self._split(layer.qkv, rows)
        if layer.queries is None:
            query, turn = parts[:, :queries], self._turn
        else:
            query = self._split(layer.queries, rows[self._lasts])
            turn = (self._turn[0][self._lasts], self._turn[1][self._lasts])
        key = _turned(parts[:, -2 * keys : -keys], layer.key_norm, self._turn)
        return _turned(query, layer.query_norm, turn), KeysAndValues(key, parts[:, -keys:])

    def _split(self, linear: Linear, rows: Tensor) -> Tensor:
        """The layer's output as heads, [rows, heads, size]."""
        return materialize(linear(Rows(rows))).view(len(rows), -1, self._size)


def _turned(heads: Tensor, norm: RmsNorm | None, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, normalised if the model does, and at their positions; computed in fp32."""
    if has_card_kernels(heads):
        weight, epsilon = (None, 0.0) if norm is None else (norm.weight, norm.epsilon)
        return turned(heads, turn, weight, epsilon)

    return rotate(heads, *turn, norm)


def open_native(  # noqa: PLR0913 - what the registry knows of a model
    *,
    folder: Path,
    architecture: DecoderArchitecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
    answers: Answers | None = None,
) -> Scorer:
    """Open a decoder.

    Args:
        folder: the model's.
        architecture: its shape.
        device: where it runs.
        plan: precision of its linear layers.
        threads: CPU threads of a step, for its :class:`ModelInfo`.
        label: index of a classifier's output that is the score.
        answers: tokens of a language model whose logits are the score; None for a classifier.
    """
    weights = load_weights(Checkpoint(folder), architecture, device, plan, label, answers)
    return DecoderScorer(architecture, weights, device, plan.precision, threads)
