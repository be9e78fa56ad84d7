"""The benchmark of predicted rates: same requests for both, bisection, errors, merging, page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "benchmarks"))

from simulations import SIMPLE

import sustain
from echelon.data import load_texts
from echelon.loadtest.texts import WordLengths
from echelon.simulation.workload import FixedSize, LognormalSize
from echelon.tuning.candidates import paced
from echelon.tuning.goal import ScenarioGoal, ScenarioLimits
from echelon.tuning.recommendation import LoadMetrics, Validation
from echelon.tuning.scenario import Candidate, predict
from echelon.tuning.scenario_model import WorkloadTexts
from echelon.tuning.validation import load_test_plan
from sustain_page import GOAL, Bisection, merged, off, page, verdict

NAMES = ("probes", "after a look")


@pytest.fixture
def bench():
    tokens = LognormalSize(60, 0.5, 512)
    goal = ScenarioGoal("concurrent", 3.0, 1.0, documents=FixedSize(10), tokens=tokens)
    load = WorkloadTexts(goal.traffic(tokens), load_texts(language="en").topics, WordLengths())
    return sustain.Bench(None, goal, load, Path("profile.json"), 100, 50.0)


@pytest.fixture
def forecast():
    return sustain.Forecast("probes", Candidate(2048, SIMPLE), ScenarioLimits(3.0, overhead_s=0.01))


@pytest.mark.parametrize(("rate", "seconds"), [(1.0, 50.0), (4.0, 25.0)])
def test_the_simulated_requests_are_sent(bench, rate, seconds):
    plan = load_test_plan(bench.context(rate), "http://127.0.0.1:1")
    sent = list(plan.workload.requests(plan.ends_s))
    simulated = bench.arrivals(rate)
    assert plan.ends_s == seconds
    assert len(simulated) == pytest.approx(rate * seconds, rel=0.3)
    assert sent == simulated
    other = bench.context(rate, sustain.OTHER_SEED)
    assert list(load_test_plan(other, "http://h").workload.requests(seconds)) != sent


def test_higher_rates_have_the_same_requests_sooner(bench):
    slow, fast = bench.arrivals(4.0), bench.arrivals(8.0)
    assert [r.lengths for r in slow] == [r.lengths for r in fast]
    assert [r.at_s for r in slow] == pytest.approx([2 * r.at_s for r in fast])


def test_the_highest_rate_is_the_last_that_meets_the_goal(bench, forecast):
    highest = bench.highest(forecast, 1.7)
    assert bench.predicted(forecast, 0.97 * highest)[1]
    assert not bench.predicted(forecast, 1.03 * highest)[1]


def test_a_validation_corrects_pace_and_overhead(bench, forecast):
    metrics = LoadMetrics(0.6, 0.7, 0.8, 1.0, 10.0, 1e9, 100, 0)
    looked = sustain.corrected(forecast, Validation(metrics, 2.0, 0.05, held=True))
    assert looked.pace == 2.0
    assert looked.limits == replace(forecast.limits, overhead_s=0.05)
    assert looked.candidate.cost.predict([60]) == pytest.approx(2 * SIMPLE.predict([60]))
    assert bench.predicted(looked, 0.5)[0]["p50_s"] > 2 * bench.predicted(forecast, 0.5)[0]["p50_s"]
    assert bench.highest(looked, 1.7) < bench.highest(forecast, 1.7)


@pytest.fixture
def machine(monkeypatch):
    """A machine that takes 1.2 times the predicted, and 20 ms beside."""
    truth = Candidate(2048, paced(SIMPLE, 1.2))

    async def run(line, rate, seed=sustain.SEED, *, alone_s=None):
        context = line._bench.context(rate, seed)
        sent = context.load.requests(context.goal.verify_s, seed)
        limits = ScenarioLimits(context.goal.goal_s, overhead_s=0.02)
        kind = "concurrent" if alone_s is None else "edge"
        outcome, largest = predict(kind, sent, truth, limits)
        seen = Validation(LoadMetrics.of(kind, outcome, truth, largest), 1.2, 0.02, outcome.held)
        return seen, sustain.row_of(seen)

    @contextlib.asynccontextmanager
    async def opened(plan):
        yield plan

    server = SimpleNamespace(url="http://127.0.0.1:1")
    monkeypatch.setattr(sustain, "ServerProcess", lambda _: contextlib.nullcontext(server))
    monkeypatch.setattr(sustain, "serve_arguments", lambda *_: [])
    monkeypatch.setattr(sustain, "opened", opened)
    monkeypatch.setattr(sustain.RunningServer, "run", run)
    monkeypatch.setattr("echelon.tuning.scenario.REQUESTS", 200)


def test_a_machine_that_is_slower_under_load_is_detected(bench, machine):
    found = asyncio.run(sustain.measure(bench, Candidate(2048, SIMPLE), 5))
    alone_s = 0.02 + 1.2 * SIMPLE.predict([60] * 10)
    assert found["alone"]["p50_s"] == pytest.approx(alone_s, rel=0.1)
    assert found["goal_s"] == 4 * found["alone"]["p50_s"]
    assert found["capacity_per_s"] == pytest.approx(1 / 0.6, rel=0.1)
    shares = [point["rate_per_s"] / found["capacity_per_s"] for point in found["points"]]
    assert shares == pytest.approx([0.3, 0.5, 0.7])
    for point in found["points"]:
        assert point["off"]["after a look"] == pytest.approx(0.0, abs=0.01)
        assert point["off"]["probes"] < -0.1
    highest = found["most"]
    assert len(highest["probes"]) == 5
    assert highest["between"][0] <= highest["measured"] <= highest["between"][1]
    assert highest["off"]["after a look"] == pytest.approx(0.0, abs=0.06)
    assert highest["off"]["probes"] > 0.12
    assert found["verdict"]["after a look"]["met"]
    assert highest["in_the_long_run"]["probes"] > highest["in_the_long_run"]["after a look"] > 0


@given(st.floats(0.01, 0.99), st.integers(6, 10))
def test_bisection_closes_in(share, steps):
    highest = 2.0 + 6.0 * share
    search = Bisection(2.0, 8.0)
    for _ in range(steps):
        search.update(held=search.rate <= highest)
    assert search.low <= highest <= search.high
    if search.found is not None:
        assert abs(search.found - highest) <= 6.0 / 2 ** (steps + 1)
    assert search.high - search.low == pytest.approx(6.0 / 2**steps)


@pytest.mark.parametrize("held", [True, False])
def test_a_rate_outside_is_not_found(held):
    search = Bisection(1.0, 2.0)
    for _ in range(5):
        search.update(held=held)
    assert search.found is None


def test_errors_are_relative_to_the_measurement():
    assert off(0.5, 0.4) == pytest.approx(0.25)
    assert off(0.3, 0.4) == pytest.approx(-0.25)
    assert off(None, 1.0) is off(1.0, None) is None


@pytest.mark.parametrize(
    ("p99s", "rate", "met"),
    [
        ((0.1, -GOAL), GOAL, True),
        ((0.1, -0.26), 0.0, False),
        ((0.1, 0.2), -0.26, False),
        ((0.1, None), 0.0, False),
        ((0.1, 0.2), None, False),
    ],
)
def test_a_prediction_holds_where_all_its_values_do(p99s, rate, met):
    points = [{"off": {"probes": one, "other": 9.0}} for one in p99s]
    found = verdict("probes", points, {"off": {"probes": rate, "other": 9.0}})
    assert found["met"] is met
    assert found["p99"] == (None if None in p99s else max(map(abs, p99s)))


def evaluated(p99_s=0.40, highest=10.0):
    """A model's results, as they are measured."""
    came = {"p50_s": 0.1, "p95_s": 0.2, "p99_s": 0.5, "requests": 321, "doubts": ["A doubt."]}
    said = {"p50_s": 0.11, "p95_s": 0.2, "p99_s": p99_s, "missed": 0.0}
    point = {
        "share": 0.5,
        "rate_per_s": 7.25,
        "measured": came,
        "predicted": dict.fromkeys(NAMES, said),
        "off": dict.fromkeys(NAMES, off(p99_s, 0.5)),
    }
    highest = {
        "predicted": dict.fromkeys(NAMES, highest),
        "in_the_long_run": {"probes": 9.5, "after a look": None},
        "measured": 8.0,
        "between": [7.75, 8.25],
        "probes": [came, came],
        "off": dict.fromkeys(NAMES, off(highest, 8.0)),
    }
    return {
        "alone": came,
        "goal_s": 0.4,
        "capacity_per_s": 14.5,
        "forecasts": {name: {"pace": 1.0, "overhead_s": 0.003, "noise": 0.1} for name in NAMES},
        "points": [point],
        "most": highest,
        "verdict": {name: verdict(name, [point], highest) for name in NAMES},
    }


def run(monkeypatch, folder, found, *arguments):
    monkeypatch.setattr(sustain, "evaluate", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["sustain.py", *arguments, "--out", str(folder)])
    sustain.main()
    return json.loads((folder / "sustain.json").read_text("utf-8"))["models"]


def test_models_are_merged(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, evaluated())
    run(monkeypatch, tmp_path, evaluated(p99_s=0.9), "--model", "folder", "--name", "a large one")
    models = run(monkeypatch, tmp_path, evaluated(highest=None))
    assert [one["model"] for one in models] == ["a large one", "demo"]
    assert models[1]["most"]["predicted"]["probes"] is None
    assert "--name 'a large one'" in models[0]["command"]
    assert "probes: P99 off by 80%, highest rate by 25%" in capsys.readouterr().out
    text = (tmp_path / "sustain.md").read_text("utf-8")
    assert "| a large one | probes | 80% | 25% | no |" in text
    assert "| demo | probes | 20% | unknown | no |" in text
    assert "| highest rate | 2 runs | 7.75–8.25/s | 8/s | not found | – | not found | – |" in text


def test_the_page_has_both_rates_and_each_doubt_once():
    found = evaluated() | {
        "model": "demo",
        "precision": "bf16",
        "tokens": 60,
        "command": "python benchmarks/sustain.py",
        "date": "2026-11-24",
        "machine": {"cpu": "c", "usable_cpus": 2},
        "versions": {"torch": "2"},
    }
    text = page(merged([], found))
    assert "| demo | probes | 20% | 25% | yes |" in text
    assert "| 50%, 7.25/s | 321 | P99 | 500 ms | 400 ms | -20% | 400 ms | -20% |" in text
    assert "| 50%, 7.25/s | 321 | P50 | 100 ms | 110 ms | +10% |" in text
    assert "the goal is P99 within 400 ms; predicted capacity 14.5 requests a second." in text
    assert "| highest rate, simulated for long | | | | 9.5/s | | not found | |" in text
    assert text.count("Note: A doubt.") == 1
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert tables == [6] * 4 + [9] * 7
