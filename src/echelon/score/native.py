"""Loading a native model: tensor names, shapes and the order they are read in.

One layer's tensors are mapped, converted and dropped before the next layer's are touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.errors import BadCheckpoint
from echelon.score.architecture import HEAD_TENSORS
from echelon.score.cuda import CudaScorer
from echelon.score.device import DTYPES, release_memory
from echelon.score.linear import make_linear
from echelon.score.packed import Embeddings, Head, Layer, Norm, PackedScorer, Weights

if TYPE_CHECKING:
    from torch import Tensor

    from echelon.score.architecture import Architecture
    from echelon.score.base import Scorer
    from echelon.score.checkpoint import Checkpoint
    from echelon.score.linear import Linear

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, ...]]


def open_native(
    checkpoint: Checkpoint,
    architecture: Architecture,
    device: torch.device,
    precision: str,
    threads: int,
    label: int,
) -> Scorer:
    """Load a native model.

    Args:
        checkpoint: its weights.
        architecture: its shape.
        device: where to.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        threads: CPU threads in use; 0 on other devices.
        label: which output of the head is the score.

    Raises:
        BadCheckpoint: the weights do not fit the configuration.
    """
    _refuse_more_layers(checkpoint, architecture)
    with torch.inference_mode():
        loader = _Loader(checkpoint, architecture, device, getattr(torch, DTYPES[precision]))
        embeddings = loader.embeddings()
        layers = tuple(loader.layer(i) for i in range(architecture.layers))
        head = loader.head(label)
    weights = Weights(embeddings, layers, head, loader.loaded_bytes)
    if device.type == "cuda":
        return CudaScorer(architecture, weights, device, precision)
    return PackedScorer(architecture, weights, device, precision, threads)


def _refuse_more_layers(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Weights with more layers than the configuration would load, and score wrongly."""
    surplus = f"{architecture.prefix}.encoder.layer.{architecture.layers}."
    if any(name.startswith(surplus) for name in checkpoint.names):
        raise BadCheckpoint(
            f"{checkpoint.folder}: the weights hold {surplus}*, beyond config.json's "
            f"num_hidden_layers={architecture.layers}. Use the config.json that came with these "
            "weights."
        )


class _Loader:
    """Reads one part of the model after another and counts the bytes it keeps."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint = checkpoint
        self._shape = architecture
        self._device = device
        self._dtype = dtype
        self.loaded_bytes = 0

    def embeddings(self) -> Embeddings:
        """The three tables as they are on disk, and their norm in fp32."""
        shape, root = self._shape, f"{self._shape.prefix}.embeddings"
        names: Shapes = {
            f"{root}.word_embeddings.weight": (shape.vocabulary, shape.hidden),
            f"{root}.position_embeddings.weight": (shape.table_positions, shape.hidden),
            f"{root}.token_type_embeddings.weight": (shape.segments, shape.hidden),
        }
        tensors = self._checkpoint.read(names)
        words, positions, segments = (tensors[name].to(self._device) for name in names)
        if self._device.type != "cpu":
            self.loaded_bytes += words.nbytes + positions.nbytes + segments.nbytes
        names = self._norm_shapes(f"{root}.LayerNorm")
        norm = self._norm(f"{root}.LayerNorm", self._checkpoint.read(names), torch.float32)
        return Embeddings(words, positions, segments, norm)

    def layer(self, index: int) -> Layer:
        """Layer ``index``; the last one keeps its query projection apart."""
        root = f"{self._shape.prefix}.encoder.layer.{index}"
        hidden, wide = self._shape.hidden, self._shape.intermediate
        projections = [f"{root}.attention.self.{part}" for part in ("query", "key", "value")]
        shapes = {
            **{k: v for name in projections for k, v in _dense_shapes(name, hidden, hidden)},
            **dict(_dense_shapes(f"{root}.attention.output.dense", hidden, hidden)),
            **self._norm_shapes(f"{root}.attention.output.LayerNorm"),
            **dict(_dense_shapes(f"{root}.intermediate.dense", wide, hidden)),
            **dict(_dense_shapes(f"{root}.output.dense", hidden, wide)),
            **self._norm_shapes(f"{root}.output.LayerNorm"),
        }
        tensors = self._checkpoint.read(shapes)
        last = index == self._shape.layers - 1
        layer = Layer(
            queries=self._linear(tensors, projections[0]) if last else None,
            qkv=self._linear(tensors, *(projections[1:] if last else projections)),
            attention_out=self._linear(tensors, f"{root}.attention.output.dense"),
            attention_norm=self._norm(f"{root}.attention.output.LayerNorm", tensors),
            up=self._linear(
                tensors, f"{root}.intermediate.dense", activation=self._shape.activation
            ),
            down=self._linear(tensors, f"{root}.output.dense"),
            output_norm=self._norm(f"{root}.output.LayerNorm", tensors),
        )
        # Else the C library keeps the freed copies: a third more memory than the weights.
        release_memory(self._device)
        return layer

    def head(self, label: int) -> Head:
        """The classifier, its projection cut to the chosen label."""
        dense, project = HEAD_TENSORS[self._shape.prefix]
        hidden = self._shape.hidden
        shapes = dict(_dense_shapes(dense, hidden, hidden))
        shapes |= dict(_dense_shapes(project, len(self._shape.labels), hidden))
        tensors = self._checkpoint.read(shapes)
        for part in ("weight", "bias"):
            tensors[f"{project}.{part}"] = tensors[f"{project}.{part}"][label : label + 1]
        # In fp32 whatever the layers compute in: a half-width logit has so few digits that
        # different documents tie.
        exact = (self._linear(tensors, name, dtype=torch.float32) for name in (dense, project))
        return Head(*exact)

    def _linear(
        self,
        tensors: Tensors,
        *names: str,
        dtype: torch.dtype | None = None,
        activation: str = "none",
    ) -> Linear:
        """One linear layer from one or several stacked ones."""
        dtype = dtype or self._dtype
        weights = [tensors[f"{name}.weight"] for name in names]
        biases = [tensors[f"{name}.bias"] for name in names]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        self.loaded_bytes += (weight.numel() + bias.numel()) * dtype.itemsize
        return make_linear(weight, bias, self._device, dtype, activation)

    def _norm(self, name: str, tensors: Tensors, dtype: torch.dtype | None = None) -> Norm:
        weight, bias = (
            tensors[f"{name}.{part}"].to(self._device, dtype or self._dtype, copy=True)
            for part in ("weight", "bias")
        )
        self.loaded_bytes += weight.nbytes + bias.nbytes
        return Norm(weight, bias, self._shape.epsilon)

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (self._shape.hidden,) for part in ("weight", "bias")}


def _dense_shapes(name: str, out: int, into: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, into)), (f"{name}.bias", (out,))]
