"""The weights of Qwen3 and Qwen2 decoders, and of Llamas, loaded layer by layer.

Of the vocabulary's head no more than one vector is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from echelon.models.device import release_memory
from echelon.models.gated import GatedFeedForward
from echelon.models.layers import RmsNorm
from echelon.models.loading import WeightLoader

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.layers import Linear
    from echelon.models.prompts import Answers
    from echelon.models.qwen import DecoderArchitecture

    Shapes = dict[str, tuple[int, ...]]

WORDS = "model.embed_tokens.weight"
"""The word table, and the vocabulary's head of a tied model."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One transformer layer; ``qkv`` is fused, but the last layer has separate queries."""

    attention_norm: RmsNorm
    queries: Linear | None
    qkv: Linear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    attention_out: Linear
    feed_forward_norm: RmsNorm
    feed_forward: GatedFeedForward


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A loaded decoder; ``loaded_bytes`` does not count a mapped table."""

    words: Tensor  # [vocabulary, hidden], as on disk
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    head: Tensor  # float32 [hidden]
    loaded_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    architecture: DecoderArchitecture,
    device: torch.device,
    plan: LayerPlan,
    label: int,
    answers: Answers | None,
) -> DecoderWeights:
    """Load a decoder; arguments as of :func:`echelon.models.decoder.open_native`."""
    checkpoint.refuse_surplus("model.layers.", architecture.layers)
    with torch.inference_mode():
        loader = _DecoderLoader(checkpoint, architecture, device, plan)
        words = loader.words()
        layers = tuple(loader.layer(index) for index in range(architecture.layers))
        norm, head = loader.rms_norm("model.norm"), loader.head(label, answers)
    return DecoderWeights(words, layers, norm, head, loader.loaded_bytes)


class _DecoderLoader(WeightLoader):
    """Reads one part of the model after another."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: DecoderArchitecture,
        device: torch.device,
        plan: LayerPlan,
    ) -> None:
        self._architecture = architecture
        super().__init__(checkpoint, device, plan, "model.")

    def words(self) -> Tensor:
        """The word table as on disk; on CPU it is mapped."""
        words = self._read(WORDS, self._architecture.vocabulary).to(self.device)
        self.loaded_bytes += 0 if self.device.type == "cpu" else words.nbytes
        return words

    def layer(self, index: int) -> DecoderLayer:
        """Layer ``index``; the last one has separate queries if the head reads last rows only."""
        shape, root = self._architecture, f"model.layers.{index}"
        attention, mlp = f"{root}.self_attn", f"{root}.mlp"
        query, key, value, out = (f"{attention}.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{mlp}.{part}_proj" for part in ("gate", "up", "down"))
        wide, narrow = (heads * shape.head_size for heads in (shape.query_heads, shape.key_heads))
        last = shape.reads_last and index == shape.layers - 1
        hidden, inner, bias = shape.hidden, shape.intermediate, shape.qkv_bias
        queries = self._linear({query: wide}, hidden, bias=bias) if last else None
        rest = {key: narrow, value: narrow} if last else {query: wide, key: narrow, value: narrow}
        ups = self._dense({gate: inner, up: inner}, hidden)
        layer = DecoderLayer(
            attention_norm=self.rms_norm(f"{root}.input_layernorm"),
            queries=queries,
            qkv=self._linear(rest, hidden, bias=bias),
            query_norm=self._head_norm(f"{attention}.q_norm"),
            key_norm=self._head_norm(f"{attention}.k_norm"),
            attention_out=self._linear({out: hidden}, wide, bias=shape.out_bias),
            feed_forward_norm=self.rms_norm(f"{root}.post_attention_layernorm"),
            feed_forward=GatedFeedForward(
                self.gate(ups, gate, up, activation="silu"),
                self._linear({down: hidden}, inner, bias=False),
            ),
        )
        # Else the C library keeps the freed copies: a third more memory than the weights.
        release_memory(self.device)
        return layer

    def rms_norm(self, name: str, width: int | None = None) -> RmsNorm:
        """A norm, over the hidden width by default."""
        weight = self._read(f"{name}.weight", width or self._architecture.hidden, inner=())
        weight = weight.to(self.device, torch.float32, copy=True)
        self.loaded_bytes += weight.nbytes
        return RmsNorm(weight, self._architecture.epsilon)

    def head(self, label: int, answers: Answers | None) -> Tensor:
        """The vector whose product with a pair's last row is its logit, in fp32."""
        shape = self._architecture
        if shape.classifies:
            vector = self._read("score.weight", len(shape.labels))[label].float()
        elif answers is None:
            raise RuntimeError("This is a bug: a language model was opened without its answers.")
        else:
            shape.check_ids(np.array(answers.ids))
            table = self._read(WORDS if shape.tied else "lm_head.weight", shape.vocabulary)
            vector = table[answers.yes].float()
            if answers.no is not None:
                vector = vector - table[answers.no].float()
            vector = vector / answers.temperature
        self.loaded_bytes += vector.nbytes
        return vector.to(self.device, copy=True)

    def _head_norm(self, name: str) -> RmsNorm | None:
        shape = self._architecture
        return self.rms_norm(name, shape.head_size) if shape.norms_heads else None

    def _read(self, name: str, rows: int, inner: tuple[int, ...] | None = None) -> Tensor:
        """A tensor [rows, hidden], or [rows, *inner]."""
        shape = (rows, *((self._architecture.hidden,) if inner is None else inner))
        return self.checkpoint.read({name: shape})[name]

    def _linear(self, outs: dict[str, int], into: int, *, bias: bool) -> Linear:
        """A layer in the model's precision that stacks the named ones, each of so many outputs."""
        return self.linear(self._dense(outs, into, bias=bias), *outs)

    def _dense(self, outs: dict[str, int], into: int, *, bias: bool = False) -> dict[str, Tensor]:
        """The tensors of the named layers."""
        shapes: Shapes = {f"{name}.weight": (out, into) for name, out in outs.items()}
        if bias:
            shapes |= {f"{name}.bias": (out,) for name, out in outs.items()}
        return self.checkpoint.read(shapes)
