"""Measure the matrix peak of this machine: the best of several large products and routes.

    python benchmarks/peaks.py      # prints GFLOP/s (int8: GOP/s) by precision and route

An engine's share of the peak says how much of the processor it uses.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPES = ((512, 1024, 4096), (1024, 1024, 4096), (2048, 4096, 1024), (2048, 4096, 4096))
"""Rows, inputs and outputs of the products tried."""

SECONDS_EACH = 0.4


def peaks() -> dict[str, dict[str, float]]:
    """Per precision and route, the best rate over :data:`SHAPES`; routes that fail are left out."""
    import torch

    from peer_engines import threads

    torch.set_num_threads(threads())
    best: dict[str, dict[str, float]] = {"fp32": {}, "bf16": {}, "int8": {}}
    with torch.inference_mode():
        for rows, inner, out in SHAPES:
            for precision, route, prepare in _routes(rows, inner, out):
                try:
                    seconds = _fastest(prepare())
                except (RuntimeError, AttributeError, TypeError):
                    continue  # a route that this build or processor lacks
                rate = 2e-9 * rows * inner * out / seconds
                best[precision][route] = max(rate, best[precision].get(route, 0.0))
    return best


def _routes(
    rows: int, inner: int, out: int
) -> Iterator[tuple[str, str, Callable[[], Callable[[], Any]]]]:
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


def _fastest(product: Callable[[], Any]) -> float:
    """The fastest of the calls that fit in :data:`SECONDS_EACH`, after an uncounted one."""
    product()
    ends, times = time.perf_counter() + SECONDS_EACH, []
    while not times or time.perf_counter() < ends:
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(json.dumps(peaks()))
