"""Measure the matrix peak of this machine: the best of several large products and routes.

    python benchmarks/peaks.py                    # GFLOP/s (int8: GOP/s) by precision and route
    python benchmarks/peaks.py --time-limit 20    # seconds in all, 60 by default

An engine's share of the peak says how much of the processor it uses. Only what the processor has is
measured: where bf16 or int8 products are emulated, they take minutes and say nothing. What is left
out, and why, is printed to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from echelon.types import Clock

    Prepare = Callable[[], Callable[[], Any]]

SHAPES = ((512, 1024, 4096), (1024, 1024, 4096), (2048, 4096, 1024), (2048, 4096, 4096))
"""Rows, inputs and outputs of the products tried, the quickest first: a slow machine leaves out the
others."""

SECONDS_EACH = 0.4
"""Most that one product is repeated for."""


def peaks(limit_s: float = 60.0, clock: Clock = monotonic) -> dict[str, dict[str, float]]:
    """Per precision and route, the best rate over :data:`SHAPES`; routes that fail are left out.

    Args:
        limit_s: seconds in all. The product that runs when they end is still finished.
        clock: seconds that pass.
    """
    import torch

    from peer_engines import threads

    torch.set_num_threads(threads())
    best: dict[str, dict[str, float]] = {name: {} for name in ("fp32", "bf16", "int8")}
    ends, there = clock() + limit_s, _precisions()
    works = [(shape, *route) for shape in SHAPES for route in _routes(*shape) if route[0] in there]
    with torch.inference_mode():
        for place, (shape, precision, route, prepare) in enumerate(works):
            left_s = ends - clock()
            if left_s <= 0:
                _say(f"{len(works) - place} of {len(works)} products are left out: no time is left")
                break
            share_s = min(SECONDS_EACH, left_s / (len(works) - place))
            try:
                seconds = _fastest(prepare(), share_s, clock)
            except (RuntimeError, AttributeError, TypeError) as error:
                reason = str(error).partition("\n")[0]
                _say(f"{precision}, {route} is left out: {reason}")
                continue
            rows, inner, out = shape
            rate = 2e-9 * rows * inner * out / seconds
            best[precision][route] = max(rate, best[precision].get(route, 0.0))
    return best


def _precisions() -> list[str]:
    """Those that the processor multiplies without emulation."""
    from echelon.models.device import multiplies_half, multiplies_int8

    there = {"fp32": True, "bf16": multiplies_half("bf16"), "int8": multiplies_int8()}
    for name in (name for name, found in there.items() if not found):
        _say(f"{name} is left out: this processor, as torch may use it, has no units for it")
    return [name for name, found in there.items() if found]


def _say(words: str) -> None:
    print(words, file=sys.stderr)


def _routes(rows: int, inner: int, out: int) -> Iterator[tuple[str, str, Prepare]]:
    import torch

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        yield name, "F.linear", partial(_linear, rows, inner, out, dtype)
        yield name, "mkldnn prepacked", partial(_prepacked, rows, inner, out, dtype)
    yield "int8", "_int_mm", partial(_int_mm, rows, inner, out)
    yield "int8", "onednn qlinear uint8 × int8", partial(_qlinear, rows, inner, out)


def _linear(rows: int, inner: int, out: int, dtype: Any) -> Callable[[], Any]:
    import torch

    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(out, inner).to(dtype)
    return partial(torch.nn.functional.linear, x, weight)


def _prepacked(rows: int, inner: int, out: int, dtype: Any) -> Callable[[], Any]:
    import torch

    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(out, inner).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)  # noqa: SLF001 - no public name exists
    bias = torch.zeros(out, dtype=dtype)
    product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - as above
    return lambda: product(x, packed, bias, "none", [], "")


def _int_mm(rows: int, inner: int, out: int) -> Callable[[], Any]:
    import torch

    x = torch.randint(-127, 127, (rows, inner), dtype=torch.int8)
    weight = torch.randint(-127, 127, (out, inner), dtype=torch.int8)
    return partial(torch._int_mm, x, weight.t())  # noqa: SLF001 - as above


def _qlinear(rows: int, inner: int, out: int) -> Callable[[], Any]:
    import torch

    x = torch.randint(0, 255, (rows, inner), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (out, inner), dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inner])
    scales, zeros = torch.full((out,), 0.01), torch.zeros(out, dtype=torch.int32)
    head = (x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.bfloat16)
    return lambda: torch.ops.onednn.qlinear_pointwise(*head, "none", [], "")


def _fastest(product: Callable[[], Any], seconds: float, clock: Clock) -> float:
    """The fastest of the calls that fit in ``seconds``; a first, uncounted one is part of them."""
    ends, times = clock() + seconds, []
    product()
    while not times or clock() < ends:
        started = clock()
        product()
        times.append(clock() - started)
    return max(min(times), 1e-9)


def main() -> None:
    """Print the peaks as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds in all (60)")
    print(json.dumps(peaks(parser.parse_args().time_limit)))


if __name__ == "__main__":
    main()
