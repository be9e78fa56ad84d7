"""The chosen setting under its load: the real server, or the real reranker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from echelon.simulation.outcome import percentiles
from echelon.tuning.goal import HURRIED
from echelon.tuning.validation_metrics import (
    PACE,
    LoadMetrics,
    Validation,
    noise_of_ratios,
    pace_of,
    squares_share,
)
from echelon.tuning.validation_targets import RerankTask, ServerProcess, run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from echelon.loadtest.run import LoadTestPlan, LoadTestRun
    from echelon.simulation.workload import Arrival
    from echelon.tuning.goal import ScenarioGoal
    from echelon.tuning.scenario import Candidate
    from echelon.tuning.scenario_model import ScenarioModel, WorkloadTexts
    from echelon.tuning.validation_targets import RerankRun

    Scraped = dict[str, float]

WARM_S = 2.0
"""Longest warm-up."""

WARM_SEED = 1
"""Of requests that do not count: others than those that do."""

TIMEOUT_S = 30.0
"""A request that is not answered by then has failed."""


@dataclass(frozen=True, slots=True)
class ValidationContext:
    """All that a proof needs.

    Attributes:
        ask: what must hold.
        model: what is asked about.
        load: how it is sent.
        profile: file with the settings to prove.
        on_card: whether steps run on a GPU, whose memory a server does not tell.
        told: called with what is being done, and the share that is done.
    """

    ask: ScenarioGoal
    model: ScenarioModel
    load: WorkloadTexts
    profile: Path
    on_card: bool
    told: Callable[[str, float], None]


def prove(
    stage: ValidationContext, chosen: Candidate, requests: Sequence[Arrival], seconds: float
) -> Validation:
    """Run the setting under the requests.

    Args:
        stage: what for, and with what.
        chosen: the setting, as the stage's profile has it.
        requests: in tokens; the same that were simulated.
        seconds: that the simulation says of ``offline``, and a caller's mean wait for ``edge``.

    Raises:
        ServerFailed: the server did not start.
    """
    if stage.ask.scenario in HURRIED:
        return _serve(stage, chosen, requests)
    stage.told("reranking", 0.0)
    ran = run(rerank_task(stage, requests), lambda share: stage.told("reranking", share))
    return proof_of_reranking(stage, requests, ran, seconds)


# A server under load.


def _serve(stage: ValidationContext, chosen: Candidate, requests: Sequence[Arrival]) -> Validation:
    stage.told("starting the server", 0.0)
    with ServerProcess(arguments(stage, chosen)) as server:
        run, before, after = asyncio.run(_drive(stage, server))
    return proof_of(stage, chosen, requests, run, (before, after))


def proof_of(
    stage: ValidationContext,
    chosen: Candidate,
    requests: Sequence[Arrival],
    run: LoadTestRun,
    scraped: tuple[Scraped, Scraped],
) -> Validation:
    """What a run shows of a served setting.

    Args:
        stage: what for.
        chosen: the setting.
        requests: in tokens; those that were sent.
        run: what callers saw.
        scraped: the server's metrics before it and after.
    """
    from echelon.loadtest.summary import latencies

    before, after = scraped
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    summary = run.summary
    gauges = [v for k, v in after.items() if k.startswith("echelon_worker_resident_bytes{")]
    memory = float(sum(gauges)) if gauges and not stage.on_card else None
    answered, within = summary.kinds["answered"], stage.ask.level.within(latencies(run.outcome))
    numbers = LoadMetrics(
        summary.latency_s.get(50.0),
        summary.latency_s.get(95.0),
        summary.latency_s.get(99.0),
        summary.answered_per_s,
        summary.documents_per_s,
        memory,
        summary.requests,
        summary.requests - within,
    )
    paid = grown["echelon_step_tokens_sum"]
    steps = grown["echelon_step_seconds_count"]
    share = squares_share(requests, chosen.max_length)
    took = grown["echelon_step_actual_seconds_total"]
    return Validation(
        numbers,
        pace_of(took, steps, paid, share, chosen.cost),
        _overhead(grown, summary.mean_s),
        stage.ask.level.held(summary.requests, answered, within) and _fits(stage.ask, memory),
        (*summary.doubts, *summary.notes),
        noise_of_ratios(_ratios(grown)),
    )


def arguments(stage: ValidationContext, chosen: Candidate) -> list[str]:
    """Of ``echelon serve``: the profile says the rest."""
    options = stage.model.options
    several = chosen.workers > 1
    told: dict[str, Any] = {
        "--profile": stage.profile,
        "--workers": chosen.workers,
        "--device": "cuda" if several else options.device,
        "--truncation": options.truncation,
        "--revision": options.revision,
        "--label": options.label,
    }
    given = [(name, str(value)) for name, value in told.items() if value is not None]
    return [str(stage.model.name), *(word for pair in given for word in pair)]


async def _drive(
    stage: ValidationContext, server: ServerProcess
) -> tuple[LoadTestRun, Scraped, Scraped]:
    from echelon.loadtest.run import opened

    ask = stage.ask
    plan = stress_plan(stage, server.url)
    warm_s = min(WARM_S, ask.verify_s)
    async with opened(plan, told=lambda doing, share: stage.told(doing, share or 0.0)) as tester:
        await tester.measure(replace(plan, duration_s=warm_s, seed=ask.seed + WARM_SEED))
        before = await asyncio.to_thread(server.metrics)
        run = await tester.measure()
        return run, before, await asyncio.to_thread(server.metrics)


def stress_plan(stage: ValidationContext, url: str) -> LoadTestPlan:
    """The load test whose requests the simulation has seen."""
    from echelon.loadtest.client import Target, route_of, shape_of
    from echelon.loadtest.run import LoadTestPlan

    ask, load, shape = stage.ask, stage.load, shape_of("cohere")
    timeout_s = max(TIMEOUT_S, 4 * (ask.goal_s or 0.0))
    return LoadTestPlan(
        target=Target(route_of(url, shape), shape, timeout_s=timeout_s),
        topics=load.topics,
        documents=ask.sizes,
        tokens=load.traffic.workload.tokens,
        rate=load.rate,
        trace=load.traffic.trace or None,
        warmup_s=0.0,
        duration_s=ask.verify_s,
        goal=None if ask.goal_s is None else ask.level,
        seed=ask.seed,
        ruler=load.ruler,
    )


def _overhead(grown: Scraped, mean_s: float | None) -> float:
    """What a caller waits beside the queue and the steps: reading, tokenising, answering."""

    def phase(name: str) -> float:
        of = f'{{phase="{name}"}}'
        count = grown.get(f"echelon_request_seconds_count{of}", 0.0)
        return grown.get(f"echelon_request_seconds_sum{of}", 0.0) / count if count else 0.0

    return max(0.0, (mean_s or 0.0) - (phase("total") - phase("tokenise")))


def _ratios(grown: Scraped) -> dict[float, float]:
    """Steps whose actual time was at most so many times the predicted, by that bound."""
    name = 'echelon_step_actual_over_predicted_bucket{le="'
    return {
        float(key.removeprefix(name).rstrip('"}')): count
        for key, count in grown.items()
        if key.startswith(name)
    }


def _fits(ask: ScenarioGoal, memory: float | None) -> bool:
    limit = ask.memory_limit_bytes
    return limit is None or memory is None or memory <= limit


# The reranker.


def proof_of_reranking(
    stage: ValidationContext, requests: Sequence[Arrival], ran: RerankRun, seconds: float
) -> Validation:
    """What a run shows of a reranker; arguments as in :func:`prove`."""
    ask, offline = stage.ask, stage.ask.scenario == "offline"
    p50, p95, p99 = (None, None, None) if offline else percentiles(ran.waits)
    done = requests if offline else requests[: len(ran.waits)]
    count = sum(one.documents for one in done)
    late = len(ran.waits) - ask.level.within(ran.waits)
    memory, whole = float(ran.peak_bytes), ran.whole_s
    numbers = LoadMetrics(p50, p95, p99, len(done) / whole, count / whole, memory, len(done), late)
    expected = seconds if offline else seconds * len(done)
    pace = min(max(whole / expected, PACE[0]), PACE[1]) if expected > 0 else 1.0
    held = ask.level.held(len(done), len(done), len(done) - late) and _fits(ask, memory)
    return Validation(numbers, pace, None, held)


def rerank_task(stage: ValidationContext, requests: Sequence[Arrival]) -> RerankTask:
    """The requests as a reranker gets them, with the stage's profile."""
    ask, options = stage.ask, stage.model.options
    keywords: dict[str, Any] = {
        "profile": stage.profile,
        "device": options.device,
        "truncation": options.truncation,
        "revision": options.revision,
        "label": options.label,
    }
    return RerankTask(
        stage.model.name,
        keywords,
        warm=stage.load.texts(requests[:2], ask.seed + WARM_SEED),
        texts=stage.load.texts(requests, ask.seed),
        at_once=ask.scenario == "offline",
        within_s=ask.verify_s,
    )
