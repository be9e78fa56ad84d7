"""Recommends settings for a scenario: from a profile and a goal to validated settings.

Stages: workload, candidates, choice by simulation, validation. Where validation and prediction
disagree, the models are corrected by the measurement, and settings are chosen and validated again.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import GoalMissed, InvalidInput
from echelon.messages import Message, tr
from echelon.progress import Progress, no_progress
from echelon.simulation.fitted_models import (
    accuracy_notes,
    cost_of,
    lengths_of,
    memory_of,
    noise_of,
)
from echelon.tuning.calibration import models_of
from echelon.tuning.candidates import (
    FittedModels,
    MaxLengthCheck,
    candidates,
    check_max_lengths,
    fitted_models,
)
from echelon.tuning.goal import HURRIED, ScenarioGoal, ScenarioLimits
from echelon.tuning.recommendation import (
    LoadMetrics,
    ValidationRound,
    agree,
    correct,
    deviations,
    missed_message,
    scenario_entry,
    settings_of,
)
from echelon.tuning.scenario import Candidate, Recommendation, curve_of, predict, solve
from echelon.tuning.scenario_model import (
    ScenarioModel,
    WorkloadTexts,
    length_policy_of,
    require_texts,
)
from echelon.tuning.time_plan import MEMORY
from echelon.tuning.tuner import TuningPlan, probe
from echelon.tuning.validation import ValidationContext, validate
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile
    from echelon.simulation.workload import Arrival

OVERHEAD_S = 0.002
"""Seconds for HTTP and tokenizing per request until they are measured, as in `echelon plan`."""

PREDICTED_S = 20.0  # seconds of requests that are predicted where there is no validation
LOOK_AHEAD = 200  # documents whose lengths show how many pairs a shorter max_length would cut
MAX_ROUNDS = 2  # validations: the first, and one after a correction


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """A recommendation."""

    profile: Profile  # with the settings, and the entry ``scenario``
    missed: GoalMissed | None  # None where the goal held, or where nothing was validated


def recommend(
    model: ScenarioModel,
    profile: Profile,
    goal: ScenarioGoal,
    plan: TuningPlan,
    on_progress: Progress = no_progress,
) -> ScenarioResult:
    """Choose settings for a tuned model and validate them.

    The plan is that of the tuning run, for measurements that are still needed.

    Raises:
        InvalidInput: no setting reaches the goal; the error says what is possible instead.
        ProfileError: the profile contains too little to predict with.
        ServerFailed: the server for the validation did not start.
    """
    # An earlier recommendation may have cut max_length: the user's own options count.
    settings = replace(profile.settings, max_length=model.options.max_length)
    fresh = replace(profile, settings=settings, scenario=None)
    return _ScenarioRun(model, fresh, goal, plan, on_progress).run()


@dataclass(slots=True)
class _ScenarioRun:
    model: ScenarioModel
    profile: Profile
    goal: ScenarioGoal
    plan: TuningPlan
    on_progress: Progress
    rounds: list[ValidationRound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probed: dict[str, Profile] = field(default_factory=dict)

    def run(self) -> ScenarioResult:
        load = self._workload()
        self.notes += accuracy_notes(self.profile, memory=self.goal.memory_limit_bytes is not None)
        lengths = self._max_lengths(load)
        models, limits, found = self._choose(load, lengths)
        self._validate(load, models, limits, found)
        best = next((one for one in reversed(self.rounds) if one.held), self.rounds[-1])
        entry = scenario_entry(self.goal, best, self.rounds, self.profile, lengths, self.notes)
        entry["curve"] = self._curve(load, best)
        missed = None
        if best.validation is not None and not best.held:
            missed = GoalMissed(missed_message(self.goal, best))
        return ScenarioResult(replace(self._with_settings(best.chosen), scenario=entry), missed)

    def _workload(self) -> WorkloadTexts:
        tokens = self.goal.tokens or lengths_of(self.profile)
        if tokens is None:
            raise InvalidInput("--tokens", "the texts do not say how long pairs are", "Give it.")
        workload = self.goal.traffic(tokens)
        topics, encoder = self.model.texts.topics, self.model.check.encoder
        require_texts(topics, encoder, tokens, workload.trace, self.model.longest)
        return WorkloadTexts(workload, topics, length_policy_of(encoder))

    def _max_lengths(self, load: WorkloadTexts) -> list[MaxLengthCheck]:
        if "max_length" not in self.goal.allow:
            return []
        precision, requests = self.profile.key.precision, load.first(float(LOOK_AHEAD))
        keep_bf16 = self.profile.keep_bf16
        check = self.model.tuned(self.profile)
        return check_max_lengths(check, precision, keep_bf16, requests, self.on_progress)

    def _choose(
        self, load: WorkloadTexts, lengths: Sequence[MaxLengthCheck]
    ) -> tuple[list[Candidate], ScenarioLimits, Recommendation]:
        """Choose; a precision whose steps were not measured is measured before it is chosen."""
        hurried = self.goal.scenario in HURRIED
        limits = ScenarioLimits(
            goal_s=self.goal.goal_s,
            rate=load.workload.rate if hurried else None,
            memory_bytes=self.goal.memory_limit_bytes,
            overhead_s=OVERHEAD_S if hurried else 0.0,
            noise=noise_of(self.profile),
            seed=self.goal.seed,
        )
        fitted = fitted_models(self.profile)
        while True:
            models = candidates(self.profile, self.goal, fitted, lengths)
            found = self._solve(load, models, limits)
            precision = found.chosen.candidate.precision
            if precision in fitted:
                return models, limits, found
            fitted[precision] = self._probe(precision, found.chosen.candidate)

    def _solve(
        self, load: WorkloadTexts, models: Sequence[Candidate], limits: ScenarioLimits
    ) -> Recommendation:
        return solve(self.goal.scenario, load.workload, models, limits, self.on_progress)

    def _probe(self, precision: str, guess: Candidate) -> FittedModels:
        """Measure steps in a precision; where they are too noisy, the guess is kept."""
        row = self.profile.precision_row(precision) or {}
        check, texts = self.model.tuned(self.profile), self.model.texts
        factory = check.factory(row.get("keep_bf16", []))
        with closing(factory(precision=precision)) as scorer:
            probed = probe(check, scorer, self.plan, texts, monotonic, self.on_progress)
        models = models_of(probed, factory, MEMORY * self.plan.time_limit_s)
        key = self.profile.key
        note = Message("scenario.other_precision", {"swept": key.precision, "taken": precision})
        measured = replace(
            self.profile,
            key=replace(key, precision=precision),
            cost=models.cost,
            memory=models.memory,
            warnings=[*self.profile.warnings, *models.warnings, note],
        )
        self.probed[precision] = measured
        if models.cost is None:
            self.notes.append(Message("scenario.times_estimated", {"precision": precision}))
            return FittedModels(guess.cost, guess.memory)
        self.notes += accuracy_notes(measured, memory=False)
        memory = memory_of(measured) if models.memory else guess.memory
        return FittedModels(cost_of(measured), memory)

    def _curve(self, load: WorkloadTexts, best: ValidationRound) -> dict[str, Any] | None:
        """Latency over load, predicted with the models that the settings were chosen by."""
        if self.goal.scenario not in HURRIED:
            return None
        self.on_progress(tr("simulating rising load"))
        return curve_of(load.workload, best.chosen, best.limits).as_dict(load.workload.rate or 1.0)

    def _validate(
        self,
        load: WorkloadTexts,
        models: Sequence[Candidate],
        limits: ScenarioLimits,
        found: Recommendation,
    ) -> None:
        while True:
            last = self._round(load, limits, found)
            self.rounds.append(last)
            if last.validation is None or len(self.rounds) == MAX_ROUNDS:
                return
            if last.held and agree(last.deviations):
                return
            workers = last.chosen.workers
            models, limits = correct(models, limits, last.predicted, last.validation, workers)
            try:
                found = self._solve(load, models, limits)
            except InvalidInput as error:
                values = {"field": error.field, "problem": error.problem, "remedy": error.remedy}
                self.notes.append(Message("scenario.no_other_setting", values))
                return

    def _round(
        self, load: WorkloadTexts, limits: ScenarioLimits, found: Recommendation
    ) -> ValidationRound:
        chosen, name = found.chosen.candidate, self.goal.scenario
        requests = self._requests(load, found.chosen.documents_per_s or 1.0)
        outcome, largest = predict(name, requests, chosen, limits)
        predicted = LoadMetrics.of(name, outcome, chosen, largest)
        if not self.goal.verify_s:
            return ValidationRound(found, predicted, limits)
        seconds = outcome.duration_s if name == "offline" else outcome.mean_s
        with tempfile.TemporaryDirectory(prefix="echelon-") as folder:
            file = Path(folder) / "profile.json"
            self._with_settings(chosen).save(file)
            on_gpu = self.profile.key.device != "cpu"
            context = ValidationContext(self.goal, self.model, load, file, on_gpu, self.on_progress)
            seen = validate(context, chosen, requests, seconds)
        off = deviations(name, predicted, seen.metrics)
        return ValidationRound(found, predicted, limits, seen, off)

    def _requests(self, load: WorkloadTexts, documents_per_s: float) -> list[Arrival]:
        """The requests of a validation, if the setting is as fast as predicted."""
        seconds = self.goal.verify_s or PREDICTED_S
        if self.goal.scenario in HURRIED:
            return load.requests(seconds, self.goal.seed)
        return load.first(documents_per_s * seconds)

    def _with_settings(self, chosen: Candidate) -> Profile:
        """The profile with the settings of a candidate."""
        base = self.probed.get(chosen.precision, self.profile)
        return replace(base, settings=settings_of(chosen))
