"""Measures static batch sizes and the chosen settings with the same requests, in turn, in rounds.

A step of a static setting is limited by its number of pairs, and by tokens only where more of them
did not fit in memory. Precision, length, threads and workers are those of the chosen settings.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from echelon.errors import EchelonError, WorkerLost
from echelon.progress import no_progress
from echelon.simulation.fitted_models import cost_of, lengths_of
from echelon.tuning.candidates import largest_budget
from echelon.tuning.goal import HURRIED
from echelon.tuning.recommendation import settings_of
from echelon.tuning.scenario import Candidate
from echelon.tuning.scenario_model import WorkloadTexts, length_policy_of
from echelon.tuning.validation import (
    RerankRun,
    RerankTask,
    ValidationContext,
    rerank_task,
    run,
    validate,
    validation_of_reranker,
)
from static_ranking import MeasuredSettings, ranking

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from echelon.profile import Profile
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.recommendation import Validation
    from echelon.tuning.scenario_model import ScenarioModel

SIZES = (1, 2, 4, 8, 16, 32)
"""Static batch sizes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the settings are compared with.

    Attributes:
        profile: with the validated settings of a scenario.
        context: what for, and how settings are run; its file is written for each run.
    """

    profile: Profile
    context: ValidationContext

    @classmethod
    def of(
        cls, model: ScenarioModel, profile: Profile, goal: ScenarioGoal, file: Path
    ) -> Comparison:
        """Compare a profile's settings; ``file`` is written for each run."""
        settings = replace(profile.settings, max_length=model.options.max_length)
        tokens = goal.tokens or lengths_of(replace(profile, settings=settings))
        if tokens is None:
            raise ValueError("The profile does not say how long pairs are.")
        load = WorkloadTexts(
            goal.traffic(tokens), model.texts.topics, length_policy_of(model.check.encoder)
        )
        on_gpu = profile.key.device != "cpu"
        return cls(profile, ValidationContext(goal, model, load, file, on_gpu, no_progress))

    def chosen(self) -> Candidate:
        """The settings that were recommended."""
        found = self._entry["chosen"]
        return Candidate(
            found["token_budget"],
            cost_of(self.profile),
            found["batch_size"],
            found["workers"],
            found["threads"],
            found["precision"],
            found["max_length"],
        )

    def settings(self) -> list[tuple[Candidate, MeasuredSettings]]:
        """All settings: the chosen ones, then the static ones."""
        chosen, budget = self.chosen(), largest_budget(self.profile)
        static = [
            (replace(chosen, token_budget=budget, max_pairs=n), MeasuredSettings(n)) for n in SIZES
        ]
        return [(chosen, MeasuredSettings(None)), *static]

    def requests(self, context: ValidationContext) -> list[Arrival]:
        """Requests of a round: with a rate, new ones; otherwise as many as in the validation."""
        load, goal = context.load, context.goal
        if goal.scenario in HURRIED:
            return load.requests(goal.verify_s, goal.seed)
        served = self._entry["measured"]["requests"]
        return list(islice(load.workload.requests(), served))

    def write_profile(self, candidate: Candidate) -> None:
        """Write the profile with the settings of a candidate."""
        settings = settings_of(candidate)
        replace(self.profile, settings=settings, scenario=None).save(self.context.profile)

    @property
    def _entry(self) -> dict[str, Any]:
        if self.profile.scenario is None:
            raise ValueError("The profile has no scenario.")
        return self.profile.scenario


def rank_among_static(comparison: Comparison, rounds: int) -> dict[str, Any]:
    """Rank the chosen settings among static batch sizes, see :func:`ranking`."""
    return ranking(comparison.context.goal, measure_rounds(comparison, rounds))


def measure_rounds(comparison: Comparison, rounds: int) -> list[MeasuredSettings]:
    """Measure all settings in rounds, every second round in the opposite order.

    A static size that fails keeps its error and is left out of later rounds.

    Returns:
        The chosen settings, then the static ones.

    Raises:
        EchelonError: the chosen settings failed.
    """
    settings = comparison.settings()
    for number in range(rounds):
        goal = comparison.context.goal
        context = replace(comparison.context, goal=replace(goal, seed=goal.seed + number))
        requests = comparison.requests(context)
        for candidate, measured in settings[:: 1 if number % 2 == 0 else -1]:
            if measured.failed is not None:
                continue
            comparison.write_profile(candidate)
            try:
                seen = validate_apart(context, candidate, requests)
            except EchelonError as error:
                if measured.pairs is None:
                    raise
                measured.failed = str(error)
            else:
                measured.rounds.append(seen.metrics)
    return [measured for _, measured in settings]


def validate_apart(
    context: ValidationContext, candidate: Candidate, requests: Sequence[Arrival]
) -> Validation:
    """Validate in a separate process, in which a reranker serves all requests."""
    if context.goal.scenario in HURRIED:
        return validate(context, candidate, requests, 0.0)
    task = replace(rerank_task(context, requests), within_s=None)
    return validation_of_reranker(context, requests, run_apart(task), 0.0)


def run_apart(task: RerankTask) -> RerankRun:
    """Rerank in a new process, so that only its own memory is measured.

    Raises:
        WorkerLost: the process died.
        EchelonError: as the reranker raised it.
    """
    fresh = multiprocessing.get_context("spawn")  # a fork would have this one's memory
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        try:
            return pool.submit(run, task).result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "The reranking process died, possibly because memory ran out."
            ) from error
