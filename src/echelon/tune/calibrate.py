"""A model on its device to a cost model and a memory model: choose probes, measure, fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from echelon.encode.pairs import gather
from echelon.errors import TooNoisy
from echelon.plan.cost import DEFAULT_COEFFICIENTS, work_of
from echelon.tune.fit import fit_cost, fit_memory
from echelon.tune.hardware import meter_of
from echelon.tune.probes import FEWEST_ROUNDS, choose, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.clock import Clock
    from echelon.encode.pairs import EncodedPairs
    from echelon.encode.tokens import PairEncoder
    from echelon.plan.cost import Coefficients
    from echelon.score.base import Scorer
    from echelon.tune.fit import Probe
    from echelon.tune.probes import Lengths, Range
    from echelon.tune.texts import Texts
    from echelon.types import TokenBatch


LEVEL_STEPS = 3
"""Steps after the first that tell roughly how fast the machine is: the probes are planned by it."""


class Stuff:
    """Steps of any shape out of real texts.

    Args:
        encoder: the model's tokenizer.
        texts: what to cut pairs from.
        longest: tokens of the longest pair.
    """

    def __init__(self, encoder: PairEncoder, texts: Texts, longest: int) -> None:
        self.longest = longest
        topic = texts.topics[0]
        document = " ".join(text for topic in texts.topics for text in topic.documents)
        self._whole = encoder.encode([(topic.query, document)], longest, "longest_first")
        if int(self._whole.lengths[0]) < longest:
            times = 1 + longest // max(1, int(self._whole.kept[0, 1]))
            again = " ".join([document] * times)
            self._whole = encoder.encode([(topic.query, again)], longest, "longest_first")
        self._cut: dict[int, EncodedPairs] = {}

    def batch(self, lengths: Lengths) -> TokenBatch:
        """A step of pairs of these lengths."""
        return gather([(self._of(length), 0) for length in lengths])

    def _of(self, length: int) -> EncodedPairs:
        if length not in self._cut:
            self._cut[length] = self._whole.shortened(length, [0])
        return self._cut[length]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the probes gave, as the profile holds it; None where it was refused.

    Attributes:
        cost: see :class:`echelon.tune.fit.CostFit`.
        memory: see :class:`echelon.tune.fit.MemoryFit`.
        warnings: why something was refused, and the remedy.
    """

    cost: dict[str, Any] | None
    memory: dict[str, Any] | None
    warnings: list[str]


def calibrate(
    scorer: Scorer,
    stuff: Stuff,
    limits: Range,
    clock: Clock,
    limit_s: float,
    told: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Measure probes and fit both models.

    Args:
        scorer: the model, open.
        stuff: makes its steps.
        limits: the largest step and pair to know of.
        clock: seconds.
        limit_s: time to spend, in seconds.
        told: called with the share of the time used, 0 to 1.
    """

    def run(shape: Lengths) -> None:
        scorer.score(stuff.batch(shape))

    prior = level(run, limits, DEFAULT_COEFFICIENTS[scorer.facts.device.partition(":")[0]], clock)
    shapes = choose(limits, prior, limit_s / (1 + FEWEST_ROUNDS))
    meter = meter_of(scorer.facts.device)
    measured = measure(shapes.probes + shapes.checks, run, meter, clock, limit_s, told)
    checks = set(shapes.checks)
    probes = [probe for probe in measured if probe.lengths not in checks]
    return fitted(probes, [probe for probe in measured if probe.lengths in checks], limits)


def fitted(probes: list[Probe], unseen: list[Probe], limits: Range) -> Calibration:
    """Both models, or why there is none."""
    cost = memory = None
    warnings = []
    try:
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        cost = replace(fit_cost(probes, unseen, limits.paid), measured=measured).as_dict()
    except TooNoisy as error:
        warnings.append(str(error))
    try:
        memory = fit_memory(probes, unseen, limits.paid).as_dict()
    except TooNoisy as error:
        warnings.append(str(error))
    return Calibration(cost, memory, warnings)


def level(
    run: Callable[[Lengths], None], limits: Range, prior: Coefficients, clock: Clock
) -> Coefficients:
    """Default prices at the speed of this machine: the fastest of some steps of one long pair."""
    shape = (limits.longest,)
    run(shape)
    times = []
    for _ in range(LEVEL_STEPS):
        began = clock()
        run(shape)
        times.append(clock() - began)
    scale = max(min(times), 1e-9) / prior.seconds(work_of(shape, limits.paid))
    return prior.priced([scale * price for price in prior.prices])
