"""The benchmark of tuning's statements: a true profile is right, a false one is caught."""

from __future__ import annotations

import sys

import pytest
from helpers import ROOT
from report_pages import entry, make_profile

from echelon.reports.statistics import KnownValue

sys.path.insert(0, str(ROOT / "benchmarks"))

import tuning_truth


def sure(seconds):
    return KnownValue(seconds, seconds * 0.999, seconds * 1.001)


def judged(one, eight, *results):
    true = {(10, 1, None): sure(one), (10, 8, None): sure(eight)}
    results = results or [entry(10, [s] * 6, batch_size=b) for b, s in ((1, 0.2), (8, 0.1))]
    return tuning_truth.judged(make_profile(results), true)


def test_statements_that_are_true_are_right():
    found = judged(0.2, 0.1)
    assert (found["measured"], found["measured_held"]) == (2, 2)
    assert (found["claims"], found["false"]) == (1, [])
    assert all(choice["right"] for choice in found["choices"])


@pytest.mark.parametrize(("one", "eight", "slower"), [(0.2, 0.4, 1.0), (0.2, 0.2, 0.0)])
def test_a_false_verdict_and_a_wrong_choice_are_caught(one, eight, slower):
    found = judged(one, eight)
    assert found["measured_held"] == 1
    assert len(found["false"]) == 1
    (api,) = [choice for choice in found["choices"] if choice["name"] == "api"]
    assert api["slower"] == pytest.approx(slower)
    assert api["right"] == (slower == 0.0)


def test_what_is_said_to_be_not_known_is_no_claim():
    found = judged(0.2, 0.1, entry(10, [0.2], batch_size=1), entry(10, [0.1], batch_size=8))
    assert found["claims"] == found["measured"] == 0
    assert all(choice["not_known"] and choice["right"] for choice in found["choices"])


def test_the_page_sums_up_the_runs():
    run = {"seconds": [19.0, 25.0], "judged": judged(0.2, 0.4)}
    kept = {
        "command": "python x",
        "machine": {"cpu": "a CPU", "cpus": 2},
        "runs": {"stall 20": run},
    }
    page = tuning_truth.page({**kept, "precision": "fp32", "quota": "control group"})
    assert "held the truth: 1 of 2" in page
    assert "False verdicts: 1 of 1" in page
    assert "| stall | 20 s | 19 s (25 s) | 2 | 1 |" in page
