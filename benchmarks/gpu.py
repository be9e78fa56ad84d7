"""Measure Echelon on a CUDA card: accuracy, speed, memory, serving, and a peer.

The model has XLM-RoBERTa-large's shape and random weights: meaningless logits, the same work. Times
are from texts to logits; rows that say "encoded" begin with token ids, as when another thread
tokenises. Engines take turns within a round; times are medians over at least three rounds. The peak
is that of one large product, measured before and after everything else; the better one counts.

    python benchmarks/gpu.py                      # nine minutes at most; needs no network
    python benchmarks/gpu.py --tokenizer FOLDER   # with a real tokenizer
    python benchmarks/gpu.py --dry-run            # on CPU, tiny, to test the script

Each part has a share of the time and fails alone: the failure is in the results, the other parts
run, and the exit code is 1. Writes benchmarks/results/gpu.json and gpu.md after each part.
sentence-transformers and flash-attn are compared where they are installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gpu_parts as parts
from gpu_bench import DRY, Bench, Scale
from gpu_engines import free, versions
from gpu_families import families
from gpu_memory import ladder
from gpu_page import page
from gpu_serving import serving
from gpu_workloads import build

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    """Something to measure, and its share of the time that is left when it begins."""

    run: Callable[[Bench], Any]
    share: float


PARTS = {
    "peak": Part(parts.peak, 1),
    "correctness": Part(parts.correctness, 4),
    "families": Part(families, 3),
    "latency": Part(parts.latency, 2),
    "mixed": Part(parts.mixed, 8),
    "tutorial": Part(parts.tutorial, 6),
    "ladder": Part(ladder, 3),
    "serving": Part(serving, 10),
    "knee": Part(parts.knee, 3),
    "long": Part(parts.long, 4),
    "memory": Part(parts.memory, 2),
    "peak_after": Part(parts.peak, 1),
}
"""In the order in which they matter, but that the peak is measured first and last."""


def main() -> int:
    """Parse, build, measure, write; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="model folder, instead of building one")
    parser.add_argument("--tokenizer", type=Path, help="folder with XLM-RoBERTa's tokenizer")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--time-limit", type=float, default=540, help="seconds in all (540)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="on CPU, tiny, to try the script")
    arguments = parser.parse_args()
    began = time.monotonic()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.checkpoint or build(
            Path(scratch) / "model", arguments.tokenizer, tiny=arguments.dry_run
        )
        device = "cpu" if arguments.dry_run else arguments.device
        bench = Bench(folder, device, DRY if arguments.dry_run else Scale())
        return run(bench, arguments.out, began + arguments.time_limit, arguments.parts)


def run(bench: Bench, out: Path, ends: float, names: list[str]) -> int:
    """Measure the named parts until ``ends`` on the monotonic clock; 1 if one failed."""
    from echelon.tuning.machine import describe_machine

    content: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": versions(),
        "model": bench.config,
        "not_compared": bench.missing,
    }
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for place, name in enumerate(names):
        content[name] = _measured(bench, name, names[place:], ends)
        failed += [name] * is_failed(content[name])
        content["goals"] = parts.goals(content)
        (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(page(content), encoding="utf-8")
    print(json.dumps(content["goals"], indent=1))
    for name in failed:
        print(f"{name} failed: {content[name]['failed']}", file=sys.stderr)
    return bool(failed)


def is_failed(found: Any) -> bool:
    """Whether a part has no results but a reason."""
    return isinstance(found, dict) and "failed" in found


def _measured(bench: Bench, name: str, left: list[str], ends: float) -> Any:
    """A part's results, or ``{"failed": reason}``."""
    now = time.monotonic()
    share = PARTS[name].share / sum(PARTS[other].share for other in left)
    bench.ends = now + share * max(0.0, ends - now)
    try:
        return PARTS[name].run(bench)
    except Exception as error:
        logger.exception("%s failed", name)
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        free(bench.device)
        print(f"{name}: {time.monotonic() - now:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
