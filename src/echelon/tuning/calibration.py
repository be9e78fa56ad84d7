"""A model on its device to a cost model and a memory model: choose probes, measure, fit.

Times are those of an open scorer. Memory on CPU is that of a worker, a process of its own as
``echelon serve`` has them: the tuning process has had the model open in other precisions and still
holds what libraries kept of those.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from echelon.engine.worker import ChildWorker
from echelon.errors import EchelonError, TooNoisy
from echelon.messages import Message
from echelon.models.base import DeviceOutOfMemory, WorkerDied
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, work_of
from echelon.scheduling.fit import fit_cost, fit_memory
from echelon.tokenization.pairs import gather
from echelon.tuning.machine import MemoryMeter, meter_of
from echelon.tuning.probes import FEWEST_ROUNDS, choose, growing, measure

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.data import Texts
    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.scheduling.cost_model import Coefficients
    from echelon.scheduling.fit import Probe
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.tuning.probes import LengthRange, Lengths
    from echelon.types import Clock, ModelInfo, TokenBatch


logger = logging.getLogger(__name__)

LEVEL_STEPS = 3
"""Steps after the first that tell roughly how fast the machine is: the probes are planned by it."""

STEP_TIMEOUT_S = 600.0
"""A probe takes seconds; a worker that answers none for so long hangs."""


class StepFactory:
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
        cost: see :class:`echelon.scheduling.fit.CostFit`.
        memory: see :class:`echelon.scheduling.fit.MemoryFit`.
        warnings: why something was refused, and the remedy.
    """

    cost: dict[str, Any] | None
    memory: dict[str, Any] | None
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Probes, measured on an open scorer.

    Attributes:
        probes: to fit models to.
        checks: to judge them by.
        limits: the largest step and pair there were.
        stuff: made their steps.
        info: the model and the device.
    """

    probes: list[Probe]
    checks: list[Probe]
    limits: LengthRange
    stuff: StepFactory
    info: ModelInfo


def calibrate(
    scorer: Scorer,
    stuff: StepFactory,
    limits: LengthRange,
    clock: Clock,
    limit_s: float,
    told: Callable[[float], None] = lambda _: None,
) -> ProbeResult:
    """Choose probes and measure them.

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

    prior = level(run, limits, DEFAULT_COEFFICIENTS[scorer.info.device.partition(":")[0]], clock)
    shapes = choose(limits, prior, limit_s / (1 + FEWEST_ROUNDS))
    meter = meter_of(scorer.info.device)
    measured = measure(shapes.probes + shapes.checks, run, meter, clock, limit_s, told)
    checks = set(shapes.checks)
    probes = [probe for probe in measured if probe.lengths not in checks]
    unseen = [probe for probe in measured if probe.lengths in checks]
    return ProbeResult(probes, unseen, limits, stuff, scorer.info)


def models_of(probed: ProbeResult, opener: ScorerFactory) -> Calibration:
    """Both models, once the scorer is closed: on CPU a worker opens it again.

    Args:
        probed: what was measured.
        opener: opens the same model.
    """
    probes, checks, limits = probed.probes, probed.checks, probed.limits
    if probed.info.device != "cpu":
        return fitted(probes, checks, limits)
    try:
        peaks = worker_peaks([*probes, *checks], probed.stuff, opener, probed.info.precision)
    except (EchelonError, DeviceOutOfMemory, WorkerDied) as error:
        return _without_memory(fitted(probes, checks, limits), error)
    seen, unseen = (
        [replace(probe, peak_bytes=peaks.get(probe.lengths)) for probe in some]
        for some in (probes, checks)
    )
    return fitted(seen, unseen, limits)


def worker_peaks(
    probes: list[Probe], stuff: StepFactory, opener: ScorerFactory, precision: str
) -> dict[Lengths, int]:
    """Peak memory of a worker in each step, in bytes; without those that did not fit.

    Raises:
        EchelonError: it could not open the model, or score a step.
        DeviceOutOfMemory: not even the smallest step fitted.
        WorkerDied: it ended before it had scored one.
    """
    worker = ChildWorker(opener, "worker that probes memory")
    worker.start(precision)
    peaks: dict[Lengths, int] = {}
    meter = MemoryMeter(worker.pid)
    try:
        for shape in growing(probe.lengths for probe in probes):
            meter.reset()
            worker.score(stuff.batch(shape), STEP_TIMEOUT_S)
            peaks[shape] = meter.peak_bytes()
    except (DeviceOutOfMemory, WorkerDied) as end:
        if not peaks:
            raise
        # Larger ones would not fit either.
        logger.info("Memory was probed up to %d steps: %s", len(peaks), end)
    finally:
        worker.stop()
    return peaks


def _without_memory(models: Calibration, error: Exception) -> Calibration:
    words = Message("calibration.no_memory_model", {"error": str(error)})
    return replace(models, memory=None, warnings=[*models.warnings, words])


def fitted(probes: list[Probe], unseen: list[Probe], limits: LengthRange) -> Calibration:
    """Both models, or why there is none."""
    cost = memory = None
    warnings = []
    try:
        measured = datetime.now(UTC).isoformat(timespec="seconds")
        cost = replace(fit_cost(probes, unseen, limits.padding), measured=measured).as_dict()
    except TooNoisy as error:
        warnings.append(error.args[0])
    try:
        memory = fit_memory(probes, unseen, limits.padding).as_dict()
    except TooNoisy as error:
        warnings.append(error.args[0])
    return Calibration(cost, memory, warnings)


def level(
    run: Callable[[Lengths], None], limits: LengthRange, prior: Coefficients, clock: Clock
) -> Coefficients:
    """Default prices at the speed of this machine: the fastest of some steps of one long pair."""
    shape = (limits.longest,)
    run(shape)
    times = []
    for _ in range(LEVEL_STEPS):
        began = clock()
        run(shape)
        times.append(clock() - began)
    scale = max(min(times), 1e-9) / prior.seconds(work_of(shape, limits.padding))
    return prior.priced([scale * price for price in prior.prices])
