"""Clusters: the lighter model beside the exact one, routing, and what a day is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from simulations import SIMPLE, cpu, requests

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits
from echelon.simulation import capacity
from echelon.simulation.capacity import rates_of, simulate_day
from echelon.simulation.cluster_simulation import NO_PADDING, Cluster, packing_of, simulate_cluster
from echelon.simulation.cluster_traffic import RequestBlock, blocks
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import (
    ArrivalRecord,
    FixedSize,
    LognormalSize,
    ObservedSize,
    PoissonArrivals,
    ReplayedArrivals,
    UniformSize,
    Workload,
)

LENGTHS = LognormalSize(110, 0.6, 512)


def traffic(rate, seed=0):
    return Workload(PoissonArrivals(rate), UniformSize(1, 20), LENGTHS, seed)


@pytest.mark.parametrize(("budget", "workers"), [(512, 1), (2048, 2)])
@pytest.mark.parametrize("rate", [3.0, 7.0])
@pytest.mark.parametrize(
    ("cost", "p50", "p99"), [("none", 0.20, 0.20), ("rectangular", 0.25, 0.35)]
)
def test_the_lighter_model_agrees_with_the_exact_one(cost, p50, p99, rate, budget, workers):
    workload, truth = traffic(rate * workers), cpu(cost)
    settings = SimulationSettings(budget, workers=workers)
    seconds = 250 / workers
    exact = simulate(workload.requests(seconds), truth, settings)
    cluster = Cluster(1, settings, packing=packing_of(LENGTHS, truth, budget))
    light = simulate_cluster(blocks(workload, seconds), truth, cluster)
    # The same arrivals and documents; other lengths of the same distribution.
    assert light.requests == exact.requests
    assert light.utilisation == pytest.approx(exact.utilisation, rel=0.04)
    assert light.step_tokens == pytest.approx(exact.step_tokens, rel=0.12)
    assert light.p50_s == pytest.approx(exact.p50_s, rel=p50)
    assert light.p99_s == pytest.approx(exact.p99_s, rel=p99)


def block(*rows):
    """(time, documents, tokens of each)."""
    at_s, documents, lengths = zip(*rows, strict=True)
    return RequestBlock(
        list(at_s), list(documents), [float(n) for n in lengths], [float(n * n) for n in lengths]
    )


def test_a_replica_forms_steps_just_before_the_running_one_ends():
    rows = [(0.0, 1, 30), (0.034, 1, 10), (0.036, 1, 20)]
    outcome = simulate_cluster([block(*rows)], SIMPLE, Cluster(1, SimulationSettings(100)))
    assert outcome.steps == 3
    assert outcome.longest_s == pytest.approx(0.09 - 0.036)
    assert outcome.p50_s == pytest.approx(0.04)


def test_short_requests_do_not_wait_for_long_ones_and_documents_stay_whole():
    rows = [(0.0, 1, 10), (0.001, 9, 40), (0.002, 1, 10)]
    outcome = simulate_cluster([block(*rows)], SIMPLE, Cluster(1, SimulationSettings(100)))
    # 20 ms; then the short one with two of forty, 100 ms; then 2, 2, 2 and 1 of forty.
    assert outcome.steps == 6
    assert outcome.p50_s == pytest.approx(0.12 - 0.002)
    assert outcome.longest_s == pytest.approx(0.12 + 3 * 0.09 + 0.05 - 0.001)


def test_a_document_longer_than_the_budget_goes_alone():
    outcome = simulate_cluster([block((0.0, 2, 300))], SIMPLE, Cluster(1, SimulationSettings(100)))
    assert (outcome.steps, outcome.step_pairs) == (2, 1.0)


def test_a_step_holds_at_most_max_pairs():
    outcome = simulate_cluster(
        [block((0.0, 10, 1))], SIMPLE, Cluster(1, SimulationSettings(100, max_pairs=4))
    )
    assert outcome.steps == 3


def test_a_full_replica_refuses_by_the_real_rules():
    rows = [(0.0, 1, 50)] * 5
    settings = SimulationSettings(50, bounds=AdmissionLimits(max_requests=3))
    outcome = simulate_cluster([block(*rows)], SIMPLE, Cluster(1, settings))
    assert outcome.refused == {"requests_full": 2}
    settings = SimulationSettings(50, bounds=AdmissionLimits(max_wait_s=0.1))
    outcome = simulate_cluster([block(*rows)], SIMPLE, Cluster(1, settings))
    exact = simulate(requests(*[(0.0, 50)] * 5), SIMPLE, settings)
    assert outcome.refused == exact.refused == {"wait_too_long": 3}
    settings = SimulationSettings(50, bounds=AdmissionLimits(max_documents=4))
    outcome = simulate_cluster([block((0.0, 5, 1))], SIMPLE, Cluster(1, settings))
    assert outcome.refused == {"too_many_documents": 1}


def test_both_models_refuse_as_much_when_there_is_too_much():
    workload = traffic(20.0)
    settings = SimulationSettings(2048, bounds=AdmissionLimits(max_wait_s=1.0))
    exact = simulate(workload.requests(60), cpu(), settings)
    light = simulate_cluster(blocks(workload, 60), cpu(), Cluster(1, settings))
    assert sum(exact.refused.values()) > 100
    assert sum(light.refused.values()) == pytest.approx(sum(exact.refused.values()), rel=0.2)


def test_routing_by_load_beats_two_choices_beats_chance():
    workload, cluster = traffic(160.0), 20
    p99 = {
        routing: simulate_cluster(
            blocks(workload, 40),
            cpu(),
            Cluster(cluster, SimulationSettings(2048), routing),
            warm_s=5,
        ).p99_s
        for routing in ("tokens", "requests", "two", "random")
    }
    assert p99["tokens"] < p99["two"] < p99["random"]
    assert p99["requests"] < p99["random"]


def test_routing_by_requests_counts_requests_and_by_tokens_tokens():
    # The first is long; the second goes elsewhere; the third is where the ways part.
    rows = [(0.0, 1, 90), (0.001, 1, 10), (0.002, 1, 10)]
    by = {
        routing: simulate_cluster(
            [block(*rows)], SIMPLE, Cluster(2, SimulationSettings(100), routing)
        )
        for routing in ("tokens", "requests")
    }
    assert by["tokens"].longest_s == pytest.approx(0.1)
    assert by["requests"].longest_s > 0.1


def test_a_replica_that_is_done_is_chosen_again():
    rows = [(0.0, 1, 90), (10.0, 1, 10), (10.001, 1, 10)]
    for routing in ("tokens", "requests"):
        cluster = Cluster(2, SimulationSettings(100), routing)
        found = simulate_cluster([block(*rows)], SIMPLE, cluster, warm_s=5.0)
        assert found.longest_s == pytest.approx(0.02)


def test_random_routing_reaches_all_and_a_seed_repeats_it():
    workload = traffic(50.0)
    runs = [
        simulate_cluster(
            blocks(workload, 5), cpu(), Cluster(8, SimulationSettings(2048, seed=seed), "random")
        )
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_cluster_names_what_is_wrong():
    with pytest.raises(InvalidInput, match="replicas"):
        Cluster(0, SimulationSettings(1))
    with pytest.raises(InvalidInput, match="deadline"):
        Cluster(1, SimulationSettings(1, deadline_s=1.0))
    with pytest.raises(InvalidInput, match="routing"):
        simulate_cluster([], SIMPLE, Cluster(1, SimulationSettings(1), "best"))


def test_a_ragged_step_is_never_padded_and_equal_lengths_are_not_either():
    assert packing_of(LENGTHS, cpu(), 512) is NO_PADDING
    packing = packing_of(FixedSize(100), cpu("rectangular"), 1000)
    assert packing.step(64) == (10.0, 1.0)
    assert packing.step(1) == (1.0, 1.0)
    assert packing_of(LENGTHS, cpu("rectangular"), 2048).step(64)[1] > 1.02


# Traffic in blocks.


def test_blocks_are_the_workload():
    workload = Workload(PoissonArrivals(300.0), UniformSize(1, 9), LENGTHS, seed=3)
    whole = list(workload.requests(20))
    parts = list(blocks(workload, 20))
    assert [at for part in parts for at in part.at_s] == [one.at_s for one in whole]
    documents = sum(sum(part.documents) for part in parts)
    assert documents == pytest.approx(sum(one.documents for one in whole), rel=0.03)
    mean = np.average(
        [n for part in parts for n in part.lengths], weights=[d for p in parts for d in p.documents]
    )
    assert mean == pytest.approx(np.mean([n for one in whole for n in one.lengths]), rel=0.03)
    assert all(q >= n * n - 1e-6 for p in parts for n, q in zip(p.lengths, p.squares, strict=True))


def test_a_trace_leaves_to_the_workload_what_it_does_not_record():
    records = [ArrivalRecord(5.0, 3, 20), ArrivalRecord(6.0, 2), ArrivalRecord(9.0)]
    workload = Workload(ReplayedArrivals(records), FixedSize(7), ObservedSize([50]))
    (part,) = blocks(workload)
    assert part == RequestBlock(
        [0.0, 1.0, 4.0], [3, 2, 7], [20.0, 50.0, 50.0], [400.0, 2500.0, 2500.0]
    )
    assert list(blocks(workload, 0.0)) == []
    with pytest.raises(InvalidInput, match="tokens"):
        list(blocks(Workload(PoissonArrivals(1.0), FixedSize(1)), 10))


# A day.


def test_the_rates_of_a_day_join_its_hours():
    rates = rates_of([0.5, 1.0], 200.0)
    assert len(rates) == capacity.PARTS
    assert (rates[0], rates[24], rates[48], rates[72]) == (100.0, 150.0, 200.0, 150.0)
    assert max(rates_of(capacity.TYPICAL, 70.0)) == pytest.approx(70.0)
    for shape in ([], [0.0], [-1.0, 1.0], [math.nan]):
        with pytest.raises(InvalidInput, match="day"):
            rates_of(shape, 1.0)


def test_a_day_counts_its_quarters_by_their_requests(monkeypatch):
    monkeypatch.setattr(capacity, "WARM_S", 1.0)
    rates = [4.0, 0.0, 60.0, 4.0]
    patient = SimulationSettings(2048, bounds=AdmissionLimits(max_wait_s=30.0))
    found = simulate_day(traffic(1.0), rates, cpu(), Cluster(3, patient), ServiceLevel(0.5))
    assert [part.rate for part in found.parts] == [4.0, 60.0, 4.0]
    assert [part.overfull for part in found.parts] == [False, True, False]
    assert found.requests == 68 * 86_400 / 4
    assert found.overfull_s == 86_400 / 4
    assert found.missed == pytest.approx(
        sum(part.rate / 68 * part.outcome.missed for part in found.parts), rel=0.05
    )
    assert found.utilisation == pytest.approx(sum(p.outcome.utilisation for p in found.parts) / 4)
    assert found.p50_s > 3 * found.parts[0].outcome.p99_s
    assert found.as_dict()["parts"][1]["outcome"]["missed"] > 0.5


def test_a_day_without_requests_says_nothing():
    found = simulate_day(traffic(1.0), [0.0, 0.0], cpu(), Cluster(1, SimulationSettings(2048)))
    assert (found.requests, found.simulated, found.utilisation, found.missed) == (0, 0, 0, 0)
    assert found.as_dict()["p99_s"] is None
