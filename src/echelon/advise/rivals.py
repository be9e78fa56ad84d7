"""Static batch sizes beside the chosen settings: the same requests, in turns, round after round.

A static one is bounded in pairs and in nothing else, but for the tokens that were too many for
memory. Everything else is as chosen: precision, length, threads, workers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from echelon.advise.ask import HURRIED
from echelon.advise.proof import prove
from echelon.advise.standing import Rival
from echelon.errors import EchelonError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.advise.proof import Stage
    from echelon.plan.workload import Arrival
    from echelon.tune.profile import Profile
    from echelon.tune.scenario import Candidate

SIZES = (1, 2, 4, 8, 16, 32)
"""Static batch sizes."""


def compete(
    stage: Stage,
    chosen: Candidate,
    most_tokens: int,
    requests: Sequence[Arrival],
    settled: Callable[[Candidate], Profile],
) -> list[Rival]:
    """Run all of them in rounds, every other round in the opposite order.

    A static size that fails is told why, and left out from then on.

    Args:
        stage: what for, and with what; a profile is written to its file for each run.
        chosen: the settings that were recommended.
        most_tokens: most tokens that any step may have.
        requests: of each round, where the scenario has no rate; with one, each round has others.
        settled: the profile with the settings of a candidate.

    Returns:
        The chosen settings, then the static ones.

    Raises:
        EchelonError: the chosen settings failed.
    """
    entered: list[tuple[Candidate, Rival]] = [(chosen, Rival(None))]
    entered += [
        (replace(chosen, token_budget=most_tokens, max_pairs=size), Rival(size)) for size in SIZES
    ]
    for number in range(stage.ask.static_rounds):
        turn = _turn(stage, number)
        if stage.ask.scenario in HURRIED:
            requests = turn.load.requests(turn.ask.verify_s, turn.ask.seed)
        for place, (candidate, rival) in enumerate(entered[:: 1 if number % 2 == 0 else -1]):
            if rival.failed is not None:
                continue
            done = (number + place / len(entered)) / stage.ask.static_rounds
            settled(candidate).save(stage.profile)
            try:
                proof = prove(_telling(turn, number, rival, done), candidate, requests, 0.0)
            except EchelonError as error:
                if rival.pairs is None:
                    raise
                rival.failed = str(error)
            else:
                rival.rounds.append(proof.numbers)
    return [rival for _, rival in entered]


def _turn(stage: Stage, number: int) -> Stage:
    """A round's: other requests than in the last, the same for all in it."""
    ask = replace(stage.ask, seed=stage.ask.seed + number)
    return replace(stage, ask=ask, beside=True)


def _telling(stage: Stage, number: int, rival: Rival, done: float) -> Stage:
    name = "chosen" if rival.pairs is None else f"static {rival.pairs}"
    words = f"round {number + 1} of {stage.ask.static_rounds}, {name}"
    told = stage.told
    return replace(stage, told=lambda doing, _: told(f"{words}: {doing}", done))
