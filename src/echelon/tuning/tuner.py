"""Spine 2: machine in, profile out.

A tuning run goes: texts → compare precisions with fp32 → compare thread counts → sweep step
sizes → probes for the cost model → choose → profile.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.data import load_texts
from echelon.engine.precision_check import PrecisionCheck, compare, require_passed
from echelon.errors import EchelonWarning, InvalidInput, ProfileError, StorageError
from echelon.models.device import usable_cpus
from echelon.models.hub import ModelFolder, resolve
from echelon.models.registry import precisions_to_compare, runs_on_cpu
from echelon.options import check_max_length
from echelon.profile import (
    Profile,
    ProfileKey,
    TunedSettings,
    current_key,
    library_versions,
    read_json,
    write_json,
)
from echelon.scheduling.packing import NO_BUDGET, pack, step_budget, step_cost
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.calibration import ProbeResult, StepFactory, calibrate, models_of
from echelon.tuning.choose import best_batches, best_budget, cautions, situations
from echelon.tuning.machine import describe_machine, meter_of
from echelon.tuning.probes import LengthRange
from echelon.tuning.sweep import MeasuredPoint, SweepPoint, SweepRun, grid, sweep
from echelon.types import monotonic

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from echelon.data import Texts
    from echelon.models.base import Scorer
    from echelon.options import Options
    from echelon.types import Clock, Pair

PAIRS = (10, 50, 100)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
TOKEN_BUDGETS = (256, 512, 1024, 2048, 4096, 8192)

PROBE_SHARE = 0.4
"""Time of the probes for the cost model, beside that of the sweep."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and for how long.

    Attributes:
        pairs: numbers of pairs a call.
        batch_sizes: pairs a step.
        token_budgets: tokens a step, measured at the largest number of pairs.
        data: the user's JSONL; None is the built-in set.
        time_limit_s: seconds for the sweep; probes have PROBE_SHARE of it beside.
        partial: file that results are kept in while the run lasts; None keeps none.
    """

    pairs: tuple[int, ...] = PAIRS
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    token_budgets: tuple[int, ...] = TOKEN_BUDGETS
    data: str | os.PathLike[str] | None = None
    time_limit_s: float = 100.0
    partial: Path | None = None

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
    plan: Plan,
    *,
    clock: Clock = monotonic,
    told: Callable[[str, float], None] = lambda *_: None,
    known: Profile | None = None,
) -> Profile:
    """Measure the machine with a model and choose settings.

    Args:
        model: hub id, local folder, or ``"demo"``.
        options: device, precision, lengths and threads to tune for.
        plan: what to measure.
        clock: seconds.
        told: called with what is being done and the share of the sweep done, 0 to 1.
        known: a profile whose precisions and threads still hold and are not compared again.

    Raises:
        InvalidInput: an option, or the data.
        ModelError: the model is not there, damaged, or of an unsupported kind.
        OutOfMemory: the weights, or a single pair, do not fit.
    """
    folder = resolve(model, revision=options.revision, progress=options.progress)
    texts = load_texts(plan.data, language="en" if folder.name == "demo" else None)
    encoder = PairEncoder(folder.path)
    kept = _Partial.of(plan, options, folder, texts)
    if known is not None:
        kept.precisions, kept.threads = known.precisions, known.threads
    trial = PrecisionCheck.of(folder, options, encoder, texts)
    kept.precisions = precisions = kept.precisions or _compare_precisions(trial, told)
    precision, keep_bf16 = _fastest(precisions, options)
    options = replace(options, precision=precision)
    trial = replace(trial, options=options)
    kept.threads = threads = kept.threads or _compare_threads(trial, keep_bf16, told)
    options = replace(options, threads=_most_useful(threads, options))
    scorer = replace(trial, options=options).open(precision, keep_bf16)
    try:
        samples = {count: texts.sample(count) for count in plan.pairs}
        timed = _Timed(encoder, scorer, options, samples, clock)
        results = sweep(
            grid(plan.pairs, plan.batch_sizes, plan.token_budgets),
            timed,
            clock=clock,
            limit_s=plan.time_limit_s,
            known=kept.points,
            saved=kept.save,
            told=lambda point, share: told(f"measuring {point.label}", share),
        )
        probed = probe(replace(trial, options=options), scorer, plan, texts, clock=clock, told=told)
        key = current_key(folder.name, folder.revision, scorer.info)
        used = scorer.info.threads or None
    finally:
        scorer.close()
    told("measuring a worker's memory", 1.0)
    models = models_of(probed, replace(trial, options=options).opener(keep_bf16))
    return Profile(
        key=key,
        settings=_settings(key, results, used, options.max_length),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        data={"name": texts.name, "pairs": len(texts.pairs), "tokens": timed.lengths()},
        precisions=precisions,
        threads=threads,
        points=[measured.as_dict() for measured in results],
        best=[measured.as_dict() for measured in best_batches(results)],
        situations=[situation.as_dict() for situation in situations(results)],
        warnings=[*cautions(results), *models.warnings],
        cost=models.cost,
        memory=models.memory,
    )


def probe(
    trial: PrecisionCheck,
    scorer: Scorer,
    plan: Plan,
    texts: Texts,
    *,
    clock: Clock,
    told: Callable[[str, float], None],
) -> ProbeResult:
    """Probes of an open scorer, up to the plan's largest step; see :func:`models_of`."""
    facts, encoder = scorer.info, trial.encoder
    specials = encoder.template.specials
    longest = check_max_length(trial.options.max_length, facts.max_tokens, specials)
    largest = max(plan.token_budgets, default=step_budget(None, None, facts.device))
    return calibrate(
        scorer,
        StepFactory(encoder, texts, longest),
        LengthRange(longest, largest, facts.padding),
        clock,
        PROBE_SHARE * plan.time_limit_s,
        lambda share: told("measuring probes for the cost model", share),
    )


def _compare_precisions(
    trial: PrecisionCheck, told: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Speed and agreement of each precision, see :func:`compare`; none without a choice."""
    candidates = precisions_to_compare(trial.folder.path, trial.options.device)
    asked = trial.options.precision
    if asked == "int8" and asked in candidates[1:]:
        candidates = ["fp32", "int8"]  # it passes the gate even where it was asked for
    elif asked != "auto" or len(candidates) == 1:
        return []
    return compare(trial, candidates, lambda doing: told(doing, 0.0))


def _compare_threads(
    trial: PrecisionCheck, keep_bf16: Sequence[str], told: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Speed with all usable CPUs and with fewer; none where there is no choice.

    More threads are not always faster: hyper-threads share a core's units, neighbours share the
    machine, and small layers do not divide well.
    """
    counts = thread_counts(usable_cpus())
    options = trial.options
    if options.threads is not None or len(counts) == 1:
        return []
    if not runs_on_cpu(trial.folder.path, options.device):
        return []
    rows: list[dict[str, Any]] = []
    for count in counts:
        told(f"trying {count} threads", 0.0)
        tried = replace(trial, options=replace(options, threads=count))
        _, tokens_per_s = tried.score(options.precision, keep_bf16)
        rows.append({"threads": count, "tokens_per_s": tokens_per_s})
    return rows


def thread_counts(usable: int) -> list[int]:
    """Thread counts worth trying: all, a half and a quarter of the usable CPUs."""
    return sorted({max(1, usable // part) for part in (1, 2, 4)}, reverse=True)


def _most_useful(threads: list[dict[str, Any]], options: Options) -> int | None:
    if not threads:
        return options.threads
    best: int = max(threads, key=lambda row: row["tokens_per_s"])["threads"]
    return best


def _fastest(precisions: list[dict[str, Any]], options: Options) -> tuple[Any, list[str]]:
    """The fastest precision that passed, and the layers it leaves in bf16.

    Raises:
        InvalidInput: int8 was asked for and did not pass.
    """
    asked = options.precision
    if asked == "int8" and precisions:
        require_passed(precisions[-1])
    passed = [row for row in precisions if row["passed"] and asked in {"auto", row["precision"]}]
    if not passed:
        return asked, []
    fastest = max(passed, key=lambda row: row["tokens_per_s"])
    return fastest["precision"], fastest.get("keep_bf16", [])


class _Timed:
    """Runs a point once, from texts in hand to scores in hand.

    Identical pairs are not folded and nothing is cached: every pair goes through the model.
    """

    def __init__(
        self,
        encoder: PairEncoder,
        scorer: Scorer,
        options: Options,
        samples: dict[int, list[Pair]],
        clock: Clock,
    ) -> None:
        facts = scorer.info
        self._encode = partial(
            encoder.encode,
            max_length=check_max_length(
                options.max_length, facts.max_tokens, encoder.template.specials
            ),
            truncation=options.truncation,
            max_query_tokens=options.max_query_tokens,
        )
        self._scorer = scorer
        self._clock = clock
        self._samples = samples
        self._meter = meter_of(facts.device)

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

    def lengths(self) -> dict[str, Any]:
        """Token lengths of the largest sample."""
        lengths = self._encode(self._samples[max(self._samples)]).lengths
        p50, p90 = np.percentile(lengths, [50, 90])
        return {
            "mean": float(lengths.mean()),
            "p50": float(p50),
            "p90": float(p90),
            "max": int(lengths.max()),
        }


@dataclass(slots=True)
class _Partial:
    """Results of a run that has not ended, kept on disk so that it can go on later."""

    path: Path | None
    question: dict[str, Any]
    precisions: list[dict[str, Any]]
    threads: list[dict[str, Any]]
    points: list[MeasuredPoint]
    broken: bool = False

    @classmethod
    def of(cls, plan: Plan, options: Options, folder: ModelFolder, texts: Texts) -> _Partial:
        """Pick up what an interrupted run of the same question left."""
        question = {
            "model": folder.revision,
            "options": options.as_dict(),
            "texts": [texts.name, len(texts.pairs)],
            "sizes": [list(plan.pairs), list(plan.batch_sizes), list(plan.token_budgets)],
            "versions": library_versions(),
        }
        fresh = cls(plan.partial, question, [], [], [])
        if plan.partial is None or not plan.partial.is_file():
            return fresh
        try:
            content = read_json(plan.partial)
            if content["question"] != question:
                return fresh
            points = [MeasuredPoint.from_dict(known) for known in content["points"]]
            return cls(plan.partial, question, content["precisions"], content["threads"], points)
        except (ProfileError, KeyError, TypeError):
            return fresh  # half-written or foreign: measure again

    def save(self, results: list[MeasuredPoint]) -> None:
        """Keep what is known; a full disk costs the safety net, not the run."""
        if self.path is None or self.broken:
            return
        points = [measured.as_dict() for measured in results]
        content = {
            "question": self.question,
            "precisions": self.precisions,
            "threads": self.threads,
            "points": points,
        }
        try:
            write_json(self.path, content)
        except StorageError as error:
            self.broken = True
            warnings.warn(
                f"Results cannot be kept while measuring: {error}", EchelonWarning, stacklevel=2
            )


def _settings(
    key: ProfileKey, results: Sequence[MeasuredPoint], threads: int | None, max_length: int | None
) -> TunedSettings:
    """The best token budget; where none was measured, the best batch size of the most pairs."""
    budget = best_budget(results)
    if budget is not None:
        return TunedSettings(key.precision, budget.point.size, None, threads, max_length)
    best = best_batches(results)
    batch_size = best[-1].point.batch_size if best else None
    return TunedSettings(key.precision, NO_BUDGET, batch_size, threads, max_length)
