"""Whole recommendations on a tiny model: command, real server, corrections, missed goals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
from helpers import run_command
from tuned_models import MIB, api_goal, known_as, pretend_validations, toy

from echelon.errors import GoalMissed, InvalidInput, ModelNotFound
from echelon.profile import Profile
from echelon.reports.tables import print_scenario
from echelon.simulation.workload import FixedSize, UniformSize
from echelon.tuning import advisor
from echelon.tuning.advisor import recommend
from echelon.tuning.goal import ScenarioGoal
from echelon.tuning.time_plan import MEMORY
from echelon.tuning.tuner import TuningPlan
from echelon.tuning.validation import RerankTask, run, validate

QUICK = ("--pairs=4", "--batch-sizes=2", "--token-budgets=256,512", "--time-limit=1")
CPU = ("--precision", "fp32", "--device", "cpu", "--threads", 1)
SLOW_S = 600.0
"""A goal that no machine misses, however busy."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("echelon.tuning.scenario.REQUESTS", 60)
    monkeypatch.setattr("echelon.tuning.scenario.FULL", 20)


@pytest.fixture
def call(capsys, monkeypatch):
    """The command in this process: (exit code, output, error output)."""

    return partial(run_command, capsys, monkeypatch)


@pytest.fixture(scope="module")
def model(bert):
    return toy(bert)


@pytest.fixture(scope="module")
def known(model):
    return known_as(model, precisions=[])


def test_the_real_server_validates_what_the_command_chose(bert, tmp_path, call):
    paths = ("--profile", tmp_path / "p.json", "--report", tmp_path / "r.html")
    asked = ("--scenario", "api", "--slo-p99-ms", 1000 * SLOW_S, "--rate", 20, "--documents", "1-3")
    code, out, err = call("tune", bert, *QUICK, *paths, *asked, *CPU, "--verify-s", 1)
    assert code == 0, err
    for words in ("Realtime API: 20.0 requests/s", "Predicted", "Measured", "P99", "Validated"):
        assert words in out
    found = Profile.load(tmp_path / "p.json")
    entry = found.scenario
    assert entry["schema"] == 1
    assert entry["held"] is True
    assert entry["measured"]["requests"] == entry["predicted"]["requests"] > 5
    assert entry["measured"]["p99_s"] >= entry["measured"]["p50_s"] > 0
    assert entry["measured"]["memory_bytes"] > 50 * MIB
    assert entry["measured"]["missed"] == 0
    assert found.settings.token_budget == entry["chosen"]["token_budget"]
    assert {one["token_budget"] for one in entry["tried"]} >= {256, 512}
    assert entry["rounds"][0]["pace"] > 0
    assert entry["rounds"][0]["measured_overhead_s"] > 0
    assert entry["curve"]["rate"] == 20
    assert entry["curve"]["most_rate"] >= entry["curve"]["points"][0]["rate"] > 0
    html = (tmp_path / "r.html").read_text("utf-8")
    assert "Realtime API" in html
    assert "Latency over load" in html
    assert "echelon</span> <span>serve" in html


@pytest.mark.parametrize("name", ["edge", "offline"])
def test_the_real_reranker_validates_edge_and_offline(name, model, known, capsys):
    goal = ScenarioGoal(name, documents=FixedSize(4), tokens=UniformSize(50, 90), verify_s=0.1)
    found = recommend(model, known, goal, TuningPlan()).profile
    entry = found.scenario
    assert entry["held"] is True
    assert entry["measured"]["documents_per_s"] > 0
    assert entry["measured"]["memory_bytes"] > 50 * MIB
    assert (entry["measured"]["p50_s"] is None) == (name == "offline")
    assert entry["accuracy"]["tau"] == 1.0
    print_scenario(found)
    assert "Documents/s" in capsys.readouterr().out
    assert Profile.from_dict(json.loads(json.dumps(found.as_dict())), "p") == found


def test_a_recommendation_without_validation_says_so(model, known):
    advice = recommend(model, known, api_goal(verify_s=0.0), TuningPlan())
    entry = advice.profile.scenario
    assert advice.missed is None
    assert (entry["measured"], entry["held"], entry["agrees"]) == (None, None, None)
    assert entry["predicted"]["requests"] > 50
    assert "Nothing was validated" in entry["notes"][0]


def test_one_validation_is_enough_where_it_agrees(model, known, monkeypatch):
    seen = pretend_validations(monkeypatch, 1.1)
    found = recommend(model, known, api_goal(), TuningPlan()).profile
    ((chosen, validated),) = seen
    assert validated == found.settings
    assert validated.token_budget == chosen.token_budget
    assert found.scenario["agrees"]
    assert len(found.scenario["rounds"]) == 1
    assert found.key == known.key


def test_a_deviation_corrects_the_models_and_validates_again(model, known, monkeypatch):
    seen = pretend_validations(monkeypatch, 2.0, 1.0)
    entry = recommend(model, known, api_goal(), TuningPlan()).profile.scenario
    first, second = (chosen.cost.predict((60,) * 5) for chosen, _ in seen)
    assert second == pytest.approx(2 * first)
    assert [one["agrees"] for one in entry["rounds"]] == [False, True]
    assert entry["agrees"]
    assert "Validation 1 differs from its prediction: P50" in entry["notes"][0]
    assert any("chosen and validated again" in note for note in entry["notes"])


def test_the_models_are_corrected_only_once(model, known, monkeypatch):
    seen = pretend_validations(monkeypatch, 2.0, 2.0, 2.0)
    entry = recommend(model, known, api_goal(), TuningPlan()).profile.scenario
    assert len(seen) == 2
    assert not entry["agrees"]
    assert [note for note in entry["notes"] if "Validation" not in note][1].startswith(
        "Trust the meas"
    )


def test_a_goal_missed_in_validation_is_an_error_with_the_profile(model, known, monkeypatch):
    pretend_validations(monkeypatch, 1.0, 1.0, held=False)
    advice = recommend(model, known, api_goal(), TuningPlan())
    assert isinstance(advice.missed, GoalMissed)
    assert "the goal is 500 ms" in str(advice.missed).replace("\u00a0", " ")
    assert advice.profile.scenario["held"] is False
    assert len(advice.profile.scenario["rounds"]) == 2


def test_a_correction_that_leaves_nothing_keeps_the_first_choice(model, known, monkeypatch):
    pretend_validations(monkeypatch, 10.0)
    entry = recommend(model, known, api_goal(goal_s=0.06), TuningPlan()).profile.scenario
    assert len(entry["rounds"]) == 1
    assert "no other setting can be chosen" in entry["notes"][-1]


def test_an_impossible_rate_is_refused_with_the_possible_one(model, known):
    with pytest.raises(InvalidInput, match="Possible are") as caught:
        recommend(model, known, api_goal(rate=5000.0), TuningPlan())
    assert caught.value.field == "--rate"


def test_an_earlier_recommendation_does_not_limit_a_new_one(model, known, monkeypatch):
    pretend_validations(monkeypatch, 1.0)
    cut = replace(known, settings=replace(known.settings, max_length=40), scenario={"schema": 1})
    found = recommend(model, cut, api_goal(), TuningPlan()).profile
    assert found.settings.max_length is None
    assert found.scenario["asked"]["max_length"] is None


def test_a_precision_is_measured_before_it_is_taken(model, known, monkeypatch):
    row = {"tau": 1.0, "overlap": 1.0, "ndcg_loss": None, "passed": True}
    rows = [{"precision": "fp32", "tokens_per_s": 50.0, **row},
            {"precision": "bf16", "tokens_per_s": 500.0, **row}]  # fmt: skip
    asked = []
    real = advisor.models_of

    def noisy(probed, opener, limit_s):
        asked.append(probed.info.precision)
        assert limit_s == MEMORY * 0.2
        return replace(real(probed, opener, limit_s), cost=None, memory=None)

    monkeypatch.setattr(advisor, "models_of", noisy)
    goal = api_goal(verify_s=0.0, allow=("precision",))
    plan = TuningPlan(token_budgets=(256,), time_limit_s=0.2)
    found = recommend(model, replace(known, precisions=rows), goal, plan).profile
    assert asked == ["bf16"]
    assert found.settings.precision == found.key.precision == "bf16"
    assert any("too noisy" in note for note in found.scenario["notes"])
    assert any("scenario uses bf16" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rate", 5), "--rate: is for --scenario"),
        (("--verify-s", 0), "--verify-s: is for --scenario"),
        (("--scenario", "api", "--rate", 5), "--slo-p99-ms: is not given"),
        (("--scenario", "edge", "--documents", "0"), "--documents"),
        (("--scenario", "edge", "--trace", "/no/such"), "--trace"),
        (("--scenario", "edge", "--allow", "speed"), "--allow: 'speed' is unknown"),
        (("--scenario", "batch"), "'batch' is not one of"),
    ],
)
def test_wrong_options_end_before_anything_is_measured(options, said, call, tmp_path):
    code, out, err = call("tune", tmp_path / "no-model", *options)
    assert (code, out) == (2, "")
    assert said in err


def test_an_impossible_goal_still_leaves_the_profile(bert, tmp_path, call):
    paths = ("--profile", tmp_path / "p.json", "--report", tmp_path / "r.html")
    asked = ("--scenario", "api", "--slo-p99-ms", 500, "--rate", 1e6, "--verify-s", 0)
    code, _, err = call("tune", bert, *QUICK, *paths, *asked, *CPU, "--quiet")
    assert code == 2
    assert "Possible are" in err
    assert Profile.load(tmp_path / "p.json").scenario is None
    assert (tmp_path / "r.html").exists()


def test_the_validation_is_the_real_one():
    assert advisor.validate is validate


def test_a_reranker_says_what_went_wrong(tmp_path):
    task = RerankTask(tmp_path / "none", {"device": "cpu"}, [], [("a", ["b"])], at_once=True)
    with pytest.raises(ModelNotFound):
        run(task)


@pytest.mark.parametrize(("within_s", "count"), [(None, 3), (1e-9, 1)])
def test_calls_are_made_while_there_is_time(bert, within_s, count):
    texts = [("a kettle", ["an old stove", "a ferry"])] * 3
    reports = []
    task = RerankTask(bert, {"device": "cpu"}, texts[:1], texts, at_once=False, within_s=within_s)
    ran = run(task, lambda *report: reports.append(report))
    assert len(ran.waits) == len(reports) - 1 == count
    assert ran.whole_s == sum(ran.waits) > 0
    assert reports[-1] == ("reranking", 1.0, 1.0)
