"""The solver: the four scenarios, and what it never does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echelon.errors import InvalidInput
from echelon.scheduling.cost_model import Coefficients, CostModel, MemoryModel
from echelon.simulation.workload import PoissonArrivals, UniformSize, Workload
from echelon.tuning import scenario as module
from echelon.tuning.goal import SCENARIOS, ScenarioLimits
from echelon.tuning.scenario import Candidate, solve

WORKLOAD = Workload(PoissonArrivals(1.0), UniformSize(1, 10), UniformSize(20, 200))
MIB = 2**20
MEMORY = MemoryModel(500 * MIB, 0.1 * MIB)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "REQUESTS", 120)
    monkeypatch.setattr(module, "FULL", 40)


def costs(base=4e-3, token=7e-5, kind="none"):
    return CostModel(Coefficients(base, token, 3.5e-8), kind)


def candidate(budget=1024, **changes):
    changes = {"cost": costs(), "memory": MEMORY} | changes
    return Candidate(budget, **changes)


candidates = st.builds(
    candidate,
    st.sampled_from([128, 512, 2048]),
    cost=st.builds(
        costs,
        st.sampled_from([1e-3, 2e-2]),
        st.sampled_from([3e-5, 2e-4]),
        st.sampled_from(["none", "rectangular"]),
    ),
    workers=st.integers(1, 3),
    max_length=st.sampled_from([None, 64]),
    agreement=st.sampled_from([1.0, 0.98, 0.9]),
)
limits = st.builds(
    ScenarioLimits,
    goal_s=st.sampled_from([0.03, 0.1, 0.5]),
    rate=st.sampled_from([0.5, 5.0, 30.0]),
    memory_bytes=st.sampled_from([None, 600 * MIB, 1200 * MIB]),
)
models_of = st.lists(candidates, min_size=1, max_size=3)


def solved(scenario, models, given_limits):
    """The recommendation, or why there is none."""
    try:
        return solve(scenario, WORKLOAD, models, given_limits)
    except InvalidInput as error:
        return error


@given(st.sampled_from(SCENARIOS), models_of, limits)
@settings(deadline=None, max_examples=25)
def test_it_never_recommends_what_its_own_models_forbid(scenario, models, given_limits):
    found = solved(scenario, models, given_limits)
    if isinstance(found, InvalidInput):
        assert found.field in {"--rate", "--slo-p99-ms", "--memory-limit", "--allow"}
        assert found.remedy
        return
    chosen = found.chosen
    assert chosen.reason is None
    assert chosen.candidate in models
    assert chosen.candidate.agreement >= given_limits.agreement
    if given_limits.memory_bytes is not None:
        assert chosen.candidate.bytes <= given_limits.memory_bytes
    if scenario != "offline":
        assert chosen.predicted.missed <= 0.01
        assert chosen.predicted.p99_s <= given_limits.goal_s
        assert scenario == "api" or chosen.max_rate >= given_limits.rate
    assert solve(scenario, WORKLOAD, models, given_limits) == found


@given(st.sampled_from(["api", "concurrent", "edge"]), models_of, limits, st.floats(1.0, 20.0))
@settings(deadline=None, max_examples=12)
def test_more_rate_never_gives_fewer_workers(scenario, models, given_limits, factor):
    def workers(rate):
        found = solved(scenario, models, replace(given_limits, rate=rate))
        return 99 if isinstance(found, InvalidInput) else found.chosen.candidate.workers

    assert workers(given_limits.rate) <= workers(given_limits.rate * factor)


def test_offline_takes_the_fastest_whatever_the_latency():
    models = [candidate(128), candidate(4096), candidate(512)]
    found = solve("offline", WORKLOAD, models, ScenarioLimits(goal_s=0.001))
    assert found.chosen.candidate.token_budget == 4096
    assert found.measure == "documents_per_s"
    assert found.value == max(one.documents_per_s for one in found.tried)


def test_an_api_takes_the_lowest_p99_and_high_concurrency_the_highest_rate():
    # Small steps let the next in sooner, large ones do more.
    models = [candidate(256, cost=costs(8e-3)), candidate(8192, cost=costs(8e-3))]
    by = {
        name: solve(name, WORKLOAD, models, ScenarioLimits(2.0, 3.0))
        for name in ("api", "concurrent")
    }
    tried = by["api"].tried
    assert by["api"].value == min(one.predicted.p99_s for one in tried)
    assert by["concurrent"].value == max(one.max_rate for one in by["concurrent"].tried)
    assert by["concurrent"].chosen.candidate.token_budget == 8192


def test_the_fewest_workers_that_reach_the_goal():
    models = [candidate(workers=workers) for workers in (3, 1, 2)]
    chosen = [
        solve("api", WORKLOAD, models, ScenarioLimits(0.5, rate)).chosen.candidate.workers
        for rate in (2.0, 25.0, 45.0)
    ]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[-1] > 1
    found = solve("concurrent", WORKLOAD, models, ScenarioLimits(0.5, 2.0))
    assert found.chosen.candidate.workers == 1
    assert found.value < max(one.max_rate for one in found.tried)


def test_a_p99_as_good_as_the_best_goes_by_what_is_in_reserve():
    models = [candidate(budget) for budget in (64, 256, 512, 1024, 2048, 8192)]
    found = solve("api", WORKLOAD, models, ScenarioLimits(1.0, 2.0))
    able = [one for one in found.tried if one.reason is None]
    near = [p for p in able if p.predicted.p99_s <= 1.05 * min(o.predicted.p99_s for o in able)]
    assert 1 < len(near) < len(models)
    assert found.chosen is max(near, key=lambda one: one.documents_per_s)


def test_each_worker_needs_its_own_memory():
    models = [candidate(512, workers=2), candidate(512)]
    found = solve("offline", WORKLOAD, models, ScenarioLimits(memory_bytes=600 * MIB))
    assert found.chosen.candidate.workers == 1
    assert found.tried[0].reason.startswith("needs")
    assert solve("offline", WORKLOAD, models, ScenarioLimits()).chosen.candidate.workers == 2


def test_an_edge_machine_gives_a_little_speed_for_memory():
    models = [candidate(budget) for budget in (64, 1024, 2048, 8192)]
    found = solve("edge", WORKLOAD, models, ScenarioLimits())
    calm = {one.candidate.token_budget: one.calm.p50_s for one in found.tried}
    assert found.chosen.candidate.token_budget in {1024, 2048}
    assert found.value <= 1.05 * min(calm.values())
    assert found.value == calm[found.chosen.candidate.token_budget]


def test_shorter_texts_are_faster_and_must_still_agree():
    short = candidate(max_length=32, agreement=0.9)
    models = [candidate(), short]
    assert solve("offline", WORKLOAD, models, ScenarioLimits()).chosen.candidate == models[0]
    allowed = ScenarioLimits(agreement=0.85)
    assert solve("offline", WORKLOAD, models, allowed).chosen.candidate == short


@pytest.mark.parametrize(
    ("models", "given_limits", "field", "possible"),
    [
        ([candidate(agreement=0.5)], ScenarioLimits(1.0, 1.0), "--allow", "0.500"),
        ([candidate(512)], ScenarioLimits(1.0, 1.0, 500 * MIB), "--memory-limit", "0.538 GiB"),
        ([candidate()], ScenarioLimits(0.5, 900.0), "--rate", "more machines"),
        ([candidate()], ScenarioLimits(0.01, 1.0), "--slo-p99-ms", "or more"),
    ],
)
def test_what_cannot_be_had_says_what_can(models, given_limits, field, possible):
    with pytest.raises(InvalidInput) as raised:
        solve("api", WORKLOAD, models, given_limits)
    assert raised.value.field == field
    assert possible in str(raised.value).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("scenario", "models", "given_limits"),
    [
        ("api", [candidate()], ScenarioLimits(rate=1.0)),
        ("concurrent", [candidate()], ScenarioLimits(goal_s=1.0)),
        ("api", [], ScenarioLimits(1.0, 1.0)),
        ("batch", [candidate()], ScenarioLimits(1.0, 1.0)),
    ],
)
def test_what_is_missing_is_named(scenario, models, given_limits):
    with pytest.raises(InvalidInput):
        solve(scenario, WORKLOAD, models, given_limits)


@pytest.mark.parametrize("name", ["goal_s", "rate", "memory_bytes"])
def test_limits_are_above_zero(name):
    with pytest.raises(InvalidInput, match=name):
        ScenarioLimits(**{name: 0.0})
