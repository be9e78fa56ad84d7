"""Measures a model on this machine and chooses settings: the main function of `echelon tune`.

Stages of a run: read texts, time the first steps, compare precisions with fp32, compare thread
counts, sweep step sizes, probe for the cost model, measure a worker's memory, predict what was not
measured, choose. The time limit holds for all of them together: a stage that does not fit is left
out, and a warning names it.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from echelon.data import Texts, load_texts
from echelon.engine.launch import open_encoder
from echelon.engine.precision_check import PrecisionCheck
from echelon.errors import InvalidInput
from echelon.messages import Message, tr, translated
from echelon.messages.units import duration, number
from echelon.models.base import warm_runs
from echelon.models.device import processor_of
from echelon.models.hub import resolve
from echelon.profile import Profile, TunedSettings, current_key, library_versions
from echelon.progress import Progress, no_progress
from echelon.reports.statistics import MIN_RUNS
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS
from echelon.scheduling.fit import CallTimes, CostFit, MemoryFit
from echelon.scheduling.packing import NO_BUDGET, step_budget
from echelon.tuning.calibration import Calibration, ProbeResult, calibrate, models_of
from echelon.tuning.calls import TimedCalls, predict
from echelon.tuning.choice import best_batches, best_budget, scenario_advice, sweep_warnings
from echelon.tuning.first_stages import (
    compare_in_time,
    compare_threads,
    first_steps,
    price_steps,
    with_fastest_precision,
    with_fastest_threads,
)
from echelon.tuning.load import MachineLoad, Watch, quota_notes
from echelon.tuning.machine import describe_machine
from echelon.tuning.probe_shapes import LengthRange, StepFactory
from echelon.tuning.saved_run import SavedRun
from echelon.tuning.sweep import MeasuredPoint, SweepPoint, grid, sweep
from echelon.tuning.time_plan import PROBES, RUNS, Price, TimeBudget, affordable, more_points
from echelon.types import Clock, ModelInfo, monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from echelon.models.base import Scorer
    from echelon.options import Options

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "pairs": (5, 10, 50, 100),
        "batch_sizes": (1, 2, 4, 8, 16, 32),
        "token_budgets": (256, 512, 1024, 2048, 4096, 8192),
    },
    "cuda": {
        "pairs": (5, 10, 100, 1000),
        "batch_sizes": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "token_budgets": (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    },
    "mps": {
        "pairs": (5, 10, 50, 100),
        "batch_sizes": (1, 2, 4, 8, 16, 32, 64),
        "token_budgets": (512, 1024, 2048, 4096, 8192),
    },
}
"""Sizes that are measured unless the plan names others, by kind of device: an edge device ranks 1
to 5 pairs, a realtime API 10, offline work many. Larger steps than a CPU's fill a card."""

TIME_LIMIT_S = 75.0
"""Seconds of a run on any machine, so that the first profile takes less than two minutes."""


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What to measure, and for how long; sizes that are None are those of :data:`SIZES`."""

    pairs: tuple[int, ...] | None = None  # numbers of pairs per call
    batch_sizes: tuple[int, ...] | None = None  # pairs per step
    token_budgets: tuple[int, ...] | None = None  # per step, measured at the most pairs
    data: str | os.PathLike[str] | None = None  # the user's JSONL; None is the built-in set
    time_limit_s: float = TIME_LIMIT_S  # of all stages, once the model is open
    partial: Path | None = None  # stores results while the run lasts; None stores none

    def __post_init__(self) -> None:
        for name in ("pairs", "batch_sizes", "token_budgets"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if not sizes and name != "token_budgets":
                raise InvalidInput(name, "is empty", "Give at least one number.")
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
                raise InvalidInput(name, f"{sizes} are not all positive", "Give whole numbers.")
        if not 0 < self.time_limit_s < math.inf:
            problem = tr("{value} is not a finite number above 0", value=f"{self.time_limit_s:g}")
            raise InvalidInput("time_limit", problem, tr("Give seconds."))

    def sizes(self, device: str) -> dict[str, tuple[int, ...]]:
        """Pairs, batch sizes and token budgets for a device, ``cpu`` or ``cuda:N``."""
        usual = SIZES[device.partition(":")[0]]
        own = {name: getattr(self, name) for name in usual}
        return {name: usual[name] if sizes is None else sizes for name, sizes in own.items()}


def tune(  # noqa: PLR0913 - each is a distinct collaborator
    model: str | os.PathLike[str],
    options: Options,
    plan: TuningPlan,
    *,
    clock: Clock = monotonic,
    on_progress: Progress = no_progress,
    watch: Watch | None = None,
    known: Profile | None = None,
) -> Profile:
    """Measure a model on this machine and choose settings.

    The precisions and threads of a ``known`` profile are taken without a new comparison; ``watch``
    says what disturbed a run that has just ended, see :class:`echelon.tuning.load.MachineLoad`.

    Raises:
        InvalidInput: an option, or the data.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        OutOfMemory: the weights, or a single pair, do not fit.
    """
    check, texts = find_model(model, options, plan.data)
    run = _saved_run(check, plan, texts, known)
    time, price = first_steps(check, texts, plan.time_limit_s, clock, on_progress)
    if not run.precisions:
        run.precisions, run.notes = compare_in_time(check, price, time, on_progress)
        run.save()
    check, keep_bf16 = with_fastest_precision(check, run.precisions)
    if not run.threads:
        found = compare_threads(check, keep_bf16, price, time, clock, on_progress)
        run.threads, run.notes = found[0], run.notes + found[1]
        run.save()
    check = with_fastest_threads(check, run.threads)
    watching = watch or MachineLoad()
    with closing(check.open(check.options.precision, keep_bf16)) as scorer:
        price = price_steps(check, scorer, texts, time, clock)
        opened = _OpenRun(check, scorer, texts, plan, clock, watching, time, price, run)
        calls, said = opened.sweep(on_progress)
        probed, info = opened.probe(calls, on_progress), scorer.info
    in_worker = time.memory_s(in_worker=info.device == "cpu") - time.worker_start_s
    models = models_of(probed, check.factory(keep_bf16), in_worker, on_progress)
    _fill(run.points, models, calls)
    run.notes += quota_notes(watching)
    said |= {"time_limit_s": plan.time_limit_s, "spent_s": time.spent_s}
    data = calls.data() | {"measuring": said}
    return _profile_of(run, check, info, models, data)


def find_model(
    model: str | os.PathLike[str], options: Options, data: str | os.PathLike[str] | None
) -> tuple[PrecisionCheck, Texts]:
    """Find a model and read its tokenizer and the texts to measure with."""
    folder = resolve(model, revision=options.revision, progress=options.progress)
    encoder = open_encoder(folder, options.instruction)
    texts = load_texts(data, language="en" if folder.name == "demo" else None)
    return PrecisionCheck.of(folder, options, encoder, texts), texts


def probe(
    check: PrecisionCheck,
    scorer: Scorer,
    plan: TuningPlan,
    texts: Texts,
    clock: Clock,
    on_progress: Progress,
) -> ProbeResult:
    """Measure probes of an open scorer, up to the plan's largest step; see :func:`models_of`."""
    steps, limits = _probe_range(check, scorer, plan, texts)
    return calibrate(scorer, steps, limits, clock, PROBES * plan.time_limit_s, on_progress)


def _probe_range(
    check: PrecisionCheck, scorer: Scorer, plan: TuningPlan, texts: Texts
) -> tuple[StepFactory, LengthRange]:
    info = scorer.info
    longest = check.max_length(info)
    budgets = plan.sizes(info.device)["token_budgets"]
    largest = max(budgets, default=step_budget(None, None, info.device))
    return StepFactory(check.encoder, texts, longest), LengthRange(longest, largest, info.padding)


@dataclass(frozen=True, slots=True)
class _OpenRun:
    """The chosen model, open, and the stages that measure it."""

    check: PrecisionCheck
    scorer: Scorer
    texts: Texts
    plan: TuningPlan
    clock: Clock
    watch: Watch
    time: TimeBudget
    price: Price
    run: SavedRun

    def sweep(self, on_progress: Progress) -> tuple[TimedCalls, dict[str, Any]]:
        """Measure the points that fit in the time; all others are left for the prediction.

        Returns:
            What ran the calls, and the profile's entry of what was planned.
        """
        device, time = self.scorer.info.device, self.time
        sizes = self.plan.sizes(device)
        calls = TimedCalls(self.check, self.scorer, self.texts, sizes["pairs"], self.clock)

        def expected_s(point: SweepPoint) -> float:
            return self.price.seconds(calls.work(point))

        limit_s = time.sweep_s(time.memory_s(in_worker=device == "cpu"))
        planned = affordable(**sizes, seconds=expected_s, limit_s=limit_s)
        every = {*grid(**sizes), *planned}
        said = _said(self.price, planned, len(every), self.plan.time_limit_s)
        nothing = _nothing_fits(self.price, min(map(expected_s, every)), time)
        if not planned:
            said["text"] = nothing
        on_progress(translated(said["text"]))
        before = {measured.point: measured for measured in self.run.points}

        def keep(results: list[MeasuredPoint]) -> None:
            found = before | {measured.point: measured for measured in results}
            self.run.points = [
                found.get(point, MeasuredPoint(point)) for point in sorted(every, key=_place)
            ]
            self.run.save()

        keep([])
        ends_s, more = time.spent_s + limit_s, planned
        while more:
            planned = sorted({*planned, *more}, key=_place)
            results = sweep(
                planned,
                calls,
                clock=self.clock,
                limit_s=ends_s - time.spent_s,
                expected_s=expected_s,
                warm_runs=warm_runs(device),
                watch=self.watch,
                known=self.run.points,
                save=keep,
                on_progress=on_progress,
            )
            keep(results)
            # Time that the planned points did not need goes to others.
            more = more_points(every.difference(planned), expected_s, ends_s - time.spent_s)
        if all(measured.status == "not_reached" for measured in self.run.points):
            self.run.notes.append(nothing)
        return calls, said

    def probe(self, calls: TimedCalls, on_progress: Progress) -> ProbeResult:
        """Measure probes, unless an interrupted run did; the sweep's calls go with them."""
        run, scorer = self.run, self.scorer
        steps, limits = _probe_range(self.check, scorer, self.plan, self.texts)
        left_s = self.time.left_s - self.time.memory_s(in_worker=scorer.info.device == "cpu")
        limit_s = min(PROBES * self.time.limit_s, left_s)
        if not any(measured.measured for measured in run.points):
            limit_s = max(PROBES * self.time.limit_s, left_s)  # all that will be known
        if not run.probed:
            found = calibrate(
                scorer,
                steps,
                limits,
                self.clock,
                limit_s,
                on_progress,
                prior=self.price.scaled(DEFAULT_COEFFICIENTS[scorer.info.device.partition(":")[0]]),
                watch=self.watch,
                save=run.keep_probes,
            )
            run.probed = True
            run.keep_probes(found.probes, found.checks)
        measured = [m for m in run.points if m.seconds and min(m.step_s) > 0]
        times = [
            CallTimes(calls.work(m.point), tuple(m.step_s[i] for i in m.used)) for m in measured
        ]
        return ProbeResult(run.probes, run.checks, limits, steps, scorer.info, tuple(times))


def _saved_run(
    check: PrecisionCheck, plan: TuningPlan, texts: Texts, known: Profile | None
) -> SavedRun:
    """What an interrupted run of the same model, options and sizes stored."""
    question = {
        "model": check.folder.revision,
        "options": check.options.as_dict(),
        "texts": [texts.name, len(texts.pairs)],
        "sizes": [
            None if sizes is None else list(sizes)
            for sizes in (plan.pairs, plan.batch_sizes, plan.token_budgets)
        ],
        "versions": library_versions(),
    }
    run = SavedRun.of(plan.partial, question)
    if known is not None:
        run.precisions, run.threads = known.precisions, known.threads
    return run


def _place(point: SweepPoint) -> tuple[bool, int, int]:
    """Sort key: batch sizes by number of pairs, then token budgets."""
    return point.batch_size is None, point.pairs, point.size


def _said(price: Price, planned: list[SweepPoint], every: int, limit_s: float) -> dict[str, Any]:
    """What is planned, as the profile keeps it and as one line."""
    counts = sorted({point.pairs for point in planned})
    values = {
        "pair": duration(price.pair_s),
        "pairs": ", ".join(map(str, counts)),
        "points": len(planned),
        "all": every,
        "runs": MIN_RUNS,
        "seconds": number(limit_s),
    }
    text = Message("tune.plan", values)
    return {"pair_s": price.pair_s, "pairs": counts, "points": len(planned), "text": text}


def _nothing_fits(price: Price, quickest_s: float, time: TimeBudget) -> Message:
    """Why no call is measured, and the time limit that would be enough for the quickest one."""
    values = {
        "seconds": number(time.limit_s),
        "pair": duration(price.pair_s),
        "runs": MIN_RUNS,
        "limit": f"{time.limit_for(RUNS * quickest_s):.0f}",
    }
    return Message("tune.nothing_fits", values)


def _fill(points: Sequence[MeasuredPoint], models: Calibration, calls: TimedCalls) -> None:
    """Predict what was not measured; on CPU memory is that of a fresh worker, where it is known."""
    if models.cost is not None:
        predict(points, calls, CostFit.from_dict(models.cost))
    if models.memory is None or calls.device != "cpu":
        return
    memory = MemoryFit.from_dict(models.memory).model
    for measured in points:
        if not measured.ended:
            largest = max(calls.steps(measured.point), key=lambda step: step.tokens)
            measured.peak_bytes = round(memory.peak_bytes(largest))


def _profile_of(
    run: SavedRun, check: PrecisionCheck, info: ModelInfo, models: Calibration, data: dict[str, Any]
) -> Profile:
    best = best_batches(run.points)
    return Profile(
        key=current_key(
            check.folder.name, check.folder.revision, info, **processor_of(info.device)
        ),
        settings=_settings(run.points, info, check.options.max_length),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        data=data,
        precisions=run.precisions,
        threads=run.threads,
        points=[measured.as_dict() for measured in run.points],
        best=[choice.chosen.as_dict() | choice.certainty() for choice in best],
        situations=scenario_advice(run.points),
        warnings=[*run.notes, *sweep_warnings(run.points), *models.warnings],
        cost=models.cost,
        memory=models.memory,
    )


def _settings(
    points: Sequence[MeasuredPoint], info: ModelInfo, max_length: int | None
) -> TunedSettings:
    """The best token budget; where none is known, the best batch size of the most pairs."""
    threads, budget = info.threads or None, best_budget(points)
    if budget is not None:
        return TunedSettings(info.precision, budget.chosen.point.size, None, threads, max_length)
    best = best_batches(points)
    batch_size = best[-1].chosen.point.batch_size if best else None
    if batch_size is None:
        tokens = step_budget(None, None, info.device)
        return TunedSettings(info.precision, tokens, None, threads, max_length)
    return TunedSettings(info.precision, NO_BUDGET, batch_size, threads, max_length)
