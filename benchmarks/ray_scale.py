"""Many machines: what a second worker brings, and routing by tokens beside Ray's own.

A cluster of this machine alone, with a scorer that sleeps for as long as a step would take, so that
what is measured is everything but the scoring. Run it on a machine that has nothing else to do:

    python benchmarks/ray_scale.py --out benchmarks/results/ray_scale.json     # five minutes

1. Requests from closed loops, on one worker and on two: pairs a second.
2. Requests of mixed sizes at the same times, P50 and P99: two replicas of one worker each, between
   which Ray Serve chooses (by requests), and one replica that shares its queue between two workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import serve
from ray.cluster_utils import Cluster

from echelon.engine.events import ServiceSettings
from echelon.engine.service import Service
from echelon.integrations.ray.worker import RayWorker, WorkerResources
from echelon.models.base import FakeScorer
from echelon.scheduling.admission import AdmissionLimits
from echelon.tokenization.pairs import EncodedPairs, Template, encode_pairs
from echelon.tuning.machine import describe_machine
from echelon.types import RerankRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from echelon.types import FloatArray, Pair, TokenBatch, Truncation

BASE_S, TOKEN_S = 3e-3, 2e-5
"""Seconds of an empty step, and of a token: a small model on a GPU."""

BUDGET, LENGTH = 4096, 60
SIZES, SHARES = (10, 100, 1000), (0.8, 0.17, 0.03)
"""Documents of a request, and the number of requests of that size."""

TEMPLATE = Template((1,), (2, 2), (2,), None)
MACHINE = WorkerResources(cpus=2)
"""A worker takes a machine; the head has one CPU and so no worker."""


class Sleeper(FakeScorer):
    """Takes as long as was planned."""

    def score(self, batch: TokenBatch) -> FloatArray:
        """Sleep, then score as the fake does."""
        time.sleep(BASE_S + TOKEN_S * len(batch.ids))
        self.batches.clear()
        return super().score(batch)


class Encoder:
    """Encodes numbers as texts into pairs of one length."""

    template = TEMPLATE

    def encode(
        self, pairs: Sequence[Pair], max_length: int, truncation: Truncation, *more: Any
    ) -> EncodedPairs:
        """Encode pairs of :func:`pairs_of`; texts of the canary count as 0."""
        numbers = [[int(text) if text.isdigit() else 0 for text in pair] for pair in pairs]
        queries = [np.array([query], dtype=np.int32) for query, _ in numbers]
        documents = [np.array([*pair, *range(LENGTH - 7)], dtype=np.int32) for pair in numbers]
        return encode_pairs(TEMPLATE, queries, documents, max_length, truncation, *more[1:])


def pairs_of(seed: int, count: int) -> list[Pair]:
    """A request: none of its pairs is like that of another."""
    return [(str(seed), str(number)) for number in range(count)]


def service(workers: int) -> Service:
    """A service whose workers are actors."""
    settings = ServiceSettings(
        workers=workers,
        precision="fp32",
        token_budget=BUDGET,
        bounds=AdmissionLimits(max_requests=100_000, max_wait_s=600.0),
    )
    made: Any = Encoder()
    return Service(
        made, lambda number, ended: RayWorker(Sleeper, MACHINE, f"{number}", on_end=ended), settings
    )


@serve.deployment(max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
class Replica:
    """A service with a number of workers behind Ray Serve."""

    def __init__(self, workers: int) -> None:
        self._service = service(workers)
        self._started: asyncio.Task[None] | None = None

    async def score(self, seed: int, count: int) -> int:
        """Score a request; the first starts the service."""
        if self._started is None:
            self._started = asyncio.create_task(self._service.start())
        await self._started
        return len((await self._service.submit(RerankRequest(pairs_of(seed, count)))).logits)

    async def __del__(self) -> None:
        """End the workers."""
        await self._service.stop()


async def rate(workers: int, seconds: float, loops: int = 16) -> float:
    """Pairs a second of closed loops."""
    done = 0
    async with service(workers) as made:
        end = time.perf_counter() + seconds
        began = time.perf_counter()

        async def loop(number: int) -> None:
            nonlocal done
            seed = number * 100_000
            while time.perf_counter() < end:
                seed += 1
                answer = await made.submit(RerankRequest(pairs_of(seed, 40)))
                done += len(answer.logits)  # not in one line: it would read `done` before it waits

        await asyncio.gather(*(loop(number) for number in range(loops)))
        return done / (time.perf_counter() - began)


def arrivals(seconds: float, load: float, seed: int) -> list[tuple[float, int]]:
    """(when, documents) of requests that keep two workers busy for so large a part of the time."""
    chance = np.random.default_rng(seed)
    tokens = float(np.dot(SIZES, SHARES)) * LENGTH
    own_s = tokens * (TOKEN_S + BASE_S / BUDGET)
    gaps = chance.exponential(own_s / (2 * load), size=int(2 * load * seconds / own_s))
    sizes = chance.choice(SIZES, size=len(gaps), p=SHARES)
    return list(zip(np.cumsum(gaps).tolist(), sizes.tolist(), strict=True))


async def latencies(handle: Any, trace: list[tuple[float, int]]) -> list[tuple[int, float]]:
    """(documents, seconds) of each request, from when it was due."""
    await asyncio.gather(*(handle.score.remote(-n, 1) for n in range(8)))  # all replicas are up
    began = time.perf_counter()

    async def ask(number: int, due: float, size: int) -> tuple[int, float]:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        await handle.score.remote(number + 1, size)
        return size, time.perf_counter() - began - due

    asked = [ask(number, *request) for number, request in enumerate(trace)]
    return list(await asyncio.gather(*asked))


def routed(way: str, trace: list[tuple[float, int]]) -> dict[str, float]:
    """Latencies of one way of routing, in milliseconds."""
    replicas, workers = (2, 1) if way == "ray" else (1, 2)
    made: Any = Replica
    handle = serve.run(made.options(num_replicas=replicas).bind(workers), route_prefix=None)
    try:
        seen = asyncio.run(latencies(handle, trace))
    finally:
        serve.delete("default")
    found = {}
    for size in (None, *SIZES):
        times = [s * 1000 for of, s in seen if size in {None, of}]
        if not times:
            continue  # a short run may have none of the rarest
        name = "all" if size is None else str(size)
        found[f"{name}: p50 ms"] = round(float(np.percentile(times, 50)), 1)
        found[f"{name}: p99 ms"] = round(float(np.percentile(times, 99)), 1)
    return found


@contextlib.contextmanager
def cluster(machines: int) -> Iterator[None]:
    """A head and machines with room for one worker each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    store = 100 * 2**20
    head = {"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(machines):
            made.add_node(num_cpus=MACHINE.cpus, object_store_memory=store)
        ray.init(made.address, log_to_driver=False)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        made.shutdown()


def say(words: str) -> None:
    """Print the progress."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.6, help="of two workers, in routing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    ways: dict[str, list[dict[str, float]]] = {"ray": [], "tokens": []}
    with cluster(2):
        for turn in range(options.rounds):
            for workers, seen in rates.items():
                seen.append(round(asyncio.run(rate(workers, options.seconds)), 1))
                say(f"round {turn + 1}, workers {workers}: {seen[-1]} pairs/s")
            trace = arrivals(options.seconds, options.load, turn)
            for way, found in ways.items():
                found.append(routed(way, trace))
                say(f"round {turn + 1}, routing by {way}: P99 {found[-1]['all: p99 ms']} ms")
    medians = {
        way: {name: median(one[name] for one in found if name in one) for name in found[0]}
        for way, found in ways.items()
    }
    results = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": {"ray": ray.__version__},
        "step": {"base_s": BASE_S, "token_s": TOKEN_S, "token_budget": BUDGET},
        "pairs/s": {str(workers): seen for workers, seen in rates.items()},
        "two over one": round(median(rates[2]) / median(rates[1]), 3),
        "routing": medians,
        "routing, each round": ways,
    }
    text = json.dumps(results, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
