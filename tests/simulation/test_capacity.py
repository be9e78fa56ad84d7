"""How many machines a rate needs: more rate never needs fewer, and a trace needs its own number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import SIMPLE, cpu

from echelon.errors import InvalidInput
from echelon.simulation import capacity as module
from echelon.simulation.capacity import Capacity
from echelon.simulation.cluster_simulation import simulate_cluster
from echelon.simulation.cluster_traffic import blocks
from echelon.simulation.server_simulation import SimulationSettings
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import (
    ArrivalRecord,
    FixedSize,
    PoissonArrivals,
    ReplayedArrivals,
    UniformSize,
    Workload,
)

WORKLOAD = Workload(PoissonArrivals(1.0), UniformSize(1, 20), UniformSize(20, 200))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "REQUESTS", 500)
    monkeypatch.setattr(module, "FULL", 200)


def test_a_machine_is_no_faster_than_its_cost_model():
    workload = Workload(PoissonArrivals(1.0), FixedSize(2), FixedSize(50))
    made = Capacity(workload, SIMPLE, SimulationSettings(1000, request_s=0.5), ServiceLevel(1.0))
    # Twenty pairs a step: 1.01 s for ten requests.
    assert made.machine_rate == pytest.approx(10 / 1.01, rel=0.01)


@given(st.data())
@settings(deadline=None, max_examples=5)
def test_more_rate_never_takes_fewer_machines(data):
    goal_s = data.draw(st.sampled_from([0.3, 0.4, 0.8]))
    routing = data.draw(st.sampled_from(["tokens", "two", "random"]))
    made = Capacity(WORKLOAD, cpu(), SimulationSettings(1024), ServiceLevel(goal_s), routing)
    rates = sorted(data.draw(st.lists(st.floats(0.1, 3000), min_size=2, max_size=30)))
    machines = [made.machines(rate) for rate in rates]
    assert machines == sorted(machines)
    for rate, count in zip(rates, machines, strict=True):
        found = made.at(rate, count)
        assert found.held
        assert found.p99_s <= goal_s
        assert made.max_rate(count) >= rate * (1 - 1e-9)
        if count > 1 and count <= 64:
            assert made.at(rate, count - 1) is None


def test_the_search_ends_at_the_maximum_of_machines():
    made = Capacity(WORKLOAD, cpu(), SimulationSettings(1024), ServiceLevel(0.8))
    needed = made.machines(30.0)
    assert made.machines(30.0, needed) == needed
    assert made.machines(30.0, needed - 1) is None
    assert made.machines(3000.0, 10) is None


def test_a_goal_that_no_machine_meets_has_no_answer():
    made = Capacity(WORKLOAD, cpu(), SimulationSettings(1024), ServiceLevel(0.02))
    assert made.machines(1.0) is None
    assert made.max_rate(1) == 0.0


def trace(count, gap):
    return [ArrivalRecord(100 + i * gap + (i % 7) * gap / 10, 1 + i % 5, 40) for i in range(count)]


def replayed(records, **changes):
    return replace(WORKLOAD, arrivals=ReplayedArrivals.of(records), **changes)


def test_a_trace_is_sped_up_to_the_rate_and_bursts_cost_machines():
    even = replayed(trace(400, 0.5), tokens=None)
    assert even.rate == pytest.approx(2.0, rel=0.01)
    assert even.at(8.0).span_s(400) == pytest.approx(50.0, rel=0.01)
    requests = list(even.at(8.0).requests())
    assert requests[-1].at_s == pytest.approx(50.0, rel=0.01)
    bursts = [
        ArrivalRecord(round(one.at_s / 20) * 20.0, one.documents, 40) for one in trace(400, 0.5)
    ]
    bursty = replayed(bursts, tokens=None)
    needs = [
        Capacity(traffic, cpu(), SimulationSettings(1024), ServiceLevel(0.3)).machines(20.0)
        for traffic in (even, bursty)
    ]
    assert needs[0] < needs[1]


def test_of_a_long_trace_the_busiest_part_is_simulated(monkeypatch):
    monkeypatch.setattr(module, "REQUESTS", 50)
    slow, fast = trace(100, 1.0), [replace(one, at_s=one.at_s / 10 + 300) for one in trace(60, 1.0)]
    workload = replayed([*slow, *fast])
    traffic = Capacity(workload, cpu(), SimulationSettings(1024), ServiceLevel(1.0)).workload
    assert len(traffic.trace) == 50
    assert traffic.trace[0].at_s > 300
    assert traffic.rate == workload.rate < 1.0


def test_a_trace_of_one_moment_has_no_rate():
    with pytest.raises(InvalidInput, match="one moment"):
        replayed([ArrivalRecord(1.0), ArrivalRecord(1.0)])


def test_lengths_must_be_known():
    with pytest.raises(InvalidInput, match="tokens"):
        Capacity(replace(WORKLOAD, tokens=None), cpu(), SimulationSettings(1), ServiceLevel(1.0))


def test_the_highest_throughput_is_measured_without_refusals():
    made = Capacity(WORKLOAD, cpu(), SimulationSettings(1024), ServiceLevel(1.0))
    assert math.isfinite(made.machine_rate)
    assert made.machine_rate * 0.95 * 10 > 60


def test_a_cluster_at_the_rate_that_is_asked_meets_the_goal_too():
    goal_s = 0.5
    made = Capacity(WORKLOAD, cpu(), SimulationSettings(1024), ServiceLevel(goal_s))
    machines = made.machines(400.0)
    traffic = blocks(replace(WORKLOAD, arrivals=PoissonArrivals(400.0)), 20)
    found = simulate_cluster(traffic, cpu(), made.cluster(machines), level=made.level, warm_s=2)
    assert found.held
    less = blocks(replace(WORKLOAD, arrivals=PoissonArrivals(400.0)), 20)
    too_few = made.cluster(machines * 8 // 10)
    assert not simulate_cluster(less, cpu(), too_few, level=made.level, warm_s=2).held
