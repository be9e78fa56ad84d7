"""A recommendation as plain data: predicted and measured metrics, corrections, profile entry. Pure.

docs/TUNE.md describes the entry.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from echelon.messages import Message
from echelon.messages.units import duration, size
from echelon.profile import Profile, TunedSettings
from echelon.reports.wording import METRICS, value
from echelon.scheduling.cost_model import CostModel, Work
from echelon.tuning.candidates import MaxLengthCheck, paced

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.simulation.service_level import SimulationResult
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import Scenario, ScenarioGoal, ScenarioLimits
    from echelon.tuning.scenario import Candidate, Recommendation, TriedCandidate

SCHEMA = 1  # version of the entry's layout, see docs/TUNE.md
TOLERANCE = 0.25  # relative difference up to which a measurement agrees with its prediction

COMPARED = {
    "api": ("p50_s", "p99_s"),
    "concurrent": ("p50_s", "p99_s"),
    "edge": ("p50_s", "p99_s"),
    "offline": ("documents_per_s",),
}
"""Metrics of each scenario that must agree."""

PACE_RANGE = (0.1, 10.0)  # a measured pace outside this range is an error of the measurement

EDGE = 1.5
"""Ratios beyond the outermost bounds of a histogram are taken to be within this factor of them."""


@dataclass(frozen=True, slots=True)
class LoadMetrics:
    """Metrics of a setting under load, predicted or measured.

    Latencies are None where nothing was answered, and for ``offline``.
    """

    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    requests_per_s: float  # answered
    documents_per_s: float
    memory_bytes: float | None  # of all workers at the largest step; None where it is not known
    requests: int
    missed: int  # requests that were refused, failed, or were answered later than the goal

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


@dataclass(frozen=True, slots=True)
class Validation:
    """A setting, measured under load; overhead and noise are None without a server."""

    metrics: LoadMetrics
    pace: float  # time of the steps, relative to the cost model
    overhead_s: float | None  # of a request besides the queue and its steps
    held: bool  # whether the goal and the memory limit held
    doubts: tuple[str, ...] = ()  # why the metrics may be misleading
    noise: float | None = None  # of step times, as in SimulationSettings


@dataclass(frozen=True, slots=True)
class ValidationRound:
    """A recommendation and its validation."""

    recommendation: Recommendation
    predicted: LoadMetrics  # of the requests that the validation sends
    limits: ScenarioLimits  # goal, overhead and noise of the simulation
    validation: Validation | None = None
    deviations: dict[str, float] = field(default_factory=dict)  # relative to the predicted metrics

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
            "predicted": asdict(self.predicted),
            "overhead_s": self.limits.overhead_s,
            "noise": self.limits.noise,
            "measured": seen and asdict(seen.metrics),
            "held": seen and seen.held,
            "agrees": seen and agree(self.deviations),
            "off": self.deviations,
            "pace": seen and seen.pace,
            "measured_overhead_s": seen and seen.overhead_s,
            "measured_noise": seen and seen.noise,
        }


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


def noise_of_ratios(counts: Mapping[float, float]) -> float | None:
    """Standard deviation of log(actual / predicted) step time; None with fewer than two steps.

    ``counts`` is a Prometheus histogram: by upper bound, the steps whose ratio is at most that
    bound. Each step is taken for the middle of its interval.
    """
    bounds = sorted(counts)
    below = [0.0, *(counts[bound] for bound in bounds[:-1])]
    steps = [counts[bound] - less for bound, less in zip(bounds, below, strict=True)]
    if sum(steps) < 2:  # noqa: PLR2004 - a deviation needs two
        return None
    edges = [bounds[0] / EDGE, *bounds[:-1], bounds[-2] * EDGE]
    middles = [math.log(low * high) / 2 for low, high in itertools.pairwise(edges)]
    mean = sum(n * at for n, at in zip(steps, middles, strict=True)) / sum(steps)
    spread = sum(n * (at - mean) ** 2 for n, at in zip(steps, middles, strict=True)) / sum(steps)
    return math.sqrt(spread)


def squares_per_token(requests: Sequence[Arrival], max_length: int | None) -> float:
    """Sum of squared pair lengths over the sum of lengths, with pairs cut to ``max_length``."""
    lengths = [length for one in requests for length in one.lengths]
    lengths = [n if max_length is None else min(n, max_length) for n in lengths]
    return sum(n * n for n in lengths) / max(1, sum(lengths))


def pace_of(seconds: float, steps: float, tokens: float, squares: float, cost: CostModel) -> float:
    """Measured over predicted seconds of all steps; 1 where nothing was measured.

    ``tokens`` includes padding, and ``squares`` is squared tokens per token.
    """
    expected = cost.seconds(Work(round(steps), round(tokens), round(tokens * squares)))
    if not (seconds > 0 and expected > 0):
        return 1.0
    return limited_pace(seconds / expected)


def limited_pace(ratio: float) -> float:
    """A ratio of measured and predicted time, within PACE_RANGE."""
    return min(max(ratio, PACE_RANGE[0]), PACE_RANGE[1])


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
        "lengths": [asdict(one) for one in lengths],
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
        "predicted": predicted and predicted.as_dict(),
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
    notes: list[str] = [] if goal.verify_s else [Message("scenario.not_validated")]
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
