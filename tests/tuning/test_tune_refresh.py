"""``echelon tune --refresh``: what is out of date is measured, the rest is kept and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count

import pytest
from click.testing import CliRunner
from helpers import offer
from tuned_models import known_as, toy

from echelon import cli
from echelon.models.base import DeviceOutOfMemory
from echelon.options import Options
from echelon.profile import Profile
from echelon.scheduling.fit import CostFit
from echelon.tuning import refresh, tuner
from echelon.tuning.load import nothing_known
from echelon.tuning.time_plan import MEMORY
from echelon.tuning.tuner import TuningPlan

pytestmark = pytest.mark.device

QUICK = TuningPlan(pairs=(4,), batch_sizes=(1, 4), token_budgets=(64, 256))
SHORT = Options(max_length=100, precision="fp32", threads=1)


def clock():
    """Ticks evenly: every step takes a thousandth."""
    return count(step=0.001).__next__


@pytest.fixture
def offered(bert, monkeypatch):
    """The toy BERT's folder; its model is a fake one."""
    offer(monkeypatch, "fp32")
    return bert


@pytest.fixture(scope="module")
def tuned(bert):
    """A profile of the fake model."""
    with pytest.MonkeyPatch.context() as patch:
        offer(patch, "fp32")
        return tuner.tune(bert, SHORT, QUICK, clock=clock(), watch=nothing_known)


@pytest.fixture
def calls(monkeypatch):
    """The measurements that are made, ``sweep`` and ``calibrate``, in order."""
    heard = []
    for name in ("sweep", "calibrate"):
        real = getattr(tuner, name)

        def spy(*args, _name=name, _real=real, **kwargs):
            heard.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(tuner, name, spy)
    return heard


def run(model, old):
    return refresh.refresh(model, SHORT, QUICK, old, clock=clock())


def with_coefficients(profile, factor, **changes):
    """The profile, as a machine of another speed would have it."""
    cost = json.loads(json.dumps(profile.cost)) | changes
    for name in ("base_s", "token_s", "square_s", "beyond_s"):
        cost["coefficients"][name] *= factor
    return replace(profile, cost=cost)


def test_a_fresh_profile_is_kept_whole(tuned, offered, calls):
    fresh = run(offered, tuned)
    assert fresh.profile == tuned
    assert fresh.measured == []
    assert len(fresh.kept) == 2
    assert calls == []


@pytest.mark.parametrize(
    ("old", "why"),
    [
        (lambda tuned: replace(tuned, cost=None), "there was none"),
        (lambda tuned: replace(tuned, cost={"paid": 3}), "cannot be read"),
        (
            lambda tuned: with_coefficients(tuned, 1, measured="2020-01-01T00:00:00+00:00"),
            "days old",
        ),
    ],
)
def test_a_cost_model_that_is_not_there_or_old_is_measured_alone(tuned, offered, calls, old, why):
    stale = replace(old(tuned), warnings=["a note", "noisy: `echelon tune --refresh`"])
    fresh = run(offered, stale)
    assert calls == ["calibrate"]
    assert why in fresh.measured[0]
    assert CostFit.from_dict(fresh.profile.cost).coefficients.base_s == pytest.approx(1e-3)
    assert fresh.profile.points == tuned.points
    assert fresh.profile.warnings == ["a note"]
    assert any("sweep" in line for line in fresh.kept)


def test_memory_is_measured_anew_within_its_share_of_the_time(tuned, offered, monkeypatch):
    limits, real = [], refresh.models_of

    def limited(probed, factory, limit_s):
        limits.append(limit_s)
        return real(probed, factory, limit_s)

    monkeypatch.setattr(refresh, "models_of", limited)
    run(offered, replace(tuned, cost=None))
    assert limits == [MEMORY * QUICK.time_limit_s]


def test_on_a_machine_of_another_speed_all_times_are_measured_and_no_ranking(tuned, offered, calls):
    known = [{"precision": "fp32", "tokens_per_s": 1.0, "passed": True}]
    fresh = run(offered, replace(with_coefficients(tuned, 2.0), precisions=known))
    assert calls == ["sweep", "calibrate"]
    assert "no longer take as long" in fresh.measured[0]
    assert fresh.profile.precisions == known
    assert CostFit.from_dict(fresh.profile.cost).coefficients.base_s == pytest.approx(1e-3)


def test_another_device_or_version_means_everything(tuned, offered, calls):
    key = replace(tuned.key, versions={"torch": "1.0"})
    fresh = run(offered, replace(tuned, key=key, learned_token_budget=70))
    assert calls == ["sweep", "calibrate"]
    assert "torch was 1.0" in fresh.measured[0]
    assert fresh.kept == []
    assert fresh.profile.learned_token_budget is None


def test_a_profile_of_a_precision_that_is_not_there_means_everything(tuned, offered, calls):
    key = replace(tuned.key, precision="int8")
    fresh = run(offered, replace(tuned, key=key))
    assert calls == ["sweep", "calibrate"]
    assert fresh.measured == ["everything: this machine has no fast int8"]
    assert fresh.profile.key.precision == "fp32"


@pytest.mark.parametrize("fits", [True, False])
def test_a_learned_budget_is_forgotten_where_the_full_one_fits(tuned, offered, fits, monkeypatch):
    if not fits:

        def full(self, tokens):
            assert tokens == tuned.settings.token_budget
            return False

        monkeypatch.setattr(refresh._OpenModel, "fits", full)
    fresh = run(offered, replace(tuned, learned_token_budget=50))
    assert fresh.profile.learned_token_budget == (None if fits else 50)
    assert ("50" in " ".join(fresh.measured)) == fits
    assert ("50" in " ".join(fresh.kept)) == (not fits)


def test_what_does_not_fit_does_not_fit():
    class Full:
        def score(self, batch):
            raise DeviceOutOfMemory

    class Steps:
        longest = 10

        def batch(self, lengths):
            assert lengths == (10,) * 5

    model = refresh._OpenModel(None, Full(), None, Steps(), None)
    assert not model.fits(50)


def test_the_command_says_what_it_did_and_writes_the_profile(tuned, bert, tmp_path, monkeypatch):
    path, report = tmp_path / "p.json", tmp_path / "r.html"
    replace(tuned, key=known_as(toy(bert)).key, cost=None).save(path)
    asked = ["tune", str(bert), "--refresh", "--profile", str(path), "--report", str(report)]
    real = refresh.refresh
    monkeypatch.setattr(refresh, "refresh", lambda *a, **k: real(*a, clock=clock(), **k))
    done = CliRunner().invoke(cli.cli, [*asked, "--max-length", "100"])
    assert done.exit_code == 0, done.output
    assert "Measured: the cost model: there was none." in done.stderr
    assert "Kept: " in done.stderr
    assert Profile.load(path).cost is not None
    assert report.is_file()
    missing = CliRunner().invoke(cli.cli, ["tune", str(bert), "--refresh", "--profile", "nowhere"])
    assert "no such profile" in str(missing.exception)
