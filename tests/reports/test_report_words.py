"""The report's commands can be typed, and its numbers are for people."""

import ast
import math
import shlex
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import entry, make_profile

from echelon.messages import units
from echelon.options import Options
from echelon.reports import tuning_report, wording

# Commands that can be typed.


def params_of(command, line):
    from echelon import cli

    parts = shlex.split(line)
    assert parts[:2] == ["echelon", command]
    return getattr(cli, command).make_context(command, parts[2:]).params


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
    assert params["batch_sizes"] == (1, 8, 16, 32)
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
