"""Measure Echelon on a CUDA card: accuracy, speed, share of the card's peak, and a peer.

The model has XLM-RoBERTa-large's shape and random weights: meaningless logits, the same work. Times
are from texts to logits; rows that say "encoded" begin with token ids, as when another thread
tokenises. Engines take turns within a round; times are medians over rounds. The peak is that of one
large product, measured before and after everything else; the better one counts.

    python benchmarks/gpu.py --tokenizer FOLDER   # a real tokenizer
    python benchmarks/gpu.py                      # a small one trained on the built-in texts
    python benchmarks/gpu.py --dry-run            # on CPU, tiny, to test the script

Writes benchmarks/results/gpu.json and gpu.md after each part.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_engines import DTYPES, Ours, Peer, free, open_peers, reference, versions
from gpu_page import page
from gpu_workloads import LIMIT, Writer, build, by_query, flop
from workloads import DOCUMENTS, QUERY
from workloads import tutorial as tutorial_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from echelon.types import Pair

RESULTS = Path(__file__).parent / "results"
PRECISIONS = ("fp32", "fp16", "bf16")
HALVES = ("fp16", "bf16")
TUTORIAL_PAIRS = (10, 50, 100)
TUTORIAL_BATCHES = (1, 2, 4, 8, 16, 32)
TUTORIAL_BUDGETS = (256, 512, 1024, 2048, 4096)
BATCHES = (16, 32, 64, 128, 256)
BUDGETS = (4096, 8192, 16384, 32768, 65536)
KNEE = tuple(256 << i for i in range(9))
LATENCY_DOCUMENTS = 10


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure."""

    pairs: int = 1024  # of mixed lengths
    long_pairs: int = 256  # of 512 tokens
    checked: int = 256  # pairs whose scores are compared
    rounds: int = 5  # turns of each engine
    calls: int = 200  # single calls whose latency is measured
    matrix: int = 8192  # rows and columns of the product that gives the peak


DRY = Scale(pairs=24, long_pairs=2, checked=32, rounds=1, calls=3, matrix=256)


class Bench:
    """The model, engines and clock that all parts share."""

    def __init__(self, folder: Path, device: str, scale: Scale, seconds: float) -> None:
        self.folder, self.device, self.scale = folder, device, scale
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.ours = {precision: Ours(folder, precision, device) for precision in HALVES}
        self.peers, self.missing = open_peers(folder, device)
        self.writer = Writer.of(folder)
        self._until = time.monotonic() + seconds

    @property
    def engines(self) -> list[Ours | Peer]:
        """All of them, ours first."""
        return [*self.ours.values(), *self.peers]

    def rounds(self) -> int:
        """Turns of each engine: one when the time is over."""
        return self.scale.rounds if time.monotonic() < self._until else 1

    def wait(self) -> None:
        """Wait until the card is idle."""
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def in_turn(self, cells: list[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
        """Time each cell's ``call`` once a round; return the cells with their medians.

        Two calls before are not counted: the second one captures graphs.
        """
        for cell in cells:
            cell["call"]()
            cell["call"]()
            cell["seconds"] = []
        for _ in range(self.rounds()):
            for cell in cells:
                cell["seconds"].append(self.time(cell["call"]))
        return [_summary(cell, pairs) for cell in cells]


def _summary(cell: dict[str, Any], pairs: int) -> dict[str, Any]:
    median = float(np.median(cell["seconds"]))
    kept = {key: value for key, value in cell.items() if key != "call"}
    return kept | {"median_s": median, "pairs_per_s": pairs / median}


def _cells(engines: Iterable[Ours | Peer], unit: str, sizes: Iterable[int], *args: Any) -> Any:
    """A cell for each engine and step size, which scores ``args``."""
    return [
        {
            "engine": engine.name,
            "unit": unit,
            "size": size,
            "call": lambda e=engine, s=size: e.score(*args, **{unit: s}),
        }
        for engine in engines
        for size in sizes
    ]


def peak(bench: Bench) -> dict[str, float]:
    """TFLOP/s of one large product in each half-width type: median of 5 groups of 10."""
    import torch

    size, found = bench.scale.matrix, {}
    for precision in HALVES:
        dtype = getattr(torch, DTYPES[precision])
        first, second = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))

        def group(a: torch.Tensor = first, b: torch.Tensor = second) -> None:
            for _ in range(10):
                a @ b

        group()
        seconds = float(np.median([bench.time(group) for _ in range(5)])) / 10
        found[precision] = 2 * size**3 / seconds / 1e12
    free(bench.device)
    return found


def correctness(bench: Bench) -> list[dict[str, Any]]:
    """Logits of every engine and precision beside transformers' in fp32."""
    from echelon.engine.precision_check import agreement

    pairs = bench.writer.mixed(bench.scale.checked)
    encoded = bench.ours["fp16"].encode(pairs)
    exact = reference(bench.folder, encoded, bench.device)
    fp32 = Ours(bench.folder, "fp32", bench.device)
    scored = {fp32.name: fp32.run(encoded, budget=16384)}
    scored["echelon fp32, small steps"] = _small_steps(fp32, encoded)
    fp32.close()
    for ours in bench.ours.values():
        scored[ours.name] = ours.run(encoded, budget=16384)
        scored[f"{ours.name}, small steps"] = _small_steps(ours, encoded)
    for peer in bench.peers:
        scored[peer.name] = peer.score(pairs, batch=32)
    free(bench.device)
    wanted = by_query(pairs, exact)
    rows = []
    for name, logits in scored.items():
        found = agreement(wanted, by_query(pairs, logits), [None] * len(wanted))
        rows.append({"engine": name, "max_delta": found.max_delta, "tau": found.tau})
    return [{"engine": "transformers fp32", "logits": _spread(exact)}, *rows]


def _small_steps(ours: Ours, encoded: Any) -> np.ndarray:
    """Scores as graphs give them: by the third time every shape has been captured."""
    for _ in range(3):
        logits = ours.run(encoded, budget=1024)
    return logits


def _spread(logits: np.ndarray) -> dict[str, float]:
    return {"lowest": float(logits.min()), "highest": float(logits.max())}


def tutorial(bench: Bench) -> list[dict[str, Any]]:
    """The tutorial's grid: 10, 50 and 100 short pairs, batch sizes 1 to 32, token budgets."""
    rows = []
    for count in TUTORIAL_PAIRS:
        pairs = tutorial_pairs(count)
        cells = _cells(bench.engines, "batch", [b for b in TUTORIAL_BATCHES if b <= count], pairs)
        cells += _cells(bench.ours.values(), "budget", TUTORIAL_BUDGETS, pairs)
        rows += [{"pairs": count, **row} for row in bench.in_turn(cells, count)]
    return rows


def mixed(bench: Bench) -> dict[str, Any]:
    """Log-normal lengths, mean 120, at most 512 tokens."""
    return _throughput(bench, bench.writer.mixed(bench.scale.pairs))


def long(bench: Bench) -> dict[str, Any]:
    """512 tokens each."""
    return _throughput(bench, bench.writer.pairs([LIMIT] * bench.scale.long_pairs))


def _throughput(bench: Bench, pairs: list[Pair]) -> dict[str, Any]:
    encoded = bench.ours["fp16"].encode(pairs)
    cells = _cells(bench.peers, "batch", [b for b in BATCHES if b <= len(pairs)], pairs)
    cells += _cells(bench.ours.values(), "budget", BUDGETS, pairs)
    for ours in bench.ours.values():
        cells += [
            {
                "engine": f"{ours.name}, encoded",
                "unit": "budget",
                "size": budget,
                "call": lambda o=ours, b=budget: o.run(encoded, budget=b),
            }
            for budget in BUDGETS
        ]
    work = flop(bench.config, encoded.lengths)
    rows = [row | _rates(row, encoded, work) for row in bench.in_turn(cells, len(pairs))]
    return {"pairs": len(pairs), "tokens": int(encoded.lengths.sum()), "cells": rows}


def _rates(row: dict[str, Any], encoded: Any, work: float) -> dict[str, float]:
    """Tokens and operations a second; only the necessary operations count."""
    seconds = row["median_s"]
    return {
        "tokens_per_s": int(encoded.lengths.sum()) / seconds,
        "tflops": work / seconds / 1e12,
    }


def knee(bench: Bench) -> list[dict[str, Any]]:
    """Throughput against tokens a step, encoded pairs of mixed lengths in fp16."""
    ours = bench.ours["fp16"]
    encoded = ours.encode(bench.writer.mixed(bench.scale.pairs))
    cells = [
        {"size": budget, "call": lambda b=budget: ours.run(encoded, budget=b)} for budget in KNEE
    ]
    work = flop(bench.config, encoded.lengths)
    rows = bench.in_turn(cells, len(encoded))
    return [row | _rates(row, encoded, work) for row in rows]


def latency(bench: Bench) -> list[dict[str, Any]]:
    """One question, ten short documents: milliseconds until they are ranked."""
    from echelon import Reranker

    documents = [f"{DOCUMENTS[i % 4]} {i}" for i in range(LATENCY_DOCUMENTS)]
    pairs = [(QUERY, document) for document in documents]
    ours = bench.ours["fp16"]
    rows = [_repeated(bench, f"{ours.name}, texts to logits", lambda: ours.score(pairs))]
    if ours.has_graphs:
        ours.scorer.use_graphs = False
        name = f"{ours.name}, texts to logits, no graphs"
        rows.append(_repeated(bench, name, lambda: ours.score(pairs)))
        ours.scorer.use_graphs = True
    with Reranker(str(bench.folder), device=bench.device, precision="fp16") as reranker:
        call = lambda: reranker.rank(QUERY, documents)  # noqa: E731 - as the others
        rows.insert(0, _repeated(bench, "echelon fp16, Reranker.rank", call))
    for peer in bench.peers:
        call = lambda p=peer: p.score(pairs, batch=32)  # noqa: E731 - as above
        rows.append(_repeated(bench, peer.name, call))
    return rows


def _repeated(bench: Bench, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    for _ in range(5):
        call()
    calls = bench.scale.calls if bench.rounds() > 1 else max(3, bench.scale.calls // 10)
    taken = [bench.time(call) * 1e3 for _ in range(calls)]
    low, high = np.quantile(taken, [0.05, 0.95]).tolist()
    return {"engine": name, "median_ms": float(np.median(taken)), "p5_ms": low, "p95_ms": high}


def memory(bench: Bench) -> list[dict[str, Any]]:
    """Peak bytes above the idle state, mixed lengths, without graphs and their pool."""
    if bench.device == "cpu":
        return []
    import torch

    pairs = bench.writer.mixed(bench.scale.pairs // 4)
    for ours in bench.ours.values():
        ours.scorer.use_graphs = False
    calls = {f"{o.name}, {b} tokens": (o, {"budget": b}) for o in bench.ours.values() for b in KNEE}
    calls |= {f"{p.name}, batch {b}": (p, {"batch": b}) for p in bench.peers for b in (32, 128)}
    rows = []
    for name, (engine, size) in calls.items():
        free(bench.device)
        idle = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.score(pairs, **size)
        rows.append({"run": name, "peak_bytes": torch.cuda.max_memory_allocated() - idle})
    return rows


def goals(content: dict[str, Any]) -> dict[str, float]:
    """Summary figures of all parts."""
    top = max(content["peak"]["fp16"], content["peak_after"]["fp16"])
    cells = content["mixed"]["cells"]

    def best(engine: str, key: str) -> float:
        return max((c[key] for c in cells if c["engine"] == engine), default=float("nan"))

    peer = best("sentence-transformers fp16", "pairs_per_s")
    return {
        "share_of_peak_mixed_fp16_encoded": best("echelon fp16, encoded", "tflops") / top,
        "share_of_peak_mixed_fp16_texts": best("echelon fp16", "tflops") / top,
        "times_sentence_transformers_fp16_texts": best("echelon fp16", "pairs_per_s") / peer,
        "times_sentence_transformers_fp16_encoded": best("echelon fp16, encoded", "pairs_per_s")
        / peer,
        "rank_ten_short_documents_median_ms": content["latency"][0]["median_ms"],
    }


PARTS: dict[str, Callable[[Bench], Any]] = {
    "peak": peak,
    "correctness": correctness,
    "latency": latency,
    "mixed": mixed,
    "tutorial": tutorial,
    "knee": knee,
    "long": long,
    "memory": memory,
    "peak_after": peak,
}


def main() -> None:
    """Parse, build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="model folder, instead of building one")
    parser.add_argument("--tokenizer", type=Path, help="folder with XLM-RoBERTa's tokenizer")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--seconds", type=float, default=240, help="then one round a part only")
    parser.add_argument("--dry-run", action="store_true", help="on CPU, tiny, to try the script")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.checkpoint or build(
            Path(scratch) / "model", arguments.tokenizer, tiny=arguments.dry_run
        )
        device = "cpu" if arguments.dry_run else arguments.device
        scale = DRY if arguments.dry_run else Scale()
        _run(Bench(folder, device, scale, arguments.seconds), arguments.out)


def _run(bench: Bench, out: Path) -> None:
    from echelon.tuning.machine import describe_machine

    content: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": versions(),
        "model": bench.config,
        "not_compared": bench.missing,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        started = time.monotonic()
        content[name] = part(bench)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        if name == "peak_after":
            content["goals"] = goals(content)
        (out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(page(content), encoding="utf-8")
    print(json.dumps(content["goals"], indent=1))


if __name__ == "__main__":
    main()
