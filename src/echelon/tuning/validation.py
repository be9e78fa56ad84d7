"""Validates a chosen setting under its load, on a real server or a reranker in this process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, Self

from echelon.errors import EchelonError
from echelon.messages import tr
from echelon.progress import Progress, no_progress
from echelon.reranker import Reranker
from echelon.simulation.service_level import percentiles
from echelon.tuning.goal import HURRIED, ScenarioGoal
from echelon.tuning.machine import meter_of
from echelon.tuning.recommendation import (
    LoadMetrics,
    Validation,
    limited_pace,
    noise_of_ratios,
    pace_of,
    squares_per_token,
)
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from echelon.loadtest.run import LoadTestPlan, LoadTestRun
    from echelon.simulation.workload import Arrival
    from echelon.tuning.scenario import Candidate
    from echelon.tuning.scenario_model import ScenarioModel, WorkloadTexts

    Scraped = dict[str, float]


ENV_PREFIXES = ("ECHELON_SERVE_", "ECHELON_API_KEY", "OTEL_")
"""Environment of the user's own server, which must not reach the server that is started here."""

STOP_TIMEOUT_S = 20.0
"""Time to answer open requests and to stop the workers; then the process is killed."""

MAX_LINES = 20  # last lines of the log that an error message shows

SCRAPE_TIMEOUT_S = 10.0
MAX_WARM_S = 2.0  # longest warm-up, in seconds
WARM_SEED = 1  # added to the seed for warm-up requests, so that they differ from those that count
TIMEOUT_S = 30.0  # a request without an answer after this time has failed


class ServerFailed(EchelonError):
    """The server for a validation did not start, or ended."""


class ServerProcess:
    """`echelon serve` with these arguments on a free port of the loopback interface."""

    def __init__(self, arguments: list[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIXES)}
        command = [sys.executable, "-m", "echelon", "serve", *arguments]
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own command
            [*command, "--host", "127.0.0.1", "--port", "0", "--log-format", "json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        self._reader: threading.Thread | None = None
        self.url = ""

    def __enter__(self) -> Self:
        stream = self._process.stderr
        if stream is None:
            raise RuntimeError("This is a bug: stderr is a pipe.")
        try:
            self.url = self._await_url(stream)
        except BaseException:
            self._end()
            raise
        self._reader = threading.Thread(target=self._lines.extend, args=(stream,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def metrics(self) -> dict[str, float]:
        """Read the server's metrics: name with labels to value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=SCRAPE_TIMEOUT_S) as response:  # noqa: S310 - our own server
            text = response.read().decode("utf-8")
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        pairs = (line.rpartition(" ") for line in lines)
        return {name: float(value) for name, _, value in pairs}

    def _await_url(self, stream: IO[str]) -> str:
        for line in stream:
            self._lines.append(line)
            url = _url_in(line)
            if url is not None:
                return url
        code = self._process.wait()
        words = " ".join("".join(self._lines).split()) or "nothing was logged"
        raise ServerFailed(
            f"The server for the validation ended with exit code {code}: {words}. "
            "Start it yourself with `echelon serve` to see why, or give --verify-s 0."
        )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _url_in(line: str) -> str | None:
    """The address in a line of the server's log; None where there is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    url = entry.get("url") if isinstance(entry, dict) else None
    return url if isinstance(url, str) else None


Texts = list[tuple[str, list[str]]]  # query and documents of each request


@dataclass(frozen=True, slots=True)
class RerankTask:
    """What to rerank, and how."""

    model: str | os.PathLike[str]
    keywords: dict[str, Any]  # of Reranker
    warm: Texts  # requests that do not count
    texts: Texts  # requests that count
    at_once: bool  # whether all requests are one call; otherwise one call follows another
    within_s: float | None = None  # after it no further call is started; None makes all calls


@dataclass(frozen=True, slots=True)
class RerankRun:
    """A finished task."""

    waits: list[float]  # seconds of each call; empty where all requests were one call
    whole_s: float  # seconds of all calls
    peak_bytes: int  # warm-up and libraries included


def run(task: RerankTask, on_progress: Progress = no_progress) -> RerankRun:
    """Run a task with a new reranker."""
    on_progress(tr("reranking"))
    with Reranker(task.model, **task.keywords) as reranker:
        for query, documents in task.warm:
            reranker.rank(query, documents)
        meter = meter_of(reranker.facts.device)
        meter.reset()
        if task.at_once:
            pairs = [(query, document) for query, texts in task.texts for document in texts]
            began = monotonic()
            reranker.score_pairs(pairs)
            return RerankRun([], monotonic() - began, meter.peak_bytes())
        waits = _one_after_another(reranker, task, on_progress)
        return RerankRun(waits, sum(waits), meter.peak_bytes())


def _one_after_another(reranker: Reranker, task: RerankTask, on_progress: Progress) -> list[float]:
    """Seconds of each call, as many calls as the time allows."""
    began, waits = monotonic(), []
    for number, (query, documents) in enumerate(task.texts, 1):
        started = monotonic()
        reranker.rank(query, documents)
        ended = monotonic()
        waits.append(ended - started)
        share = number / len(task.texts)
        if task.within_s is not None:
            share = (ended - began) / task.within_s
        on_progress(tr("reranking"), min(1.0, share), 1.0)
        if share >= 1:
            break
    return waits


@dataclass(frozen=True, slots=True)
class ValidationContext:
    """What a validation needs."""

    goal: ScenarioGoal
    model: ScenarioModel
    load: WorkloadTexts
    profile: Path  # with the settings to validate
    on_gpu: bool  # whether steps run on a GPU, whose memory a server does not report
    on_progress: Progress

    def options(self) -> dict[str, Any]:
        """The profile and the options that are not in it, as a server and a reranker take them."""
        options = self.model.options
        names = ("device", "truncation", "revision", "label")
        return {"profile": self.profile} | {name: getattr(options, name) for name in names}


def validate(
    context: ValidationContext, chosen: Candidate, requests: Sequence[Arrival], seconds: float
) -> Validation:
    """Run the chosen setting, which is in the context's profile, under the simulated requests.

    ``seconds`` is the predicted time: of all requests for ``offline``, per request for ``edge``.

    Raises:
        ServerFailed: the server did not start.
    """
    if context.goal.scenario not in HURRIED:
        ran = run(rerank_task(context, requests), context.on_progress)
        return validation_of_reranker(context, requests, ran, seconds)
    context.on_progress(tr("starting the server"))
    with ServerProcess(serve_arguments(context, chosen)) as server:
        test, before, after = asyncio.run(_send(context, server))
    return validation_of_server(context, chosen, requests, test, (before, after))


# A server under load.


def validation_of_server(
    context: ValidationContext,
    chosen: Candidate,
    requests: Sequence[Arrival],
    run: LoadTestRun,
    scraped: tuple[Scraped, Scraped],
) -> Validation:
    """Judge a load test, by what callers measured and the server's metrics before and after."""
    from echelon.loadtest.summary import latencies

    before, after = scraped
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    summary, level = run.summary, context.goal.level
    gauges = [v for k, v in after.items() if k.startswith("echelon_worker_resident_bytes{")]
    memory = float(sum(gauges)) if gauges and not context.on_gpu else None
    answered, within = summary.kinds["answered"], level.within(latencies(run.outcome))
    p50, p95, p99 = (summary.latency_s.get(percentile) for percentile in (50.0, 95.0, 99.0))
    metrics = LoadMetrics(
        p50,
        p95,
        p99,
        summary.answered_per_s,
        summary.documents_per_s,
        memory,
        summary.requests,
        summary.requests - within,
    )
    pace = pace_of(
        grown["echelon_step_actual_seconds_total"],
        grown["echelon_step_seconds_count"],
        grown["echelon_step_tokens_sum"],
        squares_per_token(requests, chosen.max_length),
        chosen.cost,
    )
    return Validation(
        metrics,
        pace,
        _overhead(grown, summary.mean_s),
        level.held(summary.requests, answered, within) and _fits(context.goal, memory),
        (*summary.doubts, *summary.notes),
        noise_of_ratios(_ratios(grown)),
    )


def serve_arguments(context: ValidationContext, chosen: Candidate) -> list[str]:
    """Arguments of ``echelon serve`` that are not in the profile, the model first."""
    # Scoring is measured, and warm-up may send texts of the load.
    values = context.options() | {"workers": chosen.workers, "score-cache": 0}
    if chosen.workers > 1:
        values["device"] = "cuda"
    given = [(f"--{name}", str(value)) for name, value in values.items() if value is not None]
    return [str(context.model.name), *(word for pair in given for word in pair)]


async def _send(
    context: ValidationContext, server: ServerProcess
) -> tuple[LoadTestRun, Scraped, Scraped]:
    from echelon.loadtest.run import opened

    goal, plan = context.goal, load_test_plan(context, server.url)
    warm_s = min(MAX_WARM_S, goal.verify_s)
    warm = replace(plan.workload, seed=goal.seed + WARM_SEED)
    async with opened(plan, on_progress=context.on_progress) as test:
        await test.measure(replace(plan, duration_s=warm_s, workload=warm))
        before = await asyncio.to_thread(server.metrics)
        run = await test.measure()
        return run, before, await asyncio.to_thread(server.metrics)


def load_test_plan(context: ValidationContext, url: str) -> LoadTestPlan:
    """The load test that sends the simulated requests."""
    from echelon.loadtest.client import Target, protocol_of, route_of
    from echelon.loadtest.run import LoadTestPlan

    goal, load, protocol = context.goal, context.load, protocol_of("cohere")
    timeout_s = max(TIMEOUT_S, 4 * (goal.goal_s or 0.0))
    return LoadTestPlan(
        target=Target(route_of(url, protocol), protocol, timeout_s=timeout_s),
        topics=load.topics,
        workload=replace(load.workload, seed=goal.seed),
        warmup_s=0.0,
        duration_s=goal.verify_s,
        goal=None if goal.goal_s is None else goal.level,
        length_policy=load.length_policy,
    )


def _overhead(grown: Scraped, mean_s: float | None) -> float:
    """Mean seconds of a request besides queue and steps: reading, tokenizing, answering."""

    def phase(name: str) -> float:
        of = f'{{phase="{name}"}}'
        count = grown.get(f"echelon_request_seconds_count{of}", 0.0)
        return grown.get(f"echelon_request_seconds_sum{of}", 0.0) / count if count else 0.0

    return max(0.0, (mean_s or 0.0) - (phase("total") - phase("tokenise")))


def _ratios(grown: Scraped) -> dict[float, float]:
    """The histogram of actual over predicted step time, by upper bound."""
    name = 'echelon_step_actual_over_predicted_bucket{le="'
    return {
        float(key.removeprefix(name).rstrip('"}')): count
        for key, count in grown.items()
        if key.startswith(name)
    }


def _fits(goal: ScenarioGoal, memory: float | None) -> bool:
    limit = goal.memory_limit_bytes
    return limit is None or memory is None or memory <= limit


# A reranker in this process.


def validation_of_reranker(
    context: ValidationContext, requests: Sequence[Arrival], ran: RerankRun, seconds: float
) -> Validation:
    """Judge a run of a reranker; arguments as in :func:`validate`."""
    goal, offline = context.goal, context.goal.scenario == "offline"
    p50, p95, p99 = (None, None, None) if offline else percentiles(ran.waits)
    done = requests if offline else requests[: len(ran.waits)]
    count = sum(one.documents for one in done)
    late = len(ran.waits) - goal.level.within(ran.waits)
    memory, whole = float(ran.peak_bytes), ran.whole_s
    metrics = LoadMetrics(p50, p95, p99, len(done) / whole, count / whole, memory, len(done), late)
    expected = seconds if offline else seconds * len(done)
    pace = limited_pace(whole / expected) if expected > 0 else 1.0
    held = goal.level.held(len(done), len(done), len(done) - late) and _fits(goal, memory)
    return Validation(metrics, pace, None, held)


def rerank_task(context: ValidationContext, requests: Sequence[Arrival]) -> RerankTask:
    """The requests as a reranker gets them, with the context's profile."""
    goal = context.goal
    return RerankTask(
        context.model.name,
        context.options(),
        warm=context.load.texts(requests[:2], goal.seed + WARM_SEED),
        texts=context.load.texts(requests, goal.seed),
        at_once=goal.scenario == "offline",
        within_s=goal.verify_s,
    )
