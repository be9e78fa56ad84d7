"""A recommendation as plain data: predicted and measured metrics, corrections, profile entry. Pure.

docs/TUNE.md describes the entry.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from echelon.messages import Message
from echelon.messages.units import duration, size
from echelon.profile import TunedSettings
from echelon.reports.wording import METRICS, value
from echelon.tuning.candidates import paced

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.profile import Profile
    from echelon.simulation.service_level import SimulationResult
    from echelon.tuning.candidates import MaxLengthCheck
    from echelon.tuning.goal import Scenario, ScenarioGoal, ScenarioLimits
    from echelon.tuning.scenario import Candidate, Recommendation, TriedCandidate

SCHEMA = 1
"""Version of the entry's layout, see docs/TUNE.md."""

TOLERANCE = 0.25
"""Relative difference up to which a measurement agrees with its prediction."""

COMPARED = {
    "api": ("p50_s", "p99_s"),
    "concurrent": ("p50_s", "p99_s"),
    "edge": ("p50_s", "p99_s"),
    "offline": ("documents_per_s",),
}
"""Metrics of each scenario that must agree."""


@dataclass(frozen=True, slots=True)
class LoadMetrics:
    """Metrics of a setting under load, predicted or measured.

    Attributes:
        p50_s: median latency; None where nothing was answered, and for ``offline``.
        p95_s: 95th percentile.
        p99_s: 99th percentile.
        requests_per_s: requests answered per second.
        documents_per_s: their documents per second.
        memory_bytes: memory of all workers at the largest step; None where it is not known.
        requests: all requests.
        missed: requests that were refused, failed, or were answered later than the goal.
    """

    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    requests_per_s: float
    documents_per_s: float
    memory_bytes: float | None
    requests: int
    missed: int

    @classmethod
    def of(
        cls, scenario: Scenario, outcome: SimulationResult, candidate: Candidate, largest: int
    ) -> LoadMetrics:
        """The metrics of a simulation whose largest step had ``largest`` tokens."""
        answered = outcome.answered > 0 and scenario != "offline"
        duration_s = outcome.duration_s
        if scenario == "edge" and outcome.answered:
            duration_s = outcome.mean_s * outcome.answered  # one after another, without a queue
        memory = candidate.memory
        share = outcome.answered / outcome.requests if outcome.requests else 0.0
        return cls(
            outcome.p50_s if answered else None,
            outcome.p95_s if answered else None,
            outcome.p99_s if answered else None,
            outcome.answered / duration_s if duration_s else 0.0,
            outcome.documents * share / duration_s if duration_s else 0.0,
            None if memory is None else candidate.workers * memory.bytes_of(largest),
            outcome.requests,
            outcome.requests - outcome.within,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the profile."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Validation:
    """A setting, measured under load.

    Attributes:
        metrics: what was measured.
        pace: time of the steps, relative to the cost model.
        overhead_s: seconds of a request besides the queue and its steps; None without a server.
        held: whether the goal and the memory limit held.
        doubts: why the metrics may be misleading.
        noise: of step times, see :class:`echelon.simulation.server_simulation.SimulationSettings`;
            None without a server.
    """

    metrics: LoadMetrics
    pace: float
    overhead_s: float | None
    held: bool
    doubts: tuple[str, ...] = ()
    noise: float | None = None


@dataclass(frozen=True, slots=True)
class ValidationRound:
    """A recommendation and its validation.

    Attributes:
        recommendation: what was chosen by simulation.
        predicted: metrics of the requests that the validation sends.
        limits: goal, overhead and noise of the simulation.
        validation: what was measured; None where nothing was.
        deviations: relative differences of the measured from the predicted metrics.
    """

    recommendation: Recommendation
    predicted: LoadMetrics
    limits: ScenarioLimits
    validation: Validation | None = None
    deviations: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate:
        """The chosen setting."""
        return self.recommendation.chosen.candidate

    @property
    def held(self) -> bool:
        """Whether the goal and the memory limit held when measured."""
        return self.validation is not None and self.validation.held

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the profile."""
        seen = self.validation
        return {
            "chosen": _setting(self.chosen),
            "predicted": self.predicted.as_dict(),
            "overhead_s": self.limits.overhead_s,
            "noise": self.limits.noise,
            "measured": None if seen is None else seen.metrics.as_dict(),
            "held": None if seen is None else seen.held,
            "agrees": None if seen is None else agree(self.deviations),
            "off": self.deviations,
            "pace": None if seen is None else seen.pace,
            "measured_overhead_s": None if seen is None else seen.overhead_s,
            "measured_noise": None if seen is None else seen.noise,
        }


# Predicted beside measured.


def deviations(
    scenario: Scenario, predicted: LoadMetrics, measured: LoadMetrics
) -> dict[str, float]:
    """Relative differences of the metrics that must agree, and of the memory."""
    found = {}
    for name in (*COMPARED[scenario], "memory_bytes"):
        expected, seen = getattr(predicted, name), getattr(measured, name)
        if expected and seen is not None:
            found[name] = seen / expected - 1
        elif name != "memory_bytes":
            found[name] = float("inf") if expected != seen else 0.0
    return found


def agree(found: Mapping[str, float]) -> bool:
    """Whether the prediction was right; memory is shown, but does not count."""
    return all(abs(value) <= TOLERANCE for name, value in found.items() if name != "memory_bytes")


def correct(
    models: Sequence[Candidate],
    limits: ScenarioLimits,
    predicted: LoadMetrics,
    validation: Validation,
    workers: int,
) -> tuple[list[Candidate], ScenarioLimits]:
    """Correct candidates and limits by a validation: pace, memory, overhead and noise.

    A difference of memory does not depend on the step: it is libraries, the tokenizer and products
    that are stored.
    """
    expected, seen = predicted.memory_bytes, validation.metrics.memory_bytes
    extra = (seen - expected) / workers if expected and seen else 0.0
    corrected = [
        replace(
            one,
            cost=paced(one.cost, validation.pace),
            memory=one.memory and one.memory.shifted(extra),
        )
        for one in models
    ]
    if validation.overhead_s is not None:
        limits = replace(limits, overhead_s=validation.overhead_s)
    if validation.noise is not None:
        limits = replace(limits, noise=validation.noise)
    return corrected, limits


# The profile's entry.


def settings_of(chosen: Candidate) -> TunedSettings:
    """A candidate as the profile's settings."""
    return TunedSettings(
        chosen.precision, chosen.token_budget, chosen.max_pairs, chosen.threads, chosen.max_length
    )


def scenario_entry(
    goal: ScenarioGoal,
    best: ValidationRound,
    rounds: Sequence[ValidationRound],
    profile: Profile,
    lengths: Sequence[MaxLengthCheck],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The profile's entry ``scenario``."""
    recommendation, shown = best.recommendation, best.as_dict()
    doubts = () if best.validation is None else best.validation.doubts
    return {
        "schema": SCHEMA,
        "scenario": goal.scenario,
        "asked": goal.as_dict() | {"max_length": profile.settings.max_length},
        "chosen": shown["chosen"],
        "accuracy": _accuracy(best.chosen, profile, lengths),
        "measure": {"name": recommendation.measure, "value": recommendation.value},
        "predicted": shown["predicted"],
        "measured": shown["measured"],
        "held": shown["held"],
        "agrees": shown["agrees"],
        "rounds": [one.as_dict() for one in rounds],
        "tried": [_tried(one) for one in recommendation.tried],
        "lengths": [one.as_dict() for one in lengths],
        "notes": [*_notes(goal, rounds), *doubts, *notes],
    }


def missed_message(goal: ScenarioGoal, best: ValidationRound) -> str:
    """The error message where the goal was missed in the validation."""
    if best.validation is None:
        raise RuntimeError("This is a bug: nothing was measured.")
    seen, predicted, parts = best.validation.metrics, best.predicted, []
    if goal.goal_s is not None:
        p99 = "nothing was answered" if seen.p99_s is None else f"P99 is {duration(seen.p99_s)}"
        before = "" if predicted.p99_s is None else f" (predicted {duration(predicted.p99_s)})"
        parts.append(
            f"{p99}{before}, the goal is {duration(goal.goal_s)}; {seen.missed} of {seen.requests} "
            "requests were late or failed"
        )
    limit = goal.memory_limit_bytes
    if limit is not None and seen.memory_bytes is not None and seen.memory_bytes > limit:
        need, there = size(round(seen.memory_bytes)), size(round(limit))
        parts.append(f"memory is {need}, the limit is {there}")
    return (
        f"The goal of {goal.scenario} was missed in the validation: {'; '.join(parts)}. Give a "
        "lower rate, fewer documents or a longer goal, or use more machines (`echelon plan`). "
        "The profile contains the settings and says that they miss the goal."
    )


def _setting(candidate: Candidate) -> dict[str, Any]:
    return {
        "token_budget": candidate.token_budget,
        "batch_size": candidate.max_pairs,
        "workers": candidate.workers,
        "threads": candidate.threads,
        "precision": candidate.precision,
        "max_length": candidate.max_length,
        "agreement": candidate.agreement,
        "memory_bytes": candidate.bytes or None,
    }


def _tried(one: TriedCandidate) -> dict[str, Any]:
    predicted = one.predicted
    return _setting(one.candidate) | {
        "reason": one.reason,
        "documents_per_s": one.documents_per_s,
        "bears_rate": one.max_rate,
        "predicted": None if predicted is None else predicted.as_dict(),
    }


def _accuracy(
    chosen: Candidate, profile: Profile, lengths: Sequence[MaxLengthCheck]
) -> dict[str, Any] | None:
    """Agreement of the chosen setting with fp32 at full length; None where it was not compared."""
    names = ("tau", "overlap", "ndcg_loss")
    for one in lengths:
        if one.max_length == chosen.max_length != profile.settings.max_length:
            return {name: getattr(one, name) for name in names}
    row = profile.precision_row(chosen.precision)
    if row is not None:
        return {name: row[name] for name in names}
    exact = {"tau": 1.0, "overlap": 1.0, "ndcg_loss": None}
    return exact if chosen.precision == "fp32" else None


def _notes(goal: ScenarioGoal, rounds: Sequence[ValidationRound]) -> list[str]:
    notes: list[str] = []
    if not goal.verify_s:
        notes.append(Message("scenario.not_validated"))
    for place, one in enumerate(rounds, 1):
        if one.validation is None or agree(one.deviations):
            continue
        off = [name for name, value in one.deviations.items() if abs(value) > TOLERANCE]
        notes += [_disagreement(place, name, one.predicted, one.validation) for name in off]
        last = place == len(rounds)
        notes.append(Message("scenario.trust_measured" if last else "scenario.models_corrected"))
    return notes


def _disagreement(place: int, name: str, predicted: LoadMetrics, validation: Validation) -> Message:
    return Message(
        "scenario.prediction_off",
        {
            "place": place,
            "name": Message(METRICS[name]),
            "measured": value(name, getattr(validation.metrics, name)),
            "predicted": value(name, getattr(predicted, name)),
        },
    )
