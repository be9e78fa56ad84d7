"""What is made of the fitted models: the report's charts, the benchmark's page."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import count

import pytest
import scorers
from helpers import ROOT

from echelon.engine.launch import prior_of
from echelon.options import Options
from echelon.profile import Profile, ProfileKey, TunedSettings
from echelon.reports.model_charts import model_charts
from echelon.scheduling.cost_model import Coefficients, MemoryModel, work_of
from echelon.scheduling.fit import CostFit, FitError, MemoryFit, Probe
from echelon.simulation.fitted_models import accuracy_notes, noise_of
from echelon.tuning.calibration import Calibration, ProbeResult, fitted
from echelon.tuning.probe_shapes import LengthRange, choose

sys.path.insert(0, str(ROOT / "benchmarks"))

import predict

COEFFICIENTS = Coefficients(2e-3, 5e-5, 4e-8)
MEMORY = MemoryModel(5e8, 7e4, 3.0)
LIMITS = LengthRange(512, 4096, "none")


def made(*, memory=True):
    """Both models as the profile holds them."""

    def probe(shape):
        work = work_of(shape, "none")
        peak = round(MEMORY.peak_bytes(work)) if memory else None
        return Probe(shape, (COEFFICIENTS.seconds(work),) * 3, peak)

    shapes = choose(LIMITS, COEFFICIENTS, 100)
    made = [[*map(probe, some)] for some in shapes]
    return fitted(ProbeResult(*made, LIMITS, None, None))


def profile(models) -> Profile:
    key = ProfileKey("m", "r", "cpu", "a processor", "fp32", {})
    settings = TunedSettings("fp32", 1024, None, 2, None)
    return Profile(key, settings, "2026-01-01", cost=models.cost, memory=models.memory)


def test_a_right_model_lies_on_the_line():
    time, memory = model_charts(profile(made()))
    assert "unseen shapes" in time.note
    for chart in (time, memory):
        line, fitted_, unseen = chart.figure["data"]
        assert [trace["name"] for trace in (fitted_, unseen)] == [
            "used for the fit",
            "used to check the fit",
        ]
        for trace in (fitted_, unseen):
            assert trace["x"] == pytest.approx(trace["y"], rel=1e-3)
            assert len(trace["x"]) == len(trace["text"])
            assert line["x"][0] <= min(trace["x"]) <= max(trace["x"]) <= line["x"][1]
        assert "predicted" in unseen["text"][0]


def test_plotly_knows_every_attribute():
    from plotly import graph_objects

    for chart in model_charts(profile(made())):
        graph_objects.Figure(chart.figure)


def test_there_is_no_chart_without_a_model():
    assert model_charts(profile(replace(made(), cost=None))) == []
    assert [c.name for c in model_charts(profile(made(memory=False)))] == ["predicted-time"]


@pytest.mark.parametrize(("factor", "met"), [(1.0, "yes"), (1.05, "yes"), (1.3, "no")])
def test_the_benchmark_compares_with_the_goal(factor, met):
    fit = CostFit.from_dict(made().cost)
    unseen = [
        Probe(shape, (factor * COEFFICIENTS.seconds(work_of(shape, "none")),))
        for shape in LIMITS.mixed(9, seed=3)
    ]
    row = predict.compared(unseen, fit)
    assert row["error"]["median"] == pytest.approx(abs(1 / factor - 1), abs=1e-6)
    assert row["met"] == (met == "yes")
    content = {
        "command": "python benchmarks/predict.py",
        "date": "today",
        "machine": {"cpu": "a processor", "cpus": 2},
        "models": [{"model": "m", "precision": "fp32", **row}],
    }
    page = predict.page(content)
    assert f"| 10%, 25% | {met} |" in page
    assert page.count(" ms | ") == 2 * len(unseen)


def test_the_benchmark_measures_a_model(bert, monkeypatch):
    monkeypatch.setattr(predict, "monotonic", count(step=0.001).__next__)
    monkeypatch.setattr(predict, "open_scorer", scorers.anywhere)
    asked = argparse.Namespace(device="cpu", precision="fp32", budget=256, shapes=30, seconds=20.0)
    found = predict.evaluate("toy", bert, asked)
    assert len(found["unseen"]) == 30
    assert found["fit"]["paid"] == "ragged"
    assert found["memory"] is not None
    assert found["error"]["p90"] < 1e-6  # each step takes one tick
    assert found["met"]


def imprecise(share=0.5):
    cost = CostFit(COEFFICIENTS, "none", FitError(share, 2 * share, 9), 0.01)
    memory = MemoryFit(MEMORY, FitError(share, 2 * share, 9))
    return profile(Calibration(cost.as_dict(), memory.as_dict(), []))


def test_who_predicts_with_an_imprecise_model_says_so_and_widens(caplog):
    sure, unsure = imprecise(0.02), imprecise(0.3)
    assert accuracy_notes(sure, memory=True) == []
    assert noise_of(sure) == 0.0
    step, memory = accuracy_notes(unsure, memory=True)
    assert "step times are good to ±60 %" in step
    assert "memory is good to ±60 %" in memory
    assert accuracy_notes(unsure, memory=False) == [step]
    assert noise_of(unsure) == pytest.approx(0.3)
    asked = Options(precision="fp32", threads=2)
    assert prior_of(sure, asked, 1).same
    assert caplog.text == ""
    assert not prior_of(unsure, asked, 1).same
    assert "±60 %" in caplog.text


def test_runs_that_were_disturbed_are_no_noise():
    point = {"status": "ok", "steps": 1, "seconds": [1.0, 1.0, 9.0, 1.0], "samples": 3}
    marked = [{"disturbed": [{"run": 2}]}, {"outliers": [2]}]
    quiet = [replace(imprecise(0.02), points=[point | mark]) for mark in marked]
    assert [noise_of(one) for one in quiet] == [0.0, 0.0]
    assert noise_of(replace(imprecise(0.02), points=[point])) == 0.5
