"""How well two score lists of the same queries agree, and how sure that is. Pure.

Kendall's tau-b: Kendall (1945), "The treatment of ties in ranking problems". nDCG: Järvelin and
Kekäläinen (2002), with gains 2^grade - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from echelon.types import FloatArray

MIN_TAU = 0.97
MIN_OVERLAP = 0.97
MAX_NDCG_LOSS = 0.005
TOP = 10

CONFIDENCE = 0.98
"""Of each bound of a mean. The bounds are looked at after 12, 24, 48, … queries until they decide;
together these looks are wrong in about one case of twenty (tests/engine/test_agreement.py)."""

RESAMPLES, BLOCK = 1000, 1024
"""Samples of the bootstrap, of which twenty lie beyond a bound, and values drawn at a time."""

SMALLEST = {"tau": 0.03, "overlap": 1 / TOP}
"""The smallest differences of a query: two neighbours of twelve documents change places, and one of
the best ten documents is another."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the scores of a precision agree with those of fp32: means over queries."""

    tau: float  # Kendall's tau-b within queries
    overlap: float  # share of the top ten that both have
    max_delta: float  # largest difference of a logit
    ndcg_loss: float | None  # nDCG@10 of fp32 minus that of the precision; None without judgements
    tau_low: float  # bounds of the means, see :func:`mean_bounds`
    tau_high: float
    overlap_low: float
    overlap_high: float

    @property
    def proven(self) -> bool:
        """Whether tau and overlap surely are as high as required."""
        return self.tau_low >= MIN_TAU and self.overlap_low >= MIN_OVERLAP

    @property
    def passed(self) -> bool:
        """Whether the precision may be used instead of fp32."""
        return self.proven and (self.ndcg_loss is None or self.ndcg_loss <= MAX_NDCG_LOSS)

    @property
    def failed(self) -> bool:
        """Whether tau or overlap surely is too low; more queries would not help."""
        return self.tau_high < MIN_TAU or self.overlap_high < MIN_OVERLAP


NO_AGREEMENT = Agreement(0.0, 0.0, float(np.finfo(np.float32).max), None, *[0.0] * 4)
"""Of a precision whose logits are no numbers: it surely fails."""


def decided(row: Mapping[str, Any]) -> bool:
    """Whether the queries were enough to say that a precision ranks as fp32 does, or does not.

    A precision that nothing decides does not pass; rows of older profiles were decided by means.
    """
    return bool(row.get("proven", True) or row["failed"])


def agreement(
    reference: Sequence[FloatArray],
    candidate: Sequence[FloatArray],
    grades: Sequence[Sequence[int] | None],
) -> Agreement:
    """Compare logits query by query; ``grades`` is the judged relevance of each document."""
    pairs = list(zip(reference, candidate, strict=True))
    losses = [
        ndcg(exact, judged) - ndcg(other, judged)
        for (exact, other), judged in zip(pairs, grades, strict=True)
        if judged is not None and any(judged)
    ]
    taus = [kendall_tau(a, b) for a, b in pairs]
    overlaps = [top_overlap(a, b) for a, b in pairs]
    return Agreement(
        float(np.mean(taus)),
        float(np.mean(overlaps)),
        max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs),
        float(np.mean(losses)) if losses else None,
        *mean_bounds(taus, SMALLEST["tau"]),
        *mean_bounds(overlaps, SMALLEST["overlap"]),
    )


def mean_bounds(values: Sequence[float], smallest: float) -> tuple[float, float]:
    """Lower and upper bound of the mean that many queries like these would have.

    Percentiles of the bootstrap over queries (Efron and Tibshirani 1993, "An Introduction to the
    Bootstrap", chapter 13), each with :data:`CONFIDENCE`. What a few queries do not show counts as
    one query more: as low as the lowest, and at least ``smallest`` below 1, in the lower bound; 1
    in the upper. So queries without a difference prove something only when there are enough.

    This holds for differences that many queries have, as rounding makes them, not for a large one
    in a few of a hundred: bounds for any distribution (Maurer and Pontil 2009, "Empirical Bernstein
    Bounds") would need hundreds of queries without a difference.
    """
    low = _resampled([*values, min(*values, 1.0 - smallest)])
    high = _resampled([*values, 1.0])
    return float(np.quantile(low, 1 - CONFIDENCE)), float(np.quantile(high, CONFIDENCE))


def _resampled(values: Sequence[float]) -> list[float]:
    """Means of samples of the same size, the same at every call."""
    chance, known, sums = np.random.default_rng(0), np.asarray(values), np.zeros(RESAMPLES)
    for begin in range(0, len(known), BLOCK):
        taken = min(BLOCK, len(known) - begin)
        sums += known[chance.integers(0, len(known), (RESAMPLES, taken))].sum(axis=1)
    means: list[float] = (sums / len(known)).tolist()
    return means


def kendall_tau(first: FloatArray, second: FloatArray) -> float:
    """Kendall's tau-b of two score lists; 1.0 where all scores of a list are equal."""
    upper = np.triu_indices(len(first), 1)
    a = np.sign(first[upper[0]] - first[upper[1]])
    b = np.sign(second[upper[0]] - second[upper[1]])
    orderable = np.sqrt(float(np.count_nonzero(a)) * float(np.count_nonzero(b)))
    return float(np.dot(a, b) / orderable) if orderable else 1.0


def top_overlap(first: FloatArray, second: FloatArray, top: int = TOP) -> float:
    """Share of the best ``top`` documents that both lists have in common."""
    size = min(top, len(first))
    best = [set(np.argsort(-scores, kind="stable")[:size].tolist()) for scores in (first, second)]
    return len(best[0] & best[1]) / size if size else 1.0


def ndcg(scores: FloatArray, grades: Sequence[int], top: int = TOP) -> float:
    """Compute nDCG at ``top`` of the order by score; 0.0 where no document is relevant."""
    gains = 2.0 ** np.asarray(grades, dtype=np.float64) - 1.0
    discounts = 1.0 / np.log2(np.arange(2, len(gains) + 2))
    discounts[top:] = 0.0
    ideal = float(np.dot(np.sort(gains)[::-1], discounts))
    got = float(np.dot(gains[np.argsort(-scores, kind="stable")], discounts))
    return got / ideal if ideal else 0.0
