"""Kernels for cards, in Triton: passes over rows that torch computes in several.

Each program takes one row, keeps it in registers and computes in fp32. Triton compiles them at
their first use; CUDA builds of torch bring it. :mod:`echelon.models.card_kernels` calls them and
has the same in torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


GATE_BLOCK = 1024


@triton.jit
def add_norm_kernel(
    product,
    residual,
    weight,
    bias,
    total,
    out,
    epsilon,
    width: tl.constexpr,
    block: tl.constexpr,
    centred: tl.constexpr,
    has_bias: tl.constexpr,
    keep: tl.constexpr,
) -> None:
    """``out = norm(product + residual)``, and the sum in ``total`` if it is kept."""
    columns = tl.arange(0, block)
    inside = columns < width
    first = tl.program_id(0).to(tl.int64) * width
    row = tl.load(product + first + columns, mask=inside, other=0.0).to(tl.float32)
    row += tl.load(residual + first + columns, mask=inside, other=0.0).to(tl.float32)
    if keep:
        tl.store(total + first + columns, row, mask=inside)
    if centred:
        row = tl.where(inside, row - tl.sum(row, 0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, 0) / width + epsilon)
    row = row * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        row += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + columns, row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(
    both, out, width: tl.constexpr, block: tl.constexpr, activation: tl.constexpr
) -> None:
    """``out = activation(a) · b``, where a row of ``both`` is a, then b.

    Activations: 1 GELU, 2 GELU by tanh, else SiLU, as in :mod:`echelon.models.card_kernels`.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    first = both + row * 2 * width + columns
    x = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(first + width, mask=inside, other=0.0).to(tl.float32)
    if activation == 1:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == 2:
        # (1 + tanh(y)) / 2 is 1 / (1 + exp(-2 · y)), where y is √(2 / π) times the bracket.
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        x = x / (1.0 + tl.exp(-x))
    tl.store(out + row * width + columns, (x * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def turn_kernel(
    heads,
    out,
    cosines,
    sines,
    weight,
    epsilon,
    stride,
    count: tl.constexpr,
    half: tl.constexpr,
    count_block: tl.constexpr,
    half_block: tl.constexpr,
    normed: tl.constexpr,
) -> None:
    """``out``: each head of a row normalised, if ``normed``, and turned to the row's position."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, count_block)[:, None]
    column = tl.arange(0, half_block)[None, :]
    inside = (head < count) & (column < half)
    into = heads + row * stride + head * 2 * half + column
    left = tl.load(into, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(into + half, mask=inside, other=0.0).to(tl.float32)
    if normed:
        squares = tl.sum(left * left + right * right, 1)[:, None] / (2 * half)
        scale = 1.0 / tl.sqrt(squares + epsilon)
        left = left * scale * tl.load(weight + column, mask=column < half, other=0.0)
        right = right * scale * tl.load(weight + half + column, mask=column < half, other=0.0)
    angle = row * 2 * half + column
    cosine = tl.load(cosines + angle, mask=column < half, other=0.0)
    sine = tl.load(sines + half + angle, mask=column < half, other=0.0)  # the second half has +
    to = out + row * count * 2 * half + head * 2 * half + column
    turned = out.dtype.element_ty
    tl.store(to, (left * cosine - right * sine).to(turned), mask=inside)
    tl.store(to + half, (right * cosine + left * sine).to(turned), mask=inside)


@triton.jit
def float8_kernel(
    rows, codes, scales, width: tl.constexpr, block: tl.constexpr, largest: tl.constexpr
) -> None:
    """``codes`` of a row in eight-bit floating point, its largest number as ``largest``."""
    columns = tl.arange(0, block)
    inside = columns < width
    first = tl.program_id(0).to(tl.int64) * width
    row = tl.load(rows + first + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(row), 0), 1.1754943508222875e-38) / largest
    row = tl.minimum(tl.maximum(row / scale, -largest), largest)
    tl.store(codes + first + columns, row.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + tl.program_id(0), scale)


def add_norm(
    product: Tensor,
    residual: Tensor,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centred: bool,
) -> Tensor:
    """See ``echelon::add_norm``; ``total`` gets the sum, and may be the residual."""
    rows, width = product.shape
    out = torch.empty_like(product)
    block = triton.next_power_of_2(width)
    add_norm_kernel[(rows,)](
        *(product, residual, weight, weight if bias is None else bias),
        *(out if total is None else total, out, epsilon),
        width=width,
        block=block,
        centred=centred,
        has_bias=bias is not None,
        keep=total is not None,
        num_warps=min(8, max(1, block // 256)),
    )
    return out


def gate(both: Tensor, activation: int) -> Tensor:
    """See ``echelon::gate``."""
    rows, width = len(both), both.shape[1] // 2
    out = both.new_empty(rows, width)
    block = min(GATE_BLOCK, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    gate_kernel[grid](both, out, width=width, block=block, activation=activation)
    return out


def turn(
    heads: Tensor, cosines: Tensor, sines: Tensor, weight: Tensor | None, epsilon: float
) -> Tensor:
    """See ``echelon::turn``."""
    rows, count, size = heads.shape
    out = heads.new_empty(rows, count, size)
    half = size // 2
    turn_kernel[(rows,)](
        *(heads, out, cosines, sines, cosines if weight is None else weight),
        *(epsilon, heads.stride(0)),
        count=count,
        half=half,
        count_block=triton.next_power_of_2(count),
        half_block=triton.next_power_of_2(half),
        normed=weight is not None,
    )
    return out


def float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """See ``echelon::float8``."""
    count, width = rows.shape
    codes = torch.empty_like(rows, dtype=torch.float8_e4m3fn)
    scales = rows.new_empty(count, 1, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    largest = torch.finfo(codes.dtype).max
    warps = min(8, max(1, block // 256))
    float8_kernel[(count,)](
        rows, codes, scales, width=width, block=block, largest=largest, num_warps=warps
    )
    return codes, scales
