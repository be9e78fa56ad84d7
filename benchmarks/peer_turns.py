"""Measuring one engine: its process, its best settings, its agreement with the reference."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peer_setup import CACHE, graphs_of, prepare
from peer_worker import EngineFailed, Worker
from workloads import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peer_setup import Engine
    from workloads import Workload

WORSE = 1.05
"""A step size this many times slower than the best ends the search in its direction."""

PROBE_SHARE = 0.2
PROBE_SECONDS, PROBE_RUNS = 2.0, 3
"""A probe is the fastest of this many runs, or of as many as pass this time."""

FINALISTS, FINAL_TURNS = 2, 3
"""The cheapest sizes are probed again, in turn, so often."""

FIRST_SIZES = {"pairs": 8, "tokens": 1024}
REPEATS = {"realtime": 5}
"""Runs that make one sample, their median, where one run is too short."""


class Member:
    """An engine in its process.

    Args:
        engine: which.
        model: folder it is opened on.

    Raises:
        EngineFailed: it cannot be had or opened.
    """

    def __init__(self, engine: Engine, model: Path) -> None:
        self.engine = engine
        self.options: dict[str, Any] | None = None
        self._model = model
        self._python = prepare(engine, model)
        self._log = CACHE / "logs" / f"{engine.name.replace(' ', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        self.worker: Worker | None = None
        self.open(engine.options)

    def open(self, options: dict[str, Any], *, anew: bool = False) -> None:
        """Open the engine with these options, in a new process if they are others, or ``anew``."""
        if options == self.options and not anew:
            return
        self.close()
        self.worker = Worker(self._python, self._log)
        try:
            self.worker.open(self.engine.kind, self._model, graphs_of(self._model), options)
        except EngineFailed:
            self.close()
            raise
        self.options = options

    def score(
        self, task: Task, size: int, indices: Sequence[int] | None = None
    ) -> tuple[float, list[float]]:
        """Seconds and logits of a task's pairs, all or some."""
        if self.worker is None:
            raise EngineFailed("the engine is not open")
        return self.worker.score(task.texts, size, indices)

    def close(self) -> None:
        """End the process."""
        if self.worker is not None:
            self.worker.close()
        self.worker = self.options = None


@dataclass(frozen=True, slots=True)
class Task:
    """A workload of a model, and where its texts lie."""

    workload: Workload
    texts: Path
    part: dict[str, Any]

    @property
    def name(self) -> str:
        """The workload's, in the results."""
        return str(self.part["workload"])


def climb(sizes: Sequence[int], first: int, measure: Callable[[int], float]) -> dict[int, float]:
    """Cost by size: upwards from the first as long as it pays, and downwards if it does not."""
    costs = {first: measure(first)}
    place = sizes.index(first)
    for direction in (sizes[place + 1 :], sizes[:place][::-1]):
        for size in direction:
            costs[size] = measure(size)
            if costs[size] > WORSE * min(costs.values()):
                break
        if cheapest(costs) != first:
            break
    return costs


def cheapest(costs: dict[int, float]) -> int:
    """The size that costs least."""
    return min(costs, key=costs.__getitem__)


def play_off(costs: dict[int, float], measure: Callable[[int], float]) -> dict[int, float]:
    """The cheapest sizes once more, in turn, so that what drifts between probes does not decide."""
    best = sorted(costs, key=lambda size: costs[size])[:FINALISTS]
    turns = [{size: measure(size) for size in best} for _ in range(FINAL_TURNS)]
    return {size: statistics.median(turn[size] for turn in turns) for size in best}


def settle(member: Member, task: Task) -> dict[str, Any]:
    """Find the options and the step size that are fastest on a part of the pairs."""
    engine, lengths = member.engine, task.workload.lengths
    share = 1.0 if task.name in REPEATS else PROBE_SHARE

    def measure(size: int) -> float:
        one_step, _ = sample(lengths, size, engine.unit, share=0.01)
        member.score(task, size, one_step)  # code is compiled, memory is got
        indices, scale = sample(lengths, size, engine.unit, share)
        times: list[float] = []
        while len(times) < PROBE_RUNS and sum(times) < PROBE_SECONDS:
            times.append(member.score(task, size, indices)[0])
        return scale * min(times)

    most = len(lengths) if engine.unit == "pairs" else sum(lengths)
    sizes = [s for i, s in enumerate(engine.sizes) if i == 0 or engine.sizes[i - 1] < most]
    first = min(FIRST_SIZES[engine.unit], sizes[-1])
    costs = climb(sizes, first, measure)
    finals = play_off(costs, measure)
    size = cheapest(finals)
    costs |= finals
    tried = [{"options": member.options, "seconds": costs}]
    for change in engine.alternatives:
        try:
            member.open({**engine.options, **change})
            tried.append({"options": member.options, "seconds": {size: measure(size)}})
        except EngineFailed as error:
            tried.append({"options": {**engine.options, **change}, "failure": str(error)})
    best = min((t for t in tried if "seconds" in t), key=lambda t: t["seconds"][size])
    member.open(best["options"], anew=True)  # what was tried leaves no memory behind
    measure(size)
    return {"size": size, "options": best["options"], "probes": tried}


def agreement(task: Task, reference: Sequence[float], logits: Sequence[float]) -> dict[str, float]:
    """Largest difference of a logit, and mean tau within queries, from the reference."""
    from echelon.engine.agreement import kendall_tau

    exact, other = (np.asarray(values, dtype=np.float32) for values in (reference, logits))
    queries = task.workload.queries()
    taus = [kendall_tau(exact[places], other[places]) for places in queries]
    return {"max_delta": float(np.abs(exact - other).max()), "tau": float(np.mean(taus))}
