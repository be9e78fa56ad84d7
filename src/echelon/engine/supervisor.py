"""The crew: one thread for each worker that keeps it busy, and alive.

A keeper takes a step, sends it, and just before the running one ends sends the next, so that the
worker never waits. It acts on memory trouble, kills what hangs, replaces what died or has grown
too large, and gives lost steps back. It decides nothing about order or size.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from echelon.engine.events import LadderTaken, WorkerChanged
from echelon.engine.state import WEDGE_AFTER_S
from echelon.engine.worker import RESTART_DELAYS_S
from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import DeviceOutOfMemory, WorkerDied, WorkerGone, WorkerWedged
from echelon.scheduling.queue import LEAD_S
from echelon.types import LadderStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.dispatcher import Dispatcher, PreparedStep
    from echelon.engine.events import WorkerState
    from echelon.engine.worker import Worker
    from echelon.scheduling.queue import PlannedStep
    from echelon.types import ModelInfo, TokenBatch

logger = logging.getLogger(__name__)

WEDGE_FACTOR = 20.0
"""A step has hung when it takes this many times what was predicted. A machine shared with others
has been seen to take ten times as long for a step (docs/LOG.md)."""


HOPELESS_STARTS = 4
"""Starts in a row that must fail before callers are told not to wait: by then some seconds have
passed, and what keeps a model from opening, such as a deleted file, does not heal soon."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How workers are kept.

    Attributes:
        precision: what their scorers compute in.
        memory_limit_bytes: a worker that holds more is replaced between steps; None means never.
        wedge_after_s: see :data:`echelon.engine.state.WEDGE_AFTER_S`.
        delays_s: see :data:`echelon.engine.worker.RESTART_DELAYS_S`.
    """

    precision: str = "auto"
    memory_limit_bytes: int | None = None
    wedge_after_s: float = WEDGE_AFTER_S
    delays_s: Sequence[float] = RESTART_DELAYS_S


class WorkerSupervisor(threading.Thread):
    """Keeps one worker.

    Args:
        number: the worker's number, from 0.
        worker: what to keep.
        dispatch: where steps come from.
        orders: how.
        opened: called whenever the scorer was opened; it gives the steps to warm it up with, which
            also teach the cost model.
        settled: called once, when the worker is up for the first time, or with why it cannot be.
    """

    def __init__(
        self,
        number: int,
        worker: Worker,
        dispatch: Dispatcher,
        orders: WorkerConfig,
        *,
        opened: Callable[[ModelInfo], Sequence[TokenBatch]],
        settled: Callable[[Exception | None], None],
    ) -> None:
        super().__init__(name=f"echelon-keeper-{number}", daemon=True)
        self.number = number
        self.up = False
        self.trouble = "it has not started yet"
        self.resident_bytes = 0
        self._worker = worker
        self._dispatch = dispatch
        self._orders = orders
        self._listener = dispatch.listener
        self._opened = opened
        self._settled = settled
        self._new = True
        self._facts: ModelInfo | None = None
        self._precision = orders.precision
        self._memory_limit = orders.memory_limit_bytes
        self._failures = self._failed_starts = 0
        self._fresh, self._sparing = True, False
        self._sent: deque[tuple[PreparedStep, float]] = deque()
        self._leaving = threading.Event()
        self._retiring = threading.Event()

    def run(self) -> None:
        """Keep the worker until told to leave or everything is closed."""
        while not self._over():
            try:
                self._start()
                self._work()
            except WorkerDied as error:
                if self._over():
                    break  # it was told to
                state: WorkerState = "wedged" if isinstance(error, WorkerWedged) else "died"
                self._down(state, str(error), blamed=not isinstance(error, WorkerGone))
            except EchelonError as error:
                self._down("failed", str(error))
            except Exception as error:
                logger.exception("Keeper %d met what it does not know. This is a bug.", self.number)
                self._down("failed", f"{type(error).__name__}: {error}. This is a bug.")
        self.up = False
        self._worker.stop()
        self._dispatch.put_back(self._take_back())
        self._change("stopped")

    def leave(self) -> None:
        """Kill the worker and end; from any thread. What it was given is given back."""
        self._leaving.set()
        self._worker.kill()
        self._dispatch.wake()

    @property
    def stays(self) -> bool:
        """Whether it goes on keeping its worker."""
        return self.is_alive() and not (self._retiring.is_set() or self._leaving.is_set())

    def retire(self) -> None:
        """End after the steps that were sent; at once where the worker is not up."""
        self._retiring.set()
        if self.up:
            self._dispatch.wake()
        else:
            self.leave()

    # The worker's life.

    def _over(self) -> bool:
        retired = self._retiring.is_set() and not self._sent
        return retired or self._leaving.is_set() or self._dispatch.closed

    def _start(self) -> None:
        delays = self._orders.delays_s
        pause = delays[min(self._failures, len(delays)) - 1] if self._failures else 0.0
        if self._leaving.wait(pause):
            return
        self._change("starting")
        try:
            self._open()
        except Exception as error:
            if self._new:  # it never lived: whoever starts the service is told, and nobody retries
                self._leaving.set()
                self._settled(error)
            raise
        if self._new:
            self._new = False
            self._settled(None)

    def _open(self) -> None:
        self._facts = self._worker.start(self._precision, sparing=self._sparing)
        self._warm_up(self._opened(self._facts))
        self._fresh = self.up = True
        self._failed_starts = 0
        self._dispatch.hope(self.number, None)
        self._change("up")

    def _warm_up(self, steps: Sequence[TokenBatch]) -> None:
        for batch in steps:
            self._worker.send(batch, self._orders.wedge_after_s)
            try:
                scored = self._worker.receive(self._orders.wedge_after_s)
            except DeviceOutOfMemory:
                logger.warning("Worker %d: no room for %d tokens", self.number, len(batch.ids))
                self._worker.release()
                return
            self._dispatch.observe(batch.lengths, scored.seconds)
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
        """The worker is lost, with what it was given, which may be to blame."""
        self._failures += 1
        self._failed_starts += not self.up
        self.up = False
        self.trouble = why
        logger.warning("Worker %d is down: %s", self.number, why)
        self._change(state, why)
        if blamed:
            self._dispatch.lost(self._take_back())
        else:
            self._dispatch.put_back(self._take_back())
        if self._failed_starts >= HOPELESS_STARTS:
            self._dispatch.hope(self.number, why)

    def _take_back(self) -> list[PlannedStep]:
        """What was sent and has not ended."""
        steps = [prepared.step for prepared, _ in self._sent]
        self._sent.clear()
        return steps

    def _recycle(self) -> None:
        """Replace a worker that has grown too large, while it has nothing to do."""
        why = f"it held {self.resident_bytes} bytes, more than {self._memory_limit}"
        logger.warning("Worker %d is replaced: %s", self.number, why)
        self.up = False
        self.trouble = why
        self._worker.stop()
        self._change("recycled", why)

    # Its work.

    def _work(self) -> None:
        """Steps, one after another, until the worker must be replaced."""
        while not self._over():
            if not self._sent and not self._fetch():
                if self._worker.wait(0):
                    self._worker.receive(0)  # nothing was sent: this raises how it ended
                    raise AssertionError("an answer that nobody asked for. This is a bug.")
                continue
            self._dispatch.learn()  # while the worker computes
            if not self._too_large and not self._retiring.is_set():
                self._prefetch()
            self._receive()
            if self._too_large and not self._sent:
                self._recycle()
                return

    @property
    def _too_large(self) -> bool:
        return self._memory_limit is not None and self.resident_bytes > self._memory_limit

    def _fetch(self) -> bool:
        """Wait for a step and send it; False where there is other news."""
        prepared = self._dispatch.take(lambda: self._over() or self._worker.wait(0))
        if prepared is not None:
            self._send(prepared)
        return prepared is not None

    def _prefetch(self) -> None:
        """Send the next step when the running one should soon end, unless it has ended."""
        running, sent = self._sent[0]
        left = sent + running.step.predicted_s - LEAD_S - self._dispatch.clock()
        if len(self._sent) == 1 and not self._worker.wait(left):
            prepared = self._dispatch.take()
            if prepared is not None:
                self._send(prepared)

    def _send(self, prepared: PreparedStep) -> None:
        self._sent.append((prepared, self._dispatch.clock()))
        self._worker.send(prepared.batch, self._patience(prepared.step))

    def _patience(self, step: PlannedStep) -> float:
        return max(self._orders.wedge_after_s, WEDGE_FACTOR * step.predicted_s)

    def _receive(self) -> None:
        prepared, _ = self._sent[0]
        step = prepared.step
        try:
            scored = self._worker.receive(self._patience(step))
        except DeviceOutOfMemory as error:
            self._next()
            self._make_room(prepared, str(error))
            return
        except EchelonError as error:
            self._next()
            self._dispatch.fail(step, error)
            return
        self._next()
        self._failures = 0
        self._fresh = False
        self.resident_bytes = scored.resident_bytes
        self._dispatch.finish(step, scored, self.number)

    def _next(self) -> None:
        """The running step has ended; the one that was sent ahead begins now."""
        self._sent.popleft()
        if self._sent:
            self._sent[0] = (self._sent[0][0], self._dispatch.clock())

    def _make_room(self, prepared: PreparedStep, reason: str) -> None:
        if self._facts is None:
            raise ScoringFailed("a step ran before the scorer was open. This is a bug.")
        fresh, self._fresh = self._fresh, False
        self._sparing = True  # from now on: what filled this process would fill the next
        action, budget = self._dispatch.out_of_memory(
            prepared.step, reason, self._facts, fresh=fresh, renewable=self._worker.renewable
        )
        self._worker.release()
        taken = LadderStep(action.rung, action.detail, action.remedy)
        self._listener.ladder_taken(LadderTaken(self.number, taken, budget))
        if action.precision is not None:
            self._reopen(action.precision)
        if action.rung == "fresh_worker":
            self._renew(prepared, action.detail)

    def _renew(self, prepared: PreparedStep, why: str) -> None:
        """Score a step in a fresh process, before all others; one sent ahead goes back."""
        self._dispatch.put_back(self._take_back())
        self.up = False
        self.trouble = why
        self._change("renewed", why)
        try:
            self._open()
        except BaseException:
            self._dispatch.put_back([prepared.step])  # it never began there
            raise
        self._send(prepared)

    def _reopen(self, precision: str) -> None:
        """Open the model in another precision; a step that had been sent ahead goes back."""
        self._dispatch.put_back(self._take_back())
        self._precision = precision
        self.up = False
        self._change("starting", f"in {precision}")
        self._open()

    def _change(self, state: WorkerState, detail: str = "") -> None:
        self._listener.worker_changed(WorkerChanged(self.number, state, detail))
