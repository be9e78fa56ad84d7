"""Linear layers, norms and activations, each in the form that the device computes fastest.

An int8 product comes without its rows' scales and its bias, a dense one may come without its
residual: the operation that reads the product next adds them, without a pass over memory of their
own. Such an operation is one compiled kernel, or the same in torch where there are no kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.nn import functional

from echelon.models.card_kernels import has_card_kernels
from echelon.models.device import has_onednn, multiplies_half
from echelon.models.kernel_calls import call_kernel, has_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Activation(NamedTuple):
    """An activation and how kernels compute it.

    No value of the function is below minus the shift. Added before quantising it makes all values
    positive, which frees the sign bit for one bit of precision; the product's bias subtracts it
    again, exactly.
    """

    function: Callable[[Tensor], Tensor]
    code: int  # its number in the compiled kernels
    onednn: tuple[str, str]  # operation and algorithm inside oneDNN's product, which saves a pass
    shift: float | None


_GELU_BY_TANH = Activation(partial(functional.gelu, approximate="tanh"), 2, ("gelu", "tanh"), 0.171)

ACTIVATIONS = {
    "none": Activation(lambda rows: rows, 0, ("none", ""), None),
    "gelu": Activation(functional.gelu, 1, ("gelu", "none"), 0.171),
    "gelu_new": _GELU_BY_TANH,
    "gelu_pytorch_tanh": _GELU_BY_TANH,
    "relu": Activation(functional.relu, 3, ("relu", ""), 0.0),
    "silu": Activation(functional.silu, 4, ("swish", ""), 0.279),
}
"""By the names of ``config.json``."""

SIGNED_CODES, SHIFTED_CODES = 127.0, 255.0
"""Codes on either side of the middle one, and from zero on."""

ZERO_POINT = 128  # the code of 0 in rows with negative values

BLOCK = 2**18
"""Numbers that torch computes at a time without kernels: one pass's result is still in cache for
the next, and the calls are few enough. Half and twice as many were slower."""


@dataclass(slots=True)
class Rows:
    """Rows of activations: as numbers, as eight-bit codes, or both."""

    values: Tensor | None  # [rows, width]; None if only codes are needed
    codes: Tensor | None = None  # uint8 [rows, width], ``round(x / scale) + 128``; +0 if shifted
    scales: Tensor | None = None  # float32 [rows]

    def __getitem__(self, index: Tensor) -> Rows:
        """Some of the rows."""
        parts = (self.values, self.codes, self.scales)
        return Rows(*(None if part is None else part[index] for part in parts))


@dataclass(slots=True)
class Product:
    """Output of a linear layer; its true value is ``values * scales + bias + residual``."""

    values: Tensor  # [rows, out]
    scales: Tensor | None = None  # float32 [rows], or None for 1
    bias: Tensor | None = None  # float32 [out], or None for 0
    residual: Tensor | None = None  # [rows, out], or None for 0

    def part(self, rows: slice) -> Product:
        """Some of the rows."""
        scales = None if self.scales is None else self.scales[rows]
        residual = None if self.residual is None else self.residual[rows]
        return Product(self.values[rows], scales, self.bias, residual)


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm over the hidden axis."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise each row of [rows, hidden]."""
        return functional.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Division by the root mean square of a row (Zhang and Sennrich, 2019): no mean, no bias."""

    weight: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise the last axis; the sums are in fp32."""
        return functional.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)


def materialize(product: Product) -> Tensor:
    """The product's true value without its residual, in the layers' dtype."""
    return product.values if product.scales is None else values_of(activate(product, "none"))


def evaluate(product: Product) -> Tensor:
    """The product's true value with its residual, in the layers' dtype."""
    return _evaluate(product).to(product.values.dtype)


def add_norm(product: Product, norm: Norm, *, quantized: bool) -> Rows:
    """LayerNorm of the product's true value, with codes if the next layer needs them."""
    values = product.values
    if product.residual is not None and has_kernel("add_norm", values):
        count, width = values.shape
        out = torch.empty_like(values)
        codes, scales = _code_buffers(values) if quantized else (None, None)
        call_kernel(
            "add_norm",
            *(values, product.scales, product.bias, product.residual, count, width),
            *(norm.weight, norm.bias, norm.epsilon, out, codes, scales),
        )
        return Rows(out, codes, scales)
    if product.residual is not None and has_card_kernels(values):
        return Rows(
            torch.ops.echelon.add_norm(
                *(values, product.residual, norm.weight, norm.bias, norm.epsilon, True)
            )
        )
    if product.scales is None and not quantized:
        return Rows(norm(_evaluate(product)))
    return _by_blocks(product, norm, keep=True, codes=quantized)


def activate(product: Product, activation: str, shift: float | None = None) -> Rows:
    """Activation of the product's true value; with a ``shift``, codes of value plus shift."""
    values = product.values
    if has_kernel("activate", values):
        count, width = values.shape
        kind = ACTIVATIONS[activation].code
        out = torch.empty_like(values) if shift is None else None
        codes, scales = (None, None) if shift is None else _code_buffers(values)
        call_kernel(
            "activate",
            *(values, product.scales, product.bias, count, width, kind, out, codes, scales),
            shift or 0.0,
        )
        return Rows(out, codes, scales)
    function, coded = ACTIVATIONS[activation].function, shift is not None
    if product.scales is None and not coded:
        return Rows(function(_evaluate(product)))
    return _by_blocks(product, function, shift, keep=not coded, codes=coded)


def quantize(rows: Tensor) -> Rows:
    """Rows with codes around 128. A scale for each row keeps scores independent of other pairs."""
    if has_kernel("quantize", rows):
        rows = rows.contiguous()
        codes, scales = _code_buffers(rows)
        call_kernel("quantize", rows, *rows.shape, codes, scales)
        return Rows(rows, codes, scales)
    coded = _by_blocks(Product(rows), ACTIVATIONS["none"].function, keep=False, codes=True)
    return Rows(rows, coded.codes, coded.scales)


def values_of(rows: Rows) -> Tensor:
    """The rows as numbers."""
    if rows.values is None:
        raise RuntimeError("This is a bug: only codes were computed, not the rows.")
    return rows.values


def _by_blocks(
    product: Product,
    function: Callable[[Tensor], Tensor],
    shift: float | None = None,
    *,
    keep: bool,
    codes: bool,
) -> Rows:
    """A function of the product's true value, a block of rows in cache at a time."""
    like = product.values
    values = torch.empty_like(like, dtype=torch.bfloat16) if keep else None
    out = Rows(values, *(_code_buffers(like) if codes else ()))
    step = max(1, BLOCK // like.shape[1])
    for first in range(0, len(like), step):
        part = slice(first, first + step)
        rows = function(_evaluate(product.part(part)))
        if out.values is not None:
            out.values[part] = rows
        if out.codes is not None and out.scales is not None:
            out.scales[part] = _encode(rows.float(), shift, out.codes[part])
    return out


def _encode(rows: Tensor, shift: float | None, codes: Tensor) -> Tensor:
    """Write the codes of rows; return their scales, [rows]."""
    if shift is None:
        # Two passes, and still faster than torch.aminmax.
        top = torch.maximum(-rows.amin(1), rows.amax(1))
        steps, zero = SIGNED_CODES, float(ZERO_POINT)
    else:
        top, steps, zero = rows.amax(1) + shift, SHIFTED_CODES, 0.0
    scales = torch.where(top > 0, top / steps, torch.ones_like(top))
    inverse = scales.reciprocal()[:, None]
    numbers = (rows * inverse).add_(inverse * (shift or 0.0) + (zero - ZERO_POINT)).round_()
    # Signed bytes first: torch converts to them in a quarter of the time of unsigned ones.
    codes.view(torch.int8).copy_(numbers)
    codes.bitwise_xor_(ZERO_POINT)
    return scales


def _evaluate(product: Product) -> Tensor:
    """The true value; in fp32 if scales are pending."""
    values = product.values if product.scales is None else product.values.float()
    if product.scales is not None and product.bias is not None:
        values = torch.addcmul(product.bias, values, product.scales[:, None])
    elif product.scales is not None:
        values = values * product.scales[:, None]
    elif product.bias is not None:
        values = values + product.bias
    return values if product.residual is None else values + product.residual


def _code_buffers(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=torch.uint8), torch.empty(len(rows), dtype=torch.float32)


TYPICAL_ROWS = 512  # rows of a step for which oneDNN lays out the weights


class Linear(Protocol):
    """A linear layer."""

    quantized: bool  # it multiplies codes, and uses the rows' codes if they have any
    activated: bool  # it applies the activation itself

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """[rows, in] → [rows, out], the residual added or pending."""


IN_PRODUCT = {"gelu": True, "gelu_new": True, "gelu_pytorch_tanh": True, "relu": False}
"""Activations that a card's product of half-width numbers computes itself, and whether by GELU."""


class DenseLinear:
    """A product in fp32, bf16 or fp16 of weight [out, in] and bias [out], or no bias."""

    quantized = False
    activated = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        product = functional.linear(values_of(rows), self._weight, self._bias)
        return Product(product, residual=residual)


class ActivatedLinear:
    """Product, bias and activation in one launch on a card, without a pass over the wide rows.

    cuBLASLt's GELU is the approximation by tanh. On the demo model it ranks as the exact one does:
    Kendall's tau is 1.0 in fp32, logits differ by up to 0.022; bf16 rounds them by 0.040.
    """

    quantized = False
    activated = True

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        self._weight = weight
        self._bias = bias
        self._use_gelu = IN_PRODUCT[activation]

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        product = torch.ops.aten._addmm_activation(  # noqa: SLF001 - no public name exists
            self._bias, values_of(rows), self._weight.t(), use_gelu=self._use_gelu
        )
        return Product(product, residual=residual)


class PrepackedLinear:
    """The same in oneDNN's own weight layout, with an activation or a residual inside."""

    quantized = False

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        operators = torch.ops.mkldnn
        self._packed = operators._reorder_linear_weight(weight, TYPICAL_ROWS)  # noqa: SLF001 - no public name exists
        self._bias = bias
        self.activated = activation != "none"
        self._operation, self._algorithm = ACTIVATIONS[activation].onednn
        call = operators._linear_pointwise  # noqa: SLF001 - no public name exists
        self._plain, self._joining = call.default, call.binary
        # With kernels the next norm adds the residual, in its own pass.
        self._leaves_residual = has_kernel("add_norm", weight)

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        values = values_of(rows)
        if residual is not None and not self._leaves_residual:
            return Product(self._joining(values, residual, self._packed, self._bias, "add"))
        product = self._plain(
            values, self._packed, self._bias, self._operation, [], self._algorithm
        )
        return Product(product, residual=residual)

    def times(self, rows: Rows, factor: Tensor) -> Tensor:
        """The product, without activation, multiplied by a factor [rows, out] of its dtype."""
        product: Tensor = self._joining(values_of(rows), factor, self._packed, self._bias, "mul")
        return product


class Int8Linear:
    """A product of eight-bit codes, with a scale for each weight row and each row of activations.

    oneDNN multiplies unsigned activations with signed weights; the rows' scales and the bias stay
    pending. ``shift`` is added to activations before quantising; None means codes around 128.
    """

    quantized = True
    activated = False

    def __init__(self, weight: Tensor, bias: Tensor | None, shift: float | None) -> None:
        weight = weight.float()
        scales = weight.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        codes = (weight / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int64)
        self._zero_point = ZERO_POINT if shift is None else 0
        # The codes mean x + shift; the bias subtracts what shift adds to each product.
        added = 0.0 if shift is None else shift * scales * codes.sum(1, dtype=torch.int32)
        bias = torch.zeros(len(scales)) if bias is None else bias.float()
        self._bias = bias - added
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
    """A dense layer that records int8's largest relative error in ``errors[name]``."""

    quantized = False
    activated = False

    def __init__(self, dense: Linear, int8: Linear, name: str, errors: dict[str, float]) -> None:
        self._dense, self._int8 = dense, int8
        self._name, self._errors = name, errors

    def __call__(self, rows: Rows, residual: Tensor | None = None) -> Product:
        """See :class:`Linear`."""
        exact = materialize(self._dense(rows)).float()
        error = (materialize(self._int8(rows)).float() - exact).norm() / exact.norm()
        self._errors[self._name] = max(self._errors.get(self._name, 0.0), float(error))
        return self._dense(rows, residual)


class FeedForward:
    """Up, activation and down; the rows between them in the form that ``down`` needs."""

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self._up, self._down = up, down
        self._activation = "none" if up.activated else activation
        self._shift = ACTIVATIONS[activation].shift if down.quantized else None
        self.quantized = up.quantized

    def __call__(self, rows: Rows, residual: Tensor) -> Product:
        """[rows, hidden] → [rows, hidden], the residual added or pending."""
        wide = self._up(rows)
        if self._activation == "none" and self._shift is None:
            return self._down(Rows(wide.values), residual)
        return self._down(activate(wide, self._activation, self._shift), residual)


def make_linear(
    weight: Tensor,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    activation: str = "none",
) -> Linear:
    """A dense layer in ``dtype`` on ``device``, the activation in the product if possible.

    ``weight`` [out, in] and ``bias`` may be views of a mapped file in any dtype; they are copied.
    """
    weight = weight.to(device, dtype, copy=True)
    if bias is not None:
        bias = bias.to(device, dtype, copy=True)
    if prepacks(device, dtype):
        return PrepackedLinear(weight, bias, activation)
    half = device.type == "cuda" and dtype != torch.float32
    if half and bias is not None and activation in IN_PRODUCT:
        return ActivatedLinear(weight, bias, activation)
    return DenseLinear(weight, bias)


def prepacks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch build and processor have oneDNN's prepacked product for the dtype."""
    there = has_onednn() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if device.type != "cpu" or not there:
        return False
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    return kind is None or multiplies_half(kind)
