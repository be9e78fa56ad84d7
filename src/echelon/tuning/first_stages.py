"""The stages of a tuning run before the sweep: first steps, precisions, threads."""

from __future__ import annotations

import math
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from echelon.engine.precision_check import compare_precisions, require_passed
from echelon.errors import InvalidInput
from echelon.messages import N_, Message, tr
from echelon.messages.units import duration, number
from echelon.models.base import DeviceOutOfMemory
from echelon.models.device import usable_cpus
from echelon.models.registry import precisions_to_compare, runs_in, runs_on_cpu
from echelon.reports.statistics import MIN_RUNS, summarize, verdict
from echelon.tuning.probe_shapes import StepFactory
from echelon.tuning.time_plan import LEAST_PAIRS, PRECISIONS, THREADS, Price, TimeBudget, price

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.data import Texts
    from echelon.engine.precision_check import PrecisionCheck
    from echelon.models.base import Scorer
    from echelon.progress import Progress
    from echelon.types import Clock

SAMPLE = 10  # pairs whose mean length is that of a typical pair

MAX_THREAD_PAIRS = 32
"""Pairs of the call that thread counts are compared with: more would tell no more."""

WARM_UP = 1.1  # all topics, and the first one before them

CHECKED = ("int8", "fp8")
"""Precisions that are compared with fp32 also where the user asked for them."""

THREAD_RUNS = 5  # of a thread count, where they are quick


def first_steps(
    check: PrecisionCheck, texts: Texts, limit_s: float, clock: Clock, on_progress: Progress
) -> tuple[TimeBudget, Price]:
    """Open the model and price its steps; the time limit begins when it is open.

    Raises:
        InvalidInput: the time limit is too short for anything to be known afterwards.
    """
    on_progress(tr("opening the model and timing its first steps"))
    began = clock()
    with closing(check.open(check.options.precision)) as scorer:
        time = TimeBudget(limit_s, clock() - began, clock)
        found = price_steps(check, scorer, texts, time, clock)
    least_s = LEAST_PAIRS * found.pair_s
    if limit_s < least_s:
        words = N_("{limit} s is too short: a pair takes {pair} here")
        problem = tr(words, limit=number(limit_s), pair=duration(found.pair_s))
        remedy = tr("Give at least {least}.", least=math.ceil(least_s))
        raise InvalidInput("time_limit", problem, remedy)
    return time, found


def price_steps(
    check: PrecisionCheck, scorer: Scorer, texts: Texts, time: TimeBudget, clock: Clock
) -> Price:
    """Price the steps of an open model, with pairs of a typical length."""
    longest = check.max_length(scorer.info)
    steps = StepFactory(check.encoder, texts, longest)
    lengths = check.encoder.encode(texts.sample(SAMPLE), longest, "longest_first").lengths
    typical = max(1, round(float(lengths.mean())))
    return price(lambda shape: scorer.score(steps.batch(shape)), typical, clock, time.limit_s)


def compare_in_time(
    check: PrecisionCheck, price: Price, time: TimeBudget, on_progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the precisions there are, and a note where the time is too short for it.

    No rows where there is no choice or no time.
    """
    candidates = precisions_to_compare(check.folder.path, check.options.device)
    asked = check.options.precision
    required = asked in CHECKED and runs_in(check.folder.path, check.options.device, asked)
    if required:
        candidates = ["fp32", asked]
    elif asked != "auto":
        return [], []
    elif len(candidates) == 1:
        return [], [Message("tune.one_precision", {"precision": candidates[0]})]
    pairs = sum(len(topic.documents) for topic in check.topics)
    # A precision is worth having if it is faster than the first one: twice as fast is usual.
    passes = 1 + (len(candidates) - 1) / 2
    seconds = time.open_s * len(candidates) + WARM_UP * passes * pairs * price.pair_s
    if not (required or time.affords(seconds, PRECISIONS)):
        values = {"seconds": f"{seconds:.0f}", "limit": f"{seconds / PRECISIONS:.0f}"}
        return [], [Message("tune.precisions_left_out", values)]

    def said(stage: str, done: float = 0.0, total: float = 0.0) -> None:
        words = N_("{stage} (all precisions: about {seconds} s)")
        on_progress(tr(words, stage=stage, seconds=number(seconds)), done, total)

    # Queries are added within the stage's share; a precision that was asked for is decided.
    limit_s = math.inf if required else min(PRECISIONS * time.limit_s, time.left_s)
    return compare_precisions(check, candidates, said, limit_s), []


def with_fastest_precision(
    check: PrecisionCheck, rows: list[dict[str, Any]]
) -> tuple[PrecisionCheck, list[str]]:
    """Choose the fastest precision that passed, and the layers that it leaves in bf16."""
    asked = check.options.precision
    if asked in CHECKED and rows:
        require_passed(rows[-1])
    passed = [row for row in rows if row["passed"] and asked in {"auto", row["precision"]}]
    if not passed:
        return check, []
    fastest = max(passed, key=lambda row: row["tokens_per_s"])
    options = replace(check.options, precision=fastest["precision"])
    return replace(check, options=options), fastest.get("keep_bf16", [])


def compare_threads(
    check: PrecisionCheck,
    keep_bf16: Sequence[str],
    price: Price,
    time: TimeBudget,
    clock: Clock,
    on_progress: Progress,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare thread counts, and a note where the time is too short; no rows without a choice.

    More threads are not always faster: hyper-threads share the units of a core, other programs
    use the machine too, and small layers do not divide well.
    """
    counts, options = thread_counts(usable_cpus()), check.options
    if options.threads is not None or len(counts) == 1:
        return [], []
    if not runs_on_cpu(check.folder.path, options.device):
        return [], []
    share_s = min(THREADS * time.limit_s, time.left_s)
    # The smaller counts take longer, at most by as much as they are fewer.
    slower = sum(counts[0] / count for count in counts)
    spare_s = share_s - len(counts) * time.open_s
    pairs = int(spare_s / (slower * (MIN_RUNS + 1) * max(price.pair_s, 1e-9)))
    if pairs < 1:
        needed = len(counts) * time.open_s + slower * (MIN_RUNS + 1) * price.pair_s
        values = {"seconds": f"{needed:.0f}", "limit": f"{needed / THREADS:.0f}"}
        return [], [Message("tune.threads_left_out", values)]
    rows = []
    with suppress(DeviceOutOfMemory):  # the sweep finds the steps that fit
        for count in counts:
            words = N_("trying threads: {count} (all counts: about {seconds} s)")
            on_progress(tr(words, count=count, seconds=number(share_s)))
            tried = replace(check, options=replace(options, threads=count))
            part_s = spare_s * counts[0] / count / slower
            rows.append({"threads": count, **_speed(tried, keep_bf16, pairs, part_s, clock)})
    return rows, []


def _speed(
    check: PrecisionCheck, keep_bf16: Sequence[str], pairs: int, limit_s: float, clock: Clock
) -> dict[str, Any]:
    """Time one step after a warm-up, at least MIN_RUNS times."""
    with closing(check.open(check.options.precision, keep_bf16)) as scorer:
        encoded = check.encode(scorer.info)
        step = list(range(len(encoded.lengths)))[: min(pairs, MAX_THREAD_PAIRS)]
        seconds, began = list[float](), clock()
        scorer.score(encoded.batch(step))
        while len(seconds) < MIN_RUNS or (
            len(seconds) < THREAD_RUNS and clock() - began < limit_s / 2
        ):
            encoded = check.encode(scorer.info, len(seconds))
            batch, started = encoded.batch(step), clock()
            scorer.score(batch)
            seconds.append(clock() - started)
    tokens = int(encoded.lengths[step].sum())
    return {"tokens_per_s": tokens / float(np.median(seconds)), "seconds": seconds}


def with_fastest_threads(check: PrecisionCheck, rows: list[dict[str, Any]]) -> PrecisionCheck:
    """All usable CPUs, unless another number of threads is surely faster."""
    if not rows:
        return check
    chosen = rows[0]
    for row in rows[1:]:
        if _surely_faster(row, chosen):
            chosen = row
    return replace(check, options=replace(check.options, threads=chosen["threads"]))


def _surely_faster(row: dict[str, Any], other: dict[str, Any]) -> bool:
    if "seconds" not in row or "seconds" not in other:  # of an older profile
        return bool(row["tokens_per_s"] > other["tokens_per_s"])
    mine, its = (summarize(one["seconds"]).known for one in (row, other))
    return verdict(mine, its) == "better"


def thread_counts(usable: int) -> list[int]:
    """Thread counts to compare: all usable CPUs, a half and a quarter of them."""
    return sorted({max(1, usable // part) for part in (1, 2, 4)}, reverse=True)
