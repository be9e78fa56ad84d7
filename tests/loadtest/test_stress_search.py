"""The search of a load test: what ended it, and that the server is idle between its probes."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

from stand_in_reranker import connected, plan_of, run

from echelon.loadtest.run import LoadTest
from echelon.simulation.rate_search import RateSearch


def find(monkeypatch, search, *, capacity, generator=math.inf, stop_at=None):
    """A search with simulated runs: (the found rate, the requests sent to wait in between)."""
    stop = asyncio.Event()

    async def measure(self, plan):
        held = plan.workload.rate <= capacity and plan.workload.rate <= generator
        summary = SimpleNamespace(
            held=held or plan.workload.rate > generator, trusted=plan.workload.rate <= generator
        )
        if stop_at is not None and plan.workload.rate >= stop_at:
            stop.set()
        return SimpleNamespace(
            summary=summary,
            outcome=SimpleNamespace(interrupted=stop.is_set()),
            rate=plan.workload.rate,
        )

    monkeypatch.setattr(LoadTest, "measure", measure)
    heard = []

    async def main():
        async with connected() as (server, client):
            test = LoadTest(plan_of(server.url), client, stop, lambda *_: None)
            return await test.find_max(search, heard.append), len(server.bodies)

    found, waited = run(main())
    assert heard == list(found.probes)
    return found, waited


def test_a_search_ends_at_the_servers_limit_and_waits_between_probes(monkeypatch):
    found, waited = find(monkeypatch, RateSearch(8.0), capacity=100.0)
    assert 100 / 1.05 <= found.rate <= 100
    assert found.limit == "server"
    assert found.best.rate == found.rate
    assert waited == len(found.probes) - 1
    assert [p.rate for p in found.probes][:5] == [8, 16, 32, 64, 128]


def test_a_rate_that_the_generator_cannot_keep_up_with_does_not_hold(monkeypatch):
    found, _ = find(monkeypatch, RateSearch(8.0), capacity=math.inf, generator=50.0)
    assert 50 / 1.05 <= found.rate <= 50
    assert found.limit == "generator"


def test_a_search_has_its_bounds(monkeypatch):
    found, _ = find(monkeypatch, RateSearch(8.0, 20.0), capacity=100.0)
    assert (found.rate, found.limit) == (20.0, "bounded")
    found, _ = find(monkeypatch, RateSearch(8.0, min_rate=2.0), capacity=1.0)
    assert (found.rate, found.limit, found.best) == (0.0, "server", None)


def test_a_search_that_is_stopped_keeps_what_it_found(monkeypatch):
    found, _ = find(monkeypatch, RateSearch(8.0), capacity=100.0, stop_at=64)
    assert (found.rate, found.limit) == (32.0, "interrupted")
    assert len(found.probes) == 3
