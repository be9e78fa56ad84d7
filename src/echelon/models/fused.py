"""The passes between the products, each in one go where the kernels are there, else in torch.

A product of eight-bit codes arrives without the scales of its rows and without its bias; a dense
one may arrive without its residual. What is pending is settled by whatever reads the product next,
so that no pass over memory is spent on it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.models.kernels import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows,
    "gelu": functional.gelu,
    "gelu_new": lambda rows: functional.gelu(rows, approximate="tanh"),
    "gelu_pytorch_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
"""By the names of ``config.json``."""

KERNEL_ACTIVATIONS = {
    "none": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "relu": 3,
    "silu": 4,
}

SHIFTS = {"gelu": 0.171, "gelu_new": 0.171, "gelu_pytorch_tanh": 0.171, "relu": 0.0, "silu": 0.279}
"""No value of an activation is below minus this: added before quantising, it frees the code's sign
bit for one bit more of precision. The product's bias takes it off again, exactly."""

SIGNED_CODES, SHIFTED_CODES = 127.0, 255.0
"""Codes either side of the middle one, and from zero upwards."""

ZERO_POINT = 128
"""The code of 0 in rows that may be negative."""


BLOCK = 2**18
"""Numbers that torch works on at a time where there are no kernels: what one pass leaves is still
near for the next, and there are few enough calls. Half and twice as many were slower."""


@dataclass(slots=True)
class Rows:
    """Rows of activations: as numbers, as eight-bit codes, or both.

    Attributes:
        values: [rows, width]; None where only codes are needed.
        codes: uint8 [rows, width], ``round(x / scale) + 128``, or from 0 upwards where shifted.
        scales: float32 [rows].
    """

    values: Tensor | None
    codes: Tensor | None = None
    scales: Tensor | None = None

    def __getitem__(self, index: Tensor) -> Rows:
        """Some of the rows."""
        parts = (self.values, self.codes, self.scales)
        return Rows(*(None if part is None else part[index] for part in parts))


@dataclass(slots=True)
class Product:
    """What a linear layer gives; its true value is ``values * scales + bias + residual``.

    Attributes:
        values: [rows, out].
        scales: float32 [rows], or None for 1.
        bias: float32 [out], or None for 0.
        residual: [rows, out], or None for 0.
    """

    values: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None

    def part(self, rows: slice) -> Product:
        """Some of the rows."""
        scales = None if self.scales is None else self.scales[rows]
        residual = None if self.residual is None else self.residual[rows]
        return Product(self.values[rows], scales, self.bias, residual)


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the hidden axis."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        """[rows, hidden], each row normalised."""
        return functional.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.epsilon)


def settle(product: Product) -> Tensor:
    """The product's true value, without a residual, in the layers' dtype."""
    return product.values if product.scales is None else values_of(activate(product, "none"))


def add_norm(product: Product, norm: Norm, *, quantized: bool) -> Rows:
    """LayerNorm of the product's true value, and its codes if the next layer wants them."""
    values = product.values
    if product.residual is not None and _has_kernels(values):
        count, width = values.shape
        out = torch.empty_like(values)
        codes, scales = _code_buffers(values) if quantized else (None, None)
        _call(
            "echelon_add_norm",
            *(values, product.scales, product.bias, product.residual, count, width),
            *(norm.weight, norm.bias, norm.epsilon, out, codes, scales),
        )
        return Rows(out, codes, scales)
    if product.scales is None and not quantized:
        return Rows(norm(_settled(product)))
    return _by_blocks(product, norm, keep=True, codes=quantized)


def activate(product: Product, activation: str, shift: float | None = None) -> Rows:
    """Activation of the product's true value (without a residual).

    Args:
        product: what it is applied to.
        activation: its name.
        shift: None for values; else codes of the value plus this, which leaves none negative.
    """
    values = product.values
    if _has_kernels(values):
        count, width = values.shape
        kind = KERNEL_ACTIVATIONS[activation]
        out = torch.empty_like(values) if shift is None else None
        codes, scales = (None, None) if shift is None else _code_buffers(values)
        _call(
            "echelon_activate",
            *(values, product.scales, product.bias, count, width, kind, out, codes, scales),
            shift or 0.0,
        )
        return Rows(out, codes, scales)
    function, coded = ACTIVATIONS[activation], shift is not None
    if product.scales is None and not coded:
        return Rows(function(_settled(product)))
    return _by_blocks(product, function, shift, keep=not coded, codes=coded)


def quantize(rows: Tensor) -> Rows:
    """Rows with their codes around 128, each row with a scale of its own.

    A scale that looked at more than its row would let a score depend on its neighbours.
    """
    if _has_kernels(rows):
        rows = rows.contiguous()
        codes, scales = _code_buffers(rows)
        _call("echelon_quantize", rows, *rows.shape, codes, scales)
        return Rows(rows, codes, scales)
    coded = _by_blocks(Product(rows), ACTIVATIONS["none"], keep=False, codes=True)
    return Rows(rows, coded.codes, coded.scales)


def values_of(rows: Rows) -> Tensor:
    """The rows as numbers."""
    if rows.values is None:
        raise RuntimeError("This is a bug: rows were asked for and only codes were made.")
    return rows.values


def _by_blocks(
    product: Product,
    function: Callable[[Tensor], Tensor],
    shift: float | None = None,
    *,
    keep: bool,
    codes: bool,
) -> Rows:
    """A function of the product's true value, a few rows in cache at a time.

    Args:
        product: what it is applied to.
        function: of rows.
        shift: see :func:`activate`; None for codes around 128.
        keep: whether the values are wanted.
        codes: whether their codes are.
    """
    like = product.values
    out = Rows(
        torch.empty_like(like, dtype=torch.bfloat16) if keep else None,
        *(_code_buffers(like) if codes else ()),
    )
    step = max(1, BLOCK // like.shape[1])
    for first in range(0, len(like), step):
        part = slice(first, first + step)
        rows = function(_settled(product.part(part)))
        if out.values is not None:
            out.values[part] = rows
        if out.codes is not None and out.scales is not None:
            out.scales[part] = _encode(rows.float(), shift, out.codes[part])
    return out


def _encode(rows: Tensor, shift: float | None, codes: Tensor) -> Tensor:
    """Fill in the codes of rows; their scales, [rows]."""
    if shift is None:
        # Two passes, and still faster than torch.aminmax.
        most = torch.maximum(-rows.amin(1), rows.amax(1))
        steps, zero = SIGNED_CODES, float(ZERO_POINT)
    else:
        most, steps, zero = rows.amax(1) + shift, SHIFTED_CODES, 0.0
    scales = torch.where(most > 0, most / steps, torch.ones_like(most))
    inverse = scales.reciprocal()[:, None]
    numbers = (rows * inverse).add_(inverse * (shift or 0.0) + (zero - ZERO_POINT)).round_()
    # By way of signed bytes, which torch makes in a quarter of the time that unsigned ones take.
    codes.view(torch.int8).copy_(numbers)
    codes.bitwise_xor_(ZERO_POINT)
    return scales


def _settled(product: Product) -> Tensor:
    """The true value; in fp32 where scales are pending."""
    values = product.values if product.scales is None else product.values.float()
    if product.scales is not None and product.bias is not None:
        values = torch.addcmul(product.bias, values, product.scales[:, None])
    elif product.scales is not None:
        values = values * product.scales[:, None]
    elif product.bias is not None:
        values = values + product.bias
    return values if product.residual is None else values + product.residual


def _has_kernels(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and kernels() is not None


def _code_buffers(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=torch.uint8), torch.empty(len(rows), dtype=torch.float32)


def _call(name: str, *arguments: Tensor | float | None) -> None:
    """Call a kernel; tensors go as addresses, the number of threads is torch's."""
    addresses = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(kernels(), name)(*addresses, torch.get_num_threads())
