"""Fits a cost model and a memory model to a model on its device: measure probes, then fit.

Times are measured on an open scorer. Memory on CPU is measured in a worker process such as
``echelon serve`` uses, because the tuning process still holds memory of the precisions that it
opened before.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.engine.worker import ChildWorker, ScorerFactory
from echelon.errors import EchelonError, TooNoisy
from echelon.messages import N_, Message, tr
from echelon.models.base import DeviceOutOfMemory, Scorer, WorkerDied, warm_runs
from echelon.progress import Progress, no_progress
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Coefficients, work_of
from echelon.scheduling.fit import CallTimes, Probe, fit_cost, fit_memory
from echelon.tuning.load import Watch, nothing_known
from echelon.tuning.machine import MemoryMeter, Meter, meter_of
from echelon.tuning.probe_shapes import (
    LengthRange,
    Lengths,
    StepFactory,
    choose,
    smallest_first,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.types import Clock, ModelInfo

logger = logging.getLogger(__name__)

PRIOR_STEPS = 3  # steps after the first that measure roughly how fast the machine is
STEP_TIMEOUT_S = 600.0  # a probe takes seconds; a worker without an answer for this long hangs
ROUNDS = 9  # repeats after which medians gain little

MIN_ROUNDS = 3
"""Fewer repeats say nothing about the certainty of a median; the time is planned for these."""

QUIET = 0.01  # where repeats differ by less than this share, more of them are not needed
PROBING = N_("measuring probes for the cost model (about {seconds} s)")


def measure(  # noqa: PLR0913 - each is a distinct collaborator
    shapes: Sequence[Lengths],
    run: Callable[[Lengths], None],
    meter: Meter,
    clock: Clock,
    limit_s: float,
    on_progress: Progress = no_progress,
    *,
    warm_runs: int = 1,
    watch: Watch = nothing_known,
    save: Callable[[list[Probe]], None] = lambda _: None,
) -> list[Probe]:
    """Measure shapes in turn, round after round, until the time is up.

    The first round goes from the smallest to the largest step, so that memory which the allocator
    keeps is not counted for the next step. It is also the warm-up, of ``warm_runs`` runs: its times
    count only where there are no others. After it no round starts that would end later than
    ``limit_s``. Times that were disturbed count only where a shape has no others. ``save`` gets the
    probes after each round.

    Returns:
        The shapes that fit in memory, smallest first.
    """
    started, stage = clock(), tr(PROBING, seconds=f"{limit_s:.0f}")
    first: dict[Lengths, tuple[float, int | None]] = {}
    times: dict[Lengths, list[tuple[float, bool]]] = {}

    def probes() -> list[Probe]:
        return [_probe(shape, times[shape], *seen) for shape, seen in first.items()]

    for shape in smallest_first(shapes):
        on_progress(stage, min(clock() - started, limit_s), limit_s)
        meter.reset()
        try:
            seconds = _timed(run, shape, clock)
            for _ in range(warm_runs - 1):
                run(shape)
        except DeviceOutOfMemory:
            break  # larger steps would not fit either
        first[shape], times[shape] = (seconds, meter.peak_bytes()), []
    while not _enough(probes(), min(map(len, times.values()), default=ROUNDS)):
        spent = clock() - started
        rounds = 1 + min(map(len, times.values()))
        if spent + spent / rounds > limit_s:
            break
        for shape, seen in times.items():
            on_progress(stage, min(clock() - started, limit_s), limit_s)
            seconds = _timed(run, shape, clock)
            seen.append((seconds, watch(seconds) is not None))
        save(probes())
    return probes()


def _probe(
    shape: Lengths, seen: Sequence[tuple[float, bool]], first_s: float, peak: int | None
) -> Probe:
    undisturbed = tuple(seconds for seconds, disturbed in seen if not disturbed)
    return Probe(shape, undisturbed or tuple(s for s, _ in seen) or (first_s,), peak)


def _enough(probes: Sequence[Probe], rounds: int) -> bool:
    if rounds < MIN_ROUNDS:
        return False
    return rounds >= ROUNDS or float(np.median([probe.spread for probe in probes])) < QUIET


def _timed(run: Callable[[Lengths], None], shape: Lengths, clock: Clock) -> float:
    began = clock()
    run(shape)
    return clock() - began


@dataclass(frozen=True, slots=True)
class Calibration:
    """The fitted models, as the profile stores them; None where the fit was refused."""

    cost: dict[str, Any] | None
    memory: dict[str, Any] | None
    warnings: list[str]  # why a fit was refused, and the remedy


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Probes that were measured on an open scorer."""

    probes: list[Probe]  # the models are fitted to these
    checks: list[Probe]  # the models are judged by these
    limits: LengthRange
    steps: StepFactory
    info: ModelInfo
    calls: tuple[CallTimes, ...] = ()  # calls of the sweep, which the cost model is fitted to too


def calibrate(  # noqa: PLR0913 - each is a distinct collaborator
    scorer: Scorer,
    steps: StepFactory,
    limits: LengthRange,
    clock: Clock,
    limit_s: float,
    on_progress: Progress = no_progress,
    *,
    prior: Coefficients | None = None,
    watch: Watch = nothing_known,
    save: Callable[[list[Probe], list[Probe]], None] = lambda *_: None,
) -> ProbeResult:
    """Choose probes within the limits and measure them, for about ``limit_s`` seconds.

    ``prior`` says roughly how fast the machine is; None measures it. ``save`` gets the probes and
    the checks after each round.
    """

    def run(shape: Lengths) -> None:
        scorer.score(steps.batch(shape))

    device = scorer.info.device
    usual = DEFAULT_COEFFICIENTS[device.partition(":")[0]]
    prior = prior or scaled_prior(run, limits, usual, clock)
    shapes, checks = choose(limits, prior, limit_s / (1 + MIN_ROUNDS))

    def parts(measured: list[Probe]) -> tuple[list[Probe], list[Probe]]:
        unseen = [probe for probe in measured if probe.lengths in checks]
        return [probe for probe in measured if probe.lengths not in checks], unseen

    measured = measure(
        shapes + checks,
        run,
        meter_of(device),
        clock,
        limit_s,
        on_progress,
        warm_runs=warm_runs(device),
        watch=watch,
        save=lambda probes: save(*parts(probes)),
    )
    return ProbeResult(*parts(measured), limits, steps, scorer.info)


def models_of(
    probed: ProbeResult,
    factory: ScorerFactory,
    limit_s: float = math.inf,
    on_progress: Progress = no_progress,
) -> Calibration:
    """Fit both models, after the scorer was closed: on CPU a worker opens the model again.

    The worker scores as many of the steps as it can in ``limit_s`` seconds after its start; with a
    limit of 0 or less there is no memory model, and a warning says so.
    """
    probes, checks = probed.probes, probed.checks
    if probed.info.device != "cpu":
        return fitted(probed)
    if limit_s <= 0:
        return _without_memory(probed, Message("calibration.memory_left_out"))
    try:
        shapes = _within(probed, limit_s)
        peaks = worker_peaks(shapes, probed.steps, factory, probed.info.precision, on_progress)
    except (EchelonError, DeviceOutOfMemory, WorkerDied) as error:
        reason = Message("calibration.no_memory_model", {"error": str(error)})
        return _without_memory(probed, reason)
    seen, unseen = (
        [replace(probe, peak_bytes=peaks.get(probe.lengths)) for probe in some]
        for some in (probes, checks)
    )
    return fitted(replace(probed, probes=seen, checks=unseen))


def _without_memory(probed: ProbeResult, reason: str) -> Calibration:
    models = fitted(probed)
    return replace(models, memory=None, warnings=[*models.warnings, reason])


def _within(probed: ProbeResult, limit_s: float) -> list[Lengths]:
    """Shapes that a worker scores in a time: every, every second … of them, the largest always."""
    took = {probe.lengths: probe.median_s for probe in (*probed.probes, *probed.checks)}
    shapes = smallest_first(took)
    for every in range(1, len(shapes) + 1):
        chosen = shapes[::-1][::every][::-1]
        if sum(took[shape] for shape in chosen) <= limit_s:
            return chosen
    return shapes[:1]


def worker_peaks(
    shapes: Sequence[Lengths],
    steps: StepFactory,
    factory: ScorerFactory,
    precision: str,
    on_progress: Progress = no_progress,
) -> dict[Lengths, int]:
    """Measure the peak memory of a worker in each step that fits, in bytes."""
    worker = ChildWorker(factory, "worker that probes memory")
    on_progress(tr("starting a worker to measure its memory"))
    worker.start(precision)
    peaks: dict[Lengths, int] = {}
    meter = MemoryMeter(worker.pid)
    try:
        for number, shape in enumerate(smallest_first(shapes)):
            on_progress(tr("measuring the memory of a worker"), number, len(shapes))
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


def fitted(probed: ProbeResult) -> Calibration:
    """Fit both models, or say why there is none; a warning says where predictions are imprecise."""
    cost = memory = None
    warnings: list[str] = []
    padding = probed.limits.padding
    try:
        found = fit_cost(probed.probes, probed.checks, padding, probed.calls)
        cost = replace(found, measured=datetime.now(UTC).isoformat(timespec="seconds"))
        warnings += [] if cost.note is None else [cost.note]
    except TooNoisy as error:
        warnings.append(error.args[0])
    try:
        memory = fit_memory(probed.probes, probed.checks, padding)
        warnings += [] if memory.note is None else [memory.note]
    except TooNoisy as error:
        warnings.append(error.args[0])
    stored = [None if fit is None else fit.as_dict() for fit in (cost, memory)]
    return Calibration(stored[0], stored[1], warnings)


def scaled_prior(
    run: Callable[[Lengths], None], limits: LengthRange, prior: Coefficients, clock: Clock
) -> Coefficients:
    """Scale default coefficients to this machine, by the fastest of some steps of one long pair."""
    shape = (limits.longest,)
    run(shape)
    fastest = min(_timed(run, shape, clock) for _ in range(PRIOR_STEPS))
    scale = max(fastest, 1e-9) / prior.seconds(work_of(shape, limits.padding))
    return prior.with_values([scale * value for value in prior.values])
