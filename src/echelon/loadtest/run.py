"""The highest rate that holds: doubled until one does not, then halved in on. Pure.

It must not know servers or time: it names a rate, is told whether it held, and names the next.

The spine of a load test: connect, try out, drive, sum up; or search for the highest rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from echelon.errors import InvalidInput
from echelon.loadtest.client import Client, settle, try_out
from echelon.loadtest.driver import Driver, closed_loop, open_loop
from echelon.loadtest.summary import LoadSummary, summarise
from echelon.loadtest.texts import TextSource
from echelon.simulation.workload import (
    ConstantArrivals,
    FixedSize,
    PoissonArrivals,
    ReplayedArrivals,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from echelon.data import Topic
    from echelon.loadtest.client import Target
    from echelon.loadtest.driver import DriveResult
    from echelon.loadtest.records import RequestRecord
    from echelon.loadtest.texts import LengthPolicy
    from echelon.simulation.service_level import ServiceLevel
    from echelon.simulation.workload import Arrivals, KnownArrivals, SizeDistribution

PRECISION = 0.05
"""The last step, as a share of the rate: load tests of a minute do not tell rates apart that are
closer."""


@dataclass(slots=True)
class RateBisection:
    """What is known of the highest rate.

    Attributes:
        rate: the rate to try next, a second.
        most: never try more.
        least: nor less; a probe of a few requests says nothing.
        precision: how close the two ends have to be, as a share.
        held: the highest rate that held; 0 where none did.
        broke: the lowest that did not.
    """

    rate: float
    most: float = math.inf
    least: float = 0.05
    precision: float = PRECISION
    held: float = 0.0
    broke: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.rate <= self.most:
            limit = f"{self.least:.3g} to {self.most:g}"
            raise InvalidInput(
                "--rate",
                f"{self.rate:g} is not within {limit}",
                "Choose another, or a longer time.",
            )
        if not 0 < self.precision < 1:
            raise InvalidInput("precision", f"{self.precision} is not within 0 and 1", "Use 0.05.")

    @property
    def over(self) -> bool:
        """Whether nothing is left to try."""
        if self.held == 0.0:
            return self.broke <= self.least
        return self.held >= self.most or self.broke <= self.held * (1 + self.precision)

    def tell(self, *, held: bool) -> None:
        """Say whether :attr:`rate` held; it is another afterwards, unless the search is over."""
        if held:
            self.held = self.rate
        else:
            self.broke = self.rate
        if not self.over:
            self.rate = self._next()

    def _next(self) -> float:
        if self.held == 0.0:
            return max(self.least, self.broke / 2)
        if math.isinf(self.broke):
            return min(self.most, self.held * 2)
        # The geometric middle: what counts is the distance as a share.
        return math.sqrt(self.held * self.broke)


if TYPE_CHECKING:
    Told = Callable[[str, float | None], object]

TICK_S = 0.25
"""Between two words to whoever looks on."""


@dataclass(frozen=True, slots=True)
class LoadTestPlan:
    """What to test and how.

    Attributes:
        target: the server.
        topics: texts to send.
        documents: documents of a request.
        tokens: tokens of a pair, about; None sends texts whole.
        rate: requests a second of an open loop; where a search begins.
        even: at even distances, not by chance.
        trace: replay these instead; gone through once.
        clients: a closed loop of so many; None is an open loop.
        warmup_s: seconds before anything counts.
        duration_s: seconds that count; None, in a trace only: to its end.
        goal: what callers were promised.
        marked: make each request's texts its own; else identical pairs may be folded.
        seed: the same seed gives the same requests at the same times.
        ruler: cuts texts to length; None goes by words.
    """

    target: Target
    topics: Sequence[Topic]
    documents: SizeDistribution = FixedSize(10)  # noqa: RUF009 - frozen, so that all may share one
    tokens: SizeDistribution | None = None
    rate: float = 1.0
    even: bool = False
    trace: Iterable[KnownArrivals] | None = None
    clients: int | None = None
    warmup_s: float = 5.0
    duration_s: float | None = 30.0
    goal: ServiceLevel | None = None
    marked: bool = True
    seed: int = 0
    ruler: LengthPolicy | None = None

    def __post_init__(self) -> None:
        if self.warmup_s < 0:
            raise InvalidInput("--warmup-s", f"{self.warmup_s} is negative", "Give 0 or more.")
        if self.duration_s is None and self.trace is None:
            raise InvalidInput("--duration-s", "is missing", "Give seconds.")
        if self.duration_s is not None and not 0 < self.duration_s < float("inf"):
            raise InvalidInput("--duration-s", f"{self.duration_s} is not above 0", "Give seconds.")
        if self.clients is not None and self.clients < 1:
            raise InvalidInput("--clients", f"{self.clients} is not positive", "Give 1 or more.")

    @property
    def mode(self) -> Literal["open", "closed"]:
        """Which loop."""
        return "open" if self.clients is None else "closed"

    @property
    def ends_s(self) -> float | None:
        """When the last request may be due; None: when the trace ends."""
        return None if self.duration_s is None else self.warmup_s + self.duration_s

    def workload(self) -> Workload:
        """The requests."""
        arrivals: Arrivals = (
            ConstantArrivals(self.rate) if self.even else PoissonArrivals(self.rate)
        )
        if self.trace is not None:
            arrivals = ReplayedArrivals(self.trace)
        return Workload(arrivals, self.documents, self.tokens, self.seed)


@dataclass(frozen=True, slots=True)
class LoadTestRun:
    """One run: its records and their summary."""

    outcome: DriveResult
    summary: LoadSummary


@dataclass(frozen=True, slots=True)
class RateProbe:
    """One rate of a search.

    Attributes:
        rate: requests a second.
        run: what came of it.
        held: whether the goal held, and the generator kept up.
    """

    rate: float
    run: LoadTestRun
    held: bool


@dataclass(frozen=True, slots=True)
class FoundRate:
    """A search's end.

    Attributes:
        rate: the highest rate that held; 0 where none did.
        limit: why no higher one: ``server`` broke its goal, the ``generator`` could not keep up,
            the search was ``bounded``, or ``interrupted``.
        probes: all that was tried, in order.
    """

    rate: float
    limit: Literal["server", "generator", "bounded", "interrupted"]
    probes: tuple[RateProbe, ...]

    @property
    def best(self) -> RateProbe | None:
        """The probe of the highest rate that held."""
        return next((p for p in self.probes if p.held and p.rate == self.rate), None)


class LoadTest:
    """A target with open connections, tried out. To be used as :func:`opened` gives it."""

    def __init__(self, plan: LoadTestPlan, client: Client, stop: asyncio.Event, told: Told) -> None:
        self.plan = plan
        self._client = client
        self._stop = stop
        self._told = told
        self._material = TextSource(
            plan.topics, seed=plan.seed, marked=plan.marked, ruler=plan.ruler
        )

    async def measure(self, plan: LoadTestPlan | None = None) -> LoadTestRun:
        """One run under the plan, or under another one for the same target."""
        plan = plan or self.plan
        counts = {"answered": 0, "failed": 0}

        def count(record: RequestRecord) -> None:
            counts["answered" if record.kind == "answered" else "failed"] += 1

        drive = Driver(
            self._client, self._material, warmup_s=plan.warmup_s, stop=self._stop, told=count
        )
        async with self._ticking(plan, counts):
            if plan.clients is None:
                requests = plan.workload().requests(plan.ends_s or float("inf"))
                outcome = await open_loop(drive, requests, plan.ends_s)
            else:
                endless = Workload(ConstantArrivals(1.0), plan.documents, plan.tokens, plan.seed)
                ends_s = plan.ends_s or 0.0
                outcome = await closed_loop(drive, endless.requests(), plan.clients, ends_s)
        return LoadTestRun(outcome, summarise(outcome, plan.goal))

    async def find_max(
        self, search: RateBisection, tried: Callable[[RateProbe], object]
    ) -> FoundRate:
        """Probe rate after rate, with time to settle in between.

        Args:
            search: where to begin.
            tried: called with each probe.
        """
        probes: list[RateProbe] = []
        while not search.over and not self._stop.is_set():
            run = await self.measure(replace(self.plan, rate=search.rate))
            if run.outcome.interrupted:
                break
            probe = RateProbe(search.rate, run, run.summary.held and run.summary.trusted)
            probes.append(probe)
            tried(probe)
            search.tell(held=probe.held)
            if not search.over:
                await self._settle()
        return FoundRate(search.held, _limit(search, probes), tuple(probes))

    async def try_out(self) -> None:
        """One request; see :func:`echelon.loadtest.client.try_out`."""
        await try_out(self._client, *self._one())

    async def _settle(self) -> None:
        goal = self.plan.goal
        within_s = self.plan.target.timeout_s if goal is None else goal.latency_s
        self._told("settling", None)
        await settle(self._client, *self._one(), within_s=within_s, stop=self._stop)

    def _one(self) -> tuple[bytes, int]:
        arrival = next(
            Workload(ConstantArrivals(1.0), self.plan.documents, self.plan.tokens).requests()
        )
        target = self.plan.target
        query, documents = self._material.request(arrival)
        return target.shape.body(query, documents, target.model), len(documents)

    @contextlib.asynccontextmanager
    async def _ticking(self, plan: LoadTestPlan, counts: dict[str, int]) -> AsyncIterator[None]:
        """Say how it goes for as long as the context is open."""
        loop = asyncio.get_running_loop()
        began, whole_s = loop.time(), plan.ends_s

        async def tick() -> None:
            while True:
                share = None if whole_s is None else min(1.0, (loop.time() - began) / whole_s)
                rate = f"{plan.rate:.3g}/s, " if plan.mode == "open" and not plan.trace else ""
                self._told(f"{rate}{counts['answered']:,} ok, {counts['failed']:,} failed", share)
                await asyncio.sleep(TICK_S)

        task = asyncio.create_task(tick())
        try:
            yield
        finally:
            task.cancel()


def _limit(
    search: RateBisection, probes: Sequence[RateProbe]
) -> Literal["server", "generator", "bounded", "interrupted"]:
    if not search.over:
        return "interrupted"
    broken = [p for p in probes if p.rate == search.broke]
    if not broken:
        return "bounded"
    return "server" if not broken[-1].run.summary.held else "generator"


@contextlib.asynccontextmanager
async def opened(
    plan: LoadTestPlan, *, stop: asyncio.Event | None = None, told: Told = lambda *_: None
) -> AsyncIterator[LoadTest]:
    """Connect to a plan's target and try it out.

    Args:
        plan: what to test.
        stop: set it to end a run; what was measured is kept.
        told: hears what is being done, and the share that is done.

    Raises:
        InvalidInput: the server cannot be reached or does not speak the dialect.
    """
    async with Client(plan.target) as client:
        tester = LoadTest(plan, client, stop or asyncio.Event(), told)
        await tester.try_out()
        yield tester
