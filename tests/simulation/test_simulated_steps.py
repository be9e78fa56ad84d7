"""The simulator decides as the service does: the same steps at the same times, the same answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulations import cpu, serve, traces

from echelon.scheduling.admission import AdmissionLimits
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.workload import PoissonArrivals, UniformSize, Workload


def both(trace, server, cost="none"):
    """The decisions of the service and of the simulator."""
    served, ends = serve(trace, server, cost)
    simulated = []
    outcome = simulate(
        trace,
        cpu(cost),
        server,
        on_step=lambda now, step: simulated.append((now, step.places, step.lengths)),
    )
    return served, ends, simulated, outcome


def check(trace, server, cost="none"):
    served, ends, simulated, outcome = both(trace, server, cost)
    assert [step[1:] for step in simulated] == [step[1:] for step in served]
    assert np.allclose([step[0] for step in simulated], [step[0] for step in served])
    kinds = [end for end, _ in ends.values()]
    assert len(ends) == len(trace) == outcome.requests
    assert outcome.expired == kinds.count("expired")
    assert sum(outcome.refused.values()) == kinds.count("refused")
    waits = [end - came for came, (end, _) in ends.items() if not isinstance(end, str)]
    assert outcome.answered == len(waits)
    if waits:
        assert outcome.longest_s == pytest.approx(max(waits))
        assert outcome.mean_s == pytest.approx(np.mean(waits))
    return outcome


@given(
    traces(),
    st.integers(20, 200),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(["none", "rectangular"]),
    st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None)
def test_the_same_trace_gives_the_same_steps(trace, budget, max_pairs, cost, noise):
    check(trace, SimulationSettings(budget, max_pairs, noise=noise), cost)


@given(traces(), st.sampled_from([0.004, 0.02, 0.05]), st.integers(1, 4))
@settings(deadline=None)
def test_the_same_requests_are_refused_and_expire(trace, deadline_s, most):
    check(
        trace,
        SimulationSettings(
            80, deadline_s=deadline_s, bounds=AdmissionLimits(max_requests=most), noise=0.3
        ),
    )


@given(traces(), st.sampled_from([0.002, 0.01, 0.05]))
@settings(deadline=None)
def test_a_goal_moves_the_budget_of_both_alike(trace, goal_s):
    check(trace, SimulationSettings(200, goal_s=goal_s, noise=0.8))


def test_under_load_some_are_refused_some_late_and_most_answered():
    workload = Workload(PoissonArrivals(60.0), UniformSize(1, 9), UniformSize(10, 60))
    server = SimulationSettings(
        256, deadline_s=0.12, bounds=AdmissionLimits(max_requests=6), noise=0.5
    )
    trace = list(workload.requests(20.0))
    outcome = check(trace, server)
    assert outcome.expired > 5
    assert set(outcome.refused) > {"deadline_too_near"}
    assert outcome.answered > outcome.requests / 2
