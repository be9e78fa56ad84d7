"""ModernBERT on packed rows: Warner and others, Smarter, Better, Faster, Longer, 2024.

All tokens of a step are rows of one matrix, as in :mod:`echelon.models.encoder`. Norms come before
the layers, positions are rotary, feed-forwards have a gate, and most layers see only a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from echelon.models.architecture import positions_from_zero
from echelon.models.attention_cpu import AttentionLayout
from echelon.models.blocks import add_and_norm
from echelon.models.checkpoint import Checkpoint
from echelon.models.device import release_memory
from echelon.models.gated import GatedFeedForward
from echelon.models.heads import Head, HeadProduct, load_chain
from echelon.models.layers import Norm, Rows, materialize
from echelon.models.loading import WeightLoader
from echelon.models.local_attention import LocalAttention, attend_pairs
from echelon.models.packed import PackedEncoder
from echelon.models.rotary import Rotary, rotate_in_place

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.layers import Linear
    from echelon.models.modernbert import ModernBertArchitecture
    from echelon.types import TokenBatch

    Tensors = dict[str, Tensor]
    Shapes = dict[str, tuple[int, ...]]
    Attend = Callable[[Tensor], Tensor]  # of [tokens, 3, heads, size], which it changes


@dataclass(frozen=True, slots=True)
class ModernBertLayer:
    """One transformer layer."""

    attention_norm: Norm | None  # the first layer has none
    qkv: Linear
    attention_out: Linear
    feed_forward_norm: Norm
    feed_forward: GatedFeedForward


@dataclass(frozen=True, slots=True)
class ModernBertWeights:
    """A loaded model; ``loaded_bytes`` does not count a mapped table."""

    words: Tensor  # as on disk; on CPU it is mapped
    words_norm: Norm
    layers: tuple[ModernBertLayer, ...]
    final_norm: Norm
    head: Head
    loaded_bytes: int


class ModernBertScorer(PackedEncoder["ModernBertArchitecture", ModernBertWeights]):
    """A :class:`~echelon.models.base.Scorer` over packed rows, on CPU and CUDA."""

    def _logits(self, weights: ModernBertWeights, batch: TokenBatch) -> Tensor:
        shape = self._architecture
        rows = weights.words_norm(self._look_up(weights.words, batch.ids))
        layout = AttentionLayout.of(batch.offsets)
        attentions = self._attentions(batch, layout)
        firsts = layout.firsts.to(self._device) if weights.head.pooling == "cls" else None
        # The sum of all layers stays in fp32 in every precision: it costs little, and rounding it
        # 44 times is most of what bf16 loses.
        product, last = None, len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            normed = add_and_norm(rows, product, layer.attention_norm, self._dtype)
            mixed = self._attention(layer, normed, attentions[shape.local[index]])
            if index == last and firsts is not None:
                mixed, rows = mixed[firsts], rows[firsts]
            product = materialize(layer.attention_out(Rows(mixed)))
            normed = add_and_norm(rows, product, layer.feed_forward_norm, self._dtype)
            product = layer.feed_forward(normed)
        found = add_and_norm(rows, product, weights.final_norm, torch.float32)
        return weights.head(found, layout.offsets.to(self._device))

    def _attention(self, layer: ModernBertLayer, normed: Tensor, attend: Attend) -> Tensor:
        """[tokens, hidden] → the same."""
        product = materialize(layer.qkv(Rows(normed)))
        return attend(product.view(len(normed), 3, *self._architecture.head_shape))

    def _attentions(self, batch: TokenBatch, layout: AttentionLayout) -> tuple[Attend, Attend]:
        """The attention of global and that of local layers, with their rotary positions."""
        positions = torch.from_numpy(positions_from_zero(batch)).to(self._device)
        local = LocalAttention(layout, self._architecture.reach, self._device, self._dtype)

        def turned(rotary: Rotary, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
            tables = rotary.tables(positions)

            def attend_heads(heads: Tensor) -> Tensor:
                rotate_in_place(heads[:, :2], *tables)
                return attend(*heads.unbind(1))

            return attend_heads

        size = self._architecture.head_shape[1]
        wide, near = (Rotary(theta, size) for theta in self._architecture.thetas)
        return turned(wide, partial(attend_pairs, layout=layout)), turned(near, local)


def open_native(
    *,
    folder: Path,
    architecture: ModernBertArchitecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Open a model; ``label`` is the index of the head's output that is the score."""
    weights = load_weights(folder, architecture, device, plan, label)
    return ModernBertScorer(
        architecture,
        weights,
        words=weights.words,
        loaded_bytes=weights.loaded_bytes,
        device=device,
        precision=plan.precision,
        threads=threads,
    )


def load_weights(
    folder: Path,
    architecture: ModernBertArchitecture,
    device: torch.device,
    plan: LayerPlan,
    label: int,
) -> ModernBertWeights:
    """Load a model; arguments as of :func:`open_native`."""
    with torch.inference_mode():
        loader = _ModernBertLoader(Checkpoint(folder), architecture, device, plan)
        return loader.weights(folder, label)


class _ModernBertLoader(WeightLoader):
    """Reads one part of the model after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: ModernBertArchitecture,
        device: torch.device,
        plan: LayerPlan,
    ) -> None:
        self._shape = architecture
        # The model without a classifier is saved without the name of its part.
        self._root = "" if architecture.chain is not None else "model."
        super().__init__(checkpoint, device, plan, self._root)

    def weights(self, folder: Path, label: int) -> ModernBertWeights:
        """All parts."""
        shape = self._shape
        self.checkpoint.refuse_surplus(f"{self._root}layers.", shape.layers)
        name = f"{self._root}embeddings.tok_embeddings.weight"
        words = self.checkpoint.read({name: (shape.vocabulary, shape.hidden)})[name]
        words = words.to(self.device)
        if self.device.type != "cpu":
            self.loaded_bytes += words.nbytes
        words_norm = self._own_norm(f"{self._root}embeddings.norm")
        layers = tuple(self._layer(index) for index in range(shape.layers))
        final_norm = self._own_norm(f"{self._root}final_norm")
        chain = shape.chain
        head = self._classifier(label) if chain is None else load_chain(self, folder, chain)
        return ModernBertWeights(words, words_norm, layers, final_norm, head, self.loaded_bytes)

    def _layer(self, index: int) -> ModernBertLayer:
        shape, root = self._shape, f"{self._root}layers.{index}"
        hidden, wide = shape.hidden, shape.intermediate
        qkv, mixed = f"{root}.attn.Wqkv", f"{root}.attn.Wo"
        up, down = f"{root}.mlp.Wi", f"{root}.mlp.Wo"
        norms = [f"{root}.attn_norm"] * (index > 0) + [f"{root}.mlp_norm"]
        tensors = self.checkpoint.read(
            {
                **_dense(qkv, 3 * hidden, hidden, bias=shape.attention_bias),
                **_dense(mixed, hidden, hidden, bias=shape.attention_bias),
                **_dense(up, 2 * wide, hidden, bias=shape.feed_forward_bias),
                **_dense(down, hidden, wide, bias=shape.feed_forward_bias),
                **dict.fromkeys([p for norm in norms for p in self._norm_parts(norm)], (hidden,)),
            }
        )
        layer = ModernBertLayer(
            attention_norm=self._norm(tensors, norms[0]) if index else None,
            qkv=self.linear(tensors, qkv),
            attention_out=self.linear(tensors, mixed),
            feed_forward_norm=self._norm(tensors, norms[-1]),
            feed_forward=GatedFeedForward(
                self.gate(tensors, up, activation=shape.activation), self.linear(tensors, down)
            ),
        )
        release_memory(self.device)
        return layer

    def _classifier(self, label: int) -> Head:
        """Dense, activation, norm, and the projection to the chosen label."""
        shape, hidden = self._shape, self._shape.hidden
        tensors = self.checkpoint.read(
            {
                **_dense("head.dense", hidden, hidden, bias=shape.classifier_bias),
                **dict.fromkeys(self._norm_parts("head.norm"), (hidden,)),
                **_dense("classifier", len(shape.labels), hidden, bias=True),
            }
        )
        for part in ("classifier.weight", "classifier.bias"):
            tensors[part] = tensors[part][label : label + 1]
        dense, project = (
            self.dense(tensors, name, dtype=torch.float32) for name in ("head.dense", "classifier")
        )
        layers = (
            HeadProduct(dense, shape.classifier_activation),
            self._norm(tensors, "head.norm"),
            HeadProduct(project),
        )
        return Head(layers, shape.pooling)

    def _own_norm(self, name: str) -> Norm:
        shapes = dict.fromkeys(self._norm_parts(name), (self._shape.hidden,))
        return self._norm(self.checkpoint.read(shapes), name)

    def _norm(self, tensors: Tensors, name: str) -> Norm:
        return self.norm(tensors, name, self._shape.epsilon, torch.float32)

    def _norm_parts(self, name: str) -> list[str]:
        parts = ("weight", "bias") if self._shape.norm_bias else ("weight",)
        return [f"{name}.{part}" for part in parts]


def _dense(name: str, out: int, into: int, *, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out, into)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})
