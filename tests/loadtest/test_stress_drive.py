"""Driving: what is due is sent, what is slow is seen, and no failure passes for an answer."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiohttp import web
from stand_in_reranker import TOPICS, connected, good, run, target_of

from echelon.loadtest.client import Reply
from echelon.loadtest.driver import Driver, closed_loop, open_loop
from echelon.loadtest.summary import RequestRecord, RequestRecords, summarise
from echelon.loadtest.texts import TextSource
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import (
    ArrivalRecord,
    ConstantArrivals,
    FixedSize,
    PoissonArrivals,
    ReplayedArrivals,
    UniformSize,
    Workload,
)

TICK = 0.01
"""Between two requests that are due."""


async def even(client, seconds=0.3, **more):
    """An open loop at even distances."""
    requests = Workload(ConstantArrivals(1 / TICK), FixedSize(3)).requests(seconds)
    drive = Driver(client, TextSource(TOPICS, salt=""), **more)
    return await open_loop(drive, requests, seconds)


def test_every_request_is_sent_once_and_not_before_it_is_due():
    async def main():
        async with connected() as (server, client):
            requests = list(Workload(PoissonArrivals(150.0), UniformSize(1, 4)).requests(0.3))
            outcome = await open_loop(Driver(client, TextSource(TOPICS)), requests, 0.3)
            return server, requests, outcome

    server, requests, outcome = run(main())
    records = sorted(outcome.records, key=lambda record: record.scheduled)
    assert [r.scheduled for r in records] == [a.at_s for a in requests]
    assert [r.documents for r in records] == [a.documents for a in requests]
    assert len(server.bodies) == len(requests)
    assert all(r.sent >= r.scheduled and r.ended > r.sent for r in records)
    assert {r.kind for r in records} == {"answered"}
    assert not outcome.interrupted


def test_a_server_that_stalls_once_is_charged_for_all_who_came_meanwhile():
    """From number 10 on nothing is answered before number 30 has come."""
    thirtieth = asyncio.Event()

    async def answer(_, body):
        number = int(body["query"].split()[0], 16)
        if number == 30:
            thirtieth.set()
        if number >= 10:
            await thirtieth.wait()
        return good(body)

    async def main():
        async with connected(answer) as (_, client):
            return await even(client, 0.5)

    outcome = run(main())
    records = sorted(outcome.records, key=lambda record: record.scheduled)
    for number in range(10, 30):
        assert records[number - 1].latency_s >= (30 - number) * TICK - 1e-9
    # A loop that waits for each answer would have seen one slow request of fifty.
    assert summarise(outcome).latency_s[90.0] >= 14 * TICK


def test_a_generator_that_stalls_charges_itself_and_says_so():
    stalled = []

    def stall_once(record):
        if not stalled:
            stalled.append(record)
            time.sleep(0.2)

    async def main():
        async with connected() as (_, client):
            return await even(client, on_record=stall_once)

    outcome = run(main())
    late = [r for r in outcome.records if r.sent - r.scheduled > 0.05]
    assert len(late) >= 10
    assert all(r.latency_s >= r.sent - r.scheduled for r in late)
    summary = summarise(outcome, ServiceLevel(0.3))
    assert summary.send_lag_s > 0.1
    assert not summary.trusted
    assert any("sent up to" in doubt for doubt in summary.doubts)


def test_the_warm_up_is_driven_but_does_not_count():
    def answer(number, body):
        return web.Response(status=500) if number <= 15 else good(body)

    async def main():
        async with connected(answer) as (_, client):
            return await even(client, 0.3, warmup_s=0.2)

    outcome = run(main())
    summary = summarise(outcome)
    assert len(outcome.records) == 30
    assert summary.requests == 10
    assert summary.failures == 0
    assert summary.problems == {}
    assert summary.window_s == pytest.approx(0.1)
    assert summary.offered_per_s == pytest.approx(100)


TROUBLES = {
    "full": (lambda _: web.Response(status=429, text="full"), "refused", 429, "status 429"),
    "draining": (lambda _: web.Response(status=503), "refused", 503, "status 503"),
    "broken": (lambda _: web.Response(status=500, text="oh no"), "error", 500, "status 500"),
    "moved": (
        lambda _: web.Response(status=307, headers={"Location": "/x"}),
        "error", 307, "status 307",
    ),
    "no JSON": (lambda _: web.Response(text="hello"), "wrong", 200, "wrong"),
    "one too few": (
        lambda body: good(body | {"documents": body["documents"][1:]}),
        "wrong", 200, "wrong",
    ),
    "not a number": (
        lambda body: web.Response(
            text=str(good(body)).replace("0.5", "NaN").replace("'", '"'),
            content_type="application/json",
        ),
        "wrong", 200, "wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TROUBLES)
def test_each_trouble_is_counted_as_what_it_is(name):
    make, kind, status, complaint = TROUBLES[name]

    async def main():
        async with connected(lambda number, body: make(body) if number % 2 else good(body)) as (
            _,
            client,
        ):
            return await even(client, 0.1)

    outcome = run(main())
    summary = summarise(outcome, ServiceLevel(10.0))
    assert {r.status for r in outcome.records if r.kind == kind} == {status}
    assert summary.kinds["answered"] == summary.kinds[kind] == 5
    assert summary.problems[complaint][0] == 5
    assert summary.failure_share == 0.5
    assert not summary.held


def test_who_is_not_answered_in_time_timed_out_and_is_not_in_the_latencies():
    async def answer(number, body):
        if number == 3:
            await asyncio.Event().wait()
        return good(body)

    async def main():
        async with connected(answer, timeout_s=1.0) as (_, client):
            return await even(client, 0.1)

    outcome = run(main())
    summary = summarise(outcome, ServiceLevel(1.0))
    assert summary.kinds["timeout"] == 1
    assert summary.kinds["answered"] == 9
    (lost,) = [r for r in outcome.records if r.kind == "timeout"]
    assert 1.0 <= lost.latency_s < 20  # aiohttp's own limit would be 300
    assert summary.latency_s[100.0] < lost.latency_s
    assert not summary.held


def test_a_connection_that_is_cut_is_an_error():
    async def answer(number, body):
        if number == 2:
            raise ConnectionResetError
        return good(body)

    async def main():
        async with connected(answer) as (server, client):
            outcome = await even(client, 0.05)
            await server.__aexit__()
            return outcome, await client.send(b"{}", 1)

    outcome, gone = run(main())
    assert sum(r.kind == "error" for r in outcome.records) == 1
    assert (gone.kind, gone.status) == ("error", 0)


def test_a_stopped_run_keeps_its_records_and_cancels_the_rest():
    stop = asyncio.Event()

    async def answer(number, body):
        if number > 5:
            if number == 8:
                stop.set()
            await asyncio.Event().wait()
        return good(body)

    async def main():
        async with connected(answer) as (_, client):
            return await even(client, 100.0, stop=stop)

    outcome = run(main())
    assert outcome.interrupted
    assert [r.kind for r in outcome.records] == ["answered"] * 5
    assert outcome.unfinished >= 3
    assert outcome.ended_s < 50
    assert summarise(outcome).requests == 5


def test_what_this_machine_could_not_send_is_counted_apart():
    class Exhausted:
        target = target_of("http://h")

        async def send(self, body, documents):
            return Reply("error", 0, "no more connections", own_fault=True)

    summary = summarise(run(even(Exhausted(), 0.05)), ServiceLevel(1.0))
    assert summary.health.own_faults == 5
    assert not summary.trusted


def test_a_mistake_of_our_own_is_not_a_servers():
    def stop_once(_):
        raise ZeroDivisionError

    async def main():
        async with connected() as (_, client):
            await even(client, 100.0, on_record=stop_once)

    with pytest.raises(ZeroDivisionError):
        run(main())


def test_a_closed_loop_never_has_more_inside_than_clients():
    all_here = asyncio.Event()

    async def answer(number, body):
        if number == 4:
            all_here.set()
        await all_here.wait()
        await asyncio.sleep(0)
        return good(body)

    async def main():
        async with connected(answer) as (server, client):
            endless = Workload(ConstantArrivals(1.0), FixedSize(2)).requests()
            drive = Driver(client, TextSource(TOPICS))
            return server, await closed_loop(drive, endless, 4, 0.2)

    server, outcome = run(main())
    assert server.most_inside == 4
    assert len(outcome.records) == len(server.bodies) >= 4
    assert all(r.scheduled < 0.2 for r in outcome.records)


def test_connections_are_used_again_and_may_be_limited():
    """Three requests at once wait until all are inside, or two where only two can be."""

    async def seen(inside, **target):
        barrier = asyncio.Barrier(inside)

        async def answer(number, body):
            if number <= inside:
                await barrier.wait()
            return good(body)

        async with connected(answer, **target) as (server, client):
            for _ in range(2):
                requests = Workload(
                    ReplayedArrivals([ArrivalRecord(0.0)] * 3), FixedSize(1)
                ).requests()
                await open_loop(Driver(client, TextSource(TOPICS)), requests, None)
            return len(server.bodies), len(server.peers)

    async def main():
        return await seen(3), await seen(2, max_connections=2)

    assert run(main()) == ((6, 3), (6, 2))


def test_a_replay_keeps_the_times_and_documents_of_the_trace():
    records = [ArrivalRecord(100.0, 2), ArrivalRecord(100.05, 3), ArrivalRecord(100.05, 1)]

    async def main():
        async with connected() as (server, client):
            requests = Workload(ReplayedArrivals(records), FixedSize(9)).requests()
            outcome = await open_loop(Driver(client, TextSource(TOPICS)), requests, None)
            return server, outcome

    server, outcome = run(main())
    assert sorted(len(body["documents"]) for body in server.bodies) == [1, 2, 3]
    assert outcome.ended_s == pytest.approx(0.05)


def test_records_are_given_back_as_added():
    records = [
        RequestRecord(0.5, 0.75, 1.0, "answered", 200, 7),
        RequestRecord(0.0, 0.25, 9.5, "timeout", 0, 10_000),
        RequestRecord(2.0, 2.0, 2.5, "refused", 503, 1),
    ]
    kept = RequestRecords()
    for record in records:
        kept.add(record)
    assert list(kept) == records
    assert kept.ended.tolist() == [1.0, 9.5, 2.5]
