"""Linear layers in the layout that the device multiplies fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from echelon.score.device import has_onednn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Linear = Callable[..., Tensor]
    """(rows [rows, in], residual [rows, out] or nothing) → [rows, out], activated or with the
    residual added."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows,
    "gelu": functional.gelu,
    "gelu_new": lambda rows: functional.gelu(rows, approximate="tanh"),
    "gelu_pytorch_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
"""By the names of ``config.json``."""

ONEDNN_ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
"""The same as (operation, algorithm) inside oneDNN's product: a pass over memory less."""

TYPICAL_ROWS = 512
"""Rows of a step that oneDNN is told to lay the weights out for."""


def make_linear(
    weight: Tensor,
    bias: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    activation: str = "none",
) -> Linear:
    """A function from [rows, in] to [rows, out] in ``dtype`` on ``device``.

    Args:
        weight: [out, in] in any dtype, possibly a view of a mapped file; never kept.
        bias: [out].
        device: where it runs.
        dtype: what it computes in.
        activation: applied to the product; a layer has this or takes a residual, not both.
    """
    # Copies, so that the mapped checkpoint can be given back.
    weight = torch.empty_like(weight, dtype=dtype, device=device).copy_(weight)
    bias = torch.empty_like(bias, dtype=dtype, device=device).copy_(bias)
    if device.type == "cpu" and _can_prepack(dtype):
        return _prepacked(weight, bias, activation)

    activate = ACTIVATIONS[activation]

    def linear(rows: Tensor, residual: Tensor | None = None) -> Tensor:
        product = functional.linear(rows, weight, bias)
        return activate(product) if residual is None else product.add_(residual)

    return linear


def _prepacked(weight: Tensor, bias: Tensor, activation: str) -> Linear:
    """Take oneDNN's own weight layout, chosen once instead of in every call."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)  # noqa: SLF001
    call = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - no public name exists
    plain, adding = call.default, call.binary
    operation, algorithm = ONEDNN_ACTIVATIONS[activation]

    def linear(rows: Tensor, residual: Tensor | None = None) -> Tensor:
        product: Tensor
        if residual is None:
            product = plain(rows, packed, bias, operation, [], algorithm)
        else:  # added before rounding, in the same pass
            product = adding(rows, residual, packed, bias, "add")
        return product

    return linear


def _can_prepack(dtype: torch.dtype) -> bool:
    """Whether this torch build and processor have oneDNN's prepacked product for the dtype."""
    if not has_onednn() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    checks = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    check = checks.get(dtype)
    return check is None or bool(getattr(torch.ops.mkldnn, check)())
