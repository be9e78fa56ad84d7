"""Measures a model on this machine and chooses settings: the main function of `echelon tune`.

Stages of a run: read texts, compare precisions with fp32, compare thread counts, sweep step sizes,
probe for the cost model, choose, write the profile.
"""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import Texts, load_texts
from echelon.engine.launch import open_encoder
from echelon.engine.precision_check import PrecisionCheck, compare_precisions, require_passed
from echelon.errors import EchelonWarning, InvalidInput, ProfileError, StorageError
from echelon.models.device import usable_cpus
from echelon.models.hub import resolve
from echelon.models.registry import precisions_to_compare, runs_on_cpu
from echelon.profile import (
    Profile,
    TunedSettings,
    current_key,
    library_versions,
    read_json,
    write_json,
)
from echelon.progress import Progress, no_progress
from echelon.scheduling.packing import NO_BUDGET, pack, step_budget, step_cost
from echelon.tuning.calibration import (
    Calibration,
    LengthRange,
    ProbeResult,
    StepFactory,
    calibrate,
    models_of,
)
from echelon.tuning.machine import describe_machine, meter_of
from echelon.tuning.sweep import (
    MeasuredPoint,
    SweepPoint,
    SweepRun,
    best_batches,
    best_budget,
    grid,
    scenario_advice,
    sweep,
    sweep_warnings,
)
from echelon.types import Clock, ModelInfo, monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from echelon.models.base import Scorer
    from echelon.options import Options

PAIRS = (10, 50, 100)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
TOKEN_BUDGETS = (256, 512, 1024, 2048, 4096, 8192)

PROBE_SHARE = 0.4
"""Time of the probes for the cost model, as a share of the sweep's time and in addition to it."""


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What to measure, and for how long."""

    pairs: tuple[int, ...] = PAIRS  # numbers of pairs per call
    batch_sizes: tuple[int, ...] = BATCH_SIZES  # pairs per step
    token_budgets: tuple[int, ...] = TOKEN_BUDGETS  # per step, measured at the most pairs
    data: str | os.PathLike[str] | None = None  # the user's JSONL; None is the built-in set
    time_limit_s: float = 100.0  # of the sweep; the probes take PROBE_SHARE of it in addition
    partial: Path | None = None  # stores results while the run lasts; None stores none

    def __post_init__(self) -> None:
        for name in ("pairs", "batch_sizes", "token_budgets"):
            sizes = getattr(self, name)
            if not sizes and name != "token_budgets":
                raise InvalidInput(name, "is empty", "Give at least one number.")
            if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
                raise InvalidInput(name, f"{sizes} are not all positive", "Give whole numbers.")
        if not self.time_limit_s > 0:
            raise InvalidInput(
                "time_limit", f"{self.time_limit_s} is not positive", "Give seconds."
            )


def tune(
    model: str | os.PathLike[str],
    options: Options,
    plan: TuningPlan,
    *,
    clock: Clock = monotonic,
    on_progress: Progress = no_progress,
    known: Profile | None = None,
) -> Profile:
    """Measure a model on this machine and choose settings.

    The precisions and threads of a ``known`` profile are taken without a new comparison.

    Raises:
        InvalidInput: an option, or the data.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        OutOfMemory: the weights, or a single pair, do not fit.
    """
    check, texts = find_model(model, options, plan.data)
    run = SavedRun.of(check, plan, texts, known)
    run.precisions = run.precisions or _compare_precisions(check, on_progress)
    check, keep_bf16 = _with_fastest_precision(check, run.precisions)
    run.threads = run.threads or _compare_threads(check, keep_bf16, on_progress)
    if run.threads:
        fastest = max(run.threads, key=lambda row: row["tokens_per_s"])
        check = replace(check, options=replace(check.options, threads=fastest["threads"]))
    with closing(check.open(check.options.precision, keep_bf16)) as scorer:
        info, timed = scorer.info, _TimedRun(check, scorer, texts, plan, clock)
        run.points = sweep(
            grid(plan.pairs, plan.batch_sizes, plan.token_budgets),
            timed,
            clock=clock,
            limit_s=plan.time_limit_s,
            known=run.points,
            save=run.save,
            on_progress=on_progress,
        )
        probed = probe(check, scorer, plan, texts, clock, on_progress)
    on_progress("measuring the memory of a worker", 1.0, 1.0)
    models = models_of(probed, check.factory(keep_bf16))
    return _profile_of(run, check, info, models, timed.data())


def find_model(
    model: str | os.PathLike[str], options: Options, data: str | os.PathLike[str] | None
) -> tuple[PrecisionCheck, Texts]:
    """Find a model and read its tokenizer and the texts to measure with."""
    folder = resolve(model, revision=options.revision, progress=options.progress)
    encoder = open_encoder(folder)
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
    info = scorer.info
    longest = check.max_length(info)
    largest = max(plan.token_budgets, default=step_budget(None, None, info.device))
    return calibrate(
        scorer,
        StepFactory(check.encoder, texts, longest),
        LengthRange(longest, largest, info.padding),
        clock,
        PROBE_SHARE * plan.time_limit_s,
        on_progress,
    )


def _compare_precisions(check: PrecisionCheck, on_progress: Progress) -> list[dict[str, Any]]:
    """Compare the precisions there are; an empty list where there is no choice."""
    candidates = precisions_to_compare(check.folder.path, check.options.device)
    asked = check.options.precision
    if asked == "int8" and asked in candidates[1:]:
        candidates = ["fp32", "int8"]  # int8 is checked also where the user asked for it
    elif asked != "auto" or len(candidates) == 1:
        return []
    return compare_precisions(check, candidates, on_progress)


def _with_fastest_precision(
    check: PrecisionCheck, rows: list[dict[str, Any]]
) -> tuple[PrecisionCheck, list[str]]:
    """Choose the fastest precision that passed, and the layers that it leaves in bf16."""
    asked = check.options.precision
    if asked == "int8" and rows:
        require_passed(rows[-1])
    passed = [row for row in rows if row["passed"] and asked in {"auto", row["precision"]}]
    if not passed:
        return check, []
    fastest = max(passed, key=lambda row: row["tokens_per_s"])
    options = replace(check.options, precision=fastest["precision"])
    return replace(check, options=options), fastest.get("keep_bf16", [])


def _compare_threads(
    check: PrecisionCheck, keep_bf16: Sequence[str], on_progress: Progress
) -> list[dict[str, Any]]:
    """Compare thread counts; an empty list where there is no choice.

    More threads are not always faster: hyper-threads share the units of a core, other programs
    use the machine too, and small layers do not divide well.
    """
    counts, options = thread_counts(usable_cpus()), check.options
    if options.threads is not None or len(counts) == 1:
        return []
    if not runs_on_cpu(check.folder.path, options.device):
        return []
    rows: list[dict[str, Any]] = []
    for count in counts:
        on_progress(f"trying {count} threads")
        tried = replace(check, options=replace(options, threads=count))
        _, tokens_per_s = tried.score(options.precision, keep_bf16)
        rows.append({"threads": count, "tokens_per_s": tokens_per_s})
    return rows


def thread_counts(usable: int) -> list[int]:
    """Thread counts to compare: all usable CPUs, a half and a quarter of them."""
    return sorted({max(1, usable // part) for part in (1, 2, 4)}, reverse=True)


class _TimedRun:
    """Runs a point once, from texts to scores: identical pairs are scored again, not folded."""

    def __init__(
        self, check: PrecisionCheck, scorer: Scorer, texts: Texts, plan: TuningPlan, clock: Clock
    ) -> None:
        self._encode = partial(
            check.encoder.encode,
            max_length=check.max_length(scorer.info),
            truncation=check.options.truncation,
            max_query_tokens=check.options.max_query_tokens,
        )
        self._scorer = scorer
        self._clock = clock
        self._texts = texts
        self._samples = {count: texts.sample(count) for count in plan.pairs}
        self._meter = meter_of(scorer.info.device)

    def __call__(self, point: SweepPoint) -> SweepRun:
        """Measure one run of ``point``; see :func:`echelon.tuning.sweep.sweep`."""
        padding = self._scorer.info.padding
        self._meter.reset()
        started = self._clock()
        encoded = self._encode(self._samples[point.pairs])
        budget = point.token_budget or NO_BUDGET
        steps = pack(encoded.lengths, budget, padding=padding, max_pairs=point.batch_size)
        for step in steps:
            self._scorer.score(encoded.batch(step))
        return SweepRun(
            seconds=self._clock() - started,
            tokens=int(encoded.lengths.sum()),
            cost_tokens=sum(step_cost(encoded.lengths[step], padding) for step in steps),
            steps=len(steps),
            peak_bytes=self._meter.peak_bytes(),
        )

    def data(self) -> dict[str, Any]:
        """The profile's entry of the texts, with the token lengths of the largest sample."""
        lengths = self._encode(self._samples[max(self._samples)]).lengths
        p50, p90 = np.percentile(lengths, [50, 90]).tolist()
        tokens = {"mean": float(lengths.mean()), "p50": p50, "p90": p90, "max": int(lengths.max())}
        return {"name": self._texts.name, "pairs": len(self._texts.pairs), "tokens": tokens}


@dataclass(slots=True)
class SavedRun:
    """Results of a run that has not ended, stored on disk so that the run can be resumed."""

    path: Path | None
    question: dict[str, Any]
    precisions: list[dict[str, Any]] = field(default_factory=list)
    threads: list[dict[str, Any]] = field(default_factory=list)
    points: list[MeasuredPoint] = field(default_factory=list)
    unwritable: bool = False

    @classmethod
    def of(
        cls, check: PrecisionCheck, plan: TuningPlan, texts: Texts, known: Profile | None
    ) -> SavedRun:
        """Read what an interrupted run of the same model, options and sizes stored."""
        question = {
            "model": check.folder.revision,
            "options": check.options.as_dict(),
            "texts": [texts.name, len(texts.pairs)],
            "sizes": [list(plan.pairs), list(plan.batch_sizes), list(plan.token_budgets)],
            "versions": library_versions(),
        }
        run = cls(plan.partial, question)
        if plan.partial is not None and plan.partial.is_file():
            run._read(plan.partial)
        if known is not None:
            run.precisions, run.threads = known.precisions, known.threads
        return run

    def _read(self, path: Path) -> None:
        try:
            content = read_json(path)
            if content["question"] == self.question:
                points = [MeasuredPoint.from_dict(point) for point in content["points"]]
                self.precisions, self.threads = content["precisions"], content["threads"]
                self.points = points
        except (ProfileError, KeyError, TypeError):
            return  # half-written, or not a file of ours: measure again

    def save(self, points: list[MeasuredPoint]) -> None:
        """Store what is known; where that fails, the run goes on and cannot be resumed."""
        if self.path is None or self.unwritable:
            return
        content = {
            "question": self.question,
            "precisions": self.precisions,
            "threads": self.threads,
            "points": [measured.as_dict() for measured in points],
        }
        try:
            write_json(self.path, content)
        except StorageError as error:
            self.unwritable = True
            warnings.warn(
                f"Results cannot be stored while measuring: {error}", EchelonWarning, stacklevel=2
            )


def _profile_of(
    run: SavedRun, check: PrecisionCheck, info: ModelInfo, models: Calibration, data: dict[str, Any]
) -> Profile:
    return Profile(
        key=current_key(check.folder.name, check.folder.revision, info),
        settings=_settings(run.points, info, check.options.max_length),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        data=data,
        precisions=run.precisions,
        threads=run.threads,
        points=[measured.as_dict() for measured in run.points],
        best=[measured.as_dict() for measured in best_batches(run.points)],
        situations=scenario_advice(run.points),
        warnings=[*sweep_warnings(run.points), *models.warnings],
        cost=models.cost,
        memory=models.memory,
    )


def _settings(
    points: Sequence[MeasuredPoint], info: ModelInfo, max_length: int | None
) -> TunedSettings:
    """The best token budget; where none was measured, the best batch size of the most pairs."""
    threads, budget = info.threads or None, best_budget(points)
    if budget is not None:
        return TunedSettings(info.precision, budget.point.size, None, threads, max_length)
    best = best_batches(points)
    batch_size = best[-1].point.batch_size if best else None
    return TunedSettings(info.precision, NO_BUDGET, batch_size, threads, max_length)
