"""How long the simulators take: an hour at 2,000 requests a second, and a day over 1,000 replicas.

The hour is simulated request by request; the day in windows of each quarter of an hour, see
`echelon.simulation.capacity`. Both on as many replicas of two CPU cores as the traffic needs at
about 80 % load: requests of 1 to 19 documents of about 110 tokens. The exact simulation of one
server is timed beside them.

    python benchmarks/simulate.py

Writes benchmarks/results/simulate.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon.profile import library_versions
from echelon.scheduling.cost_model import DEFAULT_COEFFICIENTS, CostModel
from echelon.simulation.capacity import TYPICAL, Capacity, rates_of, simulate_day
from echelon.simulation.cluster_simulation import Cluster, simulate_cluster
from echelon.simulation.cluster_traffic import blocks
from echelon.simulation.server_simulation import SimulationSettings, simulate
from echelon.simulation.service_level import ServiceLevel
from echelon.simulation.workload import LognormalSize, PoissonArrivals, UniformSize, Workload
from echelon.tuning.machine import describe_machine

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
WORKLOAD = Workload(PoissonArrivals(1.0), UniformSize(1, 19), LognormalSize(110, 0.6, 512))
TRUTH = CostModel(DEFAULT_COEFFICIENTS["cpu"])
SETTINGS = SimulationSettings(2048)
LEVEL = ServiceLevel(0.4)
LOAD = 0.8


def machine_rate() -> float:
    """Requests a second that one replica does at most."""
    return Capacity(WORKLOAD, TRUTH, SETTINGS, LEVEL).machine_rate


def hour(rate: float, seconds: float, routing: str) -> dict[str, Any]:
    """Some seconds at a rate, request by request."""
    replicas = math.ceil(rate / (LOAD * machine_rate()))
    traffic = blocks(replace(WORKLOAD, arrivals=PoissonArrivals(rate)), seconds)
    cluster = Cluster(replicas, SETTINGS, routing)
    outcome = simulate_cluster(traffic, TRUTH, cluster, level=LEVEL, warm_s=5.0)
    return {"replicas": replicas, "rate": rate, "seconds": seconds, "outcome": outcome.as_dict()}


def day(replicas: int) -> dict[str, Any]:
    """A day over a number of replicas."""
    peak = LOAD * replicas * machine_rate()
    rates = rates_of(TYPICAL, peak)
    found = simulate_day(WORKLOAD, rates, TRUTH, Cluster(replicas, SETTINGS), LEVEL).as_dict()
    del found["parts"]
    return {"replicas": replicas, "peak_rate": peak, "day": found}


def exact(seconds: float) -> dict[str, Any]:
    """One service, pair by pair, with the real batcher."""
    workload = replace(WORKLOAD, arrivals=PoissonArrivals(LOAD * machine_rate()))
    outcome = simulate(workload.requests(seconds), TRUTH, SETTINGS, level=LEVEL)
    return {"seconds": seconds, "outcome": outcome.as_dict()}


def timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a run found and the seconds it took."""
    started, used = time.perf_counter(), time.process_time()
    found = run()
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - used,
        **found,
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=2000.0, help="requests a second of the hour")
    parser.add_argument("--hour-s", type=float, default=3600.0, help="seconds of the hour")
    parser.add_argument("--replicas", type=int, default=1000, help="replicas of the day")
    parser.add_argument("--name", default="simulate", help="name of the result file")
    arguments = parser.parse_args()
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": library_versions(),
        "hour": timed(lambda: hour(arguments.rate, arguments.hour_s, "tokens")),
        "hour_at_random": timed(lambda: hour(arguments.rate, arguments.hour_s, "random")),
        "day": timed(lambda: day(arguments.replicas)),
        "exact": timed(lambda: exact(min(3600.0, arguments.hour_s))),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in ("hour", "hour_at_random", "day", "exact"):
        print(f"{name:15} {content[name]['wall_s']:7.1f} s")
    print(path)


if __name__ == "__main__":
    main()
