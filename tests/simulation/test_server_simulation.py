"""One simulated service: sums done by heart, and what must always hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import SIMPLE, cpu, requests, traces

from echelon.errors import InvalidInput
from echelon.scheduling.admission import AdmissionLimits
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.service_level import ServiceLevel, Tally, percentiles
from echelon.simulation.workload import Arrival


def steps_of(trace, server, truth=SIMPLE):
    steps = []
    outcome = simulate(trace, truth, server, on_step=lambda now, step: steps.append((now, step)))
    return [(round(now, 6), step.lengths) for now, step in steps], outcome


def test_a_step_is_formed_just_before_the_running_one_ends():
    # 30 tokens take 40 ms, so the next step is formed at 35 ms: what comes at 36 ms is too late.
    steps, outcome = steps_of(
        requests((0.0, 30), (0.034, 10), (0.036, 20)), SimulationSettings(100)
    )
    assert steps == [(0.0, (30,)), (0.035, (10,)), (0.055, (20,))]
    assert outcome.longest_s == pytest.approx(0.09 - 0.036)
    assert outcome.p50_s == pytest.approx(0.04)
    assert outcome.utilisation == pytest.approx(1.0)
    assert (outcome.steps, outcome.step_pairs, outcome.step_tokens) == (3, 1.0, 20.0)


def test_an_idle_worker_takes_a_request_at_once():
    steps, outcome = steps_of(requests((0.0, 30), (0.036, 20), (0.2, 20)), SimulationSettings(100))
    assert steps == [(0.0, (30,)), (0.04, (20,)), (0.2, (20,))]
    assert outcome.utilisation == pytest.approx(0.1 / 0.23)
    assert outcome.throughput == pytest.approx(3 / 0.23)


def test_workers_share_the_queue():
    trace = requests((0.0, 30), (0.001, 30), (0.002, 30))
    steps, outcome = steps_of(trace, SimulationSettings(100, workers=2))
    assert steps == [(0.0, (30,)), (0.001, (30,)), (0.035, (30,))]
    assert outcome.longest_s == pytest.approx(0.078)
    assert outcome.utilisation == pytest.approx(0.12 / (2 * 0.08))


def test_reading_and_tokenising_come_first():
    server = SimulationSettings(100, request_s=0.5, document_s=0.1)
    steps, outcome = steps_of(requests((0.0, 10, 10, 10)), server)
    assert steps == [(0.8, (10, 10, 10))]
    assert outcome.longest_s == pytest.approx(0.84)


def test_a_request_that_is_tokenised_too_long_expires():
    server = SimulationSettings(100, request_s=0.5, deadline_s=0.4)
    steps, outcome = steps_of(requests((0.0, 10)), server)
    assert steps == []
    assert (outcome.expired, outcome.answered, outcome.missed) == (1, 0, 1.0)
    assert math.isnan(outcome.p99_s)
    assert outcome.as_dict()["p99_s"] is None


def test_a_request_is_judged_again_once_it_is_tokenised():
    server = SimulationSettings(100, request_s=0.5, deadline_s=0.52)
    _, outcome = steps_of(requests((0.0, 30)), server)
    assert (outcome.refused, outcome.expired) == ({"deadline_impossible": 1}, 0)


def test_refusals_are_counted_by_reason_and_miss_the_goal():
    server = SimulationSettings(20, bounds=AdmissionLimits(max_requests=2))
    outcome = simulate(
        requests((0.0, 20), (0.001, 20), (0.002, 20)), SIMPLE, server, level=ServiceLevel(1.0)
    )
    assert outcome.refused == {"requests_full": 1}
    assert outcome.within == 2
    assert outcome.missed == pytest.approx(1 / 3)


def test_requests_of_the_warm_up_are_served_and_not_counted():
    trace = requests((0.0, 30), (0.01, 30))
    outcome = simulate(
        trace, SIMPLE, SimulationSettings(100), level=ServiceLevel(0.06), warm_s=0.005
    )
    assert (outcome.requests, outcome.answered, outcome.documents) == (1, 1, 1)
    assert outcome.longest_s == pytest.approx(0.07)
    assert (outcome.within, outcome.goodput) == (0, 0.0)
    assert outcome.steps == 2


def test_noise_makes_steps_vary_not_longer():
    trace = [Arrival(float(i), 1, (100,)) for i in range(1000)]
    calm = simulate(trace, SIMPLE, SimulationSettings(200))
    noisy = simulate(trace, SIMPLE, SimulationSettings(200, noise=0.3))
    assert calm.longest_s == pytest.approx(0.11)
    assert noisy.p99_s > 1.5 * noisy.p50_s
    assert noisy.mean_s == pytest.approx(calm.mean_s, rel=0.03)


def test_the_model_that_is_given_is_not_changed():
    truth = cpu()
    simulate(
        [Arrival(0.1 * i, 1, (100,)) for i in range(50)], truth, SimulationSettings(200, noise=1.0)
    )
    assert truth.scale == 1.0


@given(traces(), st.integers(20, 200), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_every_request_ends_once_and_twice_the_same(trace, budget, workers):
    server = SimulationSettings(budget, workers=workers, deadline_s=0.2, noise=0.2)
    one, two = (simulate(trace, SIMPLE, server) for _ in range(2))
    assert one == two or math.isnan(one.p50_s)
    assert one.answered + one.expired + sum(one.refused.values()) == one.requests == len(trace)
    assert 0 <= one.utilisation <= 1 + 1e-9


@pytest.mark.parametrize(
    ("rows", "problem"),
    [([(1.0, 5), (0.5, 5)], "before"), ([(0.0,)], "no lengths")],
)
def test_what_cannot_be_simulated_is_refused(rows, problem):
    with pytest.raises(InvalidInput, match=problem):
        simulate(requests(*rows), SIMPLE, SimulationSettings(10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_budget": 0},
        {"token_budget": 1, "workers": 0},
        {"token_budget": 1, "max_pairs": 0},
        {"token_budget": 1, "deadline_s": 0.0},
        {"token_budget": 1, "request_s": -1.0},
        {"token_budget": 1, "noise": math.inf},
    ],
)
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(InvalidInput, match=list(wrong)[-1]):
        SimulationSettings(**wrong)


# Outcomes.


def test_percentiles_are_latencies_that_occurred():
    assert percentiles(range(1, 101)) == (50.0, 95.0, 99.0)
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)


def test_without_requests_none_was_missed():
    outcome = Tally().outcome(1)
    assert (outcome.missed, outcome.throughput, outcome.goodput) == (0.0, 0.0, 0.0)
