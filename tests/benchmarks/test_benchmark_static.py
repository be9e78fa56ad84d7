"""Static batch sizes beside the chosen settings: ranking, rounds and texts."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from helpers import ROOT
from tuned_models import MIB, goal_of, known_as, load_metrics, row, toy

sys.path.insert(0, str(ROOT / "benchmarks"))

from report_pages import scenario_entry

import static_baselines
from echelon.errors import ModelNotFound
from echelon.profile import Profile
from echelon.scheduling.packing import NO_BUDGET
from echelon.simulation.workload import FixedSize, UniformSize
from echelon.tuning import advisor
from echelon.tuning.advisor import recommend
from echelon.tuning.recommendation import Validation
from echelon.tuning.tuner import TuningPlan
from echelon.tuning.validation import RerankTask
from static_baselines import SIZES, Comparison, measure_rounds, rank_among_static, run_apart
from static_ranking import MeasuredSettings, in_words, ranking


def among(name, chosen, *others, **changes):
    """The ranking of chosen rounds among others' rounds."""
    found = [
        MeasuredSettings(None, chosen),
        *(MeasuredSettings(2**i, rounds) for i, rounds in enumerate(others)),
    ]
    return ranking(goal_of(name, **changes), found)


def slow(*seconds):
    return [load_metrics(p99=one) for one in seconds]


# Ranking.


@pytest.mark.parametrize(
    ("theirs", "verdict", "best", "behind"),
    [((0.11, 0.12), "best", None, 0.0), ((0.098, 0.0985), "within", 1, 0.0178),
     ((0.08, 0.08), "behind", 1, 0.25)],
)  # fmt: skip
def test_the_verdict_is_best_within_or_behind(theirs, verdict, best, behind):
    found = among("api", slow(0.1, 0.1), slow(*theirs))
    assert (found["verdict"], found["best"], found["measure"]) == (verdict, best, "p99_s")
    assert found["behind"] == pytest.approx(behind, abs=1e-4)
    assert found["rounds"] == 2


def test_settings_are_compared_round_by_round():
    # Medians over all rounds would call the static size better: 0.2 against 0.21.
    found = among("api", slow(0.1, 0.21, 0.3), slow(0.11, 0.2, 0.33))
    assert found["verdict"] == "best"
    assert found["settings"][1]["ahead"] == pytest.approx(0.1 / 0.11 - 1)
    assert [found["settings"][1][name] for name in ("low", "value", "high")] == [0.11, 0.2, 0.33]


def test_who_does_not_bear_the_load_is_not_better_by_refusing_it():
    refusing = [load_metrics(p99=0.01, missed=30)] * 2
    found = among("api", slow(0.1, 0.1), refusing)
    assert found["best"] is None
    assert found["settings"][1]["reason"] == "does not bear the load"
    assert found["settings"][1]["ahead"] is None


def test_an_overloaded_choice_is_compared_by_goodput():
    found = among("api", [load_metrics(missed=20)], [load_metrics(missed=0)])
    assert (found["measure"], found["verdict"]) == ("goodput_per_s", "behind")
    assert found["behind"] == pytest.approx(0.25)
    nothing = among("concurrent", [load_metrics(missed=100)], [load_metrics()])
    assert (nothing["verdict"], nothing["behind"], nothing["best"]) == ("behind", None, 1)


def test_concurrent_counts_goodput_until_all_bear_the_load():
    lighter, heavier = slow(0.08), [load_metrics(p99=0.9, missed=40)]
    overloaded = among("concurrent", slow(0.1), lighter, heavier)
    assert (overloaded["measure"], overloaded["verdict"]) == ("goodput_per_s", "best")
    assert overloaded["settings"][0]["value"] == 100 / 20
    assert overloaded["settings"][2]["ahead"] == pytest.approx(-0.4)
    assert among("concurrent", slow(0.1), lighter)["measure"] == "p99_s"


def test_offline_counts_documents():
    found = among(
        "offline",
        [load_metrics(per_s=100.0)],
        [load_metrics(per_s=90.0)],
        [load_metrics(per_s=102.0)],
    )
    assert (found["measure"], found["best"], found["verdict"]) == ("documents_per_s", 2, "within")


def test_edge_counts_memory_among_the_quick_and_then_only_quickness():
    small = [load_metrics(p50=0.05, memory=380.0)]
    tardy = [load_metrics(p50=0.2, memory=300.0)]
    quick = [load_metrics(p50=0.048, memory=500.0)]
    found = among("edge", small, tardy, quick)
    assert (found["measure"], found["verdict"]) == ("memory_bytes", "best")
    assert found["settings"][1]["reason"] == "answers too late"
    found = among("edge", tardy, small)
    assert (found["measure"], found["verdict"]) == ("p50_s", "behind")
    assert found["behind"] == pytest.approx(3.0)


def test_what_may_not_be_had_or_failed_is_not_better():
    found = among("offline", [load_metrics()], [load_metrics(per_s=200.0, memory=900.0)],
                  memory_limit_bytes=500.0 * MIB)  # fmt: skip
    assert found["verdict"] == "best"
    assert "memory" in found["settings"][1]["reason"]
    failed = ranking(
        goal_of("edge"), [MeasuredSettings(None, [load_metrics()]), MeasuredSettings(1, [], "died")]
    )
    assert failed["settings"][1] | {"reason": "died", "value": None} == failed["settings"][1]


# Rounds.


@pytest.fixture(scope="module")
def model(bert):
    return toy(bert)


@pytest.fixture(scope="module")
def known(model):
    return known_as(model, precisions=[row("fp32", 1.0)])


@pytest.fixture
def seen(monkeypatch):
    """What was run, in order: (static size, settings, requests, seed); static 8 always fails."""
    monkeypatch.setattr("echelon.tuning.scenario.REQUESTS", 60)
    monkeypatch.setattr("echelon.tuning.scenario.FULL", 20)
    found = []

    def pretended(context, chosen, requests, _):
        settings = Profile.load(context.profile).settings
        found.append((chosen.max_pairs, settings, requests, context.goal.seed))
        if chosen.max_pairs == 8:
            raise ModelNotFound("static 8 is gone")
        return Validation(load_metrics(), 1.0, 0.0, held=True)

    monkeypatch.setattr(static_baselines, "validate", pretended)
    monkeypatch.setattr(
        advisor, "validate", lambda *_: Validation(load_metrics(), 1.0, 0.0, held=True)
    )
    return found


def comparison(model, known, asked, tmp_path):
    profile = recommend(model, known, asked, TuningPlan()).profile
    return Comparison.of(model, profile, asked, tmp_path / "static.json")


def test_all_settings_are_measured_in_turn_with_the_same_requests(model, known, seen, tmp_path):
    made = comparison(model, known, goal_of("api", verify_s=2.0), tmp_path)
    found = rank_among_static(made, 2)
    assert [one[0] for one in seen] == [None, *SIZES, 32, 16, 4, 2, 1, None]
    first, second = seen[:7], seen[7:]
    for turn in (first, second):
        assert all(one[2:] == turn[0][2:] for one in turn)
    assert first[0][2] != second[0][2]
    chosen = made.profile.settings
    for size, settings, *_ in seen:
        bound = {} if size is None else {"batch_size": size, "token_budget": NO_BUDGET}
        assert settings == replace(chosen, **bound)
    assert [one["static"] for one in found["settings"]] == [None, *SIZES]
    assert "gone" in found["settings"][4]["reason"]


def test_the_chosen_settings_run_as_they_were_chosen(model, known, seen, tmp_path):
    made = comparison(model, known, goal_of("api", verify_s=2.0), tmp_path)
    found, entry = made.chosen(), made.profile.scenario["chosen"]
    assert found.token_budget == entry["token_budget"]
    assert (found.workers, found.threads) == (entry["workers"], entry["threads"])
    assert (found.precision, found.max_length) == (entry["precision"], entry["max_length"])
    with pytest.raises(ValueError, match="no scenario"):
        replace(made, profile=known).chosen()


def test_no_step_is_larger_than_memory_allows(model, known, seen, tmp_path):
    refused = replace(known, learned_token_budget=900)
    measure_rounds(comparison(model, refused, goal_of("api", verify_s=2.0), tmp_path), 1)
    assert {one[1].token_budget for one in seen if one[0]} == {900}


def test_a_failure_of_the_chosen_settings_is_an_error(model, known, seen, tmp_path, monkeypatch):
    def gone(*_):
        raise ModelNotFound("all is gone")

    monkeypatch.setattr(static_baselines, "validate", gone)
    made = comparison(model, known, goal_of("api", verify_s=2.0), tmp_path)
    with pytest.raises(ModelNotFound, match="all is gone"):
        measure_rounds(made, 2)
    assert seen == []


def test_real_rerankers_are_ranked(model, known, monkeypatch, tmp_path):
    monkeypatch.setattr("echelon.tuning.scenario.REQUESTS", 60)
    monkeypatch.setattr("echelon.tuning.scenario.FULL", 20)
    monkeypatch.setattr(static_baselines, "SIZES", (2,))
    asked = goal_of("offline", documents=FixedSize(4), tokens=UniformSize(50, 90), verify_s=0.1)
    made = comparison(model, known, asked, tmp_path)
    found = rank_among_static(made, 1)
    rows = found["settings"]
    assert [one["bears"] for one in rows] == [True, True]
    assert all(one["median"]["memory_bytes"] > 50 * MIB for one in rows)
    validated = made.profile.scenario["measured"]["requests"]
    assert rows[0]["rounds"][0]["requests"] == rows[1]["rounds"][0]["requests"] == validated > 0
    shown = in_words(made.profile.scenario | {"static": found})
    assert [one["name"] for one in shown["rows"]][1] == "Static 2"
    assert "Documents/s" in shown["head"]


def test_a_reranker_apart_says_what_went_wrong(tmp_path):
    task = RerankTask(tmp_path / "none", {"device": "cpu"}, [], [("a", ["b"])], at_once=True)
    with pytest.raises(ModelNotFound):
        run_apart(task)


# Texts.


def words_of(found):
    return in_words(scenario_entry(static=found))


def plain(text):
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("theirs", "good", "said"),
    [
        (0.11, True, "Best: no static batch size is better in P99."),
        (0.098, True, "Within 3 % of the best: 2.0 % behind static 1 in P99."),
        (0.08, False, "25.0 % behind static 1 in P99."),
    ],
)
def test_the_sentence_says_how_far_behind_the_chosen_settings_are(theirs, good, said):
    shown = words_of(among("api", slow(0.1, 0.1), slow(theirs, theirs), slow(0.4, 0.4)))
    assert (plain(shown["verdict"]), shown["good"]) == (said, good)
    rows = shown["rows"]
    assert [one["name"] for one in rows] == [
        "Chosen: 1,024 tokens per step",
        "Static 1",
        "Static 2",
    ]
    assert [one["chosen"] for one in rows] == [True, False, False]
    assert sum(one["best"] for one in rows) == 1
    assert shown["head"][-1] == "Than the chosen"
    assert plain(rows[2]["cells"][-1]) == "75.0 % worse"
    assert "(100 ms – 100 ms)" in plain(rows[0]["cells"][shown["head"].index("P99")])
    assert "Medians of 2 rounds" in shown["note"]


def test_far_better_and_unfit_settings_have_texts():
    far = words_of(among("concurrent", [load_metrics(missed=100)], [load_metrics()]))
    assert far["verdict"] == "Far behind static 1 in goodput."
    assert far["rows"][1]["cells"][-1] == "far better"
    unfit = words_of(among("api", slow(0.1), [load_metrics(missed=50)]))
    assert unfit["rows"][1]["cells"][-1] == "does not bear the load"
    assert "more rounds" in unfit["note"]
