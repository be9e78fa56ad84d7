"""Static batch sizes beside the chosen settings: the same requests, in turns, round after round.

A static one is bounded in pairs and in nothing else, but for the tokens that were too many for
memory. Everything else is as chosen: precision, length, threads, workers.
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
from echelon.tuning.scenario_model import WorkloadTexts, length_policy_of
from echelon.tuning.simulated_load import Candidate
from echelon.tuning.validation import (
    ValidationContext,
    rerank_task,
    validate,
    validation_of_reranker,
)
from echelon.tuning.validation_targets import RerankRun, RerankTask, run
from static_standing import Rival, standing

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
class Contest:
    """What the settings are compared under.

    Attributes:
        profile: with a scenario's settings, which were proved.
        context: what for, and how settings are run; its file is written for each run.
    """

    profile: Profile
    context: ValidationContext

    @classmethod
    def of(cls, model: ScenarioModel, profile: Profile, goal: ScenarioGoal, file: Path) -> Contest:
        """The contest of a profile's settings; ``file`` is written for each run."""
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

    def entered(self) -> list[tuple[Candidate, Rival]]:
        """All that take part: the chosen settings, then the static ones."""
        chosen, most = self.chosen(), largest_budget(self.profile)
        static = [(replace(chosen, token_budget=most, max_pairs=n), Rival(n)) for n in SIZES]
        return [(chosen, Rival(None)), *static]

    def requests(self, turn: ValidationContext) -> list[Arrival]:
        """Requests of a round: with a rate, new ones; otherwise as many as in the validation."""
        load, goal = turn.load, turn.goal
        if goal.scenario in HURRIED:
            return load.requests(goal.verify_s, goal.seed)
        served = self._entry["measured"]["requests"]
        return list(islice(load.workload.requests(), served))

    def settle(self, candidate: Candidate) -> None:
        """Write the profile with the settings of a candidate, for the run to read."""
        settings = settings_of(candidate)
        replace(self.profile, settings=settings, scenario=None).save(self.context.profile)

    @property
    def _entry(self) -> dict[str, Any]:
        if self.profile.scenario is None:
            raise ValueError("The profile has no scenario.")
        return self.profile.scenario


def beside_static(contest: Contest, rounds: int) -> dict[str, Any]:
    """Where the chosen settings stand among static batch sizes, see :func:`standing`."""
    return standing(contest.context.goal, compete(contest, rounds))


def compete(contest: Contest, rounds: int) -> list[Rival]:
    """Run all of them in rounds, every other round in the opposite order.

    A static size that fails keeps its error and is left out of later rounds.

    Returns:
        The chosen settings, then the static ones.

    Raises:
        EchelonError: the chosen settings failed.
    """
    entered = contest.entered()
    for number in range(rounds):
        goal = contest.context.goal
        turn = replace(contest.context, goal=replace(goal, seed=goal.seed + number))
        requests = contest.requests(turn)
        for candidate, rival in entered[:: 1 if number % 2 == 0 else -1]:
            if rival.failed is not None:
                continue
            contest.settle(candidate)
            try:
                seen = validate_apart(turn, candidate, requests)
            except EchelonError as error:
                if rival.pairs is None:
                    raise
                rival.failed = str(error)
            else:
                rival.rounds.append(seen.metrics)
    return [rival for _, rival in entered]


def validate_apart(
    context: ValidationContext, candidate: Candidate, requests: Sequence[Arrival]
) -> Validation:
    """Validate in a separate process, in which a reranker serves all requests."""
    if context.goal.scenario in HURRIED:
        return validate(context, candidate, requests, 0.0)
    task = replace(rerank_task(context, requests), within_s=None)
    return validation_of_reranker(context, requests, run_apart(task), 0.0)


def run_apart(task: RerankTask) -> RerankRun:
    """Rerank in a new process, whose memory is nobody else's.

    Raises:
        WorkerLost: it died.
        EchelonError: as the reranker raised it.
    """
    fresh = multiprocessing.get_context("spawn")  # a fork would have this one's memory
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        try:
            return pool.submit(run, task).result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "The process that reranks died, perhaps for want of memory."
            ) from error
