"""Linear layers in the layout that the device multiplies fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from echelon.models.device import has_onednn, multiplies_half
from echelon.models.fused import (
    SHIFTS,
    ZERO_POINT,
    Product,
    Rows,
    activate,
    quantize,
    settle,
    values_of,
)
from echelon.models.kernels import kernels

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN_ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
"""As (operation, algorithm) inside oneDNN's product: a pass over memory less."""

TYPICAL_ROWS = 512
"""Rows of a step that oneDNN is told to lay the weights out for."""


class Linear(Protocol):
    """A linear layer.

    Attributes:
        quantized: whether it multiplies codes; rows that come with them save it the making.
        activated: whether it has applied its activation.
    """

    quantized: bool
    activated: bool

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """[rows, in] to [rows, out], the residual added or pending."""
        ...


class DenseLinear:
    """A product in fp32, bf16 or fp16.

    Args:
        weight: [out, in], kept.
        bias: [out], kept.
    """

    quantized = False
    activated = False

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        product = functional.linear(values_of(rows), self._weight, self._bias)
        return Product(product, residual=residual)


class PrepackedLinear:
    """The same in oneDNN's own weight layout, chosen once instead of in every call.

    Args:
        weight: [out, in].
        bias: [out], kept.
        activation: applied inside the product; a layer has this or takes a residual, not both.
    """

    quantized = False

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        operators = torch.ops.mkldnn
        self._packed = operators._reorder_linear_weight(weight, TYPICAL_ROWS)  # noqa: SLF001 - no public name exists
        self._bias = bias
        self.activated = activation != "none"
        self._operation, self._algorithm = ONEDNN_ACTIVATIONS[activation]
        call = operators._linear_pointwise  # noqa: SLF001 - no public name exists
        self._plain, self._adding = call.default, call.binary
        # With kernels the norm that follows adds the residual, and needs no pass of its own either.
        self._leaves_residual = weight.dtype == torch.bfloat16 and kernels() is not None

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        values = values_of(rows)
        if residual is not None and not self._leaves_residual:
            return Product(self._adding(values, residual, self._packed, self._bias, "add"))
        product = self._plain(
            values, self._packed, self._bias, self._operation, [], self._algorithm
        )
        return Product(product, residual=residual)


class Int8Linear:
    """A product of eight-bit codes: a scale for each weight row, and for each row of activations.

    oneDNN multiplies unsigned activations with signed weights; the rows' scales and the bias are
    left pending, see :mod:`echelon.models.fused`.

    Args:
        weight: [out, in].
        bias: [out].
        shift: what was added to activations before they became codes; None for codes around 128.
    """

    quantized = True
    activated = False

    def __init__(self, weight: Tensor, bias: Tensor, shift: float | None) -> None:
        weight = weight.float()
        scales = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        codes = (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        self._zero_point = ZERO_POINT if shift is None else 0
        # The codes stand for x + shift: what shift adds to every product is taken off here.
        added = 0.0 if shift is None else shift * scales * codes.sum(1, dtype=torch.int32)
        self._bias = bias.float() - added
        self._call = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        if rows.codes is None:
            rows = quantize(values_of(rows))
        product = self._call(
            *(rows.codes, 1.0, self._zero_point, self._packed, self._scales, self._zeros, None),
            *(1.0, 0, torch.bfloat16, "none", [], ""),
        )
        return Product(product, rows.scales, self._bias, residual)


class ProbedLinear:
    """A dense layer that measures what error int8 would make in its place.

    Args:
        dense: gives the answer.
        int8: the same layer in codes, around 128.
        name: key of the error.
        errors: relative error of the layer's output, kept as the largest of all steps.
    """

    quantized = False
    activated = False

    def __init__(self, dense: Linear, int8: Linear, name: str, errors: dict[str, float]) -> None:
        self._dense, self._int8 = dense, int8
        self._name, self._errors = name, errors

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        exact = settle(self._dense(rows)).float()
        error = (settle(self._int8(rows)).float() - exact).norm() / exact.norm()
        self._errors[self._name] = max(self._errors.get(self._name, 0.0), float(error))
        return self._dense(rows, residual)


class FeedForward:
    """Up, activation and down, what is between them in the form that ``down`` wants.

    Args:
        up: [hidden] to [intermediate], activated or not.
        down: [intermediate] to [hidden].
        activation: between them.
    """

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self._up, self._down = up, down
        self._activation = "none" if up.activated else activation
        self._shift = SHIFTS[activation] if down.quantized else None
        self.quantized = up.quantized

    def __call__(self, rows: Rows, residual: Tensor) -> Product:
        """[rows, hidden] to [rows, hidden], the residual added or pending."""
        wide = self._up(rows)
        if self._activation == "none" and self._shift is None:
            return self._down(Rows(wide.values), residual)
        return self._down(activate(wide, self._activation, self._shift), residual)


def make_linear(
    weight: Tensor,
    bias: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    activation: str = "none",
) -> Linear:
    """A dense layer in ``dtype`` on ``device``.

    Args:
        weight: [out, in] in any dtype, possibly a view of a mapped file; never kept.
        bias: [out].
        device: where it runs.
        dtype: what it computes in.
        activation: applied inside the product where that can be had, see ``activated``.
    """
    # Copies, so that the mapped checkpoint can be given back.
    weight = torch.empty_like(weight, dtype=dtype, device=device).copy_(weight)
    bias = torch.empty_like(bias, dtype=dtype, device=device).copy_(bias)
    if device.type == "cpu" and _can_prepack(dtype):
        return PrepackedLinear(weight, bias, activation)
    return DenseLinear(weight, bias)


def _can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch build and processor have oneDNN's prepacked product for the dtype."""
    if not has_onednn() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return kind is None or multiplies_half(kind)
