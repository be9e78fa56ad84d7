"""``echelon serve`` on the card under load, with one worker and two, beside a common server.

The other server is a batcher over sentence-transformers (``tutorial_server.py``). Servers run one
after another, since they would share the card. Each is first asked by callers enough, three times;
then all get the same Poisson arrivals at half of what ours answered.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import load_texts
from echelon.loadtest.client import Client
from echelon.loadtest.driver import Driver, closed_loop, open_loop
from echelon.loadtest.texts import TextSource
from echelon.simulation.workload import (
    ConstantArrivals,
    FixedSize,
    LognormalSize,
    PoissonArrivals,
    Workload,
)
from serving_servers import HERE, Server

if TYPE_CHECKING:
    from echelon.loadtest.summary import DriveResult
    from echelon.simulation.workload import Arrivals
    from gpu_bench import Bench

DOCUMENTS = 10
CLIENTS = 64
ROUNDS = 3
TOKENS = 120
HALF = 0.5
GOAL_S = 0.1
"""An answer later than this does not count as goodput."""


def serving(bench: Bench) -> dict[str, Any]:
    """Each server's row, or why there is none."""
    rows: dict[str, dict[str, Any]] = {}
    for name, server in _servers(bench).items():
        rows[name] = _row(bench, server, rows) if isinstance(server, Server) else {"failed": server}
    return {"goal_s": GOAL_S, "documents": DOCUMENTS, "servers": rows}


def _servers(bench: Bench) -> dict[str, Server | str]:
    own = [sys.executable, "-m", "echelon", "serve", str(bench.folder), "--port", "PORT"]
    own += ["--score-cache", "0", "--precision", "fp16", "--device", bench.device]
    own += ["--log-level", "warning"]
    if bench.device == "cpu":
        own[own.index("fp16")] = "fp32"
    found: dict[str, Server | str] = {
        f"echelon, {count} worker{'s' * (count > 1)}": Server(
            "echelon", [*own, "--workers", str(count)]
        )
        for count in (1, 2)
    }
    peer = "sentence-transformers, batcher"
    if importlib.util.find_spec("sentence_transformers") is None:
        return found | {peer: "sentence-transformers is not installed"}
    script = str(HERE / "tutorial_server.py")
    command = [sys.executable, script, str(bench.folder), "PORT", "fp16", bench.device]
    return found | {peer: Server("tutorial batcher", command)}


def _row(bench: Bench, server: Server, before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    try:
        with server:
            rates = [asyncio.run(_saturated(bench, server, number)) for number in range(ROUNDS)]
            first = next(iter(before.values()), {})
            base = first.get("pairs_per_s", float(np.median(rates)))
            workload = _workload(PoissonArrivals(HALF * base / DOCUMENTS), seed=5)
            outcome = asyncio.run(_open(bench, server, workload))
    except (RuntimeError, OSError) as error:
        return {"failed": str(error).partition("\n")[0]}
    latencies = [r.latency_s for r in outcome.records if r.kind == "answered"]
    in_time = sum(x <= GOAL_S for x in latencies) * DOCUMENTS / bench.scale.serving_s
    found = np.percentile(latencies, [50, 95, 99]).tolist() if latencies else [None] * 3
    return {
        "pairs_per_s": float(np.median(rates)),
        "rates": rates,
        "offered_pairs_per_s": HALF * base,
        "answered": len(latencies),
        "sent": len(outcome.records),
        "goodput_pairs_per_s": in_time,
        **dict(zip(("p50_s", "p95_s", "p99_s"), found, strict=True)),
    }


def _workload(arrivals: Arrivals, seed: int) -> Workload:
    return Workload(arrivals, FixedSize(DOCUMENTS), LognormalSize(TOKENS, 0.5, 512), seed)


async def _saturated(bench: Bench, server: Server, number: int) -> float:
    """Pairs a second with callers enough; the first tenth does not count."""
    seconds = bench.scale.serving_s
    requests = _workload(ConstantArrivals(1.0), seed=number).requests()
    async with Client(server.target()) as client:
        texts = TextSource(load_texts().topics, seed=number)
        driver = Driver(client, texts, warmup_s=seconds / 10)
        outcome = await closed_loop(driver, requests, CLIENTS, seconds)
    counted = [
        r for r in outcome.records
        if r.kind == "answered" and seconds / 10 <= r.ended <= seconds
    ]  # fmt: skip
    return sum(r.documents for r in counted) / (0.9 * seconds)


async def _open(bench: Bench, server: Server, workload: Workload) -> DriveResult:
    async with Client(server.target()) as client:
        driver = Driver(client, TextSource(load_texts().topics, seed=workload.seed))
        seconds = bench.scale.serving_s
        return await open_loop(driver, workload.requests(seconds), seconds)
