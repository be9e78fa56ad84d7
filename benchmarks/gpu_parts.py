"""The parts of ``gpu.py`` that run in its own process: accuracy, speed and memory of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_bench import HALVES, cells_of
from gpu_engines import DTYPES, Ours, free, reference
from gpu_workloads import LIMIT, by_query, flop
from workloads import DOCUMENTS, QUERY
from workloads import tutorial as tutorial_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.types import Pair
    from gpu_bench import Bench

TUTORIAL_PAIRS = (10, 50, 100)
TUTORIAL_BATCHES = (1, 2, 4, 8, 16, 32)
TUTORIAL_BUDGETS = (256, 512, 1024, 2048, 4096)
BATCHES = (16, 32, 64, 128, 256)
BUDGETS = (4096, 8192, 16384, 32768, 65536)
KNEE = tuple(256 << i for i in range(9))
LATENCY_DOCUMENTS = 10
ENOUGH_CALLS = 20
"""Single calls that are timed however little time is left, if so many are asked for."""


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
        cells = cells_of(bench.engines, "batch", [b for b in TUTORIAL_BATCHES if b <= count], pairs)
        cells += cells_of(bench.ours.values(), "budget", TUTORIAL_BUDGETS, pairs)
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
    cells = cells_of(bench.peers, "batch", [b for b in BATCHES if b <= len(pairs)], pairs)
    cells += cells_of(bench.ours.values(), "budget", BUDGETS, pairs)
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
    taken: list[float] = []
    while len(taken) < bench.scale.calls and (len(taken) < ENOUGH_CALLS or not bench.hurries):
        taken.append(bench.time(call) * 1e3)
    low, high = np.quantile(taken, [0.05, 0.95]).tolist()
    return {
        "engine": name,
        "calls": len(taken),
        "median_ms": float(np.median(taken)),
        "p5_ms": low,
        "p95_ms": high,
        "p99_ms": float(np.quantile(taken, 0.99)),
    }


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
    """Summary figures of the parts that are there."""
    there = {name: found for name, found in content.items() if "failed" not in found}
    found: dict[str, float] = {}
    peaks = [there[name]["fp16"] for name in ("peak", "peak_after") if name in there]
    if "mixed" in there:
        cells = there["mixed"]["cells"]
        encoded, texts, peer = (
            [cell for cell in cells if cell["engine"] == name]
            for name in ("echelon fp16, encoded", "echelon fp16", "sentence-transformers fp16")
        )
        for name, mine in (("encoded", encoded), ("texts", texts)):
            if peaks:
                share = max(cell["tflops"] for cell in mine) / max(peaks)
                found[f"share_of_peak_mixed_fp16_{name}"] = share
            if peer:
                times = _most(mine) / _most(peer)
                found[f"times_sentence_transformers_fp16_{name}"] = times
    if there.get("latency"):
        found["rank_ten_short_documents_median_ms"] = there["latency"][0]["median_ms"]
    return found


def _most(cells: list[dict[str, Any]]) -> float:
    return float(max(cell["pairs_per_s"] for cell in cells))
