"""Opened toy models, profiles as if they had been tuned, goals and pretended validations."""

from __future__ import annotations

from dataclasses import replace

from echelon.options import Options
from echelon.profile import Profile, ProfileKey, TunedSettings, current_key
from echelon.scheduling.cost_model import Coefficients
from echelon.tuning import advisor
from echelon.tuning.goal import ScenarioGoal, ScenarioLimits
from echelon.tuning.recommendation import LoadMetrics, Validation
from echelon.tuning.scenario import predict
from echelon.tuning.scenario_model import open_for_scenario

MIB = 2**20


COEFFICIENTS = Coefficients(2e-3, 5e-5, 4e-8)


def row(precision, tau=0.99, speed=100.0, *, passed=True):
    return {
        "precision": precision,
        "tokens_per_s": speed,
        "tau": tau,
        "overlap": 1.0,
        "ndcg_loss": None,
        "passed": passed,
    }


def toy(folder):
    """A toy model, opened for the scenario ``edge``."""
    return open_for_scenario(
        folder, Options(device="cpu", threads=1, precision="fp32"), None, ScenarioGoal("edge")
    )


def known_as(model, **changes):
    """A profile of the model, as if it had been measured."""
    scorer = model.check.open("fp32")
    try:
        folder = model.check.folder
        key = current_key(folder.name, folder.revision, scorer.info)
    finally:
        scorer.close()
    settings = replace(profile().settings, precision="fp32", threads=1)
    return profile(key=key, settings=settings, **changes)


def profile(**changes):
    error = {"median": 0.01, "p90": 0.02, "shapes": 9}
    cost = {"base_s": 2e-3, "token_s": 5e-5, "square_s": 4e-8, "knee_tokens": 0, "beyond_s": 0.0}
    made = Profile(
        ProfileKey("toy", "r", "cpu", "a CPU", "bf16", {}),
        TunedSettings("bf16", 700, None, 2, None),
        "2026-01-01T00:00:00+00:00",
        data={"tokens": {"mean": 60.0, "p50": 50.0, "p90": 100.0, "max": 130}},
        precisions=[row("fp32", 1.0, 50.0), row("bf16"), row("int8", 0.9, passed=False)],
        cost={"coefficients": cost, "paid": "ragged", "error": error, "spread": 0.01},
        memory={
            "model": {"fixed_bytes": 300.0 * MIB, "token_bytes": 0.1 * MIB, "square_bytes": 0.0},
            "error": error,
        },
    )
    return replace(made, **changes)


def api_goal(**changes):
    return ScenarioGoal(
        **{"scenario": "api", "goal_s": 0.5, "rate": 5.0, "verify_s": 2.0} | changes
    )


def pretend_validations(monkeypatch, *factors, held=True):
    """Replace validation runs: each measures the prediction times the next factor."""
    left, seen = list(factors), []

    def pretended(context, chosen, requests, seconds):
        factor = left.pop(0)
        seen.append((chosen, Profile.load(context.profile).settings))
        outcome, largest = predict("api", requests, chosen, ScenarioLimits(goal_s=0.5))
        said = advisor.LoadMetrics.of("api", outcome, chosen, largest)
        scaled = {f"p{n}_s": getattr(said, f"p{n}_s") * factor for n in (50, 95, 99)}
        return Validation(replace(said, **scaled, missed=0 if held else 9), factor, 0.0, held)

    monkeypatch.setattr(advisor, "validate", pretended)
    monkeypatch.setattr(advisor, "OVERHEAD_S", 0.0)
    return seen


GOALS = {"api": 0.5, "concurrent": 0.5, "offline": None, "edge": None}


def goal_of(name, **changes):
    rate = None if GOALS[name] is None else 5.0
    return ScenarioGoal(name, **{"goal_s": GOALS[name], "rate": rate} | changes)


def load_metrics(p50=0.05, p99=0.1, per_s=100.0, memory=400.0, missed=0):
    return LoadMetrics(p50, p50, p99, 10.0, per_s, memory * MIB, 100, missed)
