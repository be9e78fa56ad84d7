"""Each operation of the compiled kernels, at each level, beside what torch does without them.

For a level the processor is limited to it, torch and oneDNN too. Kernel and torch run in turn on
one thread. The ratio of their median times decides which kernels are used: `FASTER` in
src/echelon/models/kernels/__init__.py, docs/decisions/0019-kernel-levels.md.

    python benchmarks/kernel_levels.py                  # all levels of this processor
    python benchmarks/kernel_levels.py --rounds 15

Writes benchmarks/results/kernel_levels.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.models.kernels import Kernels

RESULTS = Path(__file__).parent / "results" / "kernel_levels.json"

SETTINGS = {
    "avx512bf16": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ECHELON_CPU": "avx2",
    },
    "portable": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ECHELON_CPU": "avx2",
    },
}
"""Level → environment in which torch and its libraries take the processor for one of that level."""

ROWS = 512
SHAPES = {"small": (384, 1536, 12, 32), "large": (1024, 4096, 16, 64)}
"""Hidden size, inner size, heads and their size of two models."""

LENGTHS = (32, 128, 512)

Case = tuple[str, str, "Callable[[], object]", "Callable[[], object]"]


def cases(found: Kernels) -> list[Case]:
    """Operation, what it works on, the kernel and torch's own, ready to be called."""
    rows: list[Case] = []
    for size, (hidden, inner, heads, width) in SHAPES.items():
        rows += [_attention(found, size, length, heads, width) for length in LENGTHS]
        rows += _passes(found, size, hidden, inner)
        rows += [_causal(found, size, length, heads, 2 * width) for length in LENGTHS[1:]]
    return rows


def _causal(found: Kernels, size: str, length: int, heads: int, width: int) -> Case:
    """Texts of one length behind a beginning of 96 tokens; two query heads to a key head."""
    import numpy as np
    import torch

    from echelon.models import causal_attention, kernel_calls
    from echelon.models.causal_attention import CausalAttention, KeysAndValues
    from echelon.models.prefixes import lay_out

    begin, count = np.arange(96), 2 * ROWS // length
    texts = [np.concatenate((begin, 99 + i + np.arange(length))) for i in range(count)]
    layout = lay_out([text.astype(np.int32) for text in texts], [0] * count)
    asked, shared = heads // 2, heads // 4
    parts = torch.randn(len(layout.ids), heads, width).bfloat16()
    query = parts[:, :asked].contiguous()
    own = KeysAndValues(parts[:, asked : asked + shared], parts[:, asked + shared : heads])
    attention = CausalAttention(layout, (asked, shared), torch.device("cpu"), query.dtype)

    def by(chosen: Kernels | None) -> Callable[[], object]:
        def run() -> object:
            with (
                patch.object(kernel_calls, "kernels", lambda: chosen),
                patch.object(causal_attention, "has_amx", lambda: False),
            ):
                return attention.attend(query, own, attention.beginnings(own, [None]))

        return run

    return "causal_attention", f"{size}, {length} tokens", by(found), by(None)


def _passes(found: Kernels, size: str, hidden: int, inner: int) -> list[Case]:
    import torch

    from echelon.models import kernel_calls, layers
    from echelon.models.blocks import add_and_norm
    from echelon.models.layers import ACTIVATIONS, Norm, Product, RmsNorm
    from echelon.models.rotary import Rotary, rotate, rotate_in_place

    def by(chosen: Kernels | None, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with patch.object(kernel_calls, "kernels", lambda: chosen):
                return work()

        return run

    narrow, wide = (torch.randn(ROWS, n).bfloat16() for n in (hidden, inner))
    scales, norm = torch.rand(ROWS) + 0.1, Norm(torch.rand(hidden), torch.randn(hidden), 1e-5)
    coded = Product(narrow, scales, torch.randn(hidden), narrow.clone())
    plain, up = Product(narrow, residual=narrow), Product(wide, scales, torch.randn(inner))
    shift = ACTIVATIONS["gelu"].shift
    total, root = torch.randn(ROWS, hidden), RmsNorm(torch.rand(hidden), 1e-6)
    heads = torch.randn(ROWS, 3, hidden // 64, 64).bfloat16()
    head_norm, tables = RmsNorm(torch.rand(64), 1e-6), Rotary(1e6, 64).tables(torch.arange(ROWS))
    works: list[tuple[str, str, Callable[[], object]]] = [
        ("quantize", "rows", lambda: layers.quantize(narrow)),
        ("add_norm", "to int8", lambda: layers.add_norm(coded, norm, quantized=True)),
        ("add_norm", "bf16", lambda: layers.add_norm(plain, norm, quantized=False)),
        ("activate", "GELU to int8", lambda: layers.activate(up, "gelu", shift)),
        ("activate", "scale and bias", lambda: layers.activate(up, "none")),
        ("accumulate_norm", "LayerNorm", lambda: add_and_norm(total, narrow, norm, narrow.dtype)),
        ("accumulate_norm", "RMSNorm", lambda: add_and_norm(total, narrow, root, narrow.dtype)),
        ("rotate", "in place", lambda: rotate_in_place(heads[:, :2], *tables)),
        ("rotate", "after a norm", lambda: rotate(heads[:, 0], *tables, head_norm)),
    ]
    return [(name, f"{size}, {of}", by(found, work), by(None, work)) for name, of, work in works]


def _attention(found: Kernels, size: str, length: int, heads: int, width: int) -> Case:
    """The kernel beside the faster one of torch's two ways."""
    import torch

    from echelon.models import attention_cpu

    block = torch.randn(3, ROWS // length, length, heads, width).bfloat16().transpose(2, 3)
    ways = [attention_cpu.METHODS[name] for name in ("fused", "products")]
    fastest = min(ways, key=lambda way: statistics.median(_seconds(lambda: way(*block), 5)))

    def kernel() -> object:
        with patch.object(attention_cpu, "kernels", lambda: found):
            return attention_cpu.METHODS["kernel"](*block)

    return "attention", f"{size}, {length} tokens", kernel, lambda: fastest(*block)


def _seconds(work: Callable[[], object], rounds: int) -> list[float]:
    work()
    found = []
    for _ in range(rounds):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return found


def measure(level: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one level: median seconds of both and torch's over the kernel's."""
    import torch

    from echelon.models.kernels import OPERATIONS, Kernels, load

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for operation, about, kernel, other in cases(Kernels(level, load(level), OPERATIONS)):
            times: list[list[float]] = [[], []]
            for _ in range(rounds):
                for place, work in enumerate((kernel, other)):
                    times[place] += _seconds(work, 3)
            mine, its = map(statistics.median, times)
            row = {"level": level, "operation": operation, "of": about}
            rows.append(row | {"kernel_s": mine, "torch_s": its, "speedup": its / mine})
    return rows


def main() -> None:
    """Parse, measure each level in a process of its own, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--level", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.level:
        print(json.dumps(measure(arguments.level, arguments.rounds)))
        return
    from echelon.models.kernels import possible
    from echelon.profile import library_versions
    from echelon.tuning.machine import describe_machine

    rows = []
    for level in possible():
        command = [sys.executable, __file__, "--level", level, "--rounds", str(arguments.rounds)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | SETTINGS.get(level, {})
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        rows += found
        for row in found:
            print(f"{level:11}{row['operation']:17}{row['of']:26}{row['speedup']:7.2f}")
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": library_versions(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
