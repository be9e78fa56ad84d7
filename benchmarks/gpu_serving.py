"""``echelon serve`` on the card under load, with one worker and two, beside a common server.

The other server is a batcher over sentence-transformers (``tutorial_server.py``). Servers run one
after another, since they would share the card. Each is first asked by callers enough, three times;
then all get the same Poisson arrivals at half of what the first answered, three times too.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from statistics import median
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
    from echelon.simulation.workload import Arrivals
    from gpu_bench import Bench

DOCUMENTS = 10
CLIENTS = 64
ROUNDS = 3
TOKENS = 120
HALF = 0.5
LEAST_S = 1.0
"""Seconds of a run, however little time is left, if it is to last so long."""

START_SHARES = 2
"""A server may take so many times its share of the time to start; then it is given up."""

GOAL_S = 0.1
"""An answer later than this does not count as goodput."""


def serving(bench: Bench) -> dict[str, Any]:
    """Each server's row, or why there is none."""
    servers, rows = _servers(bench), {}
    base: float | None = None
    for place, (name, server) in enumerate(servers.items()):
        if isinstance(server, str):
            rows[name] = {"skipped": server}
            continue
        share_s = max(0.0, bench.ends - time.monotonic()) / (len(servers) - place)
        rows[name] = _row(bench, server, base, share_s)
        base = base or rows[name].get("pairs_per_s")
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


def _row(bench: Bench, server: Server, base: float | None, share_s: float) -> dict[str, Any]:
    """Numbers of a server, which may take about ``share_s`` seconds, its start included.

    ``base`` is what the first server answered, in pairs a second; None for that one.
    """
    began = time.monotonic()
    server.start_s = START_SHARES * share_s
    try:
        with server:
            spare = (share_s - (time.monotonic() - began)) / (2 * ROUNDS)
            seconds = min(bench.scale.serving_s, max(LEAST_S, spare))
            rates = [asyncio.run(_saturated(server, n, seconds)) for n in range(ROUNDS)]
            base = base or median(rates)
            if not base:
                return {"failed": "no request was answered"}
            runs = [asyncio.run(_open(server, base, n, seconds)) for n in range(ROUNDS)]
    except (RuntimeError, OSError) as error:
        return {"failed": str(error).partition("\n")[0]}
    row: dict[str, Any] = {
        "pairs_per_s": median(rates),
        "rates": rates,
        "offered_pairs_per_s": HALF * base,
        "seconds": seconds,
        "runs": runs,
    }
    if not all(run["answered"] for run in runs):
        row["failed"] = "in a run no request was answered"
    return row


def _workload(arrivals: Arrivals, seed: int) -> Workload:
    return Workload(arrivals, FixedSize(DOCUMENTS), LognormalSize(TOKENS, 0.5, 512), seed)


async def _saturated(server: Server, number: int, seconds: float) -> float:
    """Pairs a second with callers enough; the first tenth does not count."""
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


async def _open(server: Server, base: float, number: int, seconds: float) -> dict[str, Any]:
    """Poisson arrivals at half of ``base`` pairs a second: goodput, and latency of answers."""
    workload = _workload(PoissonArrivals(HALF * base / DOCUMENTS), seed=ROUNDS + number)
    async with Client(server.target()) as client:
        driver = Driver(client, TextSource(load_texts().topics, seed=workload.seed))
        outcome = await open_loop(driver, workload.requests(seconds), seconds)
    latencies = [r.latency_s for r in outcome.records if r.kind == "answered"]
    in_time = sum(latency <= GOAL_S for latency in latencies)
    found = np.percentile(latencies, [50, 95, 99]).tolist() if latencies else [None] * 3
    return {
        "sent": len(outcome.records),
        "answered": len(latencies),
        "goodput_pairs_per_s": in_time * DOCUMENTS / seconds,
        **dict(zip(("p50_s", "p95_s", "p99_s"), found, strict=True)),
    }
