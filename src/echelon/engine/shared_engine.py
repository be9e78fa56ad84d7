"""Concurrent calls of one process in shared steps: the server's batcher over an engine of our own.

One keeper thread scores for all calls, in the same order and by the same rules as a service does,
but in this process and without admission: whoever calls a library has decided to.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import NullListener
from echelon.engine.inflight import InflightRequest, resolve
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.engine.worker import StepResult
from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.types import monotonic

if TYPE_CHECKING:
    from echelon.engine.engine import Engine, StepLimits
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.types import Answer, ModelInfo, TokenBatch


class LocalWorker:
    """An engine as a worker; see :class:`echelon.engine.worker.Worker`."""

    renewable = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: deque[TokenBatch] = deque()

    def start(self, precision: str, *, sparing: bool = False) -> ModelInfo:
        """Open the model in a precision, unless it is."""
        del sparing  # there is no fresh process
        if precision not in {"auto", self._engine.info.precision}:
            self._engine.use_precision(precision)
        return self._engine.info

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Keep a step until it is asked for."""
        del timeout_s
        self._steps.append(batch)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a step to score: scoring is done by whoever asks."""
        del timeout_s
        return bool(self._steps)

    def receive(self, timeout_s: float) -> StepResult:
        """Score the next step, here and now.

        Raises:
            DeviceOutOfMemory: it did not fit.
            EchelonError: what the scorer raised; of another error it is the cause.
        """
        del timeout_s
        batch, began = self._steps.popleft(), monotonic()
        try:
            logits = self._engine.step(batch)
        except (DeviceOutOfMemory, EchelonError):
            raise
        except Exception as error:
            raise ScoringFailed(f"{type(error).__name__}: {error}") from error
        return StepResult(logits, monotonic() - began, 0)

    def release(self) -> None:
        """Give cached memory back."""
        self._engine.release()

    def kill(self) -> None:
        """Nothing to kill."""

    def stop(self) -> None:
        """Nothing to stop: the engine belongs to its reranker."""


class SharedEngine:
    """Scores the pairs of many calls at once.

    Args:
        engine: scores; it stays open.
        limits: what a step may be.
    """

    def __init__(self, engine: Engine, limits: StepLimits) -> None:
        facts = engine.info
        budget = min(limits.budget, engine.budget)
        batcher = Batcher(CostModel(padding=facts.padding), budget, limits.max_pairs)
        self._dispatch = Dispatcher(batcher, NullListener(), monotonic, limits.allow, engine.learn)
        self._numbers = itertools.count(1)
        self._keeper = WorkerSupervisor(
            0,
            LocalWorker(engine),
            self._dispatch,
            WorkerConfig(facts.precision),
            opened=lambda _: (),
            settled=lambda _: None,
        )
        self._keeper.start()

    async def score(self, pairs: EncodedPairs) -> Answer:
        """Score pairs; cancelling the awaiting task takes them out.

        Raises:
            EchelonError: a pair cannot be scored.
            Exception: what the scorer raised, where that is not about memory.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | EchelonError] = loop.create_future()
        job = InflightRequest(
            next(self._numbers), pairs, partial(resolve, loop, future), monotonic()
        )
        self._dispatch.submit(job)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._dispatch.cancel(job.number)
            raise
        if isinstance(answer, ScoringFailed) and answer.__cause__ is not None:
            raise answer.__cause__
        if isinstance(answer, EchelonError):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread after the step under way; whoever still waits is told."""
        self._dispatch.close()
        self._keeper.join()
