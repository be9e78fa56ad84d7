"""The scenario benchmark: what it asks, merges and writes, around the command it runs."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from helpers import ROOT
from tuned_models import goal_of, load_metrics

sys.path.insert(0, str(ROOT / "benchmarks"))

from report_pages import scenario_profile

import scenarios
from echelon.errors import ModelNotFound
from static_ranking import MeasuredSettings, ranking


@pytest.fixture
def comparisons():
    """Comparisons that were made: (scenario of the profile, what is asked, rounds)."""
    return []


@pytest.fixture
def commands(monkeypatch, comparisons):
    """Commands that were run; each leaves the profile that it would."""
    ran = []

    def pretend(command, *, check):
        assert not check
        ran.append(command)
        values = dict(pairwise(command))
        name = values.get("--scenario")
        made = scenario_profile(scenario=name or "api")
        entry = made.scenario
        if name:
            entry |= {"tried": ["much"], "rounds": ["more"]}
        made.save(values["--profile"])
        return SimpleNamespace(returncode=8 if name == "api" else 0)

    def compared(found, asked, arguments, file):
        assert file.parent.is_dir()
        comparisons.append((found.scenario["scenario"], asked, arguments.rounds))
        measured = [
            MeasuredSettings(None, [load_metrics()]),
            MeasuredSettings(1, [load_metrics(p50=0.09, p99=0.2, per_s=50.0)]),
        ]
        return ranking(goal_of(asked.scenario), measured)

    monkeypatch.setattr(scenarios.subprocess, "run", pretend)
    monkeypatch.setattr(scenarios, "compared", compared)
    return ran


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["scenarios.py", *arguments, "--out", str(folder)])
    scenarios.main()
    return json.loads((folder / "scenarios.json").read_text("utf-8"))


def test_scenarios_are_merged_one_by_one(commands, tmp_path, monkeypatch):
    run(monkeypatch, tmp_path, "--scenarios", "edge,api")
    content = run(monkeypatch, tmp_path, "--scenarios", "offline")
    assert list(content["scenarios"]) == ["api", "offline", "edge"]
    assert "--scenarios offline" in content["command"]
    assert "--scenarios edge,api" in content["scenarios"]["api"]["command"]
    assert all(not {"tried", "rounds"} & set(one["entry"]) for one in content["scenarios"].values())
    assert len(commands) == 5  # each run tunes first
    text = (tmp_path / "scenarios.md").read_text("utf-8")
    assert "| Offline reranking | 1,024 tokens per step, bf16 | documents_per_s | Best" in text
    assert "| **Chosen: 1,024 tokens per step** (best) |" in text
    other = run(monkeypatch, tmp_path, "--scenarios", "edge", "--model", "another")
    assert list(other["scenarios"]) == ["edge"]


@pytest.mark.parametrize("name", scenarios.LOADS)
def test_the_flags_of_each_scenario_are_accepted(
    name, commands, comparisons, tmp_path, monkeypatch
):
    found = run(monkeypatch, tmp_path, "--scenarios", name, "--rounds", "2")
    words = shlex.split(found["scenarios"][name]["tune"])
    assert words[:3] == ["echelon", "tune", "demo"]
    numeric = {"--slo-p99-ms": float, "--rate": float, "--verify-s": float}
    pairs = zip(words[3::2], words[4::2], strict=True)
    given = {flag: numeric.get(flag, str)(value) for flag, value in pairs}
    names = ("trace", "memory_limit", "allow", *scenarios.LOADS["api"], "verify_s")
    values = {one.removeprefix("--").replace("-", "_"): None for one in names}
    values |= {flag[2:].replace("-", "_"): value for flag, value in given.items()}
    asked = scenarios.scenario_goal(values)
    assert comparisons == [(name, asked, 2)]
    assert (asked.scenario, asked.verify_s > 0) == (name, True)


def test_settings_without_validation_are_not_compared(monkeypatch, tmp_path):
    def unvalidated(command, *, check):
        values = dict(pairwise(command))
        scenario_profile(held=None, measured=None).save(values["--profile"])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scenarios.subprocess, "run", unvalidated)
    with pytest.raises(SystemExit, match="api: nothing was validated"):
        run(monkeypatch, tmp_path, "--scenarios", "api")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_comparison_is_reported(commands, monkeypatch, tmp_path):
    def gone(*_):
        raise ModelNotFound("all is gone")

    monkeypatch.setattr(scenarios, "compared", gone)
    with pytest.raises(SystemExit, match=r"api: nothing was compared\. all is gone"):
        run(monkeypatch, tmp_path, "--scenarios", "api")


def test_an_unknown_scenario_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, "--scenarios", "batch")
    assert not list(tmp_path.iterdir())
