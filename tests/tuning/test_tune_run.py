"""Whole tuning runs on a tiny model: what comes out, interruption, resumption, a full disk."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import count

import pytest
from helpers import offer

from echelon import Reranker
from echelon import profile as profiles
from echelon.engine import precision_check
from echelon.errors import EchelonWarning, InvalidInput, ProfileError, StorageError
from echelon.messages import stored
from echelon.models.base import DeviceOutOfMemory, FakeScorer
from echelon.options import Options
from echelon.profile import Profile, apply_profile
from echelon.reports.statistics import MIN_RUNS
from echelon.tuning import saved_run, tuner
from echelon.tuning.calls import TimedCalls
from echelon.tuning.load import nothing_known
from echelon.tuning.tuner import TuningPlan

pytestmark = pytest.mark.device

QUICK = TuningPlan(pairs=(4, 8), batch_sizes=(1, 4), token_budgets=(64, 256))
SHORT = Options(max_length=100)


def tune(model, options, plan):
    """Tune by a clock that ticks evenly, so that three runs of a point are always enough."""
    clock = count(step=0.001).__next__
    return tuner.tune(model, options, plan, clock=clock, watch=nothing_known)


@pytest.fixture(scope="module")
def tuned(bert):
    """One quick tuning run of a real model."""
    return tune(bert, SHORT, QUICK)


@pytest.fixture
def offered(bert, monkeypatch):
    """The toy BERT's folder; its model is a fake one in fp32 and bf16."""
    offer(monkeypatch, "fp32", "bf16")
    return bert


def test_a_run_measures_every_point_and_chooses_among_them(tuned, bert):
    assert {(p["pairs"], p["batch_size"], p["token_budget"]) for p in tuned.points} == {
        (4, 1, None),
        (4, 4, None),
        (8, 1, None),
        (8, 4, None),
        (8, None, 64),
        (8, None, 256),
    }
    assert all(p["status"] == "ok" and p["samples"] == MIN_RUNS for p in tuned.points)
    assert all(p["padding_share"] == 0 for p in tuned.points)
    assert all(p["peak_bytes"] > 1 << 20 for p in tuned.points)
    assert tuned.settings.token_budget in {64, 256}
    assert tuned.settings.max_length == 100
    assert [entry["pairs"] for entry in tuned.best] == [4, 8]
    assert {s["name"] for s in tuned.situations} == {"api", "offline", "edge", "concurrent"}
    assert tuned.key.model == bert.name


def test_steps_and_tokens_are_those_of_the_point(tuned):
    found = {(p["pairs"], p["batch_size"]): p for p in tuned.points if p["batch_size"]}
    assert found[8, 1]["steps"] == 8
    assert found[8, 4]["steps"] == 2
    assert found[8, 1]["tokens"] == found[8, 4]["tokens"] > 8 * 4


def test_auto_precision_is_compared_with_fp32_and_the_fastest_that_passes_is_taken(
    bert, monkeypatch
):
    offer(monkeypatch, "fp32", "bf16", "int8")
    found = tune(bert, SHORT, QUICK)
    assert [row["precision"] for row in found.precisions] == ["fp32", "bf16", "int8"]
    first = found.precisions[0]
    assert (first["tau"], first["max_delta"]) == (1.0, 0.0)
    passed = {row["precision"]: row["tokens_per_s"] for row in found.precisions if row["passed"]}
    assert found.settings.precision == max(passed, key=passed.get)


def test_a_precision_that_ranks_differently_is_not_chosen(offered, monkeypatch):
    real = precision_check.agreement

    def spoiled(reference, candidate, grades):
        verdict = real(reference, candidate, grades)
        return (
            verdict
            if candidate is reference
            else replace(verdict, tau=0.5, tau_low=0.4, tau_high=0.6)
        )

    monkeypatch.setattr(precision_check, "agreement", spoiled)
    found = tune(offered, SHORT, QUICK)
    assert [row["passed"] for row in found.precisions] == [True, False]
    assert found.settings.precision == found.key.precision == "fp32"


def test_an_asked_precision_is_taken_without_comparison(offered):
    found = tune(offered, replace(SHORT, precision="fp32"), QUICK)
    assert found.precisions == []
    assert found.settings.precision == "fp32"


def test_out_of_memory_is_recorded_and_larger_steps_are_skipped(offered, monkeypatch):
    real = FakeScorer.score

    def small(self, batch):
        if len(batch) >= 2:
            raise DeviceOutOfMemory("pretend memory is full")
        return real(self, batch)

    monkeypatch.setattr(FakeScorer, "score", small)
    plan = replace(QUICK, batch_sizes=(1, 2, 4), token_budgets=())
    found = tune(offered, replace(SHORT, precision="fp32"), plan)
    status = {(p["pairs"], p["batch_size"]): p["status"] for p in found.points}
    assert status == {
        (4, 1): "ok",
        (4, 2): "out_of_memory",
        (4, 4): "skipped",
        (8, 1): "ok",
        (8, 2): "out_of_memory",
        (8, 4): "skipped",
    }
    assert found.settings.batch_size == 1
    assert any("out of memory" in warning for warning in found.warnings)


def test_an_interrupted_run_is_kept_and_resumed(offered, tmp_path, monkeypatch):
    partial = tmp_path / "p.partial.json"
    plan = replace(QUICK, partial=partial)
    trials = []
    real = TimedCalls.__call__

    def counted(self, point):
        trials.append(point)
        if len(trials) == 15:
            raise KeyboardInterrupt
        return real(self, point)

    monkeypatch.setattr(TimedCalls, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        tune(offered, SHORT, plan)
    kept = json.loads(partial.read_text())
    assert sum(len(p.get("seconds", [])) for p in kept["points"]) == 8
    monkeypatch.setattr(tuner, "compare_in_time", lambda *_: pytest.fail("measured again"))
    found = tune(offered, SHORT, plan)
    for before, after in zip(kept["points"], found.points, strict=True):
        seconds = before.get("seconds", [])
        assert after["seconds"][: len(seconds)] == seconds


def test_a_run_interrupted_at_its_end_measures_nothing_again(offered, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    plan = replace(QUICK, partial=tmp_path / "p.partial.json")
    with monkeypatch.context() as patch:
        patch.setattr(tuner, "models_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(offered, SHORT, plan)
    for name in ("compare_in_time", "compare_threads", "calibrate"):
        monkeypatch.setattr(tuner, name, lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(TimedCalls, "__call__", lambda *_: pytest.fail("measured again"))
    found = tune(offered, SHORT, plan)
    assert all(p["status"] == "ok" for p in found.points)
    assert found.cost is not None


def test_a_short_time_predicts_points_and_names_the_stages_left_out(bert, monkeypatch):
    offer(monkeypatch, "fp32", "bf16")
    monkeypatch.setattr("echelon.tuning.first_stages.usable_cpus", lambda: 4)
    clock = count(step=0.001).__next__
    plan = replace(QUICK, time_limit_s=0.15)
    found = tuner.tune(bert, SHORT, plan, clock=clock, watch=nothing_known)
    assert clock() < 0.15 * 1.2
    said = " ".join(found.warnings)
    for words in ("Precisions were not compared", "Thread counts were not", "were predicted"):
        assert words in said
    predicted = [p for p in found.points if p["status"] == "predicted"]
    assert predicted
    for point in predicted:
        assert "latency_s" not in point
        low, high = (point["predicted_s"][end] for end in ("low", "high"))
        assert 0 < low <= point["predicted_s"]["median"] <= high
    assert found.settings.token_budget in {64, 256}
    assert found.data["measuring"]["text"].startswith("A pair takes about")


def test_where_no_point_is_affordable_all_are_predicted(offered):
    clock = count(step=0.001).__next__
    plan = replace(QUICK, pairs=(200, 400), time_limit_s=0.15)
    found = tuner.tune(offered, SHORT, plan, clock=clock, watch=nothing_known)
    assert {p["status"] for p in found.points} == {"predicted"}
    assert found.cost is not None
    assert not any(entry["certain"] for entry in found.situations)
    said = found.data["measuring"]["text"]
    assert "0.150 s are too short" in said
    enough = int(re.search(r"--time-limit (\d+)", said)[1])
    longer = tuner.tune(
        offered,
        SHORT,
        replace(plan, time_limit_s=enough),
        clock=count(step=0.001).__next__,
        watch=nothing_known,
    )
    assert "ok" in {p["status"] for p in longer.points}


@pytest.mark.parametrize("limit_s", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_is_a_finite_number_above_zero(limit_s):
    with pytest.raises(InvalidInput, match="is not a finite number above 0"):
        tuner.TuningPlan(time_limit_s=limit_s)


def test_a_limit_that_is_too_short_for_anything_is_refused_with_one_that_is_not(offered):
    clock = count(step=0.001).__next__
    with pytest.raises(InvalidInput, match=r"time_limit: .* is too short: .* Give at least 1\."):
        tuner.tune(offered, SHORT, replace(QUICK, time_limit_s=0.01), clock=clock)


@pytest.mark.parametrize("damage", ["{", '{"question": 1}', "[]", ""])
def test_a_damaged_or_foreign_partial_file_is_measured_over(offered, tmp_path, damage):
    partial = tmp_path / "p.partial.json"
    partial.write_text(damage)
    found = tune(offered, replace(SHORT, precision="fp32"), replace(QUICK, partial=partial))
    assert all(p["status"] == "ok" for p in found.points)


def test_other_options_do_not_resume_a_run(offered, tmp_path):
    partial = tmp_path / "p.partial.json"
    options = replace(SHORT, precision="fp32")
    tune(offered, options, replace(QUICK, partial=partial))
    before = json.loads(partial.read_text())
    tune(offered, replace(options, max_length=50), replace(QUICK, partial=partial))
    after = json.loads(partial.read_text())
    assert before["points"][0]["tokens"] != after["points"][0]["tokens"]


def test_a_full_disk_costs_the_safety_net_and_not_the_run(offered, tmp_path, monkeypatch):
    def full(path, content):
        raise StorageError(f"{path}: cannot be written (No space left on device).")

    monkeypatch.setattr(saved_run, "write_json", full)
    plan = replace(QUICK, partial=tmp_path / "p.json")
    with pytest.warns(EchelonWarning, match="No space left") as warned:
        found = tune(offered, replace(SHORT, precision="fp32"), plan)
    assert len(warned) == 1
    assert found.points


@pytest.mark.parametrize(
    "bad",
    [{"pairs": ()}, {"pairs": (0,)}, {"batch_sizes": (1, -2)}, {"time_limit_s": 0.0}],
)
def test_a_senseless_plan_is_refused(bad):
    with pytest.raises(InvalidInput):
        TuningPlan(**bad)


def test_saving_to_a_full_disk_keeps_the_old_profile(tuned, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    tuned.save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiles.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        replace(tuned, created="later").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_profile_survives_the_round_trip(tuned, tmp_path):
    path = tmp_path / "profile.json"
    tuned.save(path)
    assert Profile.load(path) == tuned
    assert json.loads(path.read_text()) == stored(tuned.as_dict())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "not an Echelon profile"),
        ("{}", "not an Echelon profile"),
        ('{"schema": 99}', "version 99"),
        ('{"schema": 1}', "incomplete"),
        ('{"schema": 1, "key": {}, "settings": {}, "created": ""}', "incomplete"),
    ],
)
def test_a_bad_profile_is_refused_with_the_remedy(tmp_path, content, said):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=said) as caught:
        Profile.load(path)
    assert "echelon tune" in str(caught.value)


def test_a_reranker_uses_the_profile_and_scores_the_same(tuned, bert, tmp_path):
    path = tmp_path / "profile.json"
    replace(tuned, settings=replace(tuned.settings, precision="fp32")).save(path)
    pairs = [("replace the belt", f"washing machine {i}") for i in range(9)]
    # The key's precision no longer is the setting's when the machine chose bf16.
    fresh = tuned.key.precision == "fp32"
    with Reranker(bert, precision="fp32") as plain:
        expected = plain.score(pairs)
    if fresh:
        reranker = Reranker(bert, profile=path)
    else:
        with pytest.warns(EchelonWarning, match="stale: precision"):
            reranker = Reranker(bert, profile=path)
    with reranker:
        assert reranker.token_budget == tuned.settings.token_budget
        assert reranker.max_length == 100
        assert abs(reranker.score(pairs) - expected).max() <= 1e-4


def test_what_the_user_says_beats_the_profile(tuned):
    asked = Options(precision="fp32", max_length=50, batch_size=3, threads=1)
    assert apply_profile(asked, tuned) == asked
    open_ = apply_profile(Options(), tuned)
    assert open_.token_budget == tuned.settings.token_budget
    assert open_.precision == tuned.settings.precision
    assert open_.max_length == 100


def test_a_stale_profile_warns_with_the_difference_and_the_remedy(tuned, bert, tmp_path):
    path = tmp_path / "profile.json"
    stale = replace(tuned.key, revision="older", versions={"torch": "1.0"})
    replace(tuned, key=stale).save(path)
    with pytest.warns(EchelonWarning, match="revision was older") as warned:
        Reranker(bert, profile=path).close()
    assert "echelon tune" in str(warned[0].message)
    assert "torch was 1.0" in str(warned[0].message)


def test_a_budget_that_memory_taught_goes_into_the_profile(tuned, tmp_path):
    path = tmp_path / "profile.json"
    tuned.save(path)
    profiles.remember_budget(path, 33)
    assert Profile.load(path).learned_token_budget == 33
    assert apply_profile(Options(), Profile.load(path)).token_budget == 33
    profiles.remember_budget(None, 33)
    with pytest.warns(EchelonWarning, match="33"):
        profiles.remember_budget(tmp_path / "nowhere.json", 33)


def test_time_that_the_planned_points_leave_measures_the_others(offered, monkeypatch):
    real = tuner.affordable
    monkeypatch.setattr(tuner, "affordable", lambda *a, **more: real(*a, **more)[:1])
    found = tune(offered, replace(SHORT, precision="fp32"), QUICK)
    assert all(p["status"] == "ok" and p["samples"] >= MIN_RUNS for p in found.points)
