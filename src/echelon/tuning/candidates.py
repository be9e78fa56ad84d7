"""The ways to run a service on this machine that are worth trying. Pure.

What a shorter ``max_length`` costs in accuracy: measured on the trial's texts, never assumed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import agreement
from echelon.errors import InvalidInput
from echelon.scheduling.packing import NO_BUDGET
from echelon.simulation.capacity_plan import BUDGETS
from echelon.simulation.fitted_models import cost_of, memory_of
from echelon.tuning.scenario import Candidate
from echelon.tuning.validation_metrics import paced

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.precision_check import PrecisionCheck
    from echelon.profile import Profile
    from echelon.scheduling.cost_model import CostModel, MemoryModel
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import ScenarioGoal


@dataclass(frozen=True, slots=True)
class CandidatePrices:
    """What was measured of one precision.

    Attributes:
        cost: how long its steps take.
        memory: what they need; None where it is not known.
    """

    cost: CostModel
    memory: MemoryModel | None


def prices_of(profile: Profile) -> dict[str, CandidatePrices]:
    """The measured precision's prices, by its name.

    Raises:
        ProfileError: the profile holds too little.
    """
    return {profile.key.precision: CandidatePrices(cost_of(profile), memory_of(profile))}


def candidates(
    profile: Profile,
    ask: ScenarioGoal,
    prices: dict[str, CandidatePrices],
    lengths: Sequence[MaxLengthCheck],
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


def budgets(profile: Profile, ask: ScenarioGoal) -> list[int]:
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
    base: Candidate, row: dict[str, Any], profile: Profile, prices: dict[str, CandidatePrices]
) -> Candidate:
    """Another precision; where its steps were not measured, as its speed in the gate says."""
    name = row["precision"]
    own = row_of(profile, base.precision)
    known = prices.get(name)
    if known is None:
        pace = own["tokens_per_s"] / row["tokens_per_s"] if own else 1.0
        known = CandidatePrices(paced(base.cost, pace), base.memory)
    return replace(
        base, precision=name, agreement=float(row["tau"]), cost=known.cost, memory=known.memory
    )


LENGTHS = (256, 128)
"""Shorter lengths that are tried."""

LIKE = 0.1
"""Share of pairs that the load may have cut beyond those of the texts that rankings were compared
on: what is not cut there proves nothing."""


@dataclass(frozen=True, slots=True)
class MaxLengthCheck:
    """A shorter length and what it costs.

    Attributes:
        max_length: tokens a pair may have.
        precision: that it was measured in.
        tau: Kendall's tau-b with fp32 at full length.
        overlap: share of the top ten that is the same.
        ndcg_loss: nDCG@10 lost; None without judgements.
        cut: share of the texts' pairs that it cuts.
        load_cut: share of the load's.
        passed: whether it ranks as fp32 at full length does.
        reason: why it cannot be chosen; None where it can.
    """

    max_length: int
    precision: str
    tau: float
    overlap: float
    ndcg_loss: float | None
    cut: float
    load_cut: float
    passed: bool
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """The answer's entry."""
        return asdict(self)


def shorter(
    trial: PrecisionCheck,
    precision: str,
    keep_bf16: Sequence[str],
    requests: Sequence[Arrival],
    told: Callable[[str], None],
) -> list[MaxLengthCheck]:
    """Measure each length that cuts anything of the load.

    Args:
        trial: with the full length in its options.
        precision: of the shorter ones; the reference is fp32.
        keep_bf16: layers that int8 leaves in bf16.
        requests: of the load.
        told: called with what is being done.
    """
    load = [length for request in requests for length in request.lengths]
    lengths = [most for most in LENGTHS if most < max(load, default=0)]
    if not lengths:
        return []
    told("scoring with fp32 at full length")
    reference, _ = trial.score("fp32")
    texts = _lengths(trial, precision, keep_bf16)
    found = []
    for most in lengths:
        told(f"comparing {precision} at {most} tokens")
        cut = replace(trial, options=replace(trial.options, max_length=most))
        logits, _ = cut.score(precision, keep_bf16)
        verdict = agreement(reference, logits, [topic.grades for topic in trial.topics])
        shares = [sum(n > most for n in some) / max(1, len(some)) for some in (texts, load)]
        found.append(
            MaxLengthCheck(
                most,
                precision,
                verdict.tau,
                verdict.overlap,
                verdict.ndcg_loss,
                shares[0],
                shares[1],
                verdict.passed,
                _reason(most, shares, passed=verdict.passed),
            )
        )
    return found


def _lengths(trial: PrecisionCheck, precision: str, keep_bf16: Sequence[str]) -> list[int]:
    scorer = trial.open(precision, keep_bf16)
    try:
        return [int(length) for length in trial.encode(scorer.info).lengths]
    finally:
        scorer.close()


def _reason(most: int, shares: Sequence[float], *, passed: bool) -> str | None:
    if not passed:
        return f"{most} tokens do not rank as fp32 at full length does"
    if shares[1] > shares[0] + LIKE:
        return (
            f"{most} tokens cut {shares[1]:.0%} of the load and {shares[0]:.0%} of the texts, so "
            "the agreement proves nothing: give longer ones with --data"
        )
    return None
