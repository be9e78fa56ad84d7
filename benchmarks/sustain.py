"""P99 and the highest sustainable rate, predicted by simulation and measured under `echelon serve`.

    python benchmarks/sustain.py                                  # the demo model, about 8 minutes
    python benchmarks/sustain.py --model FOLDER --name large --seconds 300      # one more beside it

Fits the cost model to the probes of `echelon tune`, starts the server with that profile, and lets
one caller goal: that gives the overhead of a request and the goal, P99 within four times a request
alone. Two predictions are compared with the measurements, by simulation of the very requests that
are sent (same seed, same times, same finite number): one from the probes and that overhead alone,
and one corrected by a look at half of the capacity, as `echelon tune --scenario` corrects itself
after its first validation. The highest rate is found by bisection, simulated and measured, by
the same criterion: all but a hundredth of the requests are answered within the goal.

Writes benchmarks/results/sustain.json and sustain.md. The goal: both within 25 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from echelon.errors import EchelonError, TooNoisy
from echelon.loadtest.run import opened
from echelon.options import Options
from echelon.profile import Profile, TunedSettings, current_key, library_versions, write_text
from echelon.progress import no_progress
from echelon.scheduling.packing import step_budget
from echelon.simulation.fitted_models import cost_of
from echelon.simulation.workload import FixedSize, LognormalSize
from echelon.tuning.calibration import models_of
from echelon.tuning.goal import ScenarioGoal, ScenarioLimits
from echelon.tuning.machine import describe_machine
from echelon.tuning.recommendation import correct
from echelon.tuning.scenario import Candidate, SimulatedService, curve_of, predict
from echelon.tuning.scenario_model import WorkloadTexts, length_policy_of, open_for_scenario
from echelon.tuning.time_plan import PROBES
from echelon.tuning.tuner import TuningPlan, probe
from echelon.tuning.validation import (
    ServerProcess,
    ValidationContext,
    load_test_plan,
    serve_arguments,
    validation_of_server,
)
from echelon.types import monotonic
from sustain_page import DOCUMENTS, Bisection, Row, merged, off, page, share_of, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from echelon.loadtest.run import LoadTest
    from echelon.simulation.workload import Arrival
    from echelon.tuning.recommendation import Validation
    from echelon.tuning.scenario_model import ScenarioModel

RESULTS = Path(__file__).parent / "results"

SCENARIO = "concurrent"
LONGEST = 512
SHARES = (0.3, 0.5, 0.7)
"""Shares of the predicted capacity."""

SLACK = 4.0
"""The goal: P99 within this multiple of a single request."""

PATIENCE_S = 30.0
"""The goal until a request alone was measured; no caller waits longer than four times this."""

ALONE = 20
"""About this many requests of a single caller; a tenth of the time before them is warm-up."""

BRACKET, SEARCHED = (0.05, 1.25), 10
"""Of the capacity, where the simulation's highest rate is looked for, and in how many steps. A
finite number of requests can be borne at somewhat more than the capacity."""

AROUND = (0.5, 1.5)
"""Of the predicted highest rate, where the measured one is looked for."""

SEED, OTHER_SEED = 2026, 2027
"""Of the requests that are compared, and of those that overhead and pace are learned from."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The models that a prediction is made with.

    Attributes:
        name: what the results call it.
        candidate: the setting, and how long its steps take.
        limits: goal and overhead.
        pace: time of steps over what the probes said of them.
    """

    name: str
    candidate: Candidate
    limits: ScenarioLimits
    pace: float = 1.0


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, its goal and the length of a run.

    Attributes:
        model: the model, opened once.
        goal: lengths and goal; its rate and seconds are replaced.
        load: the requests and their texts.
        profile: the file that the server reads.
        requests: requests per run.
        seconds: longest run.
    """

    model: ScenarioModel
    goal: ScenarioGoal
    load: WorkloadTexts
    profile: Path
    requests: int
    seconds: float

    def context(self, rate: float, seed: int = SEED) -> ValidationContext:
        """The context of one run."""
        seconds = min(self.seconds, self.requests / rate)
        goal = replace(self.goal, rate=rate, verify_s=seconds, seed=seed)
        load = self.load.at(rate)
        return ValidationContext(
            goal, self.model, load, self.profile, on_gpu=False, on_progress=no_progress
        )

    def arrivals(self, rate: float) -> list[Arrival]:
        """The requests that are compared, in tokens."""
        goal = self.context(rate).goal
        return self.load.at(rate).requests(goal.verify_s, goal.seed)

    def predicted(self, forecast: Forecast, rate: float) -> tuple[Row, bool]:
        """What the simulation says of them, and whether the goal is met."""
        outcome, _ = predict(SCENARIO, self.arrivals(rate), forecast.candidate, forecast.limits)
        known = outcome.as_dict()
        return {name: known[name] for name in ("p50_s", "p95_s", "p99_s", "missed")}, outcome.held

    def highest(self, forecast: Forecast, capacity: float) -> float | None:
        """The highest rate whose requests meet the goal in the simulation."""
        search = Bisection(*(share * capacity for share in BRACKET))
        for _ in range(SEARCHED):
            search.update(held=self.predicted(forecast, search.rate)[1])
        return search.found


class RunningServer:
    """A running server, and the load generator that sends requests to it."""

    def __init__(
        self, bench: Bench, server: ServerProcess, tester: LoadTest, candidate: Candidate
    ) -> None:
        self._bench = bench
        self._server = server
        self._tester = tester
        self._candidate = candidate

    async def run(
        self, rate: float, seed: int = SEED, *, alone_s: float | None = None
    ) -> tuple[Validation, Row]:
        """Send the requests of a rate when they are due; or those of one caller for a time."""
        context = self._bench.context(rate, seed)
        plan = load_test_plan(context, self._server.url)
        if alone_s is not None:
            plan = replace(plan, clients=1, duration_s=alone_s)
        requests = context.load.requests(context.goal.verify_s, seed)
        before = await asyncio.to_thread(self._server.metrics)
        run = await self._tester.measure(plan)
        after = await asyncio.to_thread(self._server.metrics)
        validation = validation_of_server(context, self._candidate, requests, run, (before, after))
        row = row_of(validation)
        print(f"{rate:.3g}/s: {json.dumps(row)}", flush=True)
        return validation, row


def row_of(validation: Validation) -> Row:
    """A run's entry."""
    metrics = validation.metrics
    row = {name: getattr(metrics, name) for name in ("p50_s", "p95_s", "p99_s", "requests")}
    row |= {"missed": metrics.missed / max(1, metrics.requests), "held": validation.held}
    row |= {"pace": validation.pace, "overhead_s": validation.overhead_s, "noise": validation.noise}
    return row | {"doubts": list(validation.doubts)}


def calibrated(model: ScenarioModel, seconds: float) -> Profile:
    """Step times as `echelon tune` fits them, and the settings of a server without options.

    Raises:
        TooNoisy: no fit was kept.
    """
    check = model.check
    factory = check.factory()
    scorer = factory(precision=check.options.precision)
    try:
        info = scorer.info
        plan = TuningPlan(time_limit_s=seconds / PROBES)
        probed = probe(check, scorer, plan, model.texts, monotonic, no_progress)
        key = current_key(check.folder.name, check.folder.revision, info)
    finally:
        scorer.close()
    found = models_of(probed, factory)
    if found.cost is None:
        raise TooNoisy(" ".join(found.warnings))
    budget = step_budget(None, None, info.device)
    settings = TunedSettings(info.precision, budget, None, info.threads or None, None)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(key, settings, created, cost=found.cost, memory=found.memory)


def evaluate(options: argparse.Namespace, folder: Path) -> Row:
    """Measure one model."""
    tokens = LognormalSize(options.tokens, 0.5, LONGEST)
    goal = ScenarioGoal(
        SCENARIO, PATIENCE_S, 1.0, documents=FixedSize(DOCUMENTS), tokens=tokens, seed=SEED
    )
    asked = Options(device="cpu", precision=options.precision)
    model = open_for_scenario(options.model, asked, None, goal)
    print("measuring probes for the cost model", flush=True)
    profile = calibrated(model, options.tune_seconds)
    file = folder / "profile.json"
    profile.save(file)
    topics = model.texts.topics
    load = WorkloadTexts(goal.traffic(tokens), topics, length_policy_of(model.check.encoder))
    bench = Bench(model, goal, load, file, options.requests, options.seconds)
    settings = profile.settings
    candidate = Candidate(settings.token_budget, cost_of(profile), precision=settings.precision)
    found = asyncio.run(measure(bench, candidate, options.bisections))
    return {"threads": settings.threads, "cost": profile.cost, **found}


async def measure(bench: Bench, candidate: Candidate, bisections: int) -> Row:
    """One caller, the predictions, and what comes of the same requests in reality."""
    context = bench.context(1.0)
    print("starting the server", flush=True)
    with ServerProcess(serve_arguments(context, candidate)) as server:
        async with opened(load_test_plan(context, server.url)) as tester:
            caller = RunningServer(bench, server, tester, candidate)
            one_s = candidate.cost.predict([int(bench.goal.tokens.mean)] * DOCUMENTS)
            alone_s = max(2.0, ALONE * one_s)
            await caller.run(1.0, OTHER_SEED, alone_s=alone_s / 10)
            first, alone = await caller.run(1.0, OTHER_SEED, alone_s=alone_s)
            bench = replace(bench, goal=replace(bench.goal, goal_s=SLACK * alone["p50_s"]))
            line = RunningServer(bench, server, tester, candidate)
            limits = ScenarioLimits(
                bench.goal.goal_s, overhead_s=first.overhead_s or 0.0, seed=SEED
            )
            full = SimulatedService(bench.load.workload, candidate, limits).at_once()
            capacity = full.requests / full.duration_s
            forecasts = [Forecast("probes", candidate, limits)]
            second, glance = await line.run(capacity / 2, OTHER_SEED)
            forecasts.append(corrected(forecasts[0], second))
            points = [await _point(line, bench, forecasts, s, capacity) for s in SHARES]
            highest = await _highest_rate(line, bench, forecasts, capacity, bisections)
    return {
        "alone": alone,
        "look": glance,
        "goal_s": bench.goal.goal_s,
        "capacity_per_s": capacity,
        "forecasts": {
            one.name: {
                "pace": one.pace,
                "overhead_s": one.limits.overhead_s,
                "noise": one.limits.noise,
            }
            for one in forecasts
        },
        "points": points,
        "most": highest,
        "verdict": {one.name: verdict(one.name, points, highest) for one in forecasts},
    }


def corrected(forecast: Forecast, validation: Validation) -> Forecast:
    """The models after a look, as `echelon tune --scenario` corrects them after a validation."""
    chosen, limits = forecast.candidate, forecast.limits
    # Memory plays no part here: what was predicted of it is what came.
    (candidate,), limits = correct([chosen], limits, validation.metrics, validation, 1)
    return Forecast("after a look", candidate, limits, validation.pace)


async def _point(
    line: RunningServer, bench: Bench, forecasts: Sequence[Forecast], share: float, capacity: float
) -> Row:
    rate = share * capacity
    said = {one.name: bench.predicted(one, rate)[0] for one in forecasts}
    _, came = await line.run(rate)
    return {
        "share": share,
        "rate_per_s": rate,
        "measured": came,
        "predicted": said,
        "off": {name: off(row["p99_s"], came["p99_s"]) for name, row in said.items()},
    }


async def _highest_rate(
    line: RunningServer,
    bench: Bench,
    forecasts: Sequence[Forecast],
    capacity: float,
    bisections: int,
) -> Row:
    said = {one.name: bench.highest(one, capacity) for one in forecasts}
    around = said[forecasts[-1].name] or capacity
    search = Bisection(*(share * around for share in AROUND))
    probes = []
    for _ in range(bisections):
        rate = search.rate
        validation, row = await line.run(rate)
        probes.append({"rate_per_s": rate, **row})
        search.update(held=validation.held)
    curves = {
        one.name: curve_of(bench.load.workload, one.candidate, one.limits).max_rate
        for one in forecasts
    }
    return {
        "predicted": said,
        "in_the_long_run": curves,
        "measured": search.found,
        "between": [search.low, search.high],
        "probes": probes,
        "off": {name: off(value, search.found) for name, value in said.items()},
    }


def main() -> None:
    """Parse the command line, measure, merge with what other models gave, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub id, folder or 'demo'")
    parser.add_argument("--name", help="what the results call the model [its name]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=60, help="mean tokens of a pair")
    parser.add_argument("--requests", type=int, default=300, help="of each run")
    parser.add_argument("--seconds", type=float, default=75.0, help="of a run at most")
    parser.add_argument("--tune-seconds", type=float, default=60.0, help="of the probes")
    parser.add_argument("--bisections", type=int, default=5, help="runs for the highest rate")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = {
        "model": options.name or options.model,
        "command": shlex.join(["python", "benchmarks/sustain.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": library_versions(),
        "load_before": os.getloadavg(),
        "precision": options.precision,
        "tokens": options.tokens,
    }
    with tempfile.TemporaryDirectory() as home:
        found |= evaluate(options, Path(home))
    file = options.out / "sustain.json"
    kept = json.loads(file.read_text("utf-8"))["models"] if file.exists() else []
    models = merged(kept, found)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"models": models}, indent=1) + "\n")
    write_text(options.out / "sustain.md", page(models))
    for name, row in found["verdict"].items():
        print(f"{name}: P99 off by {share_of(row['p99'])}, highest rate by {share_of(row['rate'])}")


if __name__ == "__main__":
    try:
        main()
    except EchelonError as error:
        sys.exit(str(error))
