"""Fits a cost model and a memory model to a model on its device: choose probes, measure, fit.

Probes are steps whose shapes are chosen before anything is measured. With rough cost coefficients
each shape is a row of the least-squares problem, and the next shape of a size is the one that
increases the determinant of the information matrix most (Fedorov, Theory of Optimal Experiments,
1972). A third of the probes have pairs of mixed lengths, and so have all steps that check the fit.

Times are measured on an open scorer. Memory on CPU is measured in a worker process such as
``echelon serve`` uses, because the tuning process still holds memory of the precisions that it
opened before.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from echelon.engine.worker import ChildWorker, ScorerFactory
from echelon.errors import EchelonError, TooNoisy
from echelon.messages import Message
from echelon.models.base import DeviceOutOfMemory, Scorer, WorkerDied
from echelon.progress import Progress, no_progress
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, Coefficients, work_of
from echelon.scheduling.fit import Probe, fit_cost, fit_memory
from echelon.scheduling.packing import step_cost
from echelon.tokenization.pairs import EncodedPairs, gather
from echelon.tuning.machine import MemoryMeter, Meter, meter_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from echelon.data import Texts
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Clock, ModelInfo, Padding, TokenBatch


logger = logging.getLogger(__name__)

Lengths = tuple[int, ...]  # the shape of a step: tokens of each pair

PRIOR_STEPS = 3  # steps after the first that measure roughly how fast the machine is
STEP_TIMEOUT_S = 600.0  # a probe takes seconds; a worker without an answer for this long hangs

PROBES, CHECKS = 24, 10  # shapes to fit, and to check
MIXED = 8  # probes of mixed lengths: they average what the formula leaves out
ROUNDS = 9  # repeats after which medians gain little

MIN_ROUNDS = 3
"""Fewer repeats say nothing about the certainty of a median; the time is planned for these."""

QUIET = 0.01  # where repeats differ by less than this share, more of them are not needed
SHORTEST = 16  # tokens of the shortest pair: special tokens and some words of query and document
FULL_SHARE = 0.25  # part of a round's time that the single slowest shape may take

MAX_PER_SIZE = 2
"""Shapes of about one size, after one of every size: the optimum alone would be a few extreme
shapes, and would not show where a device differs from the formula."""


@dataclass(frozen=True, slots=True)
class LengthRange:
    """Limits of the shapes of steps."""

    longest: int  # tokens of the longest pair
    budget: int  # tokens of the largest step
    padding: Padding

    def uniform(self) -> list[Lengths]:
        """Steps of one length: lengths and sizes a factor of two apart."""
        lengths = _powers(min(SHORTEST, self.longest), self.longest)
        sizes = _powers(lengths[0], max(self.budget, self.longest))
        found = {(length,) * max(1, size // length) for length in lengths for size in sizes}
        fits = [s for s in found if len(s) == 1 or step_cost(s, self.padding) <= self.budget]
        return sorted(fits, key=lambda s: (sum(s), len(s)))

    def mixed(self, count: int, seed: int) -> list[Lengths]:
        """Steps of mixed lengths and any size, as in real requests."""
        rng = random.Random(seed)  # noqa: S311 - shapes, not secrets
        return [self._mixed(rng) for _ in range(count)]

    def _mixed(self, rng: random.Random) -> Lengths:
        shortest = min(SHORTEST, self.longest)
        around = _between(rng, shortest, self.longest)
        size = _between(rng, around, max(around, self.budget))
        shape: list[int] = []
        while True:
            length = round(around * rng.lognormvariate(0, 0.4))
            shape.append(min(max(length, shortest), self.longest))
            if len(shape) > 1 and step_cost(shape, self.padding) > size:
                return tuple(shape[:-1])


class ProbeShapes(NamedTuple):
    """Shapes to fit, and shapes to check the fit with."""

    probes: list[Lengths]
    checks: list[Lengths]


def choose(limits: LengthRange, prior: Coefficients, max_s: float) -> ProbeShapes:
    """Choose the most informative shapes; by the prior, one run of all takes ``max_s`` seconds."""

    def seconds(shape: Lengths) -> float:
        return prior.seconds(work_of(shape, limits.padding))

    mixed = _affordable(limits.mixed(10 * MIXED, seed=1), seconds, MIXED, max_s / 4)
    others = [shape for shape in limits.mixed(10 * CHECKS, seed=2) if shape not in mixed]
    checks = _affordable(others, seconds, CHECKS, max_s / 4)
    uniform = [shape for shape in limits.uniform() if shape not in mixed and shape not in checks]
    chosen = most_informative(uniform, prior, limits.padding, max_s / 2, PROBES - len(mixed))
    return ProbeShapes(chosen + mixed, checks)


def most_informative(
    shapes: Sequence[Lengths], prior: Coefficients, padding: Padding, max_s: float, count: int
) -> list[Lengths]:
    """At most ``count`` shapes in ``max_s`` seconds that determine the coefficients best."""
    if not shapes:
        return []
    works = [work_of(shape, padding) for shape in shapes]
    seconds = np.array([prior.seconds(work) for work in works])
    middle = int(np.exp(np.mean(np.log([work.tokens for work in works]))))
    rows = np.array([replace(prior, knee_tokens=middle).amounts(work) for work in works])
    rows = rows / seconds[:, None]
    rows /= np.maximum(rows.max(axis=0), np.finfo(float).tiny)
    known = 1e-6 * np.eye(rows.shape[1])
    sizes = np.array([work.tokens.bit_length() for work in works])
    left = seconds <= FULL_SHARE * max_s
    chosen: list[int] = []
    for size in [*range(sizes.max() + 1)] * MAX_PER_SIZE:
        open_ = left & (sizes == size) & (seconds <= max_s - seconds[chosen].sum())
        if not open_.any() or len(chosen) == count:
            continue
        gains = np.einsum("sr,rc,sc->s", rows, np.linalg.inv(known), rows)
        best = int(np.where(open_, gains, -1.0).argmax())
        chosen.append(best)
        known += np.outer(rows[best], rows[best])
        left[best] = False
    return [shapes[index] for index in chosen]


def _affordable(
    shapes: Sequence[Lengths], seconds: Callable[[Lengths], float], count: int, max_s: float
) -> list[Lengths]:
    """The first ``count`` different shapes that together take no more than ``max_s`` seconds."""
    taken: list[Lengths] = []
    for shape in dict.fromkeys(shapes):
        if len(taken) < count and seconds(shape) <= max_s:
            taken.append(shape)
            max_s -= seconds(shape)
    return taken


def measure(
    shapes: Sequence[Lengths],
    run: Callable[[Lengths], None],
    meter: Meter,
    clock: Clock,
    limit_s: float,
    on_progress: Progress = no_progress,
) -> list[Probe]:
    """Measure shapes in turn, round after round, until the time is up.

    The first round goes from the smallest to the largest step, so that memory which the allocator
    keeps is not counted for the next step. It is also the warm-up: its times count only where
    there are no others. After it no round starts that would end later than ``limit_s``.

    Returns:
        The shapes that fit in memory, smallest first.
    """
    started = clock()
    first: dict[Lengths, tuple[float, int | None]] = {}
    for shape in smallest_first(shapes):
        meter.reset()
        try:
            seconds = _timed(run, shape, clock)
        except DeviceOutOfMemory:
            break  # larger steps would not fit either
        first[shape] = seconds, meter.peak_bytes()
    times: dict[Lengths, list[float]] = {shape: [] for shape in first}
    while not _enough(times):
        spent = clock() - started
        on_progress("measuring probes for the cost model", min(spent, limit_s), limit_s)
        rounds = 1 + min(map(len, times.values()))
        if spent + spent / rounds > limit_s:
            break
        for shape, seen in times.items():
            seen.append(_timed(run, shape, clock))
    return [
        Probe(shape, tuple(times[shape] or [seconds]), peak)
        for shape, (seconds, peak) in first.items()
    ]


def smallest_first(shapes: Iterable[Lengths]) -> list[Lengths]:
    """Sort shapes by tokens, then by squared tokens."""
    return sorted(shapes, key=lambda shape: (sum(shape), sum(n * n for n in shape)))


def _enough(times: dict[Lengths, list[float]]) -> bool:
    rounds = min(map(len, times.values()), default=ROUNDS)
    if rounds < MIN_ROUNDS:
        return False
    spreads = [Probe(shape, tuple(seen)).spread for shape, seen in times.items()]
    return rounds >= ROUNDS or float(np.median(spreads)) < QUIET


def _timed(run: Callable[[Lengths], None], shape: Lengths, clock: Clock) -> float:
    began = clock()
    run(shape)
    return clock() - began


def _powers(smallest: int, largest: int) -> list[int]:
    """From ``smallest`` up by factors of two, and ``largest``."""
    steps = range(max(0, (largest // smallest).bit_length()))
    return sorted({*(min(largest, smallest << step) for step in steps), largest})


def _between(rng: random.Random, smallest: int, largest: int) -> int:
    """A log-uniform size: 8 to 16 is as likely as 256 to 512."""
    return round(math.exp(rng.uniform(math.log(smallest), math.log(largest))))


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
    shapes, checks = choose(limits, prior, limit_s / (1 + MIN_ROUNDS))
    measured = measure(shapes + checks, run, meter_of(device), clock, limit_s, on_progress)
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
    """Measure the peak memory of a worker in each step that fits, in bytes."""
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
    fastest = min(_timed(run, shape, clock) for _ in range(PRIOR_STEPS))
    scale = max(fastest, 1e-9) / prior.seconds(work_of(shape, limits.padding))
    return prior.with_values([scale * value for value in prior.values])
