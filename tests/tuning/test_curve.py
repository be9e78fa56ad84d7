"""Latency over load: what is simulated, and how the report draws it."""

from __future__ import annotations

from itertools import islice

import pytest
from report_pages import CURVE, leave_plotly_out, read, scenario_profile

from echelon.reports.model_charts import curve_chart
from echelon.scheduling.admission import AdmissionLimits
from echelon.scheduling.cost_model import Coefficients, CostModel
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import PoissonArrivals, UniformSize, Workload
from echelon.tuning.goal import ScenarioLimits
from echelon.tuning.scenario import SHARES, Candidate, SimulatedService, curve_of

light = pytest.fixture(leave_plotly_out, autouse=True)

WORKLOAD = Workload(PoissonArrivals(1.0), UniformSize(1, 10), UniformSize(20, 200))
COST = CostModel(Coefficients(4e-3, 7e-5, 3.5e-8))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("echelon.tuning.scenario.REQUESTS", 300)
    monkeypatch.setattr("echelon.tuning.scenario.FULL", 60)


def test_the_highest_rate_holds_and_a_little_more_does_not():
    candidate, limits = Candidate(1024, COST), ScenarioLimits(goal_s=0.3)
    curve = curve_of(WORKLOAD, candidate, limits)
    service = SimulatedService(WORKLOAD, candidate, limits)
    assert service.at(curve.max_rate).held
    assert not service.at(1.04 * curve.max_rate).held
    assert [rate / curve.max_rate for rate, _ in curve.points] == pytest.approx(SHARES)
    by_share = dict(zip(SHARES, (found for _, found in curve.points), strict=True))
    assert by_share[1.0].p99_s <= 0.3 < by_share[1.2].p99_s
    assert by_share[0.2].p50_s < by_share[1.2].p50_s


def test_a_goal_that_no_rate_reaches_has_no_highest_rate():
    curve = curve_of(WORKLOAD, Candidate(1024, COST), ScenarioLimits(goal_s=0.001))
    assert curve.max_rate is None
    assert curve.as_dict(3.0)["most_rate"] is None
    assert len(curve.points) == len(SHARES)


def test_a_mild_goal_is_held_up_to_what_the_service_does_at_most():
    candidate, limits = Candidate(1024, COST), ScenarioLimits(goal_s=100.0)
    full = SimulatedService(WORKLOAD, candidate, limits).at_once()
    assert curve_of(WORKLOAD, candidate, limits).max_rate == full.requests / full.duration_s


def test_a_run_that_is_lost_ends_early_and_says_the_same():
    requests = list(islice(WORKLOAD.at(100.0).requests(), 300))
    setting, seen = SimulationSettings(1024, bounds=AdmissionLimits(max_wait_s=30.0)), []
    level, mild = ServiceLevel(0.3), ServiceLevel(1e3)
    whole = simulate(requests, COST, setting, level=level)
    early = simulate(
        requests, COST, setting, level=level, expected=300, on_step=lambda *step: seen.append(step)
    )
    assert whole.missed > 0.01
    assert early.missed > 0.01
    assert early.requests < whole.requests
    assert len(seen) < whole.steps
    # A run that is not lost is not cut.
    uncut = simulate(requests, COST, setting, level=mild)
    assert simulate(requests, COST, setting, level=mild, expected=300) == uncut


def test_the_chart_has_goal_rate_and_what_was_measured():
    made = scenario_profile(curve=CURVE)
    chart = curve_chart(made)
    traces = {trace["meta"]: trace for trace in chart.figure["data"]}
    assert traces["p99_s"]["x"] == [1.0, 4.0, 6.0]
    assert traces["p99_s"]["y"] == [0.05, 0.2, 0.3]
    assert traces["goal"]["y"] == [0.2, 0.2]
    assert traces["rate"]["x"] == [5.0, 5.0]
    assert traces["measured"]["y"] == [0.05, 0.08, 0.12]
    assert "Up to 4.00 requests/s" in chart.note.replace("\u00a0", " ")
    page = read(made)
    assert "load-curve" in page.ids
    assert "Latency over load" in page.text


def test_a_chart_without_proof_or_rate_says_so():
    chart = curve_chart(
        scenario_profile(curve=CURVE | {"most_rate": None}, measured=None, held=None)
    )
    assert "measured" not in {trace["meta"] for trace in chart.figure["data"]}
    assert "No rate" in chart.note
    # Older profiles have no curve, other scenarios none.
    assert curve_chart(scenario_profile()) is None
    assert curve_chart(scenario_profile(curve=None)) is None
    assert "load-curve" not in read(scenario_profile()).ids
