"""The texts of a report: commands, numbers, the recommendation and the rules of thumb."""

from __future__ import annotations

import ast
import math
import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import (
    PRECISIONS,
    PREDICTED,
    entry,
    leave_plotly_out,
    make_profile,
    read,
    scenario_entry,
    scenario_profile,
)

from echelon.messages import units
from echelon.options import Options
from echelon.profile import Profile
from echelon.reports import tuning_report, wording
from echelon.reports.profile_view import knee
from echelon.reports.rules_of_thumb import rules_of_thumb
from echelon.reports.tables import print_scenario
from echelon.reports.wording import command, deviation, scenario_summary

quick = pytest.fixture(leave_plotly_out, autouse=True)


# Commands that can be typed.


def params_of(name, line):
    from echelon import cli

    parts = shlex.split(line)
    assert parts[:2] == ["echelon", name]
    return getattr(cli, name).make_context(name, parts[2:]).params


@pytest.mark.parametrize("model", ["some/model", '/my models/it\'s "one"', "模型"])
def test_repeating_measures_the_same_sizes(model):
    profile = make_profile()
    profile = replace(
        profile,
        key=replace(profile.key, model=model),
        data={"name": "my data.jsonl"},
        precisions=[],
        settings=replace(profile.settings, max_length=256),
    )
    params = params_of("tune", tuning_report._repeat(profile))
    assert (params["model"], params["data"]) == (model, "my data.jsonl")
    assert params["pairs"] == (10, 50)
    assert params["batch_sizes"] == (1, 4, 8, 16, 32)
    assert params["token_budgets"] == (256, 1024, 2048)
    assert (params["precision"], params["max_length"]) == ("bf16", 256)


@pytest.mark.parametrize("model", ["some/model", '/my models/it\'s "one"', "模型\n", "\U0001f600"])
def test_examples_mean_what_they_show(model):
    advice = {"batch_size": None, "token_budget": 512}
    call = ast.parse(wording.python(model, "p.json", advice), mode="eval").body
    keywords = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert ast.literal_eval(call.args[0]) == model
    assert Options.of(**keywords).token_budget == 512
    params = params_of("rank", wording.shell(model, "p.json", advice))
    assert (params["model"], params["profile"], params["token_budget"]) == (model, "p.json", 512)


# Numbers for people.


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1e-5, "0.0000100"),
        (0.05711, "0.0571"),
        (9.996, "10.0"),
        (99.96, "100"),
        (15234.6, "15,200"),
        (-0.5, "−0.500"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_digits(value, shown):
    assert units.number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0799, "79.9 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), (19.84, "19.8 s")],
)
def test_durations_change_unit_at_a_second(value, shown):
    assert units.duration(value).replace(units.SPACE, " ") == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(1, units.UNKNOWN), (2, "≈ 1.00 s"), (19, "≈ 1.00 s"), (20, "1.00 s")]
)
def test_percentiles_of_few_runs_are_marked(count, shown):
    found = entry(10, [1.0] * count, batch_size=1).as_dict()
    assert wording.percentile(found, "p95").replace(units.SPACE, " ") == shown


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=60))
def test_spread_never_claims_more_than_the_interval(seconds):
    found = entry(10, seconds, batch_size=1).as_dict()
    latency, shown = found["latency_s"], wording.spread(found)
    if latency["low"] is None:
        assert shown == f"n={len(seconds)}"
        return
    share = float(shown.strip("±%" + units.SPACE)) / 100
    slack = 1e-9 * latency["high"]
    assert latency["median"] * (1 + share) >= latency["high"] - slack
    assert latency["median"] * (1 - share) <= latency["low"] + slack


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "int8", "keep_bf16": []}, "int8"),
        ({"precision": "int8", "keep_bf16": ["a"]}, "int8, 1 layer in bf16"),
        ({"precision": "int8", "keep_bf16": ["a", "b"]}, "int8, 2 layers in bf16"),
    ],
)
def test_a_precision_says_what_it_leaves_in_bf16(row, shown):
    assert wording.precision(row) == shown


# The recommendation for a scenario.


def test_a_report_without_a_scenario_has_no_summary():
    assert scenario_summary(make_profile()) is None
    assert "scenario" not in read(make_profile()).ids


def test_the_summary_is_first_with_predicted_and_measured_metrics():
    page = read(scenario_profile())
    assert page.ids[0] == "scenario"
    rows = {row[0]: row[1:] for row in page.tables[0]}
    shown = {name: [cell.replace("\u00a0", " ") for cell in row] for name, row in rows.items()}
    assert shown["P99"] == ["100 ms", "120 ms", "+20 %"]
    assert shown["P50"] == ["50.0 ms", "50.0 ms", "+0 %"]
    assert shown["Memory"][1:] == ["–", "–"]
    text = page.text.replace("\u00a0", " ")
    for words in ("Realtime API", "1,024 tokens", "256 tokens", "τ 0.9962", "−0.0013", "1–10 doc"):
        assert words in text
    assert "<b>Only 15 answers</b>" in text
    assert "✓ Validated" in text


@pytest.mark.parametrize(
    ("held", "state", "text"),
    [
        (True, "held", "Validated"),
        (False, "missed", "misses the goal"),
        (None, "unvalidated", "only"),
    ],
)
def test_the_summary_says_whether_the_goal_was_held(held, state, text):
    measured = None if held is None else PREDICTED
    found = scenario_summary(scenario_profile(held=held, measured=measured))
    assert found["state"] == state
    assert text in found["headline"]
    page = read(scenario_profile(held=held, measured=measured))
    assert any(attributes.get("class") == f"pick {state}" for _, attributes in page.tags)


def test_the_command_fits_the_scenario():
    assert command(scenario_profile(), "p.json") == "echelon serve some/model --profile p.json"
    several = scenario_entry()["chosen"] | {"workers": 4}
    assert command(scenario_profile(chosen=several), "p.json").endswith("--device cuda --workers 4")
    assert command(scenario_profile(scenario="edge"), "p.json").startswith("echelon rank")


def test_a_simulated_setting_needs_no_measured_point():
    chosen = make_profile().settings
    page = read(replace(scenario_profile(), settings=replace(chosen, token_budget=777)))
    assert "chosen by simulation" in page.text
    assert "higher --time-limit" not in page.text
    assert "was not measured" in read(make_profile(settings=replace(chosen, token_budget=777))).text


def test_the_command_to_measure_again_has_the_requested_length():
    profile = scenario_profile()
    shorter = replace(profile, settings=replace(profile.settings, max_length=256))
    assert "--max-length" not in read(shorter).text


@pytest.mark.parametrize(
    ("predicted", "measured", "text"),
    [(2.0, 1.0, "−50"), (2.0, 2.5, "+25"), (0.0, 1.0, "–"), (1.0, None, "–")],
)
def test_a_deviation_has_its_sign(predicted, measured, text):
    assert deviation(predicted, measured).startswith(text)


def test_an_older_profile_with_static_batch_sizes_is_shown_without_them(tmp_path, capsys):
    row = {"static": 1, "rounds": [], "median": None, "reason": "died", "ahead": None}
    static = {"rounds": 1, "measure": "p99_s", "verdict": "best", "best": None, "settings": [row]}
    older = scenario_entry(static=static)
    older["asked"] |= {"static_rounds": 1}
    made = make_profile(scenario=older)
    made.save(tmp_path / "profile.json")
    found = Profile.load(tmp_path / "profile.json")
    assert read(found).text == read(scenario_profile()).text
    print_scenario(found)
    out = capsys.readouterr().out
    assert "Realtime API" in out
    assert "tatic" not in out


# Rules of thumb.


def rules(*results, **changes):
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
    rule = rules(*sweep(10, times))["api"]
    assert rule.state == state
    assert text in rule.result


@pytest.mark.parametrize("name", ["api", "larger"])
def test_a_rule_is_not_judged_by_fewer_than_three_runs(name):
    rule = rules(*[entry(10, [s], batch_size=b) for b, s in ((4, 0.2), (8, 0.1))])[name]
    assert rule.state == "unknown"
    assert rule.result == "not known: n=1; run with --time-limit 300"


def test_a_rule_is_not_judged_where_intervals_overlap():
    wide = [0.1 * (0.7 + 0.1 * i) for i in range(7)]
    found = rules(entry(10, wide, batch_size=4), entry(10, [s * 1.1 for s in wide], batch_size=8))
    assert {found[name].state for name in ("api", "larger")} == {"unknown"}
    assert "intervals overlap" in found["api"].result


def test_offline_is_compared_with_the_best_token_budget_too():
    batches = sweep(100, {8: 1.0, 16: 0.9, 32: 1.1})
    assert rules(*batches)["offline"].result.replace("\u00a0", " ") == "up to 22 % slower here"
    budget = entry(100, [0.5] * 9, token_budget=1024)
    rule = rules(*batches, budget)["offline"]
    assert "1,024 tokens per step is best" in rule.found
    assert "120" in rule.result
    assert rules(*sweep(10, {16: 1.0}))["offline"].state == "unknown"


def test_the_edge_rule_shows_the_memory_of_its_sizes():
    small = [entry(5, [0.2] * 9, batch_size=1, memory=2**28), *sweep(5, {4: 0.2})]
    small += sweep(10, {1: 0.1, 4: 0.3})  # an edge device ranks fewer pairs
    rule = rules(*small)["edge"]
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
    rule = rules(*sweep(50, times))["larger"]
    assert rule.state == state
    assert text in rule.result


def test_half_precision_is_judged_by_its_ranking():
    points = sweep(10, {4: 1.0})
    assert rules(*points)["half"].result == "does not hold for fp16 here"
    assert rules(*points, precisions=PRECISIONS[:2])["half"].state == "holds"
    assert "τ 0.9962" in rules(*points, precisions=PRECISIONS[:2])["half"].found
    assert rules(*points, precisions=PRECISIONS[:1])["half"].state == "unknown"


def test_load_is_reported_only_if_it_was_measured():
    points = sweep(10, {4: 1.0})
    assert rules(*points)["concurrent"].state == rules(*points)["watch"].state == "unknown"
    validated = rules(*points, scenario=scenario_entry())
    assert validated["concurrent"].state == "holds"
    assert "120" in validated["concurrent"].found
    assert "2.40 times the median" in validated["watch"].found
    missed = rules(*points, scenario=scenario_entry(held=False))
    assert missed["concurrent"].state == "costs"
    unmeasured = PREDICTED | {"p50_s": None, "p99_s": None}
    offline = scenario_entry(scenario="offline", measured=unmeasured)
    assert rules(*points, scenario=offline)["watch"].state == "unknown"


def test_an_empty_profile_has_every_rule_unknown():
    assert {rule.state for rule in rules_of_thumb(make_profile((), precisions=[]))} == {"unknown"}
    assert len(rules_of_thumb(make_profile(()))) == 7


def test_the_knee_is_the_smallest_that_keeps_most_of_the_speed():
    points = [m.as_dict() for m in sweep(50, {1: 2.0, 4: 1.05, 8: 1.0, 16: 1.3})]
    assert knee(points)["batch_size"] == 4
    assert knee(points[::2])["batch_size"] == 8
    assert knee([]) is None
