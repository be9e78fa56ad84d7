"""Scores concurrent calls of one process in shared steps.

One thread scores for all calls in the order and by the rules of a service, but in this process and
without admission control: a library call is never refused.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import Listener
from echelon.engine.inflight import InflightRequest, resolve
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.engine.worker import StepResult
from echelon.errors import EchelonError, ScoringFailed
from echelon.models.base import DeviceOutOfMemory
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.types import Answer, ModelInfo, TokenBatch, monotonic

if TYPE_CHECKING:
    from echelon.engine.engine import Engine, StepLimits
    from echelon.tokenization.pairs import EncodedPairs


class LocalWorker:
    """An engine of this process as a :class:`echelon.engine.worker.Worker`."""

    renewable = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps: deque[TokenBatch] = deque()

    def start(self, precision: str, *, sparing: bool = False) -> ModelInfo:
        """Open the model in a precision, unless it is open in it."""
        del sparing  # no process is started
        if precision not in {"auto", self._engine.info.precision}:
            self._engine.use_precision(precision)
        return self._engine.info

    def send(self, batch: TokenBatch, timeout_s: float) -> None:
        """Keep a step until :meth:`receive` scores it."""
        del timeout_s
        self._steps.append(batch)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is a step to score."""
        del timeout_s
        return bool(self._steps)

    def receive(self, timeout_s: float) -> StepResult:
        """Score the next step in this thread; an unknown error is the cause of ScoringFailed."""
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
        """Do nothing: there is no process."""

    def stop(self) -> None:
        """Do nothing: the engine belongs to its reranker."""


class SharedEngine:
    """Scores the pairs of many calls at once; ``engine`` scores the steps and stays open."""

    def __init__(self, engine: Engine, limits: StepLimits) -> None:
        info = engine.info
        batcher = Batcher(CostModel(padding=info.padding), limits.budget, limits.max_pairs)
        self._dispatcher = Dispatcher(
            batcher, Listener(), monotonic, engine.allowed(limits.allow), policy=engine.policy
        )
        self._numbers = itertools.count(1)
        self._supervisor = WorkerSupervisor(
            0,
            LocalWorker(engine),
            self._dispatcher,
            WorkerConfig(info.precision),
            opened=lambda _: (),
            started=lambda _: None,
        )
        self._supervisor.start()

    async def score(self, pairs: EncodedPairs) -> Answer:
        """Score pairs; cancelling the awaiting task takes them out of the queue.

        Raises:
            EchelonError: a pair cannot be scored.
            Exception: what the scorer raised, other than lack of memory.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | EchelonError] = loop.create_future()
        request = InflightRequest(
            next(self._numbers), pairs, partial(resolve, loop, future), monotonic()
        )
        self._dispatcher.submit(request)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._dispatcher.cancel(request.number)
            raise
        if isinstance(answer, ScoringFailed) and answer.__cause__ is not None:
            raise answer.__cause__
        if isinstance(answer, EchelonError):
            raise answer
        return answer

    def close(self) -> None:
        """End the thread after the running step and fail the calls that still wait."""
        self._dispatcher.close()
        self._supervisor.join()
