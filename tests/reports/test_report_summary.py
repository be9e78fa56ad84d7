"""The recommendation in words: the report's summary, and the commands."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_pages import (
    PREDICTED,
    leave_plotly_out,
    make_profile,
    read,
    scenario_entry,
    scenario_profile,
)

from echelon.profile import Profile
from echelon.reports.tables import print_scenario
from echelon.reports.wording import command, deviation, scenario_summary

quick = pytest.fixture(leave_plotly_out, autouse=True)


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
    shorter = replace(
        scenario_profile(), settings=replace(scenario_profile().settings, max_length=256)
    )
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
