"""The ways to run a service on this machine that are worth trying. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.advise.numbers import paced
from echelon.errors import InvalidInput
from echelon.planner.answer import BUDGETS
from echelon.scheduling.packing import NO_BUDGET
from echelon.tune.prices import cost_of, memory_of
from echelon.tune.scenario import Candidate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.advise.ask import Ask
    from echelon.advise.shorter import Shorter
    from echelon.profile import Profile
    from echelon.scheduling.cost_model import CostModel, MemoryModel


@dataclass(frozen=True, slots=True)
class Prices:
    """What was measured of one precision.

    Attributes:
        cost: how long its steps take.
        memory: what they need; None where it is not known.
    """

    cost: CostModel
    memory: MemoryModel | None


def prices_of(profile: Profile) -> dict[str, Prices]:
    """The measured precision's prices, by its name.

    Raises:
        ProfileError: the profile holds too little.
    """
    return {profile.key.precision: Prices(cost_of(profile), memory_of(profile))}


def candidates(
    profile: Profile, ask: Ask, prices: dict[str, Prices], lengths: Sequence[Shorter]
) -> list[Candidate]:
    """All of them, the measured precision at full length first.

    Args:
        profile: what was measured.
        ask: what may change.
        prices: of the precisions whose steps were measured; the others' are scaled by their speed.
        lengths: shorter ones, with what they cost in accuracy.

    Raises:
        InvalidInput: there is a limit on memory, and memory was not measured.
    """
    own = profile.key.precision
    if ask.memory_limit_bytes is not None and prices[own].memory is None:
        raise InvalidInput(
            "--memory-limit", "memory could not be measured here", "Leave it out, or tune again."
        )
    base = Candidate(
        1,
        prices[own].cost,
        threads=profile.settings.threads,
        precision=own,
        max_length=profile.settings.max_length,
        agreement=_tau(profile, own),
        memory=prices[own].memory,
    )
    kinds = [base]
    kinds += [
        replace(base, max_length=one.max_length, agreement=one.tau)
        for one in lengths
        if one.reason is None
    ]
    if "precision" in ask.allow:
        kinds += [_other(base, row, profile, prices) for row in _others(profile)]
    return [
        replace(kind, token_budget=budget, workers=workers)
        for workers in worker_counts(profile)
        for kind in kinds
        for budget in budgets(profile, ask)
    ]


def budgets(profile: Profile, ask: Ask) -> list[int]:
    """Token budgets, rising: the profile's own and the usual ones that memory did not refuse."""
    settings, kind = profile.settings, profile.key.device.partition(":")[0]
    own = [settings.token_budget] if settings.token_budget != NO_BUDGET else []
    most = most_tokens(profile)
    found = sorted({one for one in (*own, *BUDGETS[kind]) if one <= most})
    found = found or [most]
    memory = memory_of(profile)
    if ask.memory_limit_bytes is None or memory is None:
        return found
    fit = [one for one in found if memory.bytes_of(one) <= ask.memory_limit_bytes]
    return fit or found[:1]  # the solver says what is possible instead


def most_tokens(profile: Profile) -> int:
    """Tokens of a step that memory did not refuse."""
    refused = [
        point["token_budget"]
        for point in profile.points
        if point.get("token_budget") and point.get("status") == "out_of_memory"
    ]
    return min(
        [one - 1 for one in refused]
        + [one for one in (profile.learned_token_budget,) if one is not None],
        default=NO_BUDGET,
    )


def worker_counts(profile: Profile) -> list[int]:
    """One, and on several cards of a machine as many as there are."""
    cards = len(profile.machine.get("gpus") or ())
    several = profile.key.device == "cuda:0" and cards > 1
    return list(range(1, cards + 1)) if several else [1]


def row_of(profile: Profile, precision: str) -> dict[str, Any] | None:
    """What tuning found of a precision; None where it was not compared."""
    rows = [row for row in profile.precisions if row["precision"] == precision]
    return rows[0] if rows else None


def _tau(profile: Profile, precision: str) -> float:
    row = row_of(profile, precision)
    return 1.0 if row is None else float(row["tau"])


def _others(profile: Profile) -> list[dict[str, Any]]:
    own = profile.key.precision
    return [row for row in profile.precisions if row["passed"] and row["precision"] != own]


def _other(
    base: Candidate, row: dict[str, Any], profile: Profile, prices: dict[str, Prices]
) -> Candidate:
    """Another precision; where its steps were not measured, as its speed in the gate says."""
    name = row["precision"]
    own = row_of(profile, base.precision)
    known = prices.get(name)
    if known is None:
        pace = own["tokens_per_s"] / row["tokens_per_s"] if own else 1.0
        known = Prices(paced(base.cost, pace), base.memory)
    return replace(
        base, precision=name, agreement=float(row["tau"]), cost=known.cost, memory=known.memory
    )
