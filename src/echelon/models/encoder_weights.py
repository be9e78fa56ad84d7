"""Loading a native model: tensor names, shapes and the order they are read in.

One layer's tensors are mapped, converted and dropped before the next layer's are touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.errors import BadCheckpoint
from echelon.models.architecture import HEAD_TENSORS
from echelon.models.device import DTYPES, release_memory
from echelon.models.encoder import Embeddings, Head, Layer, PackedScorer, Weights
from echelon.models.encoder_cuda import CudaScorer
from echelon.models.fused import SHIFTS, Norm
from echelon.models.layers import FeedForward, Int8Linear, ProbedLinear, make_linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from echelon.models.architecture import Architecture, LayerPlan
    from echelon.models.base import Scorer
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.layers import Linear

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, ...]]


def open_native(
    checkpoint: Checkpoint,
    architecture: Architecture,
    device: torch.device,
    plan: LayerPlan,
    threads: int,
    label: int,
) -> Scorer:
    """Load a native model.

    Args:
        checkpoint: its weights.
        architecture: its shape.
        device: where to.
        plan: what its linear layers compute in.
        threads: CPU threads in use; 0 on other devices.
        label: which output of the head is the score.

    Raises:
        BadCheckpoint: the weights do not fit the configuration.
    """
    _refuse_more_layers(checkpoint, architecture)
    with torch.inference_mode():
        loader = _Loader(checkpoint, architecture, device, plan)
        embeddings = loader.embeddings()
        layers = tuple(loader.layer(i) for i in range(architecture.layers))
        head = loader.head(label)
    weights = Weights(embeddings, layers, head, loader.loaded_bytes)
    if device.type == "cuda":
        return CudaScorer(architecture, weights, device, plan.precision)
    return PackedScorer(architecture, weights, device, plan.precision, threads)


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
        plan: LayerPlan,
    ) -> None:
        self._checkpoint = checkpoint
        self._shape = architecture
        self._device = device
        self._plan = plan
        self._dtype = getattr(torch, DTYPES[plan.precision])
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
            feed_forward=self._feed_forward(tensors, root),
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
        exact = (self._dense(tensors, name, dtype=torch.float32) for name in (dense, project))
        return Head(*exact)

    def _feed_forward(self, tensors: Tensors, root: str) -> FeedForward:
        activation = self._shape.activation
        up, down = f"{root}.intermediate.dense", f"{root}.output.dense"
        return FeedForward(
            self._linear(tensors, up, activation=activation),
            self._linear(tensors, down, shift=SHIFTS[activation]),
            activation,
        )

    def _linear(
        self,
        tensors: Tensors,
        *names: str,
        activation: str = "none",
        shift: float | None = None,
    ) -> Linear:
        """A layer in the model's precision, from one or several stacked ones.

        Args:
            tensors: what was read.
            names: of the layers to stack.
            activation: applied to the product where the layer can.
            shift: how far eight-bit codes of its input are shifted; None for not at all.
        """
        name = names[-1].removeprefix(f"{self._shape.prefix}.encoder.")
        if self._plan.precision != "int8" or name in self._plan.keep_bf16:
            if self._plan.errors is not None:
                int8 = Int8Linear(*_stacked(tensors, names), None)
                return ProbedLinear(self._dense(tensors, *names), int8, name, self._plan.errors)
            return self._dense(tensors, *names, activation=activation)
        weight, bias = _stacked(tensors, names)
        self.loaded_bytes += weight.numel() + 8 * bias.numel()  # codes; scales and bias
        return Int8Linear(weight, bias, shift)

    def _dense(
        self,
        tensors: Tensors,
        *names: str,
        dtype: torch.dtype | None = None,
        activation: str = "none",
    ) -> Linear:
        dtype = dtype or self._dtype
        weight, bias = _stacked(tensors, names)
        self.loaded_bytes += (weight.numel() + bias.numel()) * dtype.itemsize
        return make_linear(weight, bias, self._device, dtype, activation)

    def _norm(self, name: str, tensors: Tensors, dtype: torch.dtype | None = None) -> Norm:
        # On CPU a norm's weights stay in fp32: the kernels, and torch, mix them with bf16 rows.
        dtype = dtype or (
            torch.float32
            if self._dtype == torch.bfloat16 and self._device.type == "cpu"
            else self._dtype
        )
        weight, bias = (
            tensors[f"{name}.{part}"].to(self._device, dtype, copy=True)
            for part in ("weight", "bias")
        )
        self.loaded_bytes += weight.nbytes + bias.nbytes
        return Norm(weight, bias, self._shape.epsilon)

    def _norm_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (self._shape.hidden,) for part in ("weight", "bias")}


def _stacked(tensors: Tensors, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Weight and bias of one layer that computes what the named ones do."""
    if len(names) == 1:
        return tensors[f"{names[0]}.weight"], tensors[f"{names[0]}.bias"]
    parts = ([tensors[f"{name}.{part}"] for name in names] for part in ("weight", "bias"))
    weight, bias = map(torch.cat, parts)
    return weight, bias


def _dense_shapes(name: str, out: int, into: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, into)), (f"{name}.bias", (out,))]
