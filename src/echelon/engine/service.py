"""A reranker as a service: many callers at once, and workers that may die.

A request goes: look up cached scores → admit (estimated) → tokenise, in slices → admit (true) →
queue → steps → answer. One whose scores are all cached is answered at once.
The only asyncio of the package. Every ``submit`` ends, with the scores or with an error of
:mod:`echelon.errors` that says what to do. :mod:`echelon.engine.dispatcher` and
:mod:`echelon.engine.supervisor` hold the threads' side.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np

from echelon.engine.admission_pipeline import AdmissionPipeline, AdmittedRequest
from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import (
    Listener,
    ListenerGroup,
    Readiness,
    RequestRefused,
    ServiceSettings,
    ServiceSnapshot,
)
from echelon.engine.inflight import EXPIRED, InflightRequest, answer_from_cache, resolve
from echelon.engine.score_cache import CacheUsage, DocumentScores, may_be_kept
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.errors import DeadlinePassed, EchelonError, ShuttingDown, WorkerLost
from echelon.options import check_fallback, check_max_length
from echelon.scheduling.autoscaling import Autoscaler, AutoscalingLimits
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.scheduling.packing import DEFAULT_BUDGETS, step_budget
from echelon.scheduling.token_budget import GOAL_SHARE
from echelon.types import Answer, RerankRequest, Timings, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

    from echelon.engine.score_cache import ScoreCache
    from echelon.engine.worker import Worker
    from echelon.scheduling.fit import Prior
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Clock, ModelInfo, Pair, TokenBatch

logger = logging.getLogger(__name__)

CANARY: Pair = ("is anybody there", "A bird sings in the mine.")
"""A pair that any model can score: ready means that it was scored, not that a port is open."""

CANARY_FRESH_S = 10.0
"""A step scored in the last ten seconds is as good as a canary; probes come every five or ten."""

CANARY_TIMEOUT_S = 10.0
"""A canary has its turn in the next step; a service that needs longer is not ready."""

CARD_STEP_S = 0.05
"""Longest step of a card that was not tuned. The default token budget takes an H200 some 22 ms with
XLM-R-large and a T4 some 350 (predicted, docs/GPU.md): too long for short requests beside it."""

AUTOSCALE_INTERVAL_S = 0.5
"""Seconds between decisions: many within the shortest delay that is worth a new worker."""


class Service:
    """Scores pairs for many callers at once.

    Args:
        make_worker: makes the worker of a number; the worker calls the function that it is given
            when its process has ended.
        clock: seconds; deadlines are times of this clock.
        learned: called with each token budget that memory allows.
        prior: what steps cost when the machine was tuned; None learns it from the first steps.
        scores: the score cache of the model that the workers open; None caches none.
    """

    def __init__(  # noqa: PLR0913 - each is a distinct collaborator
        self,
        encoder: PairEncoder,
        make_worker: Callable[[int, Callable[[], None]], Worker],
        settings: ServiceSettings | None = None,
        *,
        listener: Listener | None = None,
        clock: Clock = monotonic,
        learned: Callable[[int | None], None] | None = None,
        prior: Prior | None = None,
        scores: ScoreCache | None = None,
    ) -> None:
        self.settings = settings or ServiceSettings()
        self.clock = clock
        self._encoder = encoder
        self._make_worker = make_worker
        self._prior = prior
        self._scores = scores
        self._listener = ListenerGroup(listener or Listener())
        batcher = Batcher(CostModel(), DEFAULT_BUDGETS["cpu"], self.settings.max_pairs)
        allow, workers = self.settings.allow, self.settings.workers
        self._dispatcher = Dispatcher(
            batcher, self._listener, clock, allow, learned=learned, workers=workers
        )
        self._admission = AdmissionPipeline(
            encoder, self.settings, self._dispatcher, self._workers_up, scores
        )
        self._info: ModelInfo | None = None
        self._supervisors: list[WorkerSupervisor] = []
        self._numbers = itertools.count(1)
        self._requests = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = True
        self._canary: asyncio.Task[Answer] | None = None
        self._autoscaling: asyncio.Task[None] | None = None

    # Start and stop.

    async def start(self) -> None:
        """Open the model in every worker and warm it up; raises why it cannot be opened."""
        started = self.resize(self.settings.workers)
        for failure in await asyncio.gather(*started):
            if failure is None:
                continue
            await self.stop()
            if isinstance(failure, EchelonError):
                raise failure
            raise WorkerLost(
                f"The scoring process could not start: {failure}. The log has its output."
            )
        self._draining = False
        if self.settings.scaling is not None:
            self._autoscaling = asyncio.create_task(self._autoscale(self.settings.scaling))

    def resize(self, workers: int) -> list[asyncio.Future[Exception | None]]:
        """Start or drain workers until there are ``workers``; drained ones finish their steps.

        Returns for each new worker a future: None once it is up, or why it cannot be brought up.
        """
        loop = asyncio.get_running_loop()
        alive = [supervisor for supervisor in self._supervisors if supervisor.is_alive()]
        staying = sorted((s for s in alive if s.active), key=lambda s: (not s.up, s.number))
        for supervisor in staying[workers:]:
            supervisor.drain()
        taken = {supervisor.number for supervisor in alive}
        free = (number for number in itertools.count() if number not in taken)
        started = [(next(free), loop.create_future()) for _ in range(workers - len(staying))]
        new = [self._supervisor(number, future, loop) for number, future in started]
        self._supervisors = [*alive, *new]
        self._dispatcher.set_workers({s.number for s in [*staying[:workers], *new]})
        for supervisor in new:
            supervisor.start()
        return [future for _, future in started]

    async def drain(self, timeout_s: float) -> bool:
        """Admit no more requests; whether the admitted ones were answered in ``timeout_s``."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the workers, and fail the requests that still wait. Can be called twice."""
        self._draining = True
        if self._autoscaling is not None:
            self._autoscaling.cancel()
        self._dispatcher.close()
        for supervisor in self._supervisors:
            supervisor.stop()
        await asyncio.gather(*(asyncio.to_thread(s.join) for s in self._supervisors))
        self._admission.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # Requests.

    async def submit(self, request: RerankRequest) -> Answer:
        """Score the pairs of a request; cancelling the awaiting task takes them out of the queue.

        Raises:
            InvalidInput: a pair is not two texts, its query leaves no room, or it is too long.
            TooLarge: more documents or tokens than one request may have.
            Overloaded: refused; it says when to try again.
            DeadlinePassed: the deadline passed, or cannot be met.
            ShuttingDown: the service admits no more requests.
            WorkerLost, OutOfMemory, NonFiniteScore, ScoringFailed: a pair cannot be scored.
        """
        arrived = self.clock()
        if self._draining:
            self._listener.refused(RequestRefused("shutting_down", len(request.pairs), None))
            raise ShuttingDown("The service is stopping or has not started. Ask another server.")
        if (error := self._dispatcher.unavailable) is not None:
            raise error
        if not request.pairs:
            empty = np.zeros(0, dtype=np.int32)
            return Answer(empty.astype(np.float32), empty, 0, 0, Timings())
        max_length = self.longest(request.max_length)
        timeout_s = None if request.deadline is None else request.deadline - arrived
        self._requests += 1
        self._empty.clear()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._score(request, max_length, arrived)
        except TimeoutError:
            raise DeadlinePassed(EXPIRED) from None
        finally:
            self._requests -= 1
            if self._requests == 0:
                self._empty.set()

    @property
    def info(self) -> ModelInfo:
        """The scorer's model, device and limits; raises ShuttingDown before the start."""
        if self._info is None:
            raise ShuttingDown("The service has not started. Await start() first.")
        return self._info

    def longest(self, asked: int | None = None) -> int:
        """Tokens a pair may have, special tokens included; raises InvalidInput."""
        asked = self.settings.max_length if asked is None else asked
        return check_max_length(asked, self.info.max_tokens, self._encoder.template.specials)

    # State.

    async def ready(self) -> Readiness:
        """Whether a pair was scored lately; if none was, a canary is scored now."""
        if self._draining:
            return Readiness(ready=False, reason="stopping, or not started")
        if not self._workers_up():
            trouble = self._supervisors[0].trouble if self._supervisors else "there is none"
            return Readiness(ready=False, reason=f"no worker is up: {trouble}")
        last = self._dispatcher.last_scored
        if last is not None and self.clock() - last <= CANARY_FRESH_S:
            return Readiness(ready=True)
        if self._canary is None or self._canary.done():
            deadline = self.clock() + CANARY_TIMEOUT_S
            request = RerankRequest([CANARY], deadline=deadline, priority="high", fresh=True)
            self._canary = asyncio.create_task(self.submit(request))
        try:
            await asyncio.shield(self._canary)
        except EchelonError as error:
            return Readiness(ready=False, reason=f"the canary was not scored: {error}")
        return Readiness(ready=True)

    def snapshot(self) -> ServiceSnapshot:
        """The service now, for metrics."""
        now = self._admission.update_shedding()
        oldest = now.queue.oldest
        return ServiceSnapshot(
            load=now.queue,
            requests=now.requests,
            backlog_s=now.backlog_s,
            oldest_s=0.0 if oldest is None else self.clock() - oldest,
            workers_up=now.workers,
            workers=sum(supervisor.active for supervisor in self._supervisors),
            busy_s=self._dispatcher.busy_s,
            resident_bytes=tuple(s.resident_bytes for s in self._supervisors),
            scale=self._dispatcher.cost.scale,
            drift=self._dispatcher.drift.ratio,
            drifted=self._dispatcher.drift.drifted,
            draining=self._draining,
            fallback=self._admission.shedding.on,
            cache=CacheUsage() if self._scores is None else self._scores.usage,
        )

    # Workers.

    def _supervisor(
        self, number: int, up: asyncio.Future[Exception | None], loop: asyncio.AbstractEventLoop
    ) -> WorkerSupervisor:
        own = self.settings
        config = WorkerConfig(own.precision, own.memory_limit_bytes, own.wedge_after_s)
        return WorkerSupervisor(
            number,
            self._make_worker(number, self._dispatcher.wake),
            self._dispatcher,
            config,
            opened=self._opened,
            started=partial(resolve, loop, up),
        )

    def _opened(self, info: ModelInfo) -> list[TokenBatch]:
        """Keep the scorer's info; return warm-up steps. Called from supervisors' threads."""
        budget = step_budget(self.settings.token_budget, self.settings.max_pairs, info.device)
        if self._info is None:
            self._dispatcher.set_up(info, budget, self._prior, self._goal_s(info))
        self._info = info
        if self._scores is not None:
            self._scores.reopened()
        specials = self._encoder.template.specials
        check_fallback(self.settings.fallback_max_length, self.longest(), specials)
        canary = self._encoder.encode([CANARY], self.longest(), "longest_first")
        device = info.device.partition(":")[0]
        tokens = min(self._dispatcher.load().budget, DEFAULT_BUDGETS[device])
        max_pairs = self.settings.max_pairs or tokens
        full = max(1, min(max_pairs, tokens // int(canary.lengths[0])))
        return [canary.batch([0] * pairs) for pairs in (1, full, full)]

    def _goal_s(self, info: ModelInfo) -> float | None:
        """The latency goal; without one an untuned card gets steps of :data:`CARD_STEP_S`."""
        own = self.settings
        chosen = own.goal_s is not None or own.token_budget or own.max_pairs or self._prior
        if chosen or info.device == "cpu":
            return own.goal_s
        return CARD_STEP_S / GOAL_SHARE

    def _workers_up(self) -> int:
        return sum(supervisor.up and supervisor.active for supervisor in self._supervisors)

    async def _autoscale(self, limits: AutoscalingLimits) -> None:
        """Resize as :mod:`echelon.scheduling.autoscaling` says, until cancelled."""
        autoscaler = Autoscaler(limits)
        while True:
            await asyncio.sleep(AUTOSCALE_INTERVAL_S)
            now = self.snapshot()
            work_s = now.backlog_s * max(1, now.workers_up)
            wanted = autoscaler.decide(self.clock(), now.workers, work_s, now.busy_s)
            if wanted != now.workers:
                message = "Workers: %d instead of %d; %.1f s of work"
                logger.info(message, wanted, now.workers, work_s)
                self.resize(wanted)

    async def _score(self, request: RerankRequest, max_length: int, arrived: float) -> Answer:
        late = request.deadline is not None and request.deadline <= arrived  # it is refused below
        precision = self.info.precision
        cached = None if late else await self._admission.find(request, max_length, precision)
        if cached is not None and cached.hits == len(cached.keys):
            answer, event = answer_from_cache(cached, self.clock() - arrived)
            self._listener.request_ended(event)
            return answer
        admitted = await self._admission.admit(request, max_length, cached)
        return await self._queue(request, admitted, arrived)

    async def _queue(
        self, request: RerankRequest, admitted: AdmittedRequest, arrived: float
    ) -> Answer:
        """Have the pairs of a request scored, and keep its scores if they may be kept."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | EchelonError] = loop.create_future()
        inflight = InflightRequest(
            number=next(self._numbers),
            pairs=admitted.pairs,
            done=partial(resolve, loop, future),
            arrived=arrived,
            tokenise_s=self.clock() - arrived,
            deadline=request.deadline,
            priority=request.priority,
            chunk_map=admitted.chunk_map,
            fallback=admitted.fallback,
            cached=admitted.cached,
        )
        self._dispatcher.submit(inflight)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._dispatcher.cancel(inflight.number)
            raise
        if isinstance(answer, EchelonError):
            raise answer
        self._keep(inflight, answer)
        return answer

    def _keep(self, inflight: InflightRequest, answer: Answer) -> None:
        """Keep the scores of an answer that were computed as the settings of their keys say."""
        cached = inflight.cached
        if self._scores is None or cached is None or not may_be_kept(answer.ladder):
            return
        if inflight.precisions == {cached.settings.precision}:
            _, truncated, tokens = inflight.computed()
            computed = DocumentScores(answer.logits[cached.missing], truncated, tokens)
            self._scores.keep([cached.keys[index] for index in cached.missing], computed)
