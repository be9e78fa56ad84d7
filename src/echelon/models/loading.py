"""Turns tensors of a checkpoint into layers in a model's precision, and counts what they take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from echelon.models.device import DTYPES, device_name, half_precision
from echelon.models.float8 import Float8Linear, fits
from echelon.models.gated import PackedGate, StackedGate
from echelon.models.kernels import used_level
from echelon.models.layers import (
    Int8Linear,
    Norm,
    PrepackedLinear,
    ProbedLinear,
    make_linear,
    prepacks,
)
from echelon.types import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from echelon.models.architecture import LayerPlan
    from echelon.models.checkpoint import Checkpoint
    from echelon.models.families import NativeShape
    from echelon.models.gated import Gate
    from echelon.models.layers import Linear

    Tensors = dict[str, Tensor]


def native_info(
    shape: NativeShape, loaded_bytes: int, device: torch.device, precision: str, threads: int
) -> ModelInfo:
    """The :class:`ModelInfo` of a native model on any device."""
    return ModelInfo(
        family=shape.model_type,
        device=str(device),
        device_name=device_name(device),
        precision=precision,
        max_tokens=shape.max_tokens,
        padding="none",
        weights_bytes=loaded_bytes,
        threads=threads,
        lower_precision=half_precision(device),
        kernels=used_level() if device.type == "cpu" else None,
    )


class WeightLoader:
    """Makes layers one after another.

    Args:
        checkpoint: the files.
        device: where the layers compute.
        plan: their precision.
        root: beginning of the names of layers, which their names for ``keep_bf16`` do without.

    Attributes:
        loaded_bytes: memory of all layers made so far; mapped tables are not counted.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, plan: LayerPlan, root: str
    ) -> None:
        self.checkpoint, self.device, self.plan, self._root = checkpoint, device, plan, root
        self.dtype = getattr(torch, DTYPES[plan.precision])
        # On CPU a norm's weights stay in fp32: the kernels, and torch, mix them with bf16 rows.
        mixed = self.dtype == torch.bfloat16 and device.type == "cpu"
        self._norm_dtype = torch.float32 if mixed else self.dtype
        self.loaded_bytes = 0

    def linear(
        self, tensors: Tensors, *names: str, activation: str = "none", shift: float | None = None
    ) -> Linear:
        """A layer in the model's precision that stacks the named ones.

        The layer applies the activation if it can; ``shift`` is that of its input's codes.
        """
        if self._is_dense(tensors, names):
            if self.plan.errors is not None:
                name = names[-1].removeprefix(self._root)
                int8 = Int8Linear(*stacked(tensors, names), None)
                return ProbedLinear(self.dense(tensors, *names), int8, name, self.plan.errors)
            return self.dense(tensors, *names, activation=activation)
        weight, bias = stacked(tensors, names)
        if self.plan.precision == "fp8":
            layer = Float8Linear(weight, bias, self.device)
            self.loaded_bytes += layer.nbytes
            return layer
        self.loaded_bytes += weight.numel() + 8 * len(weight)  # codes; scales and bias
        return Int8Linear(weight, bias, shift)

    def gate(self, tensors: Tensors, *names: str, activation: str) -> Gate:
        """The gate of a feed-forward, from one layer that stacks its two, or from both.

        The part with the activation comes first. Int8 multiplies both at once.
        """
        plain = self._is_dense(tensors, names) and self.plan.errors is None
        if not plain or not prepacks(self.device, self.dtype):
            return StackedGate(self.linear(tensors, *names), activation)
        weight, bias = stacked(tensors, names)
        biases = (None, None) if bias is None else bias.to(self.dtype, copy=True).chunk(2)
        active, gate = weight.to(self.dtype).chunk(2)
        numbers = weight.numel() + (0 if bias is None else bias.numel())
        self.loaded_bytes += numbers * self.dtype.itemsize
        return PackedGate(
            PrepackedLinear(active, biases[0], activation), PrepackedLinear(gate, biases[1], "none")
        )

    def dense(
        self,
        tensors: Tensors,
        *names: str,
        dtype: torch.dtype | None = None,
        activation: str = "none",
    ) -> Linear:
        """The same in ``dtype``, or the model's, whatever the plan says."""
        dtype = dtype or self.dtype
        weight, bias = stacked(tensors, names)
        numbers = weight.numel() + (0 if bias is None else bias.numel())
        self.loaded_bytes += numbers * dtype.itemsize
        return make_linear(weight, bias, self.device, dtype, activation)

    def _is_dense(self, tensors: Tensors, names: Sequence[str]) -> bool:
        """Whether the layer that stacks the named ones is in the dtype of the activations."""
        if self.plan.precision == "fp8":
            return not fits([tensors[f"{name}.weight"] for name in names])
        last = names[-1].removeprefix(self._root)
        return self.plan.precision != "int8" or last in self.plan.keep_bf16

    def norm(
        self, tensors: Tensors, name: str, epsilon: float, dtype: torch.dtype | None = None
    ) -> Norm:
        """A LayerNorm, with or without bias."""
        parts = [tensors.get(f"{name}.{part}") for part in ("weight", "bias")]
        weight, bias = (
            None if part is None else part.to(self.device, dtype or self._norm_dtype, copy=True)
            for part in parts
        )
        if weight is None:
            raise RuntimeError(f"This is a bug: {name} was not read.")
        self.loaded_bytes += weight.nbytes + (0 if bias is None else bias.nbytes)
        return Norm(weight, bias, epsilon)


def stacked(tensors: Tensors, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one layer that stacks the named ones; all have a bias or none has."""
    weights = [tensors[f"{name}.weight"] for name in names]
    biases = [tensors[f"{name}.bias"] for name in names if f"{name}.bias" in tensors]
    if len(names) == 1:
        return weights[0], biases[0] if biases else None
    return torch.cat(weights), torch.cat(biases) if biases else None
