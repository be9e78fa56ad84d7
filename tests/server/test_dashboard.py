"""The data of the dashboard: percentiles, rates, and bounds on slices, steps and events."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import RecordingListener

from echelon.engine.events import (
    LadderTaken,
    ListenerGroup,
    RequestEnded,
    RequestRefused,
    ServiceSnapshot,
    StepFinished,
    WorkerChanged,
)
from echelon.scheduling.queue import QueueLoad
from echelon.server.dashboard import (
    BINS,
    FLOOR_S,
    MAX_EVENTS,
    MAX_STEPS,
    POWERS,
    SLICES,
    STATE,
    RollingStats,
    bin_of,
    dashboard_data,
    percentiles,
    power_of,
)
from echelon.types import LadderStep

SECONDS = st.floats(min_value=1e-5, max_value=4000, allow_nan=False)


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def stats_of(time, slice_s=2.0):
    return RollingStats(slice_s, clock=time, unix=lambda: 1_000_000.0)


def shown(stats, state=None):
    return dashboard_data(stats.view(), "m", None, state)


def step(pairs=3, tokens=90, cost=100, predicted=0.2, actual=0.3, *, again=False):
    return StepFinished(0, predicted, actual, pairs, 1, tokens, cost, 2**20, again)


def ended(outcome="answered", cut=0, fallback=None):
    return RequestEnded(outcome, 2, 40, cut, cut * 7, 0.1, 0.1, 0.1, 0.3, fallback)


def snapshot(pairs=5, memory=(7, 0), budget=2048):
    load = QueueLoad(1, pairs, 60, 700, 1, 0.0, budget, None)
    return ServiceSnapshot(
        load, 2, 0.5, 0.25, 1, 1, 0.0, memory, 1.1, draining=False, drift=1.75, drifted=True
    )


# Percentiles.


@given(st.lists(SECONDS, min_size=1, max_size=60), st.sampled_from((1, 50, 95, 99, 100)))
def test_percentiles_are_within_one_percent_of_a_latency_that_was_measured(latencies, rank):
    bins = np.zeros(BINS, dtype=np.int32)
    for latency in latencies:
        bins[bin_of(latency)] += 1
    exact = max(sorted(latencies)[math.ceil(rank / 100 * len(latencies)) - 1], FLOOR_S)
    (found,) = percentiles(bins, rank)
    assert found == pytest.approx(exact, rel=0.01)


def test_nothing_measured_has_no_percentile_and_the_slowest_has_a_bin():
    assert percentiles(np.zeros(BINS, dtype=np.int32), 50, 99) == [None, None]
    assert (bin_of(0), bin_of(1e9)) == (0, BINS - 1)


@given(st.integers(1, 10**6))
def test_sizes_are_counted_under_the_next_power_of_two(size):
    power = power_of(size)
    assert power == POWERS - 1 or 2**power // 2 < size <= 2**power


# Slices.


@given(
    st.lists(
        st.tuples(st.floats(0, 90), SECONDS, st.integers(1, 50), st.sampled_from((200, 429))),
        max_size=40,
    )
)
def test_the_window_and_the_last_minute_count_their_events(events):
    time = Time()
    stats = stats_of(time)
    sent = []
    for wait, seconds, documents, status in events:
        time.now += wait
        stats.answered(status, seconds, documents)
        sent.append((int((time.now - 100) / 2.0), seconds, documents, status))
    number = int((time.now - 100) / 2.0)
    found = shown(stats)
    for name, slices in (("window", SLICES), ("minute", 30)):
        inside = [event for event in sent if number - slices <= event[0] < number]
        good = [event for event in inside if event[3] == 200]
        total = found[name]
        assert sum(total["counts"].get("http", {}).values()) == len(inside)
        length = min(slices, number) * 2.0
        assert total["seconds"] == length
        if length:
            rate = sum(event[2] for event in good) / length
            assert total["documents_per_s"] == pytest.approx(rate, abs=1e-3)
            assert total["requests_per_s"] == pytest.approx(len(inside) / length, abs=1e-3)
            assert (total["p50_s"] is None) == (not good)
        if good:
            slowest = max(FLOOR_S, *(event[1] for event in good))
            assert total["p99_s"] == pytest.approx(slowest, rel=0.011)


def test_the_current_slice_is_left_out_until_it_is_complete():
    time = Time()
    stats = stats_of(time)
    stats.answered(200, 0.1, 4)
    assert shown(stats)["window"]["counts"] == {}
    assert shown(stats)["minute"]["documents_per_s"] is None
    time.now += 2.0
    found = shown(stats)
    assert found["minute"]["documents_per_s"] == 2.0
    assert found["columns"]["documents_per_s"] == [2.0]
    assert found["columns"]["ends_at"] == [1_000_002.0] == [found["at"]]


def test_memory_is_bounded_however_long_a_server_lives():
    time = Time()
    stats = stats_of(time)
    for number in range(3 * SLICES):
        stats.answered(200, 0.1, 1)
        stats.step_finished(step())
        stats.worker_changed(WorkerChanged(number % 3, "up"))
        time.now += 2.0
    view = stats.view()
    assert len(view.slices) == SLICES
    assert len(stats._slices) == SLICES + 1
    assert (len(view.steps), len(view.events)) == (MAX_STEPS, MAX_EVENTS)
    assert [worker.worker for worker in view.workers] == [0, 1, 2]
    found = shown(stats)
    assert found["window"]["counts"]["http"] == {"200": SLICES}
    assert {len(column) for name, column in found["columns"].items() if name[0] != "r"} == {SLICES}


def test_after_a_long_pause_old_slices_are_dropped():
    time = Time()
    stats = stats_of(time)
    stats.answered(500, 0.1, 0)
    stats.step_finished(step())
    time.now += 2.0 * (SLICES + 1)
    assert not stats.view().slices
    assert shown(stats)["window"]["counts"] == {}
    assert set(shown(stats)["columns"]["tokens_per_s"]) == {0.0}
    assert set(shown(stats)["columns"]["drift"]) == {None}


def test_steps_are_counted_by_size_with_their_drift():
    time = Time()
    stats = stats_of(time)
    stats.step_finished(step(pairs=3, tokens=90, cost=100, predicted=0.2, actual=0.3))
    stats.step_finished(
        step(pairs=4, tokens=10, cost=65_537, predicted=0.2, actual=0.3, again=True)
    )
    time.now += 2.0
    found = shown(stats)
    assert found["window"]["step_pairs"][2] == 2
    assert (found["window"]["step_tokens"][7], found["window"]["step_tokens"][-1]) == (1, 1)
    assert found["window"]["tokens_per_s"] == 50.0
    assert found["window"]["drift"] == 1.5
    assert found["window"]["counts"]["step"] == {"again": 1}
    assert found["steps"]["recent"] == [[0.2, 0.3], [0.2, 0.3]]
    assert found["steps"]["powers"][2] == 4


def test_events_are_counted_by_kind_and_listed():
    time = Time()
    stats = stats_of(time)
    stats.refused(RequestRefused("requests_full", 3, 1.0))
    stats.count("connection", "too_many")
    stats.count("limited", "requests")
    stats.request_ended(ended("expired", cut=2, fallback=64))
    stats.request_ended(ended("answered"))
    taken = LadderStep("halve_budget", "token budget 8 -> 4", "Do so.")
    stats.ladder_taken(LadderTaken(1, taken, 4))
    time.now += 2.0
    stats.worker_changed(WorkerChanged(0, "died", "killed by signal 9"))
    stats.worker_changed(WorkerChanged(0, "starting"))
    time.now += 2.0
    found = shown(stats)
    counts = found["window"]["counts"]
    assert counts["refused"] == {"requests_full": 1}
    assert (counts["connection"], counts["limited"]) == ({"too_many": 1}, {"requests": 1})
    assert counts["outcome"] == {"answered": 1, "expired": 1}
    assert counts["truncated"] == {"documents": 2}
    assert counts["fallback"] == {"requests": 1}
    assert counts["ladder"] == {"halve_budget": 1}
    assert counts["worker"] == {"died": 1, "starting": 1}
    assert [event["name"] for event in found["events"]] == ["starting", "died", "halve_budget"]
    assert found["events"][1]["words"] == "killed by signal 9"
    assert found["events"][1]["at"] == 1_000_002.0
    assert found["events"][2]["words"] == "token budget 8 -> 4. Do so."
    assert [(worker["worker"], worker["name"]) for worker in found["workers"]] == [(0, "starting")]


def test_the_state_of_each_slice_and_now():
    time = Time()
    stats = stats_of(time)
    for worker in (0, 1):
        stats.worker_changed(WorkerChanged(worker, "up"))
    stats.sampled(snapshot(pairs=1))
    stats.sampled(snapshot(pairs=5))
    time.now += 4.0
    found = shown(stats, snapshot(pairs=9))
    assert found["columns"]["waiting_pairs"] == [5, None]
    assert found["columns"]["resident_bytes"] == [[7, None], [None, None]]
    assert found["now"]["waiting_pairs"] == 9
    assert set(found["now"]) == {*STATE, "draining", "drifted", "fallback"}
    assert (found["now"]["slowdown"], found["now"]["drifted"]) == (1.75, True)
    assert [worker["resident_bytes"] for worker in found["workers"]] == [7, None]


def test_many_threads_lose_nothing():
    time = Time()
    stats = stats_of(time)

    def tell():
        for _ in range(500):
            stats.answered(200, 0.01, 1)
            stats.step_finished(step())

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.now += 2.0
    assert shown(stats)["window"]["counts"]["http"] == {"200": 2000}
    assert sum(shown(stats)["window"]["step_pairs"]) == 2000


# Several listeners.


def test_each_listener_hears_everything_though_another_raises(caplog):
    first, last = RecordingListener(), RecordingListener()

    class Raises(RecordingListener):
        def note(self, event):
            raise RuntimeError("no listener")

        step_finished = request_ended = refused = ladder_taken = worker_changed = note

    fan = ListenerGroup(first, Raises(), last)
    events = {
        "step_finished": step(),
        "request_ended": ended(),
        "refused": RequestRefused("requests_full", 1, None),
        "ladder_taken": LadderTaken(0, LadderStep("a", "b", "c"), 1),
        "worker_changed": WorkerChanged(0, "up"),
    }
    for name, event in events.items():
        getattr(fan, name)(event)
    assert first.heard == last.heard == list(events.values())
    assert caplog.text.count("This is a bug in it") == len(events)
