"""The search finds the highest rate that holds, in few probes, whatever that rate is."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in_reranker import connected, plan_of, run

from echelon.errors import InvalidInput
from echelon.loadtest.run import LoadTest, RateBisection

capacities = st.floats(0.001, 100_000)
begins = st.floats(0.05, 10_000)
mosts = st.just(math.inf) | st.floats(10_000, 50_000)
precisions = st.floats(0.01, 0.5)


def searched(search, capacity):
    """All rates that were tried."""
    tried = []
    while not search.over:
        tried.append(search.rate)
        search.tell(held=search.rate <= capacity)
    return tried


@given(capacities, begins, mosts, precisions)
def test_what_is_found_holds_and_little_more_does(capacity, begin, most, precision):
    search = RateBisection(begin, most, precision=precision)
    searched(search, capacity)
    if capacity < search.least:
        assert search.held == 0.0
    else:
        assert search.held <= min(capacity, most)
        assert search.held * (1 + precision) >= min(capacity, most) * (1 - 1e-9)


@given(capacities, begins, mosts, precisions)
def test_every_probe_tells_something_new(capacity, begin, most, precision):
    search = RateBisection(begin, most, precision=precision)
    low, high = 0.0, math.inf
    while not search.over:
        assert low < search.rate < high
        assert search.least <= search.rate <= most
        held = search.rate <= capacity
        low, high = (search.rate, high) if held else (low, search.rate)
        search.tell(held=held)
        assert (search.held, search.broke) == (low, high)


@given(capacities, begins, precisions)
def test_few_probes_are_enough(capacity, begin, precision):
    tried = searched(RateBisection(begin, precision=precision), capacity)
    doublings = abs(math.log2(max(capacity, 0.05) / begin)) + 2
    halvings = math.log2(math.log(2) / math.log1p(precision)) + 1
    assert len(tried) <= doublings + max(0, halvings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RateBisection(0.0),
        lambda: RateBisection(math.nan),
        lambda: RateBisection(5.0, 4.0),
        lambda: RateBisection(0.1, least=1.0),
        lambda: RateBisection(1.0, precision=0.0),
        lambda: RateBisection(1.0, least=0.0),
    ],
)
def test_a_search_that_cannot_be_is_refused(make):
    with pytest.raises(InvalidInput):
        make()


def find(monkeypatch, search, *, capacity, generator=math.inf, stop_at=None):
    """A search whose runs are pretended: (what was found, lines told, requests that settled)."""
    stop = asyncio.Event()

    async def measure(self, plan):
        held = plan.rate <= capacity and plan.rate <= generator
        summary = SimpleNamespace(
            held=held or plan.rate > generator, trusted=plan.rate <= generator
        )
        if stop_at is not None and plan.rate >= stop_at:
            stop.set()
        return SimpleNamespace(
            summary=summary, outcome=SimpleNamespace(interrupted=stop.is_set()), rate=plan.rate
        )

    monkeypatch.setattr(LoadTest, "measure", measure)
    heard = []

    async def main():
        async with connected() as (server, client):
            tester = LoadTest(plan_of(server.url), client, stop, lambda *_: None)
            return await tester.find_max(search, heard.append), len(server.bodies)

    found, settled = run(main())
    assert heard == list(found.probes)
    return found, settled


def test_a_search_ends_at_the_servers_limit_and_settles_between_probes(monkeypatch):
    found, settled = find(monkeypatch, RateBisection(8.0), capacity=100.0)
    assert 100 / 1.05 <= found.rate <= 100
    assert found.limit == "server"
    assert found.best.rate == found.rate
    assert settled == len(found.probes) - 1
    assert [p.rate for p in found.probes][:5] == [8, 16, 32, 64, 128]


def test_a_rate_that_the_generator_cannot_keep_up_with_does_not_hold(monkeypatch):
    found, _ = find(monkeypatch, RateBisection(8.0), capacity=math.inf, generator=50.0)
    assert 50 / 1.05 <= found.rate <= 50
    assert found.limit == "generator"


def test_a_search_has_its_bounds(monkeypatch):
    found, _ = find(monkeypatch, RateBisection(8.0, 20.0), capacity=100.0)
    assert (found.rate, found.limit) == (20.0, "bounded")
    found, _ = find(monkeypatch, RateBisection(8.0, least=2.0), capacity=1.0)
    assert (found.rate, found.limit, found.best) == (0.0, "server", None)


def test_a_search_that_is_stopped_keeps_what_it_found(monkeypatch):
    found, _ = find(monkeypatch, RateBisection(8.0), capacity=100.0, stop_at=64)
    assert (found.rate, found.limit) == (32.0, "interrupted")
    assert len(found.probes) == 3
