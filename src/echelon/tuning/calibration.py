"""Fits a cost model and a memory model to a model on its device: choose probes, measure, fit.

Times are measured on an open scorer. Memory on CPU is measured in a worker process such as
``echelon serve`` uses, because the tuning process still holds memory of the precisions that it
opened before.
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
from echelon.progress import no_progress
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, work_of
from echelon.scheduling.fit import fit_cost, fit_memory
from echelon.tokenization.pairs import gather
from echelon.tuning.machine import MemoryMeter, meter_of
from echelon.tuning.probes import MIN_ROUNDS, choose, measure, smallest_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.data import Texts
    from echelon.engine.worker import ScorerFactory
    from echelon.models.base import Scorer
    from echelon.progress import Progress
    from echelon.scheduling.cost_model import Coefficients
    from echelon.scheduling.fit import Probe
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.tuning.probes import LengthRange, Lengths
    from echelon.types import Clock, ModelInfo, TokenBatch

logger = logging.getLogger(__name__)

PRIOR_STEPS = 3
"""Steps after the first that measure roughly how fast the machine is, to plan the probes."""

STEP_TIMEOUT_S = 600.0
"""A probe takes seconds; a worker without an answer for this long hangs."""


class StepFactory:
    """Makes steps of any shape from real texts, with pairs of at most ``longest`` tokens."""

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
        """Make a step of pairs of these lengths."""
        return gather([(self._of(length), 0) for length in lengths])

    def _of(self, length: int) -> EncodedPairs:
        if length not in self._cut:
            self._cut[length] = self._whole.shortened(length, [0])
        return self._cut[length]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fitted models, as the profile stores them; None where the fit was refused.

    Attributes:
        cost: see :class:`echelon.scheduling.fit.CostFit`.
        memory: see :class:`echelon.scheduling.fit.MemoryFit`.
        warnings: why a fit was refused, and the remedy.
    """

    cost: dict[str, Any] | None
    memory: dict[str, Any] | None
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Probes that were measured on an open scorer.

    Attributes:
        probes: the models are fitted to these.
        checks: the models are judged by these.
        limits: the largest step and pair that were possible.
        steps: made the steps.
        info: the model and the device.
    """

    probes: list[Probe]
    checks: list[Probe]
    limits: LengthRange
    steps: StepFactory
    info: ModelInfo


def calibrate(
    scorer: Scorer,
    steps: StepFactory,
    limits: LengthRange,
    clock: Clock,
    limit_s: float,
    on_progress: Progress = no_progress,
) -> ProbeResult:
    """Choose probes within the limits and measure them, for about ``limit_s`` seconds."""

    def run(shape: Lengths) -> None:
        scorer.score(steps.batch(shape))

    device = scorer.info.device
    prior = scaled_prior(run, limits, DEFAULT_COEFFICIENTS[device.partition(":")[0]], clock)
    shapes = choose(limits, prior, limit_s / (1 + MIN_ROUNDS))
    wanted = shapes.probes + shapes.checks
    measured = measure(wanted, run, meter_of(device), clock, limit_s, on_progress)
    checks = set(shapes.checks)
    probes = [probe for probe in measured if probe.lengths not in checks]
    unseen = [probe for probe in measured if probe.lengths in checks]
    return ProbeResult(probes, unseen, limits, steps, scorer.info)


def models_of(probed: ProbeResult, factory: ScorerFactory) -> Calibration:
    """Fit both models, after the scorer was closed: on CPU a worker opens the model again."""
    probes, checks, limits = probed.probes, probed.checks, probed.limits
    if probed.info.device != "cpu":
        return fitted(probes, checks, limits)
    try:
        peaks = worker_peaks([*probes, *checks], probed.steps, factory, probed.info.precision)
    except (EchelonError, DeviceOutOfMemory, WorkerDied) as error:
        models = fitted(probes, checks, limits)
        reason = Message("calibration.no_memory_model", {"error": str(error)})
        return replace(models, memory=None, warnings=[*models.warnings, reason])
    seen, unseen = (
        [replace(probe, peak_bytes=peaks.get(probe.lengths)) for probe in some]
        for some in (probes, checks)
    )
    return fitted(seen, unseen, limits)


def worker_peaks(
    probes: list[Probe], steps: StepFactory, factory: ScorerFactory, precision: str
) -> dict[Lengths, int]:
    """Measure the peak memory of a worker in each step that fits, in bytes.

    Raises:
        EchelonError: the worker could not open the model, or score a step.
        DeviceOutOfMemory: the smallest step did not fit.
        WorkerDied: the worker ended before it scored a step.
    """
    worker = ChildWorker(factory, "worker that probes memory")
    worker.start(precision)
    peaks: dict[Lengths, int] = {}
    meter = MemoryMeter(worker.pid)
    try:
        for shape in smallest_first(probe.lengths for probe in probes):
            meter.reset()
            worker.score(steps.batch(shape), STEP_TIMEOUT_S)
            peaks[shape] = meter.peak_bytes()
    except (DeviceOutOfMemory, WorkerDied) as end:
        if not peaks:
            raise
        # Larger steps would not fit either.
        logger.info("Memory was measured for %d steps, then: %s", len(peaks), end)
    finally:
        worker.stop()
    return peaks


def fitted(probes: list[Probe], unseen: list[Probe], limits: LengthRange) -> Calibration:
    """Fit both models, or say why there is none."""
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


def scaled_prior(
    run: Callable[[Lengths], None], limits: LengthRange, prior: Coefficients, clock: Clock
) -> Coefficients:
    """Scale default coefficients to this machine, by the fastest of some steps of one long pair."""
    shape = (limits.longest,)
    run(shape)
    times = []
    for _ in range(PRIOR_STEPS):
        began = clock()
        run(shape)
        times.append(clock() - began)
    scale = max(min(times), 1e-9) / prior.seconds(work_of(shape, limits.padding))
    return prior.with_values([scale * price for price in prior.values])
