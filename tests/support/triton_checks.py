"""Checks of the Triton kernels, in a process of their own: Triton reads at import how it runs.

python tests/support/triton_checks.py interpret
python tests/support/triton_checks.py compile 75 80
"""

from __future__ import annotations

import os
import sys

import torch

TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative; a half-width result may round to the next number."""

FLOAT8_CARDS = 89  # from this capability on


def interpret() -> None:
    """Run every kernel on CPU and compare it with the same operator in torch."""
    os.environ["TRITON_INTERPRET"] = "1"
    for dtype in TOLERANCES:
        for rows, width in ((1, 16), (7, 48), (3, 1024), (2, 1152)):
            _check_norms(dtype, rows, width)
            _check_gates(dtype, rows, width)
            _check_float8(dtype, rows, width)
        for heads, size in ((1, 8), (4, 24), (12, 64)):
            _check_turns(dtype, heads, size)


def _close(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[found.dtype], atol=2e-6)


def _check_norms(dtype, rows, width) -> None:
    from echelon.models import card_kernels, triton_kernels  # noqa: F401 - defines the operators

    product, residual = torch.randn(2, rows, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    for bias_or_none, centred in ((bias, True), (None, True), (None, False)):
        norm = (weight, bias_or_none, 1e-5, centred)
        found = triton_kernels.add_norm(product, residual, None, *norm)
        _close(found, torch.ops.echelon.add_norm(product, residual, *norm))
        total = torch.randn(rows, width)
        same = total.clone()
        found = triton_kernels.add_norm(product, total, total, *norm)
        _close(found, torch.ops.echelon.accumulate_norm(same, product, *norm))
        torch.testing.assert_close(total, same, rtol=0, atol=1e-6)


def _check_gates(dtype, rows, width) -> None:
    from echelon.models import card_kernels, triton_kernels

    both = torch.randn(rows, 2 * width).to(dtype)
    for code in card_kernels.GATES:
        _close(triton_kernels.gate(both, code), torch.ops.echelon.gate(both, code))


def _check_turns(dtype, heads, size) -> None:
    from echelon.models import triton_kernels
    from echelon.models.rotary import Rotary

    tables = Rotary(10_000.0, size).tables(torch.arange(5) + 3)
    part = torch.randn(5, 3, heads, size).to(dtype)[:, 1]
    for weight in (None, torch.randn(size)):
        found = triton_kernels.turn(part, *tables, weight, 1e-6)
        _close(found, torch.ops.echelon.turn(part, *tables, weight, 1e-6))


def _check_float8(dtype, rows, width) -> None:
    from echelon.models import card_kernels, triton_kernels  # noqa: F401 - defines the operators

    values = torch.randn(rows, width).to(dtype)
    values[0] = 0.0
    codes, scales = triton_kernels.float8(values)
    expected, exact = torch.ops.echelon.float8(values)
    torch.testing.assert_close(scales, exact, rtol=1e-6, atol=0)
    # Rounding up to a power of two gives half of it in Triton's interpreter; cards do it right.
    found, wanted = codes.float(), expected.float()
    lost = (wanted.abs().log2() % 1 == 0) & (wanted.abs() > (values.float() / exact).abs())
    found = torch.where(lost, wanted, found)
    # A number between two codes may go to either, as the last bits of its quotient say.
    torch.testing.assert_close(found, wanted, rtol=0.13, atol=2**-9)
    assert found.ne(wanted).float().mean() < 0.02


def compile_for(capability: int) -> None:
    """Compile every kernel to machine code for a card that need not be there."""
    from echelon.models import triton_kernels as kernels

    # Cards before 8.0 have no bf16 units; torch's own kernels are used for it there.
    for half in ("*fp16", "*fp32", *["*bf16"] * (capability >= 80)):
        norm = dict.fromkeys(("product", "residual", "weight", "bias", "total", "out"), half)
        fixed = {"width": 1024, "block": 1024, "centred": True, "has_bias": True, "keep": True}
        _compile(kernels.add_norm_kernel, capability, {**norm, "epsilon": "fp32"}, fixed)
        fixed = {"width": 1152, "block": 1024, "activation": 1}
        _compile(kernels.gate_kernel, capability, {"both": half, "out": half}, fixed)
        if capability >= FLOAT8_CARDS:
            fixed = {"width": 1024, "block": 1024, "largest": 448.0}
            types = {"rows": half, "codes": "*fp8e4nv", "scales": "*fp32"}
            _compile(kernels.float8_kernel, capability, types, fixed)
        turn = dict.fromkeys(("cosines", "sines", "weight"), "*fp32") | {"stride": "i32"}
        turn |= {"heads": half, "out": half, "epsilon": "fp32"}
        fixed = {"count": 12, "half": 64, "count_block": 16, "half_block": 64, "normed": True}
        _compile(kernels.turn_kernel, capability, turn, fixed)


def _compile(kernel, capability, types, constants) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1] == "interpret":
        interpret()
    else:
        for number in sys.argv[2:]:
            compile_for(int(number))
    print("done")  # noqa: T201 - the caller waits for it
