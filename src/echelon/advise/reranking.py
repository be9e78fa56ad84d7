"""The reranker under requests: all at once, or one caller after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echelon.tune.hardware import meter_of
from echelon.types import monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from echelon.reranker import Reranker

Texts = list[tuple[str, list[str]]]
"""Query and documents of each request."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to rerank, and how.

    Attributes:
        model: as the user gave it.
        keywords: of :class:`echelon.Reranker`.
        warm: requests that do not count.
        texts: those that do.
        at_once: one call for all of them; else one caller after another.
        within_s: seconds after which no further caller is asked for; None serves them all.
    """

    model: str | os.PathLike[str]
    keywords: dict[str, Any]
    warm: Texts
    texts: Texts
    at_once: bool
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it.

    Attributes:
        waits: seconds that each caller waited; empty where all was one call.
        whole_s: seconds of everything.
        peak_bytes: peak memory, warm-up and libraries included.
    """

    waits: list[float]
    whole_s: float
    peak_bytes: int


def run(task: Task, told: Callable[[float], object] = lambda _: None) -> Ran:
    """Rerank.

    Args:
        task: what.
        told: called with the share that is done.
    """
    from echelon.reranker import Reranker

    with Reranker(task.model, **task.keywords) as reranker:
        for query, documents in task.warm:
            reranker.rank(query, documents)
        meter = meter_of(reranker.facts.device)
        meter.reset()
        if task.at_once:
            return Ran([], _all_at_once(reranker, task.texts), meter.peak_bytes())
        waits = _one_after_another(reranker, task, told)
        return Ran(waits, sum(waits), meter.peak_bytes())


def _all_at_once(reranker: Reranker, texts: Texts) -> float:
    pairs = [(query, document) for query, documents in texts for document in documents]
    began = monotonic()
    reranker.score_pairs(pairs)
    return monotonic() - began


def _one_after_another(
    reranker: Reranker, task: Task, told: Callable[[float], object]
) -> list[float]:
    """Each caller's wait; where they are slower than thought, those of the time there is."""
    began, waits = monotonic(), []
    for number, (query, documents) in enumerate(task.texts, 1):
        started = monotonic()
        reranker.rank(query, documents)
        ended = monotonic()
        waits.append(ended - started)
        gone = number / len(task.texts)
        if task.within_s is not None:
            gone = (ended - began) / task.within_s
        told(min(1.0, gone))
        if gone >= 1:
            break
    return waits
