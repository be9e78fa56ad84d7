"""A reranker as a service: many callers at once, workers that may die, and an answer for everyone.

A request goes: admit (estimated) → tokenise, in slices → admit (true) → queue → steps → answer.
The only asyncio of the package. Whatever happens, ``submit`` ends: with the scores, or with an
error of :mod:`echelon.errors` that says what to do. :mod:`echelon.engine.dispatcher` and
:mod:`echelon.engine.supervisor` hold the threads' side.
"""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Self

import numpy as np

from echelon.engine.admission_pipeline import AdmissionPipeline, ScoringRequest
from echelon.engine.dispatcher import Dispatcher
from echelon.engine.events import NullListener, RequestRefused, SafeListener
from echelon.engine.inflight import EXPIRED, InflightRequest, resolve
from echelon.engine.scaling import keep_scaled
from echelon.engine.state import Readiness, ServiceSettings, ServiceSnapshot
from echelon.engine.supervisor import WorkerConfig, WorkerSupervisor
from echelon.errors import DeadlinePassed, EchelonError, ShuttingDown, WorkerLost
from echelon.options import check_fallback, check_max_length
from echelon.scheduling.batcher import Batcher
from echelon.scheduling.cost_model import CostModel
from echelon.scheduling.load_shedding import LoadShedding
from echelon.scheduling.packing import DEFAULT_BUDGETS, step_budget
from echelon.types import Answer, Timings, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from echelon.engine.events import Listener
    from echelon.engine.worker import Worker
    from echelon.options import Truncation
    from echelon.scheduling.fair_queue import Priority
    from echelon.scheduling.fit import Prior
    from echelon.tokenization.chunking import Chunking, Side
    from echelon.tokenization.pairs import EncodedPairs
    from echelon.tokenization.tokenizer import PairEncoder
    from echelon.types import Clock, ModelInfo, Pair, TokenBatch

CANARY: Pair = ("is anybody there", "A bird sings in the mine.")
"""A pair that any model can score: readiness means that it was, not that a port is open."""

CANARY_FRESH_S = 10.0
"""A step scored in the last ten seconds is as good as a canary; probes come every five or ten."""

CANARY_TIMEOUT_S = 10.0
"""A canary has its turn in the next step; one that takes longer is a reason to stay away."""


class Service:
    """Scores pairs for many callers at once.

    Args:
        encoder: the model's tokenizer.
        make_worker: gives the worker of a number; it calls what it is given when a child ended.
        settings: how to run.
        listener: hears what happens, from any thread.
        clock: seconds; deadlines are times of this clock.
        learned: called with each smaller token budget that memory taught.
        prior: what steps cost when the machine was tuned; None learns it from the first steps.
    """

    def __init__(  # noqa: PLR0913 - each is a distinct collaborator
        self,
        encoder: PairEncoder,
        make_worker: Callable[[int, Callable[[], None]], Worker],
        settings: ServiceSettings | None = None,
        *,
        listener: Listener | None = None,
        clock: Clock = monotonic,
        learned: Callable[[int], None] | None = None,
        prior: Prior | None = None,
    ) -> None:
        self.settings = settings or ServiceSettings()
        self.clock = clock
        self._encoder = encoder
        self._make_worker = make_worker
        self._prior = prior
        self._listener = SafeListener(listener or NullListener())
        batcher = Batcher(CostModel(), DEFAULT_BUDGETS["cpu"], self.settings.max_pairs)
        self._dispatch = Dispatcher(
            batcher,
            self._listener,
            clock,
            self.settings.allow,
            learned=learned,
            workers=self.settings.workers,
        )
        self._reception = AdmissionPipeline(encoder, self.settings.bounds, self._dispatch, self._up)
        self._pressure = LoadShedding(self.settings, self._reception.house, clock)
        self._facts: ModelInfo | None = None
        self._keepers: list[WorkerSupervisor] = []
        self._numbers = itertools.count(1)
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = True
        self._canary: asyncio.Task[Answer] | None = None
        self._scaling: asyncio.Task[None] | None = None

    # Its life.

    async def start(self) -> None:
        """Open the model in every worker and warm it up.

        Raises:
            EchelonError: why the model cannot be opened.
        """
        settled = self.resize(self.settings.workers)
        failures = [failure for failure in await asyncio.gather(*settled) if failure is not None]
        if failures:
            await self.stop()
            raise _not_started(failures[0])
        self._draining = False
        if self.settings.scaling is not None:
            self._scaling = asyncio.create_task(keep_scaled(self, self.settings.scaling))

    def resize(self, workers: int) -> list[asyncio.Future[Exception | None]]:
        """Have so many workers: new ones start, and those too many end after their steps.

        Returns:
            For each new one, what settles when it is up (None) or cannot be brought up (why).
        """
        loop = asyncio.get_running_loop()
        self._keepers = [keeper for keeper in self._keepers if keeper.is_alive()]
        staff = sorted((k for k in self._keepers if k.stays), key=lambda k: (not k.up, k.number))
        for keeper in staff[workers:]:
            keeper.retire()
        taken = {keeper.number for keeper in self._keepers}
        free = (number for number in itertools.count() if number not in taken)
        new = [(next(free), loop.create_future()) for _ in range(workers - len(staff))]
        hired = [self._keeper(number, settled, loop) for number, settled in new]
        self._keepers += hired
        self._dispatch.staff({keeper.number for keeper in [*staff[:workers], *hired]})
        for keeper in hired:
            keeper.start()
        return [settled for _, settled in new]

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing more in, and wait for what is inside.

        Returns:
            Whether all of it was answered in time; the rest is told that the service stops.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End the workers; whoever still waits is told. Stopping twice does nothing."""
        self._draining = True
        if self._scaling is not None:
            self._scaling.cancel()
        self._dispatch.close()
        for keeper in self._keepers:
            keeper.leave()
        await asyncio.gather(*(asyncio.to_thread(keeper.join) for keeper in self._keepers))
        self._reception.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    # Its work.

    async def submit(  # noqa: PLR0913 - what a caller may wish
        self,
        pairs: Sequence[Pair] | EncodedPairs,
        *,
        deadline: float | None = None,
        priority: Priority = "normal",
        max_length: int | None = None,
        truncation: Truncation | None = None,
        max_query_tokens: int | None = None,
        chunking: Chunking | None = None,
        whole: bool = False,
        side: Side | None = None,
    ) -> Answer:
        """Score pairs; cancelling the awaiting task takes them out of the queue.

        Args:
            pairs: (query, document) texts, or pairs already encoded.
            deadline: time of :attr:`clock` after which the answer is of no use.
            priority: share of the device.
            max_length: tokens a pair may have; None is the service's own.
            truncation: what gives way when a pair is longer; None is the service's own.
            max_query_tokens: tokens kept of a query; None is the service's own.
            chunking: read longer documents in chunks, whose best is the document's score.
            whole: refuse pairs that would be cut.
            side: the end at which longer texts are cut; None is the model's own.

        Raises:
            InvalidInput: a pair is not two texts, its query leaves no room, or it is too long.
            TooLarge: more documents or tokens than one request may have.
            Overloaded: refused; it says when to come again.
            DeadlinePassed: the deadline passed, or cannot be met.
            ShuttingDown: the service takes nothing more in.
            WorkerLost, OutOfMemory, NonFiniteScore, ScoringFailed: a pair cannot be scored.
        """
        arrived = self.clock()
        if self._draining:
            self._listener.refused(RequestRefused("shutting_down", len(pairs), None))
            raise ShuttingDown("The service is stopping or has not started. Ask another server.")
        if (hopeless := self._dispatch.hopeless) is not None:
            raise hopeless
        if not len(pairs):
            return _nothing()
        longest = self.longest(max_length)
        wish = ScoringRequest(
            max_length=longest,
            truncation=truncation or self.settings.truncation,
            max_query_tokens=max_query_tokens or self.settings.max_query_tokens,
            deadline=deadline,
            priority=priority,
            chunking=chunking,
            whole=whole,
            side=side,
            shorter=None if whole else self._pressure.shorter(priority, longest),
        )
        self._enter()
        try:
            async with asyncio.timeout(None if deadline is None else deadline - arrived):
                return await self._serve(pairs, wish, arrived)
        except TimeoutError:
            raise DeadlinePassed(EXPIRED) from None
        finally:
            self._leave()

    @property
    def info(self) -> ModelInfo:
        """What the scorer is.

        Raises:
            ShuttingDown: the service has not started.
        """
        if self._facts is None:
            raise ShuttingDown("The service has not started. Await start() first.")
        return self._facts

    def longest(self, asked: int | None = None) -> int:
        """Tokens a pair may have, special tokens included.

        Raises:
            InvalidInput: more than the model takes, or no room beside the special tokens.
        """
        asked = self.settings.max_length if asked is None else asked
        return check_max_length(asked, self.info.max_tokens, self._encoder.template.specials)

    # How it is.

    async def ready(self) -> Readiness:
        """Whether a pair was really scored lately; if none was, a canary is scored now."""
        if self._draining:
            return Readiness(ready=False, reason="stopping, or not started")
        if not self._up():
            trouble = self._keepers[0].trouble if self._keepers else "there is none"
            return Readiness(ready=False, reason=f"no worker is up: {trouble}")
        last = self._dispatch.last_scored
        if last is not None and self.clock() - last <= CANARY_FRESH_S:
            return Readiness(ready=True)
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._sing())
        try:
            await asyncio.shield(self._canary)
        except EchelonError as error:
            return Readiness(ready=False, reason=str(error))
        return Readiness(ready=True)

    def snapshot(self) -> ServiceSnapshot:
        """The service now, for metrics."""
        house = self._pressure.look()
        oldest = house.load.oldest
        return ServiceSnapshot(
            load=house.load,
            requests=house.requests,
            backlog_s=house.backlog_s,
            oldest_s=0.0 if oldest is None else self.clock() - oldest,
            workers=house.workers,
            staff=sum(keeper.stays for keeper in self._keepers),
            busy_s=self._dispatch.busy_s,
            resident_bytes=tuple(keeper.resident_bytes for keeper in self._keepers),
            scale=self._dispatch.cost.scale,
            drift=self._dispatch.drift.ratio,
            drifted=self._dispatch.drift.drifted,
            draining=self._draining,
            fallback=self._pressure.on,
        )

    # Inside.

    def _keeper(
        self,
        number: int,
        settled: asyncio.Future[Exception | None],
        loop: asyncio.AbstractEventLoop,
    ) -> WorkerSupervisor:
        return WorkerSupervisor(
            number,
            self._make_worker(number, self._dispatch.wake),
            self._dispatch,
            WorkerConfig(
                precision=self.settings.precision,
                memory_limit_bytes=self.settings.memory_limit_bytes,
                wedge_after_s=self.settings.wedge_after_s,
            ),
            opened=self._opened,
            settled=partial(resolve, loop, settled),
        )

    def _opened(self, facts: ModelInfo) -> list[TokenBatch]:
        """Learn what the scorer is; what to warm it up with. Called from keepers' threads."""
        budget = step_budget(self.settings.token_budget, self.settings.max_pairs, facts.device)
        if self._facts is None:
            self._dispatch.set_up(facts, budget, self._prior, self.settings.goal_s)
        self._facts = facts
        specials = self._encoder.template.specials
        check_fallback(self.settings.fallback_max_length, self.longest(), specials)
        canary = self._encoder.encode([CANARY], self.longest(), "longest_first")
        tokens = min(self._dispatch.load().budget, DEFAULT_BUDGETS[facts.device.partition(":")[0]])
        most = self.settings.max_pairs or tokens
        full = max(1, min(most, tokens // int(canary.lengths[0])))
        return [canary.batch([0] * pairs) for pairs in (1, full, full)]

    def _up(self) -> int:
        return sum(keeper.up and keeper.stays for keeper in self._keepers)

    def _enter(self) -> None:
        self._inside += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._empty.set()

    async def _serve(
        self, pairs: Sequence[Pair] | EncodedPairs, wish: ScoringRequest, arrived: float
    ) -> Answer:
        guest = await self._reception.let_in(pairs, wish)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer | EchelonError] = loop.create_future()
        job = InflightRequest(
            number=next(self._numbers),
            pairs=guest.pairs,
            done=partial(resolve, loop, future),
            arrived=arrived,
            tokenise_s=self.clock() - arrived,
            deadline=wish.deadline,
            priority=wish.priority,
            whole=guest.whole,
            fallback=guest.fallback,
        )
        self._dispatch.submit(job)
        try:
            answer = await future
        except asyncio.CancelledError:
            self._dispatch.cancel(job.number)
            raise
        if isinstance(answer, EchelonError):
            raise answer
        return answer

    async def _sing(self) -> Answer:
        deadline = self.clock() + CANARY_TIMEOUT_S
        return await self.submit([CANARY], deadline=deadline, priority="high")


def _nothing() -> Answer:
    """The answer to no pairs at all."""
    empty = np.zeros(0, dtype=np.int32)
    return Answer(empty.astype(np.float32), empty, 0, 0, Timings())


def _not_started(failure: Exception) -> EchelonError:
    if isinstance(failure, EchelonError):
        return failure
    return WorkerLost(f"The scoring process could not start: {failure}. The log has its words.")
