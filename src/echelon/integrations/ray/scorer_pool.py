"""Windows of a file, scored by a pool of Ray actors and returned in order.

The steps of a window depend on the window alone, so its scores do not depend on the worker: the
output is that of one machine of the same kind, to the byte.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from echelon.engine.child import fault_of, resident_bytes
from echelon.engine.launch import with_precision_there, with_profile
from echelon.engine.worker import START_TIMEOUT_S, WorkerReply, unpack
from echelon.errors import EchelonError, WorkerLost, check_positive
from echelon.integrations.ray.worker import (
    CALL_RETRIES,
    WorkerResources,
    device_there,
    loss_of,
    place_of,
    warnings_of,
)
from echelon.models.base import WorkerDied
from echelon.models.device import usable_cpus
from echelon.models.hub import resolve
from echelon.offline.scoring import ScoredWindow, WindowScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from echelon.offline.readers import BadRow
    from echelon.offline.scoring import RowWindow, Steps
    from echelon.options import Options
    from echelon.profile import Profile
    from echelon.types import FloatArray, IntArray, RunReport

logger = logging.getLogger(__name__)

WINDOWS_PER_WORKER = 2
"""One window is tokenized while the other is scored."""

ATTEMPTS = 3
"""Workers that a window, or a start, may end before the job fails."""


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """Number and size of a job's workers."""

    workers: int | None = None  # number of workers; None is as many as the cluster has room for
    cpus: float | None = None  # CPUs of each; None is the threads of the forward pass
    gpus: float | None = None  # GPUs of each; None is one where the cluster has any

    def __post_init__(self) -> None:
        check_positive("Give 1 or more.", **{"--workers": self.workers})


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Scores of a window without its texts; ``rows`` are places of the scored rows in it."""

    rows: tuple[int, ...]
    bad: tuple[BadRow, ...]
    logits: FloatArray
    truncated_tokens: IntArray
    report: RunReport

    @classmethod
    def of(cls, window: RowWindow, scored: ScoredWindow) -> PoolResult:
        """Take the scores out of a scored window."""
        places = {id(row): place for place, row in enumerate(window.rows)}
        rows = tuple(places[id(row)] for row in scored.rows)
        return cls(rows, scored.bad, scored.logits, scored.truncated_tokens, scored.report)

    def in_window(self, window: RowWindow) -> ScoredWindow:
        """Put the scores and the window together."""
        rows = tuple(window.rows[place] for place in self.rows)
        return ScoredWindow(rows, self.bad, self.logits, self.truncated_tokens, self.report, window)


class ScorerActor:
    """The actor: a model that scores windows."""

    def __init__(self) -> None:
        self._scoring: WindowScorer | None = None
        self._opening = threading.Lock()

    def open(
        self, model: str, options: Options, steps: Steps | None, profile: Profile | None
    ) -> WorkerReply:
        """Open the model, once; reply with its steps' settings, the machine's id and warnings.

        Where the profile is given it chose the precision, and this machine may take another.
        """
        try:
            with self._opening, warnings_of() as told:  # Ray may repeat the call meanwhile
                self._scoring = self._scoring or _opened(model, options, steps, profile)
        except Exception as error:  # noqa: BLE001 - the caller raises it
            return fault_of(error)
        found = self._scoring.steps, ray.get_runtime_context().get_node_id(), told
        return WorkerReply("steps", found, 0.0, resident_bytes())

    def score(self, window: RowWindow) -> WorkerReply:
        """Score a window."""
        if self._scoring is None:
            raise AssertionError("a window before the model was open. This is a bug.")
        try:
            scored = self._scoring.submit(window).result()
        except Exception as error:  # noqa: BLE001 - the caller raises it
            return fault_of(error)
        return WorkerReply("scored", PoolResult.of(window, scored), 0.0, resident_bytes())


def _opened(
    model: str, options: Options, steps: Steps | None, profile: Profile | None
) -> WindowScorer:
    if profile is not None:
        folder = resolve(model, revision=options.revision)
        options = with_precision_there(options, profile, folder)
    return WindowScorer(model, replace(options, profile=None), steps)


_ACTOR = ray.remote(
    max_concurrency=WINDOWS_PER_WORKER,
    max_restarts=0,
    max_task_retries=CALL_RETRIES,
    scheduling_strategy="SPREAD",
)(ScorerActor)


@dataclass(eq=False)
class _PoolWorker:
    """A worker and its windows, oldest first."""

    actor: Any
    machine: str | None = None
    windows: list[int] = field(default_factory=list)

    @property
    def free(self) -> bool:
        return self.machine is not None and len(self.windows) < WINDOWS_PER_WORKER


class RayScorerPool:
    """A :class:`echelon.offline.scoring.WindowScorer` over the workers of a Ray cluster.

    A model that is a folder must be on every machine. No scores are cached: the workers share no
    memory, and which windows one of them gets is chance. Without ``steps``, those of the first
    worker are taken. Raises :class:`WorkerLost` if no worker comes up.
    """

    def __init__(
        self, model: str, options: Options, steps: Steps | None, request: PoolRequest | None = None
    ) -> None:
        request = request or PoolRequest()
        chosen, profile = with_profile(options)
        self._profile = profile if options.precision == "auto" else None
        threads = chosen.threads or usable_cpus()
        wanted = WorkerResources(request.cpus or threads, request.gpus).on_cluster(chosen.device)
        beside = request.cpus is None and wanted.gpus  # a GPU: its CPUs only tokenize
        self._resources = replace(wanted, cpus=1.0) if beside else wanted
        self._model, revision = place_of(resolve(model, revision=options.revision), model)
        device = device_there(chosen.device, wanted.gpus)
        alone = replace(chosen, device=device, score_cache=None)
        self._options = replace(alone, threads=threads, revision=revision)
        self._steps = steps
        self._pending: dict[Any, tuple[_PoolWorker, int | None]] = {}
        self._workers: list[_PoolWorker] = []
        self._windows: dict[int, RowWindow] = {}
        self._queue: deque[int] = deque()
        self._done: dict[int, PoolResult | EchelonError] = {}
        self._lost: Counter[int | None] = Counter()
        self._told: set[str] = set()
        self._start_worker()
        while not any(worker.machine for worker in self._workers):
            self._receive()
        for _ in range((request.workers or _free_workers(self._resources)) - 1):
            self._start_worker()

    @property
    def steps(self) -> Steps:
        """Settings that determine the steps."""
        if self._steps is None:
            raise AssertionError("no worker is up. This is a bug.")
        return self._steps

    def score(
        self, windows: Iterable[RowWindow], on_step: Callable[[int], None] | None = None
    ) -> Generator[ScoredWindow, None, None]:
        """Score windows, in their order; they are read ahead so that every worker has two.

        ``on_step`` is not called; a window is reported when it is done. A window that ends its
        worker three times raises :class:`WorkerLost`.
        """
        del on_step
        source, turn = enumerate(windows), 0
        while self._fill(source):
            while turn not in self._done:
                self._send()
                self._receive()
            found = self._done.pop(turn)
            if isinstance(found, EchelonError):
                raise found
            yield found.in_window(self._windows.pop(turn))
            turn += 1

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()
        self._pending.clear()

    def _fill(self, source: Iterator[tuple[int, RowWindow]]) -> bool:
        """Take windows until all workers have enough; False when none is left to return."""
        while len(self._windows) < WINDOWS_PER_WORKER * len(self._workers) + 1:
            number, window = next(source, (-1, None))
            if window is None:
                break
            self._windows[number] = window
            self._queue.append(number)
        self._send()
        return bool(self._windows)

    def _send(self) -> None:
        """Send windows to the workers that have the fewest."""
        while self._queue:
            free = [worker for worker in self._workers if worker.free]
            if not free:
                return
            worker, number = min(free, key=lambda one: len(one.windows)), self._queue.popleft()
            worker.windows.append(number)
            ref = worker.actor.score.remote(self._windows[number])
            self._pending[ref] = worker, number

    def _receive(self) -> None:
        """Wait for a reply or the loss of a worker, and handle it."""
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=START_TIMEOUT_S)
        if not ready:
            raise WorkerLost(
                f"No worker answered for {START_TIMEOUT_S:g} s. Each needs a machine with "
                f"{self._resources}: is there one?"
            )
        for ref in ready:
            worker, number = self._pending.pop(ref)
            try:
                reply = ray.get(ref)
            except RayError as error:
                self._replace(worker, number, error)
            else:
                self._take_reply(worker, number, reply)

    def _take_reply(self, worker: _PoolWorker, number: int | None, reply: WorkerReply) -> None:
        if number is None:
            self._take_open_reply(worker, reply)
            return
        worker.windows.remove(number)
        try:
            self._done[number] = unpack(reply).content
        except WorkerDied as error:
            worker.windows.insert(0, number)
            self._replace(worker, number, error)
        except EchelonError as error:
            self._done[number] = error

    def _take_open_reply(self, worker: _PoolWorker, reply: WorkerReply) -> None:
        """Note that a worker is up; one that cannot open the model is dropped if others can."""
        try:
            steps, machine, told = unpack(reply).content
        except WorkerDied as error:
            self._replace(worker, None, error)
            return
        except EchelonError as error:
            self._workers.remove(worker)
            ray.kill(worker.actor)
            if not self._workers:
                raise
            logger.warning("A worker could not open the model and is not used: %s", error)
            return
        for warning in set(told) - self._told:  # machines of a kind say the same
            logger.warning("A worker's machine differs: %s", warning)
        self._told |= set(told)
        self._steps = self._steps or steps
        worker.machine = machine

    def _replace(self, worker: _PoolWorker, number: int | None, error: Exception) -> None:
        """Give a lost worker's windows to others, and start another worker."""
        why, blame = loss_of(worker.machine, error)
        logger.warning("A worker is lost: %s", why)
        self._pending = {ref: at for ref, at in self._pending.items() if at[0] is not worker}
        self._queue.extendleft(reversed(worker.windows))
        self._workers.remove(worker)
        ray.kill(worker.actor)
        suspect = worker.windows[0] if worker.windows else number
        self._lost[suspect] += blame
        if self._lost[suspect] >= ATTEMPTS:
            rows = () if suspect is None else self._windows[suspect].rows
            line = f"from line {rows[0].line if rows else 0}"
            at = "as they started" if suspect is None else line
            raise WorkerLost(f"{ATTEMPTS} workers ended in turn {at} ({why}). See Ray's logs.")
        self._start_worker()

    def _start_worker(self) -> None:
        worker = _PoolWorker(_ACTOR.options(**self._resources.needs).remote())
        self._workers.append(worker)
        ref = worker.actor.open.remote(self._model, self._options, self._steps, self._profile)
        self._pending[ref] = worker, None


def _free_workers(resources: WorkerResources) -> int:
    """Workers for which the cluster has room now, at least one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": resources.cpus, "GPU": resources.gpus or 0.0}
    fits = [
        min(int(node.get(kind, 0) // need) for kind, need in needs.items() if need)
        for node in nodes
    ]
    return max(1, sum(fits))
