"""The spine of a recommendation: profile and goal to settings, proved.

It goes: traffic → candidates → choose by simulation → prove → where the two disagree, correct the
models by what was measured, choose and prove once more → profile with the settings.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.errors import GoalMissed, InvalidInput
from echelon.messages import Message
from echelon.simulation.fitted_models import cost_of, lengths_of, memory_of, noise_of
from echelon.tuning.calibration import models_of
from echelon.tuning.candidates import (
    CandidatePrices,
    MaxLengthCheck,
    candidates,
    prices_of,
    row_of,
    shorter,
)
from echelon.tuning.goal import HURRIED
from echelon.tuning.recommendation import ValidationRound, answer_of, missed_words, settings_of
from echelon.tuning.scenario import ScenarioLimits, solve
from echelon.tuning.scenario_model import WorkloadTexts, require_texts, ruler_of
from echelon.tuning.simulated_load import curve_of, predict
from echelon.tuning.tuner import probe
from echelon.tuning.validation import ValidationContext, prove
from echelon.tuning.validation_metrics import LoadMetrics, agree, correct, differences
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.profile import Profile
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.scenario import Candidate, Recommendation
    from echelon.tuning.scenario_model import ScenarioModel
    from echelon.tuning.tuner import Plan

OVERHEAD_S = 0.002
"""HTTP and tokenising of a request before anything was measured, as `echelon plan` has it."""

DRY_S = 20.0
"""Seconds of traffic that are predicted where nothing is proved."""

LOOK_AHEAD = 200
"""Requests whose lengths are looked at to see what a shorter limit would cut."""

PROOFS = 2
"""The first, and one after a correction."""


@dataclass(frozen=True, slots=True)
class ScenarioResult:
    """A recommendation.

    Attributes:
        profile: with the settings and what is known of them.
        missed: in words, that the goal was missed in reality; None where it held or nothing was
            proved.
    """

    profile: Profile
    missed: GoalMissed | None


def advise(
    model: ScenarioModel,
    profile: Profile,
    ask: ScenarioGoal,
    plan: Plan,
    told: Callable[[str, float], None] = lambda *_: None,
) -> ScenarioResult:
    """Choose settings and prove them.

    Args:
        model: what is asked about.
        profile: what was measured of it.
        ask: what for.
        plan: of the tuning run, for what is to be measured besides.
        told: called with what is being done, and the share that is done.

    Raises:
        InvalidInput: no setting reaches the goal; it says what is possible instead.
        ProfileError: the profile holds too little to predict with.
        ServerFailed: the server that should prove them did not start.
    """
    # What an earlier recommendation chose binds nobody: lengths are those asked for now.
    settings = replace(profile.settings, max_length=model.options.max_length)
    fresh = replace(profile, settings=settings, scenario=None)
    return _ScenarioRun(model, fresh, ask, plan, told).run()


@dataclass(slots=True)
class _ScenarioRun:
    model: ScenarioModel
    profile: Profile
    ask: ScenarioGoal
    plan: Plan
    told: Callable[[str, float], None]
    rounds: list[ValidationRound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    probed: dict[str, Profile] = field(default_factory=dict)

    def run(self) -> ScenarioResult:
        load = self._load()
        lengths = self._shorter(load)
        limits = ScenarioLimits(
            goal_s=self.ask.goal_s,
            rate=load.rate if self.ask.scenario in HURRIED else None,
            memory_bytes=self.ask.memory_limit_bytes,
            overhead_s=OVERHEAD_S if self.ask.scenario in HURRIED else 0.0,
            noise=noise_of(self.profile),
            seed=self.ask.seed,
        )
        models, found = self._choose(load, lengths, limits)
        self._prove(load, models, limits, found)
        best = next((one for one in reversed(self.rounds) if one.held), self.rounds[-1])
        answer = answer_of(self.ask, best, self.rounds, self.profile, lengths, self.notes)
        entry = answer | {"curve": self._curve(load, best)}
        settled = replace(self._settled(best.found.chosen.candidate), scenario=entry)
        missed = None
        if best.proof is not None and not best.held:
            missed = GoalMissed(missed_words(self.ask, best))
        return ScenarioResult(settled, missed)

    # What comes.

    def _load(self) -> WorkloadTexts:
        tokens = self.ask.tokens or lengths_of(self.profile)
        if tokens is None:
            raise InvalidInput("--tokens", "the texts do not say how long pairs are", "Give it.")
        traffic = self.ask.traffic(tokens)
        rate = self.ask.rate or (traffic.trace_rate if self.ask.trace else 1.0)
        topics, encoder = self.model.texts.topics, self.model.trial.encoder
        require_texts(topics, encoder, tokens, traffic.trace, self.model.longest)
        return WorkloadTexts(traffic, rate, topics, ruler_of(encoder))

    def _shorter(self, load: WorkloadTexts) -> list[MaxLengthCheck]:
        if "max_length" not in self.ask.allow:
            return []
        requests = load.first(float(LOOK_AHEAD))
        precision = self.profile.key.precision
        row = row_of(self.profile, precision) or {}
        trial = self.model.tuned(self.profile)
        kept = row.get("keep_bf16", [])
        return shorter(trial, precision, kept, requests, lambda doing: self.told(doing, 0.0))

    # Choosing.

    def _choose(
        self, load: WorkloadTexts, lengths: Sequence[MaxLengthCheck], limits: ScenarioLimits
    ) -> tuple[list[Candidate], Recommendation]:
        """Choose; a precision whose steps were not measured is measured before it is taken."""
        prices = prices_of(self.profile)
        while True:
            models = candidates(self.profile, self.ask, prices, lengths)
            found = self._solve(load, models, limits)
            precision = found.chosen.candidate.precision
            if precision in prices:
                return models, found
            prices[precision] = self._probe(precision, found.chosen.candidate)

    def _solve(
        self, load: WorkloadTexts, models: Sequence[Candidate], limits: ScenarioLimits
    ) -> Recommendation:
        def told(share: float) -> None:
            self.told(f"simulating {len(models)} settings", share)

        return solve(self.ask.scenario, load.traffic, models, limits, told)

    def _probe(self, precision: str, guess: Candidate) -> CandidatePrices:
        row = row_of(self.profile, precision) or {}
        trial = self.model.tuned(self.profile)
        opener = trial.opener(row.get("keep_bf16", []))
        scorer = opener(precision=precision)
        try:
            probed = probe(
                trial, scorer, self.plan, self.model.texts, clock=monotonic, told=self.told
            )
        finally:
            scorer.close()
        models = models_of(probed, opener)
        note = Message(
            "scenario.other_precision", {"swept": self.profile.key.precision, "taken": precision}
        )
        measured = replace(
            self.profile,
            key=replace(self.profile.key, precision=precision),
            cost=models.cost,
            memory=models.memory,
            warnings=[*self.profile.warnings, *models.warnings, note],
        )
        self.probed[precision] = measured
        if models.cost is None:
            self.notes.append(Message("scenario.times_estimated", {"precision": precision}))
            return CandidatePrices(guess.cost, guess.memory)
        return CandidatePrices(
            cost_of(measured), memory_of(measured) if models.memory else guess.memory
        )

    def _curve(self, load: WorkloadTexts, best: ValidationRound) -> dict[str, Any] | None:
        """Latency over load, with the models that the settings were chosen by."""
        if self.ask.scenario not in HURRIED:
            return None
        self.told("simulating rising load", 0.0)
        return curve_of(load.traffic, best.found.chosen.candidate, best.limits).as_dict(load.rate)

    # Proving.

    def _prove(
        self,
        load: WorkloadTexts,
        models: Sequence[Candidate],
        limits: ScenarioLimits,
        found: Recommendation,
    ) -> None:
        while True:
            shown = self._round(load, limits, found)
            self.rounds.append(shown)
            if shown.proof is None or len(self.rounds) == PROOFS:
                return
            if shown.held and agree(shown.off):
                return
            workers = found.chosen.candidate.workers
            models, limits = correct(models, limits, shown.predicted, shown.proof, workers)
            try:
                found = self._solve(load, models, limits)
            except InvalidInput as error:
                self.notes.append(
                    Message(
                        "scenario.no_other_setting",
                        {"field": error.field, "problem": error.problem, "remedy": error.remedy},
                    )
                )
                return

    def _round(
        self, load: WorkloadTexts, limits: ScenarioLimits, found: Recommendation
    ) -> ValidationRound:
        chosen, name = found.chosen.candidate, self.ask.scenario
        requests = self._requests(load, found.chosen.documents_per_s or 1.0)
        outcome, largest = predict(name, requests, chosen, limits)
        predicted = LoadMetrics.of(name, outcome, chosen, largest)
        if not self.ask.verify_s:
            return ValidationRound(found, predicted, limits)
        seconds = outcome.duration_s if name == "offline" else outcome.mean_s
        with tempfile.TemporaryDirectory(prefix="echelon-") as folder:
            file = Path(folder) / "profile.json"
            self._settled(chosen).save(file)
            on_card = self.profile.key.device != "cpu"
            stage = ValidationContext(self.ask, self.model, load, file, on_card, self.told)
            proof = prove(stage, chosen, requests, seconds)
        off = differences(name, predicted, proof.numbers)
        return ValidationRound(found, predicted, limits, proof, off)

    def _requests(self, load: WorkloadTexts, documents_per_s: float) -> list[Arrival]:
        """Those that a proof sends, if the setting is as fast as predicted."""
        seconds = self.ask.verify_s or DRY_S
        if self.ask.scenario in HURRIED:
            return load.requests(seconds, self.ask.seed)
        return load.first(documents_per_s * seconds)

    def _settled(self, chosen: Candidate) -> Profile:
        """The profile with the settings of a candidate."""
        base = self.probed.get(chosen.precision, self.profile)
        return replace(base, settings=settings_of(chosen))
