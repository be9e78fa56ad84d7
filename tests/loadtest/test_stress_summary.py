"""Summing up: against plain arithmetic on the same records, and what is promised of the numbers."""

from __future__ import annotations

import errno

import aiohttp
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from echelon.loadtest.client import _failed
from echelon.loadtest.result import MAX_ROWS, over_time
from echelon.loadtest.summary import (
    KINDS,
    DriveResult,
    GeneratorHealth,
    RequestRecord,
    RequestRecords,
    doubts,
    summarise,
)
from echelon.simulation.service_level import ServiceLevel


@st.composite
def records(draw):
    scheduled = draw(st.floats(0, 20))
    lag = draw(st.floats(0, 0.05))
    took = draw(st.floats(0.00001, 30))
    kind = draw(st.sampled_from(KINDS))
    return RequestRecord(
        scheduled, scheduled + lag, scheduled + lag + took, kind, 0, draw(st.integers(1, 9))
    )


def outcome_of(kept, warmup_s=0.0, ended_s=20.0, **more):
    records = RequestRecords()
    for record in kept:
        records.add(record)
    return DriveResult(records, warmup_s, ended_s, **more)


def answered(count, latency_s=0.1, kind="answered"):
    return [
        RequestRecord(i / 100, i / 100, i / 100 + latency_s, kind, 200, 5) for i in range(count)
    ]


@given(st.lists(records(), max_size=40), st.floats(0, 10), st.floats(0.001, 30))
def test_counts_and_rates_are_those_of_the_records(kept, warmup_s, goal_s):
    summary = summarise(outcome_of(kept, warmup_s), ServiceLevel(goal_s))
    counted = [r for r in kept if r.scheduled >= warmup_s]
    good = [r for r in counted if r.kind == "answered"]
    window_s = 20.0 - warmup_s
    assert summary.requests == len(counted) == sum(summary.kinds.values())
    for kind in KINDS:
        assert summary.kinds[kind] == sum(r.kind == kind for r in counted)
    inside = [r for r in kept if r.kind == "answered" and warmup_s <= r.ended <= 20.0]
    assert summary.offered_per_s == pytest.approx(len(counted) / window_s)
    assert summary.answered_per_s == pytest.approx(len(inside) / window_s)
    assert summary.documents_per_s == pytest.approx(sum(r.documents for r in inside) / window_s)
    within = sum(r.ended - r.scheduled <= goal_s for r in good)
    assert summary.goodput_per_s == pytest.approx(within / window_s)
    assert summary.failures == len(counted) - len(good)
    if not good:
        assert summary.latency_s == {}
        assert not summary.held


@given(st.lists(records(), min_size=1, max_size=60))
def test_a_percentile_is_the_shortest_latency_that_covers_its_share(kept):
    summary = summarise(outcome_of(kept))
    latencies = sorted(r.latency_s for r in kept if r.kind == "answered")
    for percentile, seconds in summary.latency_s.items():
        within = sum(latency <= seconds for latency in latencies)
        fewer = sum(latency < seconds for latency in latencies)
        assert within >= percentile / 100 * len(latencies) > fewer
        assert seconds in latencies


def test_histograms_of_several_generators_can_be_added():
    found = [summarise(outcome_of(answered(300, took))).histogram for took in (0.1, 0.2)]
    first, second = map(HdrHistogram.decode, found)
    first.add(second)
    assert first.get_total_count() == 600
    assert first.get_value_at_percentile(25) == pytest.approx(100_000, rel=1e-3)
    assert first.get_value_at_percentile(75) == pytest.approx(200_000, rel=1e-3)


@pytest.mark.parametrize(
    ("bad", "latency_s", "held"),
    [(1, 0.1, True), (2, 0.1, False), (0, 0.3, True), (0, 0.31, False)],
)
def test_a_goal_holds_up_to_its_p99_and_one_failure_in_a_thousand(bad, latency_s, held):
    kept = answered(1000 - bad, latency_s) + answered(bad, 0.1, "refused")
    assert summarise(outcome_of(kept), ServiceLevel(0.3001)).held is held


def test_one_slow_answer_in_a_hundred_is_no_miss_and_two_are():
    for slow, held in ((10, True), (11, False)):
        kept = answered(1000 - slow) + answered(slow, 5.0)
        assert summarise(outcome_of(kept), ServiceLevel(0.3)).held is held


def test_few_answers_are_noted():
    assert "Only 99 answers" in summarise(outcome_of(answered(99))).notes[0]
    assert summarise(outcome_of(answered(100))).notes == []


def test_a_run_stopped_in_its_warm_up_has_no_rates():
    summary = summarise(outcome_of(answered(5), warmup_s=3.0, ended_s=1.0, interrupted=True))
    assert (summary.requests, summary.window_s, summary.answered_per_s) == (0, 0.0, 0.0)
    assert summary.failure_share == 1.0


@given(st.lists(records(), max_size=60), st.sampled_from([0.5, 20.0, 5000.0]))
def test_over_time_every_request_is_in_one_row(kept, ended_s):
    rows = over_time(outcome_of(kept, ended_s=ended_s))
    assert sum(row["answered"] + row["failed"] for row in rows) == len(kept)
    assert len(rows) <= MAX_ROWS + 1
    for row in rows:
        here = [r for r in kept if row["at_s"] <= r.scheduled < row["at_s"] + row["width_s"]]
        assert len(here) == row["answered"] + row["failed"] > 0
        assert (row["p99_ms"] is None) == (row["answered"] == 0)


FINE = GeneratorHealth(loop_lag_s=0.001, cpu_share=0.3)


@pytest.mark.parametrize(
    ("health", "lag_s", "latency_s", "words"),
    [
        (FINE, 0.001, 0.1, []),
        (FINE, 0.011, 0.1, ["sent up to 11 ms late"]),
        (FINE, 0.011, 0.2, []),
        (FINE, 0.009, 0.0, []),
        (GeneratorHealth(loop_lag_s=0.05), 0.0, 0.1, ["woke up to 50 ms late"]),
        (GeneratorHealth(cpu_share=0.95), 0.0, 0.1, ["95 % of a CPU"]),
        (GeneratorHealth(own_faults=3), 0.0, 0.1, ["3 requests could not be sent"]),
        (
            GeneratorHealth(0.5, 0.99, 1),
            0.5,
            0.1,
            ["sent up to", "woke up to", "99 %", "1 requests"],
        ),
    ],
)
def test_doubts_name_what_spoils_a_measurement(health, lag_s, latency_s, words):
    found = doubts(health, lag_s, latency_s)
    assert len(found) == len(words)
    assert all(word in doubt for word, doubt in zip(words, found, strict=True))


def test_a_goal_makes_lateness_bearable_that_is_small_beside_it():
    late = [RequestRecord(i, i + 0.02, i + 0.1, "answered", 200, 1) for i in range(20)]
    assert not summarise(outcome_of(late)).trusted
    assert summarise(outcome_of(late), ServiceLevel(0.3)).trusted


def test_a_lack_of_connections_here_is_not_the_servers_fault():
    key = type("Key", (), {"host": "h", "port": 1, "ssl": True})()
    for number in (errno.EMFILE, errno.EADDRNOTAVAIL):
        reply = _failed(aiohttp.ClientConnectorError(key, OSError(number, "none left")))
        assert (reply.kind, reply.own_fault) == ("error", True)
    refused = aiohttp.ClientConnectorError(key, ConnectionRefusedError(errno.ECONNREFUSED, "no"))
    assert not _failed(refused).own_fault
    assert _failed(aiohttp.ServerDisconnectedError()).detail.startswith("the connection was closed")
