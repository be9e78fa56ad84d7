"""Measure Echelon on a CUDA card: accuracy, speed, memory, serving, and a peer.

The model has XLM-RoBERTa-large's shape and random weights: meaningless logits, the same work. Times
are from texts to logits; rows that say "encoded" begin with token ids, as when another thread
tokenises. Engines take turns within a round; times are medians over at least three rounds. The peak
is that of one large product, measured before and after everything else; the better one counts.

    python benchmarks/gpu.py                      # nine minutes at most; needs no network
    python benchmarks/gpu.py --tokenizer FOLDER   # with a real tokenizer
    python benchmarks/gpu.py --dry-run            # on CPU, tiny, to test the script

Each part has a share of the time, is ended after three times that, and fails alone, also for lack
of a package that only it needs: the failure is in the results, the other parts run, and the exit
code is 1, as it is for scores that differ too much. Writes benchmarks/results/gpu.json and gpu.md
after each part.
sentence-transformers and flash-attn are compared where they are installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gpu_parts as parts
from gpu_bench import DRY, Bench, Scale
from gpu_engines import free, versions
from gpu_families import families
from gpu_memory import ladder
from gpu_page import page
from gpu_workloads import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"

PATIENCE = 3
"""A part is ended after so many times its share: three turns of each engine may take longer than
that share on a slow card, and a part that hangs must leave time to the others."""


class TimeIsOver(BaseException):
    """A part took too long; no handler for what may go wrong inside of one takes this."""


class Part(NamedTuple):
    """Something to measure, and its share of the time that is left when it begins."""

    run: Callable[[Bench], Any]
    share: float


def serving(bench: Bench) -> dict[str, Any]:
    """See ``gpu_serving``, which needs the packages of the load generator."""
    from gpu_serving import serving

    return serving(bench)


PARTS = {
    "peak": Part(parts.peak, 1),
    "correctness": Part(parts.correctness, 4),
    "families": Part(families, 3),
    "latency": Part(parts.latency, 2),
    "mixed": Part(parts.mixed, 8),
    "tutorial": Part(parts.tutorial, 6),
    "ladder": Part(ladder, 3),
    "serving": Part(serving, 14),
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
    failed: list[str] = []
    for place, name in enumerate(names):
        content[name] = _measured(bench, name, names[place:], ends)
        failed += [f"{name} failed: {reason}" for reason in failures(content[name])]
        content["goals"] = parts.goals(content)
        (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(page(content), encoding="utf-8")
    print(json.dumps(content["goals"], indent=1))
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    return bool(failed)


def failures(found: Any) -> list[str]:
    """What failed in a part's results, or in a row of them."""
    if isinstance(found, list):
        return [reason for row in found for reason in failures(row)]
    if not isinstance(found, dict):
        return []
    here = [str(found["failed"])] if "failed" in found else []
    return here + [reason for value in found.values() for reason in failures(value)]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End a block with :class:`TimeIsOver` after so many seconds, whatever it waits for."""

    def ring(*_: object) -> None:
        raise TimeIsOver(f"it was ended after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _measured(bench: Bench, name: str, left: list[str], ends: float) -> Any:
    """A part's results, or ``{"failed": reason}``."""
    now = time.monotonic()
    if now >= ends:
        return {"failed": "no time was left for it"}
    share = PARTS[name].share / sum(PARTS[other].share for other in left) * (ends - now)
    bench.ends = now + share
    try:
        with at_most(min(ends - now, PATIENCE * share)):
            return PARTS[name].run(bench)
    except (Exception, TimeIsOver) as error:
        logger.exception("%s failed", name)
        return {"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}
    finally:
        free(bench.device)
        print(f"{name}: {time.monotonic() - now:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
