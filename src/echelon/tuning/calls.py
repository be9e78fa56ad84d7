"""Runs calls of the sweep from texts to scores, and predicts the calls that were not measured."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.reports.statistics import student
from echelon.scheduling.cost_model import Work, work_of
from echelon.scheduling.packing import NO_BUDGET, pack
from echelon.tuning.machine import meter_of
from echelon.tuning.sweep import MeasuredPoint, SweepPoint, SweepRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from echelon.data import Texts
    from echelon.engine.precision_check import PrecisionCheck
    from echelon.models.base import Scorer
    from echelon.scheduling.fit import CostFit
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import Clock, IntArray


class TimedCalls:
    """Runs a point once, from texts to scores: identical pairs are scored again, not folded.

    A language model is asked other queries in each run; see ``PrecisionCheck.asked``.
    """

    def __init__(
        self,
        check: PrecisionCheck,
        scorer: Scorer,
        texts: Texts,
        counts: Sequence[int],
        clock: Clock,
    ) -> None:
        self._encode = partial(
            check.encoder.encode,
            max_length=check.max_length(scorer.info),
            truncation=check.options.truncation,
            max_query_tokens=check.options.max_query_tokens,
        )
        self._scorer, self._clock, self._texts = scorer, clock, texts
        self._asked, self._runs = check.asked, 0
        self.device, self._padding = scorer.info.device, scorer.info.padding
        self._samples = {count: texts.sample(count) for count in counts}
        self._lengths: dict[int, IntArray] = {}
        self._meter = meter_of(scorer.info.device)

    def __call__(self, point: SweepPoint) -> SweepRun:
        """Measure one run of ``point``; see :func:`echelon.tuning.sweep.sweep`."""
        self._runs += 1
        pairs = [
            (self._asked(query, self._runs), text) for query, text in self._samples[point.pairs]
        ]
        self._meter.reset()
        started = self._clock()
        encoded = self._encode(pairs)
        costs, step_s = encoded.costs, 0.0
        steps = self._packed(point, costs)
        for step in steps:
            step_s += self._scored(encoded, step)
        seconds, peak = self._clock() - started, self._meter.peak_bytes()
        tokens = int(encoded.lengths.sum())
        cost = sum(work_of(costs[step], self._padding).tokens for step in steps)
        return SweepRun(seconds, tokens, cost, len(steps), peak, step_s)

    def _scored(self, encoded: EncodedPairs, step: list[int]) -> float:
        batch, began = encoded.batch(step), self._clock()
        self._scorer.score(batch)
        return self._clock() - began

    def _packed(self, point: SweepPoint, lengths: IntArray) -> list[list[int]]:
        budget = point.token_budget or NO_BUDGET
        return pack(lengths, budget, padding=self._padding, max_pairs=point.batch_size)

    def lengths(self, pairs: int) -> IntArray:
        """Tokens that each pair of a call costs."""
        if pairs not in self._lengths:
            self._lengths[pairs] = self._encode(self._samples[pairs]).costs
        return self._lengths[pairs]

    def steps(self, point: SweepPoint) -> list[Work]:
        """The work of each step of a call."""
        lengths = self.lengths(point.pairs)
        return [work_of(lengths[step], self._padding) for step in self._packed(point, lengths)]

    def work(self, point: SweepPoint) -> Work:
        """The work of all steps of a call."""
        steps = self.steps(point)
        tokens, squares = sum(s.tokens for s in steps), sum(s.squares for s in steps)
        return Work(len(steps), tokens, squares)

    def data(self) -> dict[str, Any]:
        """The profile's entry of the texts, with the token lengths of the largest sample."""
        lengths = self.lengths(max(self._samples))
        p50, p90 = np.percentile(lengths, [50, 90]).tolist()
        tokens = {"mean": float(lengths.mean()), "p50": p50, "p90": p90, "max": int(lengths.max())}
        return {"name": self._texts.name, "pairs": len(self._texts.pairs), "tokens": tokens}


def predict(points: Iterable[MeasuredPoint], calls: TimedCalls, fit: CostFit) -> None:
    """Predict the points with too few runs: the fit's time of the steps, and that around them.

    The interval is that of one more observation among those that judged the fit.
    """
    points = list(points)
    around_s = _around_token_s(points)
    half = _half_width(fit)
    for measured in points:
        if measured.ended or measured.measured:
            continue
        steps = calls.steps(measured.point)
        seconds = sum(fit.coefficients.seconds(step) for step in steps)
        seconds += around_s * sum(step.tokens for step in steps)
        measured.status, measured.reason = "predicted", ""
        measured.predicted_s = seconds, seconds * math.exp(-half), seconds * math.exp(half)


def _around_token_s(points: Iterable[MeasuredPoint]) -> float:
    """Seconds for each token outside of the steps: encoding and packing."""
    spent = [
        (m.seconds[run] - m.step_s[run]) / m.cost_tokens
        for m in points
        if m.cost_tokens
        for run in m.used
    ]
    return max(0.0, float(np.median(spent))) if spent else 0.0


def _half_width(fit: CostFit) -> float:
    """Half of a prediction's 95 % interval, as a logarithm."""
    shapes = max(1, fit.error.shapes)
    spread = fit.error.p90 if fit.error.spread is None else fit.error.spread
    return student(shapes) * spread * math.sqrt(1 + 1 / shapes)
