"""A recommendation as plain data and in words; docs/TUNE.md describes it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from echelon.messages import Message
from echelon.profile import TunedSettings
from echelon.reports.summary import NUMBERS, value
from echelon.reports.wording import duration, size
from echelon.tuning.candidates import row_of
from echelon.tuning.validation_metrics import AGREES, agree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile
    from echelon.tuning.candidates import MaxLengthCheck
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.scenario import Candidate, Recommendation, ScenarioLimits, TriedCandidate
    from echelon.tuning.validation_metrics import LoadMetrics, Validation

SCHEMA = 1
"""Version of the entry's layout, see docs/TUNE.md."""


@dataclass(frozen=True, slots=True)
class ValidationRound:
    """A choice, and its proof.

    Attributes:
        found: the solver's.
        predicted: of the requests that the proof sends.
        limits: goal, overhead and noise that were reckoned with.
        proof: what was measured; None where nothing was.
        off: by how much it differs, relative.
    """

    found: Recommendation
    predicted: LoadMetrics
    limits: ScenarioLimits
    proof: Validation | None = None
    off: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether goal and limit held in reality."""
        return self.proof is not None and self.proof.held

    def as_dict(self) -> dict[str, Any]:
        """The answer's entry."""
        proof = self.proof
        return {
            "chosen": _setting(self.found.chosen.candidate),
            "predicted": self.predicted.as_dict(),
            "overhead_s": self.limits.overhead_s,
            "noise": self.limits.noise,
            "measured": None if proof is None else proof.numbers.as_dict(),
            "held": None if proof is None else proof.held,
            "agrees": None if proof is None else agree(self.off),
            "off": self.off,
            "pace": None if proof is None else proof.pace,
            "measured_overhead_s": None if proof is None else proof.overhead_s,
            "measured_noise": None if proof is None else proof.noise,
        }


def settings_of(chosen: Candidate) -> TunedSettings:
    """A candidate as the profile's settings."""
    return TunedSettings(
        chosen.precision,
        chosen.token_budget,
        chosen.max_pairs,
        chosen.threads,
        chosen.max_length,
    )


def answer_of(
    ask: ScenarioGoal,
    best: ValidationRound,
    rounds: Sequence[ValidationRound],
    profile: Profile,
    lengths: Sequence[MaxLengthCheck],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The profile's entry ``scenario``."""
    found = best.found
    shown = best.as_dict()
    doubts = () if best.proof is None else best.proof.doubts
    return {
        "schema": SCHEMA,
        "scenario": ask.scenario,
        "asked": ask.as_dict() | {"max_length": profile.settings.max_length},
        "chosen": shown["chosen"],
        "accuracy": _accuracy(found.chosen.candidate, profile, lengths),
        "measure": {"name": found.measure, "value": found.value},
        "predicted": shown["predicted"],
        "measured": shown["measured"],
        "held": shown["held"],
        "agrees": shown["agrees"],
        "rounds": [one.as_dict() for one in rounds],
        "tried": [_tried(one) for one in found.tried],
        "lengths": [one.as_dict() for one in lengths],
        "notes": [*_notes(ask, rounds), *doubts, *notes],
    }


def missed_words(ask: ScenarioGoal, best: ValidationRound) -> str:
    """That the goal was missed in reality, and what to do."""
    proof, parts = best.proof, []
    if proof is None:
        raise RuntimeError("This is a bug: nothing was measured.")
    came, said = proof.numbers, best.predicted
    if ask.goal_s is not None:
        p99 = "nothing was answered" if came.p99_s is None else f"P99 is {duration(came.p99_s)}"
        told = "" if said.p99_s is None else f", {duration(said.p99_s)} were predicted"
        parts.append(
            f"{p99}, {duration(ask.goal_s)} are asked for{told}; {came.missed} of {came.requests} "
            "requests came late or failed"
        )
    limit = ask.memory_limit_bytes
    if limit is not None and came.memory_bytes is not None and came.memory_bytes > limit:
        parts.append(f"{size(round(came.memory_bytes))} of memory, {size(round(limit))} are asked")
    return (
        f"The goal of {ask.scenario} is missed in reality: {'; '.join(parts)}. Ask for a lower "
        "rate, fewer documents or a longer goal, or take more machines (`echelon plan`). "
        "The profile holds the settings all the same and says that they miss it."
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
        "bears_rate": one.bears,
        "predicted": None if predicted is None else predicted.as_dict(),
    }


def _accuracy(
    chosen: Candidate, profile: Profile, lengths: Sequence[MaxLengthCheck]
) -> dict[str, Any] | None:
    """How the chosen setting ranks against fp32 at full length; None where nobody compared."""
    full = profile.settings.max_length
    names = ("tau", "overlap", "ndcg_loss")
    for one in lengths:
        if one.max_length == chosen.max_length != full:
            return {name: getattr(one, name) for name in names}
    row = row_of(profile, chosen.precision)
    if row is not None:
        return {name: row[name] for name in names}
    exact = {"tau": 1.0, "overlap": 1.0, "ndcg_loss": None}
    return exact if chosen.precision == "fp32" else None


def _notes(ask: ScenarioGoal, rounds: Sequence[ValidationRound]) -> list[str]:
    notes: list[str] = []
    if not ask.verify_s:
        notes.append(Message("scenario.not_validated"))
    for place, one in enumerate(rounds, 1):
        if one.proof is None or agree(one.off):
            continue
        notes += [_off(place, name, one) for name in one.off if abs(one.off[name]) > AGREES]
        notes.append(
            Message("scenario.models_corrected")
            if place < len(rounds)
            else Message("scenario.trust_measured")
        )
    return notes


def _off(place: int, name: str, one: ValidationRound) -> str:
    said = getattr(one.predicted, name)
    came = None if one.proof is None else getattr(one.proof.numbers, name)
    return Message(
        "scenario.prediction_off",
        {
            "place": place,
            "name": Message(NUMBERS[name]),
            "came": value(name, came),
            "said": value(name, said),
        },
    )
