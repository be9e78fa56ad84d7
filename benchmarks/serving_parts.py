"""What benchmarks/serving.py measures: one function a part, each giving a dictionary of numbers."""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon import Reranker
    from echelon.data import Topic
    from echelon.loadtest.summary import DriveResult
    from echelon.simulation.workload import Arrivals
    from serving_servers import Server

DOCUMENTS = 10
CLIENTS = 16
PAUSE_S = 0.05
"""Part f: threads that multiplied matrices look out for more for some milliseconds, and would take
the cores from the engine timed next."""

GOAL_S = 1.0
"""Part e: an answer later than this is of no use."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts share.

    Attributes:
        reranker: the engine in this process.
        server: ours.
        topics: texts.
        tokens: mean tokens of a pair.
        seconds: how long a run lasts.
        rounds: turns of parts that take turns.
    """

    reranker: Reranker
    server: Server
    topics: Sequence[Topic]
    tokens: int
    seconds: float
    rounds: int

    def workload(self, arrivals: Arrivals, documents: int = DOCUMENTS, seed: int = 0) -> Workload:
        """Requests of a number of documents with log-normal lengths, as web passages have."""
        lengths = LognormalSize(self.tokens, 0.5, 512)
        return Workload(arrivals, FixedSize(documents), lengths, seed)

    def requests(self, count: int, seed: int) -> list[tuple[str, list[str]]]:
        """Texts of a number of requests, different in each round."""
        material = TextSource(self.topics, seed=seed)
        arrivals = self.workload(ConstantArrivals(1.0), seed=seed).requests()
        return [material.request(arrival) for arrival in islice(arrivals, count)]

    async def open(self, server: Server, workload: Workload, seconds: float) -> DriveResult:
        """Send a workload when it is due."""
        async with Client(server.target()) as client:
            drive = Driver(client, TextSource(self.topics, seed=workload.seed))
            return await open_loop(drive, workload.requests(seconds), seconds)


def saturated(bench: Bench) -> dict[str, Any]:
    """(a) Pairs a second of the server with callers enough, beside the engine on the same pairs."""
    rate = _direct(bench, bench.requests(4, seed=999))[0]
    count = max(CLIENTS, round(rate * bench.seconds / DOCUMENTS / 2))
    direct, served = [], []
    for number in range(bench.rounds):
        requests = bench.requests(count, seed=number)
        direct.append(_direct(bench, requests)[0])
        served.append(asyncio.run(_served(bench.server, requests)))
    ratios = [ours / alone for ours, alone in zip(served, direct, strict=True)]
    return {
        "requests": count,
        "clients": CLIENTS,
        "direct_pairs_per_s": direct,
        "served_pairs_per_s": served,
        "ratio": _spread(ratios),
    }


def _direct(bench: Bench, requests: Sequence[tuple[str, list[str]]]) -> tuple[float, Any]:
    pairs = [(query, document) for query, documents in requests for document in documents]
    began = time.perf_counter()
    logits = bench.reranker.score_pairs(pairs).logits
    return len(pairs) / (time.perf_counter() - began), logits


async def _served(server: Server, requests: Sequence[tuple[str, list[str]]]) -> float:
    target = server.target()
    bodies = iter([(target.protocol.body(*request), len(request[1])) for request in requests])
    pairs = sum(len(documents) for _, documents in requests)

    async def caller(client: Client) -> None:
        for body, documents in bodies:
            reply = await client.send(body, documents)
            if reply.kind != "answered":
                raise RuntimeError(f"a request was not answered: {reply}")

    async with Client(target) as client:
        began = time.perf_counter()
        await asyncio.gather(*(caller(client) for _ in range(CLIENTS)))
        return pairs / (time.perf_counter() - began)


def overhead(bench: Bench) -> dict[str, Any]:
    """(f) One caller: a request over HTTP, and the same documents ranked in this process.

    The caller is as plain as can be, so that the server is measured. The same step takes up to a
    twentieth longer in one process than in another, start by start, which is more than the goal. So
    the forward passes are timed on both sides and taken off too: what is left is all that a server
    adds.
    """
    requests = bench.requests(max(20, 4 * round(bench.seconds)), seed=7)
    target = bench.server.target()
    address = urlsplit(target.url)
    forward = _Forward(bench.reranker)
    direct, served = [], []
    before = _steps(bench.server)
    with forward, closing(HTTPConnection(address.netloc)) as connection:
        for query, documents in requests:
            body = target.protocol.body(query, documents)
            time.sleep(PAUSE_S)
            served.append(_plain(connection, address.path, body))
            time.sleep(PAUSE_S)
            began = time.perf_counter()
            bench.reranker.rank(query, documents)
            direct.append(time.perf_counter() - began)
    steps = [after - start for after, start in zip(_steps(bench.server), before, strict=True)]
    extra = [(a - b) * 1e3 for a, b in zip(served, direct, strict=True)]
    around = {
        "served_ms": (sum(served) - steps[1]) / len(served) * 1e3,
        "direct_ms": (sum(direct) - forward.seconds) / len(direct) * 1e3,
    }
    return {
        "requests": len(requests),
        "steps": {"served": steps[0], "direct": forward.steps},
        "served_ms": _spread([s * 1e3 for s in served]),
        "direct_ms": _spread([s * 1e3 for s in direct]),
        "overhead_ms": _spread(extra) | {"mean": statistics.fmean(extra)},
        "around_steps": around | {"overhead_ms": around["served_ms"] - around["direct_ms"]},
    }


class _Forward:
    """Times the forward passes of an engine while the context lasts."""

    def __init__(self, reranker: Reranker) -> None:
        self.seconds, self.steps = 0.0, 0
        self._scorer: Any = reranker._engine._scorer  # noqa: SLF001 - no way in is wanted by users
        self._score = self._scorer.score

    def __enter__(self) -> None:
        self._scorer.score = self._timed

    def __exit__(self, *_: object) -> None:
        del self._scorer.score

    def _timed(self, batch: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._score(batch)
        finally:
            self.seconds += time.perf_counter() - began
            self.steps += 1


def _plain(connection: HTTPConnection, path: str, body: bytes) -> float:
    began = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    took = time.perf_counter() - began
    if response.status != HTTPStatus.OK:
        raise RuntimeError(f"a request was not answered: {answer[:200]!r}")
    return took


async def _timed(client: Client, body: bytes, documents: int) -> float:
    began = time.perf_counter()
    reply = await client.send(body, documents)
    if reply.kind != "answered":
        raise RuntimeError(f"a request was not answered: {reply}")
    return time.perf_counter() - began


def half_load(bench: Bench, capacity: float) -> dict[str, Any]:
    """(b) Latency at half of the capacity, beside that of one such request alone."""
    alone = asyncio.run(_alone(bench, 21))
    rate = capacity / DOCUMENTS / 2
    found: dict[str, Any] = {"alone_s": _spread(alone), "rate_per_s": rate}
    for arrivals in (PoissonArrivals(rate), ConstantArrivals(rate)):
        outcome = asyncio.run(bench.open(bench.server, bench.workload(arrivals), bench.seconds))
        latency = _latencies(outcome)
        found[type(arrivals).__name__.lower()] = latency | {
            "p99_over_alone": latency["p99_s"] / statistics.median(alone)
        }
    return found


async def _alone(bench: Bench, count: int) -> list[float]:
    target = bench.server.target()
    async with Client(target) as client:
        return [
            await _timed(client, target.protocol.body(query, documents), len(documents))
            for query, documents in bench.requests(count, seed=5)
        ]


def twice(bench: Bench, capacity: float) -> dict[str, Any]:
    """(c) Twice the capacity is offered: what is answered, and what the others hear."""
    rate = 2 * capacity / DOCUMENTS
    before = bench.server.metric("echelon_http_requests_total")
    answered_before = bench.server.metric("echelon_documents_total")
    workload = bench.workload(PoissonArrivals(rate), seed=3)
    outcome = asyncio.run(bench.open(bench.server, workload, bench.seconds))
    records = list(outcome.records)
    within = [r for r in records if r.kind == "answered" and r.ended <= bench.seconds]
    goodput = sum(r.documents for r in within) / bench.seconds
    refusals = [r.ended - r.sent for r in records if r.kind == "refused"]
    answered = sum(r.documents for r in records if r.kind == "answered")
    return {
        "offered_per_s": rate,
        "sent": sum(1 for _ in workload.requests(bench.seconds)),
        "kinds": _kinds(outcome),
        "statuses": sorted({r.status for r in records}),
        "heard_by_server": bench.server.metric("echelon_http_requests_total") - before,
        "documents_scored_by_server": (
            bench.server.metric("echelon_documents_total") - answered_before
        ),
        "documents_answered": answered,
        "goodput_over_capacity": goodput / capacity,
        "refusal_ms": _percentiles([s * 1e3 for s in refusals]),
        "send_lag_p99_ms": float(
            np.percentile(outcome.records.sent - outcome.records.scheduled, 99) * 1e3
        ),
    }


def beside_large(bench: Bench, capacity: float) -> dict[str, Any]:
    """(d) Single documents, ten a second at most, beside requests of a thousand documents."""
    rate = min(10.0, capacity / 50)
    return asyncio.run(_beside_large(bench, rate))


async def _beside_large(bench: Bench, rate: float) -> dict[str, Any]:
    server = bench.server
    stop = asyncio.Event()
    async with Client(server.target()) as client, Client(server.target()) as other:
        large = Driver(other, TextSource(bench.topics, seed=11), stop=stop)
        thousands = bench.workload(ConstantArrivals(1.0), 1000).requests()
        running = asyncio.create_task(closed_loop(large, thousands, 1, bench.seconds * 10))
        await asyncio.sleep(5)
        steps, spent = _steps(server)
        single = Driver(client, TextSource(bench.topics, seed=12))
        arrivals = bench.workload(ConstantArrivals(rate), 1, seed=12).requests(bench.seconds)
        outcome = await open_loop(single, arrivals, bench.seconds)
        after, spent_after = _steps(server)
        stop.set()
        await running
    step_s = (spent_after - spent) / (after - steps)
    latency = _latencies(outcome)
    return {
        "rate_per_s": rate,
        "step_s": step_s,
        **latency,
        "p99_in_steps": latency["p99_s"] / step_s,
    }


def _steps(server: Server) -> tuple[float, float]:
    return (
        server.metric("echelon_step_seconds_count"),
        server.metric("echelon_step_actual_seconds_total"),
    )


def beside_peers(bench: Bench, peers: Sequence[Server], capacity: float) -> dict[str, Any]:
    """(e) The same open loop at several rates, server by server."""
    found: dict[str, Any] = {"goal_s": GOAL_S, "rates": []}
    for share in (0.25, 0.5, 0.75, 1.0):
        rate = share * capacity / DOCUMENTS
        row: dict[str, Any] = {"share_of_capacity": share, "rate_per_s": rate, "servers": {}}
        for server in (bench.server, *peers):
            workload = bench.workload(PoissonArrivals(rate), seed=round(share * 100))
            outcome = asyncio.run(bench.open(server, workload, bench.seconds))
            in_time = [r for r in outcome.records if r.kind == "answered" and r.latency_s <= GOAL_S]
            row["servers"][server.name] = _latencies(outcome) | {
                "kinds": _kinds(outcome),
                "goodput_pairs_per_s": sum(r.documents for r in in_time) / bench.seconds,
            }
        found["rates"].append(row)
    return found


def _kinds(outcome: DriveResult) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for record in outcome.records:
        kinds[record.kind] = kinds.get(record.kind, 0) + 1
    return kinds


def _latencies(outcome: DriveResult) -> dict[str, Any]:
    latency = [r.latency_s for r in outcome.records if r.kind == "answered"]
    return {f"{name}_s": value for name, value in _percentiles(latency).items()} | {
        "answered": len(latency)
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.percentile(values, [50, 95, 99, 100])
    return dict(zip(("p50", "p95", "p99", "max"), map(float, found), strict=True))


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}
