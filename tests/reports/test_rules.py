"""Rules of thumb beside a profile: what holds, what it costs, and what nobody measured."""

from __future__ import annotations

import pytest
from report_pages import PRECISIONS, PREDICTED, entry, make_profile, scenario_entry

from echelon.reports.profile_view import knee
from echelon.reports.rules_of_thumb import rules_of_thumb


def found(*results, **changes):
    return {rule.name: rule for rule in rules_of_thumb(make_profile(results, **changes))}


def sweep(pairs, times):
    return [entry(pairs, [seconds] * 9, batch_size=size) for size, seconds in times.items()]


@pytest.mark.parametrize(
    ("times", "state", "text"),
    [
        ({1: 0.3, 4: 0.102, 8: 0.1}, "holds", "holds"),
        ({1: 0.3, 4: 0.12, 8: 0.1}, "costs", "20"),
        ({1: 0.1, 4: 0.15, 8: 0.2}, "costs", "100"),
        ({1: 0.1, 2: 0.1}, "unknown", "not measured"),
    ],
)
def test_a_size_of_the_rule_is_compared_with_the_best(times, state, text):
    rule = found(*sweep(10, times))["api"]
    assert rule.state == state
    assert text in rule.result


def test_offline_is_compared_with_the_best_token_budget_too():
    batches = sweep(100, {8: 1.0, 16: 0.9, 32: 1.1})
    assert found(*batches)["offline"].result.replace("\u00a0", " ") == "up to 22 % slower here"
    budget = entry(100, [0.5] * 9, token_budget=1024)
    rule = found(*batches, budget)["offline"]
    assert "1,024 tokens per step is best" in rule.found
    assert "120" in rule.result
    assert found(*sweep(10, {16: 1.0}))["offline"].state == "unknown"


def test_the_edge_rule_shows_the_memory_of_its_sizes():
    small = [entry(10, [0.2] * 9, batch_size=1, memory=2**28), *sweep(10, {4: 0.2})]
    rule = found(*small)["edge"]
    assert rule.state == "holds"
    assert "0.250 GiB with batch size 1" in rule.found.replace("\u00a0", " ")
    assert "0.500 GiB with batch size 4" in rule.found.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("times", "state", "text"),
    [
        ({1: 2.0, 8: 1.0, 32: 0.5}, "holds", "up to the largest"),
        ({1: 2.0, 8: 1.0, 32: 0.99}, "costs", "only up to batch size 8"),
        ({1: 2.0, 8: 1.0, 32: 1.5}, "costs", "the largest size is 50"),
        ({8: 1.0}, "unknown", "not measured"),
    ],
)
def test_whether_larger_is_faster(times, state, text):
    rule = found(*sweep(50, times))["larger"]
    assert rule.state == state
    assert text in rule.result


def test_half_precision_is_judged_by_its_ranking():
    points = sweep(10, {4: 1.0})
    assert found(*points)["half"].result == "does not hold for fp16 here"
    assert found(*points, precisions=PRECISIONS[:2])["half"].state == "holds"
    assert "τ 0.9962" in found(*points, precisions=PRECISIONS[:2])["half"].found
    assert found(*points, precisions=PRECISIONS[:1])["half"].state == "unknown"


def test_load_is_reported_only_if_it_was_measured():
    points = sweep(10, {4: 1.0})
    assert found(*points)["concurrent"].state == found(*points)["watch"].state == "unknown"
    validated = found(*points, scenario=scenario_entry())
    assert validated["concurrent"].state == "holds"
    assert "120" in validated["concurrent"].found
    assert "2.40 times the median" in validated["watch"].found
    missed = found(*points, scenario=scenario_entry(held=False))
    assert missed["concurrent"].state == "costs"
    offline = scenario_entry(
        scenario="offline", measured=PREDICTED | {"p50_s": None, "p99_s": None}
    )
    assert found(*points, scenario=offline)["watch"].state == "unknown"


def test_an_empty_profile_has_every_rule_unknown():
    assert {rule.state for rule in rules_of_thumb(make_profile((), precisions=[]))} == {"unknown"}
    assert len(rules_of_thumb(make_profile(()))) == 7


def test_the_knee_is_the_smallest_that_keeps_most_of_the_speed():
    points = [m.as_dict() for m in sweep(50, {1: 2.0, 4: 1.05, 8: 1.0, 16: 1.3})]
    assert knee(points)["batch_size"] == 4
    assert knee(points[::2])["batch_size"] == 8
    assert knee([]) is None
