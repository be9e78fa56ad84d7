"""Does a faster precision rank as the reference does? Agreement between two sets of scores. Pure.

Kendall's tau-b is Kendall (1945), "The treatment of ties in ranking problems"; nDCG is Järvelin
and Kekäläinen (2002) with gains 2^grade - 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.types import FloatArray

LEAST_TAU = 0.97
LEAST_OVERLAP = 0.97
MOST_NDCG_LOSS = 0.005
TOP = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """How scores of one precision agree with fp32's, means over queries.

    Attributes:
        tau: Kendall's tau-b within queries.
        overlap: share of the top ten that is the same.
        max_delta: largest difference of a logit.
        ndcg_loss: nDCG@10 of fp32 minus that of the precision; None without judgements.
    """

    tau: float
    overlap: float
    max_delta: float
    ndcg_loss: float | None

    @property
    def passed(self) -> bool:
        """Whether it may serve in place of fp32."""
        return (
            self.tau >= LEAST_TAU
            and self.overlap >= LEAST_OVERLAP
            and (self.ndcg_loss is None or self.ndcg_loss <= MOST_NDCG_LOSS)
        )


def agreement(
    reference: Sequence[FloatArray],
    candidate: Sequence[FloatArray],
    grades: Sequence[Sequence[int] | None],
) -> Agreement:
    """Compare logits query by query.

    Args:
        reference: per query, fp32 logits of its documents.
        candidate: per query, the other precision's.
        grades: per query, judged relevance of its documents, or None.
    """
    pairs = list(zip(reference, candidate, strict=True))
    losses = [
        ndcg(kept, judged) - ndcg(other, judged)
        for (kept, other), judged in zip(pairs, grades, strict=True)
        if judged is not None and any(judged)
    ]
    return Agreement(
        tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        overlap=float(np.mean([top_overlap(a, b) for a, b in pairs])),
        max_delta=max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs),
        ndcg_loss=float(np.mean(losses)) if losses else None,
    )


def kendall_tau(first: FloatArray, second: FloatArray) -> float:
    """Kendall's tau-b of two score lists; 1.0 where one of them has nothing to order."""
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
    """Give nDCG at ``top`` of the order that the scores give; 0.0 where nothing is relevant."""
    gains = 2.0 ** np.asarray(grades, dtype=np.float64) - 1.0
    discounts = 1.0 / np.log2(np.arange(2, len(gains) + 2))
    discounts[top:] = 0.0
    ideal = float(np.dot(np.sort(gains)[::-1], discounts))
    got = float(np.dot(gains[np.argsort(-scores, kind="stable")], discounts))
    return got / ideal if ideal else 0.0
