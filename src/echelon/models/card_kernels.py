"""Operators of ours for cards: one launch and one pass over memory where torch takes several.

Each is defined for tensors on a card (by Triton), on CPU (in torch: what the kernels must compute)
and without values (shapes, for tests that count launches). They are used on a card where
:func:`has_card_kernels` says so; elsewhere the callers compute the same in torch.
"""

from __future__ import annotations

import logging
import os
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from echelon.models.kernels import SWITCH

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

logger = logging.getLogger(__name__)

NORM = "Tensor weight, Tensor? bias, float epsilon, bool centred) -> Tensor"
OPERATORS = (
    f"add_norm(Tensor product, Tensor residual, {NORM}",
    f"accumulate_norm(Tensor(a!) total, Tensor product, {NORM}",
    "gate(Tensor both, int activation) -> Tensor",
    "turn(Tensor heads, Tensor cosines, Tensor sines, Tensor? weight, float epsilon) -> Tensor",
    "float8(Tensor rows) -> (Tensor, Tensor)",
)
"""``add_norm``: norm of product + residual, [rows, width], in the product's dtype; with ``centred``
LayerNorm, else RMSNorm. ``accumulate_norm``: the same after adding the product to ``total``, in
place. ``gate``: [rows, 2 · width] → [rows, width], the activation of the first half times the
second. ``turn``: [rows, heads, size] at their rotary positions, after an RMSNorm if there is a
weight. ``float8``: [rows, width] → codes [rows, width] and their scales, float32 [rows, 1]."""

FLOAT8 = torch.float8_e4m3fn  # four bits of exponent, three of mantissa
LARGEST = torch.finfo(FLOAT8).max

SILU = 4
GATES: dict[int, Callable[[Tensor], Tensor]] = {
    1: functional.gelu,
    2: partial(functional.gelu, approximate="tanh"),
    SILU: functional.silu,
}
"""Activations by their codes in :data:`echelon.models.layers.ACTIVATIONS`."""


def has_card_kernels(rows: Tensor) -> bool:
    """Whether rows are on a card for which the kernels compile."""
    return rows.device.type == "cuda" and missing(rows.device) is None


def turned(
    heads: Tensor, tables: tuple[Tensor, Tensor], weight: Tensor | None = None, epsilon: float = 0.0
) -> Tensor:
    """[rows, heads, size], normalised if there is a weight, at the positions of ``tables``."""
    if has_card_kernels(heads):
        found: Tensor = torch.ops.echelon.turn(heads, *tables, weight, epsilon)
        return found
    return turned_by_torch(heads, *tables, weight, epsilon)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, width] → codes of :data:`FLOAT8` [rows, width], and their scales, float32 [rows, 1].

    A number is wrong by at most a sixteenth of itself, or by what the smallest code is worth.
    """
    if has_card_kernels(rows):
        found: tuple[Tensor, Tensor] = torch.ops.echelon.float8(rows)
        return found
    return _float8(rows)


CLOSE = 1e-2  # far less than a wrong kernel differs, far more than fp16 rounds


@cache
def missing(device: torch.device) -> str | None:
    """Why a card has no kernels, or None if it has; the first call compiles one."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off leaves them out"
    if find_spec("triton") is None:
        return "Triton is not installed; CUDA builds of torch bring it"
    try:
        with torch.cuda.device(device):
            ones = torch.ones(1, 16, dtype=torch.float16, device=device)
            found = torch.ops.echelon.gate(ones, SILU)
            works = bool((found - functional.silu(ones[:, :8])).abs().max() < CLOSE)
    except Exception as error:  # noqa: BLE001 - Triton's, its compilers' and the driver's are many
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning(
            "Triton compiles no kernels here (%s). Steps take a tenth longer. Install a C compiler "
            "(gcc) if it is missing, or set %s=off.",
            reason,
            SWITCH,
        )
        return reason
    return None if works else "the kernel computes wrong numbers here"


def _add_norm(
    product: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centred: bool,  # noqa: FBT001 - operators have places only
) -> Tensor:
    rows, weight = product.float() + residual.float(), weight.float()
    if centred:
        bias = None if bias is None else bias.float()
        normed = functional.layer_norm(rows, weight.shape, weight, bias, epsilon)
    else:
        normed = functional.rms_norm(rows, weight.shape, weight, epsilon)
        normed = normed if bias is None else normed + bias
    return normed.to(product.dtype)


def _accumulate_norm(total: Tensor, product: Tensor, *norm: Any) -> Tensor:
    total.add_(product)
    return _add_norm(torch.zeros_like(product), total, *norm)


def _gate(both: Tensor, activation: int) -> Tensor:
    active, gate = both.float().chunk(2, -1)
    return (GATES[activation](active) * gate).to(both.dtype)


def turned_by_torch(
    heads: Tensor, cosines: Tensor, sines: Tensor, weight: Tensor | None, epsilon: float
) -> Tensor:
    """What ``turn`` computes, in torch: the first half of a head turns with the second."""
    wide = heads.float()
    if weight is not None:
        wide = functional.rms_norm(wide, weight.shape, weight, epsilon)
    half = heads.shape[-1] // 2
    return (wide * cosines).add_(wide.roll(half, -1) * sines).to(heads.dtype)


def _float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.float()
    scales = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (wide / scales).clamp(-LARGEST, LARGEST).to(FLOAT8), scales


def _add_norm_on_card(product: Tensor, residual: Tensor, *norm: Any) -> Tensor:
    from echelon.models import triton_kernels

    with torch.cuda.device(product.device):
        return triton_kernels.add_norm(product, residual, None, *norm)


def _accumulate_norm_on_card(total: Tensor, product: Tensor, *norm: Any) -> Tensor:
    from echelon.models import triton_kernels

    with torch.cuda.device(product.device):
        return triton_kernels.add_norm(product, total, total, *norm)


def _gate_on_card(both: Tensor, activation: int) -> Tensor:
    from echelon.models import triton_kernels

    with torch.cuda.device(both.device):
        return triton_kernels.gate(both, activation)


def _turn_on_card(
    heads: Tensor, cosines: Tensor, sines: Tensor, weight: Tensor | None, epsilon: float
) -> Tensor:
    from echelon.models import triton_kernels

    with torch.cuda.device(heads.device):
        return triton_kernels.turn(heads, cosines, sines, weight, epsilon)


def _float8_on_card(rows: Tensor) -> tuple[Tensor, Tensor]:
    from echelon.models import triton_kernels

    with torch.cuda.device(rows.device):
        return triton_kernels.float8(rows.contiguous())


def _shape_of_add_norm(product: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(product)


def _shape_of_accumulate_norm(total: Tensor, product: Tensor, *_: Any) -> Tensor:
    del total
    return torch.empty_like(product)


def _shape_of_gate(both: Tensor, activation: int) -> Tensor:
    del activation
    return both.new_empty(len(both), both.shape[1] // 2)


def _shape_of_turn(heads: Tensor, *_: Any) -> Tensor:
    return heads.new_empty(heads.shape)


def _shape_of_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.new_empty(len(rows), 1, dtype=torch.float32)
    return torch.empty_like(rows, dtype=FLOAT8), scales


_LIBRARY = torch.library.Library("echelon", "DEF")  # type: ignore[no-untyped-call]  # torch's own gap
for _schema in OPERATORS:
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]  # torch's own gap
for _key, _functions in {
    "CPU": (_add_norm, _accumulate_norm, _gate, turned_by_torch, _float8),
    "CUDA": (
        _add_norm_on_card,
        _accumulate_norm_on_card,
        _gate_on_card,
        _turn_on_card,
        _float8_on_card,
    ),
    "Meta": (
        _shape_of_add_norm,
        _shape_of_accumulate_norm,
        _shape_of_gate,
        _shape_of_turn,
        _shape_of_float8,
    ),
}.items():
    for _schema, _function in zip(OPERATORS, _functions, strict=True):
        _LIBRARY.impl(_schema.partition("(")[0], _function, _key)  # type: ignore[no-untyped-call]  # torch's own gap
