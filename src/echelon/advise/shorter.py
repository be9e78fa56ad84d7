"""What a shorter ``max_length`` costs in accuracy: measured on the trial's texts, never assumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.engine.precision_check import agreement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.precision_check import PrecisionCheck
    from echelon.plan.workload import Arrival

LENGTHS = (256, 128)
"""Shorter lengths that are tried."""

LIKE = 0.1
"""Share of pairs that the load may have cut beyond those of the texts that rankings were compared
on: what is not cut there proves nothing."""


@dataclass(frozen=True, slots=True)
class Shorter:
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
) -> list[Shorter]:
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
            Shorter(
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
        return [int(length) for length in trial.encode(scorer.facts).lengths]
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
