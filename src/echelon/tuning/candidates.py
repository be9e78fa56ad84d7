"""The settings worth simulating, and what a shorter ``max_length`` costs in accuracy.

Accuracy is measured on the texts of the precision check, never assumed.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import Comparisons, PrecisionCheck
from echelon.errors import InvalidInput
from echelon.messages import tr
from echelon.scheduling.cost_model import CostModel, MemoryModel
from echelon.scheduling.packing import NO_BUDGET
from echelon.simulation.capacity_plan import BUDGETS
from echelon.simulation.fitted_models import cost_of, memory_of
from echelon.tuning.scenario import Candidate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.profile import Profile
    from echelon.progress import Progress
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import ScenarioGoal

LENGTHS = (256, 128)  # values of `max_length` that are tried

MAX_EXTRA_CUT = 0.1
"""A length may cut this share of pairs more in the load than in the texts of the precision check:
pairs that are not cut there say nothing about accuracy."""


@dataclass(frozen=True, slots=True)
class FittedModels:
    """The models of one precision; ``memory`` is None where it is not known."""

    cost: CostModel
    memory: MemoryModel | None


def fitted_models(profile: Profile) -> dict[str, FittedModels]:
    """The models of the profile's precision, by its name."""
    return {profile.key.precision: FittedModels(cost_of(profile), memory_of(profile))}


def paced(cost: CostModel, pace: float) -> CostModel:
    """The same cost model for a machine on which each step takes ``pace`` times as long."""
    prior = cost.coefficients
    return CostModel(prior.with_values(value * pace for value in prior.values), cost.padding)


def candidates(
    profile: Profile,
    goal: ScenarioGoal,
    fitted: dict[str, FittedModels],
    lengths: Sequence[MaxLengthCheck],
) -> list[Candidate]:
    """All candidates, the profile's precision at full length first.

    A precision that is not in ``fitted`` gets the profile's models, scaled by its speed.

    Raises:
        InvalidInput: there is a limit on memory, and memory was not measured.
    """
    own = profile.key.precision
    if goal.memory_limit_bytes is not None and fitted[own].memory is None:
        raise InvalidInput(
            "--memory-limit", "memory could not be measured here", "Leave it out, or tune again."
        )
    row = profile.precision_row(own)
    base = Candidate(
        1,
        fitted[own].cost,
        threads=profile.settings.threads,
        precision=own,
        max_length=profile.settings.max_length,
        agreement=1.0 if row is None else float(row["tau"]),
        memory=fitted[own].memory,
    )
    kinds = [base]
    usable = [one for one in lengths if one.reason is None]
    kinds += [replace(base, max_length=one.max_length, agreement=one.tau) for one in usable]
    if "precision" in goal.allow:
        others = [r for r in profile.precisions if r["passed"] and r["precision"] != own]
        kinds += [_other(base, other, profile, fitted) for other in others]
    return [
        replace(kind, token_budget=budget, workers=workers)
        for workers in worker_counts(profile)
        for kind in kinds
        for budget in budgets(profile, goal)
    ]


def _other(
    base: Candidate, row: dict[str, Any], profile: Profile, fitted: dict[str, FittedModels]
) -> Candidate:
    """Another precision; where its steps were not measured, scaled by its speed in the check."""
    name = row["precision"]
    own = profile.precision_row(base.precision)
    known = fitted.get(name)
    if known is None:
        pace = own["tokens_per_s"] / row["tokens_per_s"] if own else 1.0
        known = FittedModels(paced(base.cost, pace), base.memory)
    return replace(
        base, precision=name, agreement=float(row["tau"]), cost=known.cost, memory=known.memory
    )


def budgets(profile: Profile, goal: ScenarioGoal) -> list[int]:
    """Token budgets, ascending: the profile's own and the usual ones, as far as memory allows."""
    settings, kind = profile.settings, profile.key.device.partition(":")[0]
    own = [settings.token_budget] if settings.token_budget != NO_BUDGET else []
    largest = largest_budget(profile)
    found = sorted({one for one in (*own, *BUDGETS[kind]) if one <= largest})
    found = found or [largest]
    memory = memory_of(profile)
    if goal.memory_limit_bytes is None or memory is None:
        return found
    fit = [one for one in found if memory.bytes_of(one) <= goal.memory_limit_bytes]
    return fit or found[:1]  # the solver says what is possible instead


def largest_budget(profile: Profile) -> int:
    """Largest token budget that did not run out of memory."""
    failed = [
        point["token_budget"] - 1
        for point in profile.points
        if point.get("token_budget") and point.get("status") == "out_of_memory"
    ]
    learned = profile.learned_token_budget
    return min([*failed, NO_BUDGET if learned is None else learned], default=NO_BUDGET)


def worker_counts(profile: Profile) -> list[int]:
    """Numbers of workers: one, and on a machine with several GPUs up to one for each."""
    gpus = len(profile.machine.get("gpus") or ())
    several = profile.key.device == "cuda:0" and gpus > 1
    return list(range(1, gpus + 1)) if several else [1]


@dataclass(frozen=True, slots=True)
class MaxLengthCheck:
    """A shorter length and its agreement with fp32 at full length."""

    max_length: int  # tokens
    precision: str
    tau: float
    overlap: float
    ndcg_loss: float | None  # None without judgements
    cut: float  # share of the texts' pairs that are cut
    load_cut: float  # share of the load's pairs that are cut
    passed: bool
    reason: str | None  # why it cannot be chosen; None where it can


def check_max_lengths(
    check: PrecisionCheck,
    precision: str,
    keep_bf16: Sequence[str],
    requests: Sequence[Arrival],
    on_progress: Progress,
) -> list[MaxLengthCheck]:
    """Measure the accuracy of each length that cuts any pair of the requests.

    The reference is fp32 at the full length, which is in the options of ``check``.
    """
    load = [length for request in requests for length in request.lengths]
    lengths = [length for length in LENGTHS if length < max(load, default=0)]
    if not lengths:
        return []
    on_progress(tr("scoring with fp32 at full length"))
    comparisons = Comparisons(check)
    texts, found = _lengths(check, precision, keep_bf16), []
    for limit in lengths:
        on_progress(tr("comparing {precision} at {limit} tokens", precision=precision, limit=limit))
        seen = comparisons.row(precision, keep_bf16, limit)
        text_cut, load_cut = (sum(n > limit for n in some) / len(some) for some in (texts, load))
        reason = _reason(limit, text_cut, load_cut, passed=seen["passed"])
        ranks = (seen["tau"], seen["overlap"], seen["ndcg_loss"])
        shares = (text_cut, load_cut)
        found.append(MaxLengthCheck(limit, precision, *ranks, *shares, seen["passed"], reason))
    return found


def _lengths(check: PrecisionCheck, precision: str, keep_bf16: Sequence[str]) -> list[int]:
    with closing(check.open(precision, keep_bf16)) as scorer:
        return [int(length) for length in check.encode(scorer.info).lengths]


def _reason(limit: int, text_cut: float, load_cut: float, *, passed: bool) -> str | None:
    if not passed:
        return f"{limit} tokens do not rank as fp32 at full length does"
    if load_cut > text_cut + MAX_EXTRA_CUT:
        return (
            f"{limit} tokens cut {load_cut:.0%} of the load but only {text_cut:.0%} of the texts, "
            "so the measured agreement is not valid: give longer texts with --data"
        )
    return None
