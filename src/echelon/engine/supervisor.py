"""A thread for each worker that keeps it busy and running.

A supervisor sends a step, and the next one just before the running step ends, so that the worker
never waits. It replaces a worker that hangs, dies or grows too large, puts lost steps back, and
acts when memory runs out. The order and the size of steps are not decided here.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.engine.events import WEDGE_AFTER_S, LadderTaken, WorkerChanged, WorkerState
from echelon.engine.worker import RESTART_DELAYS_S, Worker
from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import DeviceOutOfMemory, WorkerDied, WorkerGone, WorkerWedged
from echelon.scheduling.queue import LEAD_S, PlannedStep
from echelon.types import LadderStep, ModelInfo, TokenBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.dispatcher import Dispatcher, PreparedStep

logger = logging.getLogger(__name__)

WEDGE_FACTOR = 20.0
"""A step hangs if it takes this many times its predicted time. A step on a shared machine was seen
to take ten times as long (docs/LOG.md)."""

MAX_FAILED_STARTS = 4
"""Failed starts in a row after which requests fail at once: some seconds have passed by then, and
what keeps a model from opening, such as a deleted file, seldom changes soon."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How a worker is run."""

    precision: str = "auto"
    memory_limit_bytes: int | None = None  # a worker that holds more is replaced between steps
    wedge_after_s: float = WEDGE_AFTER_S
    delays_s: Sequence[float] = RESTART_DELAYS_S


class WorkerSupervisor(threading.Thread):
    """Starts one worker, keeps it busy with the dispatcher's steps, and replaces it.

    Args:
        number: the worker's number, from 0.
        worker: where steps are scored.
        dispatcher: where steps come from.
        config: how the worker is run.
        opened: called each time the scorer was opened; returns warm-up steps for the cost model.
        started: called once, with None when the worker is up or with the reason why it cannot be.
    """

    def __init__(
        self,
        number: int,
        worker: Worker,
        dispatcher: Dispatcher,
        config: WorkerConfig,
        *,
        opened: Callable[[ModelInfo], Sequence[TokenBatch]],
        started: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(name=f"echelon-worker-{number}", daemon=True)
        self.number = number
        self.up = False
        self.trouble = "it has not started yet"
        self.resident_bytes = 0
        self._worker = worker
        self._dispatcher = dispatcher
        self._config = config
        self._listener = dispatcher.listener
        self._opened = opened
        self._on_started = started
        self._new = True
        self._info: ModelInfo | None = None
        self._precision = config.precision
        self._memory_limit = config.memory_limit_bytes
        self._failures = self._failed_starts = 0
        self._fresh, self._sparing, self._worn = True, False, False
        self._sent: deque[tuple[PreparedStep, float]] = deque()
        self._stop_requested = threading.Event()
        self._drain_requested = threading.Event()

    def run(self) -> None:
        """Run the worker until it is stopped or drained, or the dispatcher is closed."""
        while not self._over():
            try:
                self._start()
                self._work()
            except WorkerDied as error:
                if self._over():
                    break  # it was killed on purpose
                state: WorkerState = "wedged" if isinstance(error, WorkerWedged) else "died"
                self._down(state, str(error), blamed=not isinstance(error, WorkerGone))
            except EchelonError as error:
                self._down("failed", str(error))
            except Exception as error:
                logger.exception("Unexpected error in supervisor %d. This is a bug.", self.number)
                self._down("failed", f"{type(error).__name__}: {error}. This is a bug.")
        self.up = False
        self._worker.stop()
        self._dispatcher.report_down(self.number)
        self._dispatcher.put_back(self._take_back())
        self._change("stopped")

    def stop(self) -> None:
        """Kill the worker and end; from any thread. Its steps are put back."""
        self._stop_requested.set()
        self._worker.kill()
        self._dispatcher.wake()

    @property
    def active(self) -> bool:
        """Whether it keeps its worker running: it is neither drained nor stopped."""
        return self.is_alive() and not (
            self._drain_requested.is_set() or self._stop_requested.is_set()
        )

    def drain(self) -> None:
        """End after the steps that were sent, or at once if the worker is not up."""
        self._drain_requested.set()
        if self.up:
            self._dispatcher.wake()
        else:
            self.stop()

    # Start and restart.

    def _over(self) -> bool:
        drained = self._drain_requested.is_set() and not self._sent
        return drained or self._stop_requested.is_set() or self._dispatcher.closed

    def _start(self) -> None:
        delays = self._config.delays_s
        pause = delays[min(self._failures, len(delays)) - 1] if self._failures else 0.0
        if self._stop_requested.wait(pause):
            return
        self._change("starting")
        try:
            self._open()
        except Exception as error:
            if self._new:  # it never ran: the caller gets the error, and nothing is retried
                self._stop_requested.set()
                self._on_started(error)
            raise
        if self._new:
            self._new = False
            self._on_started(None)

    def _open(self) -> None:
        self._info = self._worker.start(self._precision, sparing=self._sparing)
        self._warm_up(self._opened(self._info))
        self._fresh = self.up = True
        self._worn = False
        self._failed_starts = 0
        self._dispatcher.report_health(self.number, None)
        self._change("up")

    def _warm_up(self, steps: Sequence[TokenBatch]) -> None:
        for batch in steps:
            self._worker.send(batch, self._config.wedge_after_s)
            try:
                scored = self._worker.receive(self._config.wedge_after_s)
            except DeviceOutOfMemory:
                logger.warning("Worker %d: no room for %d tokens", self.number, len(batch.ids))
                self._worker.release()
                return
            self._dispatcher.observe(batch.lengths, scored.seconds)
            self.resident_bytes = scored.resident_bytes
        limit = self._memory_limit
        if limit is not None and self.resident_bytes > limit:
            logger.error(
                "memory_limit: %d bytes are less than the %d that a new worker holds. It is not "
                "applied; set it to twice as much.",
                limit,
                self.resident_bytes,
            )
            self._memory_limit = None

    def _down(self, state: WorkerState, why: str, *, blamed: bool = True) -> None:
        """Note the loss of the worker and of its steps, the first of which may be the cause."""
        self._failures += 1
        self._failed_starts += not self.up
        self.up, self.trouble = False, why
        logger.warning("Worker %d is down: %s", self.number, why)
        self._change(state, why)
        self._dispatcher.report_down(self.number)
        if blamed:
            self._dispatcher.lost(self._take_back(), self.number)
        else:
            self._dispatcher.put_back(self._take_back())
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._dispatcher.report_health(self.number, why)

    def _take_back(self) -> list[PlannedStep]:
        """Take the steps that were sent and have not ended."""
        steps = [prepared.step for prepared, _ in self._sent]
        self._sent.clear()
        return steps

    def _recycle(self) -> None:
        """Replace a worker between steps that holds too much memory or asks for it."""
        why = f"it held {self.resident_bytes} bytes, more than {self._memory_limit}"
        why = "its device keeps memory that it cannot free" if self._worn else why
        logger.warning("Worker %d is replaced: %s", self.number, why)
        self.up, self.trouble = False, why
        self._worker.stop()
        self._change("recycled", why)

    # Steps.

    def _work(self) -> None:
        """Run steps until the worker must be replaced."""
        while not self._over():
            if not self._sent and not self._fetch():
                if self._worker.wait(0):
                    self._worker.receive(0)  # nothing was sent: this raises how it ended
                    raise AssertionError("an answer without a step. This is a bug.")
                continue
            self._dispatcher.learn()  # while the worker computes
            if not self._used_up and not self._drain_requested.is_set():
                self._prefetch()
            self._receive()
            if self._used_up and not self._sent:
                self._recycle()
                return

    @property
    def _used_up(self) -> bool:
        """Whether the worker must be replaced before it gets another step."""
        limit = self._memory_limit
        return self._worn or (limit is not None and self.resident_bytes > limit)

    def _fetch(self) -> bool:
        """Wait for a step and send it; False if something else comes first."""
        prepared = self._dispatcher.take(lambda: self._over() or self._worker.wait(0), self.number)
        if prepared is not None:
            self._send(prepared)
        return prepared is not None

    def _prefetch(self) -> None:
        """Send the next step shortly before the running one should end."""
        running, sent = self._sent[0]
        left = sent + running.step.predicted_s - LEAD_S - self._dispatcher.clock()
        if len(self._sent) == 1 and not self._worker.wait(left):
            prepared = self._dispatcher.take(worker=self.number)
            if prepared is not None:
                self._send(prepared)

    def _send(self, prepared: PreparedStep) -> None:
        self._sent.append((prepared, self._dispatcher.clock()))
        self._worker.send(prepared.batch, self._patience(prepared.step))

    def _patience(self, step: PlannedStep) -> float:
        return max(self._config.wedge_after_s, WEDGE_FACTOR * step.predicted_s)

    def _receive(self) -> None:
        prepared, _ = self._sent[0]
        step = prepared.step
        try:
            scored = self._worker.receive(self._patience(step))
        except DeviceOutOfMemory as error:
            self._next()
            self._recover(prepared, error)
            return
        except EchelonError as error:
            self._next()
            self._dispatcher.fail(step, error)
            return
        self._next()
        self._failures = 0
        self._fresh = False
        self._worn = scored.worn and self._worker.renewable
        self.resident_bytes = scored.resident_bytes
        self._dispatcher.finish(step, scored, self.number, self._scorer_info.precision)

    def _next(self) -> None:
        """Drop the step that has ended; the step that was sent ahead begins now."""
        self._sent.popleft()
        if self._sent:
            self._sent[0] = (self._sent[0][0], self._dispatcher.clock())

    @property
    def _scorer_info(self) -> ModelInfo:
        """The scorer that is open now."""
        if self._info is None:
            raise ScoringFailed("a step ran before the scorer was open. This is a bug.")
        return self._info

    def _recover(self, prepared: PreparedStep, error: DeviceOutOfMemory) -> None:
        fresh, self._fresh = self._fresh, False
        self._sparing = True  # what filled this process would fill the next one
        action, budget = self._dispatcher.out_of_memory(
            prepared.step,
            error,
            self._scorer_info,
            worker=self.number,
            fresh=fresh,
            renewable=self._worker.renewable,
        )
        self._worker.release()
        taken = LadderStep(action.rung, action.detail, action.remedy)
        self._listener.ladder_taken(LadderTaken(self.number, taken, budget))
        if action.precision is not None:
            self._reopen(action.precision)
        if action.rung == "fresh_worker":
            self._renew(prepared, action.detail)

    def _renew(self, prepared: PreparedStep, why: str) -> None:
        """Score a step in a fresh process; a step that was sent ahead goes back."""
        self._dispatcher.put_back(self._take_back())
        self.up, self.trouble = False, why
        self._change("renewed", why)
        try:
            self._open()
        except BaseException:
            self._dispatcher.put_back([prepared.step])  # it did not begin there
            raise
        self._send(prepared)

    def _reopen(self, precision: str) -> None:
        """Open the model in another precision; a step that was sent ahead goes back."""
        self._dispatcher.put_back(self._take_back())
        self._precision = precision
        self.up = False
        self._change("starting", f"in {precision}")
        self._open()

    def _change(self, state: WorkerState, detail: str = "") -> None:
        self._listener.worker_changed(WorkerChanged(self.number, state, detail))
