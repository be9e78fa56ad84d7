"""A load test: connect, check the target, send requests, sum up; or search the highest rate."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from echelon.errors import InvalidInput, check_positive
from echelon.loadtest.client import Client, Target, check_target, wait_until_idle
from echelon.loadtest.driver import Driver, background, closed_loop, open_loop
from echelon.loadtest.summary import DriveResult, LoadSummary, RequestRecord, summarise
from echelon.loadtest.texts import LengthPolicy, TextSource
from echelon.messages import tr
from echelon.progress import Progress, no_progress
from echelon.simulation.workload import ConstantArrivals, ReplayedArrivals, Workload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from echelon.data import Topic
    from echelon.simulation.rate_search import RateSearch
    from echelon.simulation.service_level import ServiceLevel

Limit = Literal["server", "generator", "bounded", "interrupted"]

TICK_S = 0.25
"""Seconds between two reports of progress."""


@dataclass(frozen=True, slots=True)
class LoadTestPlan:
    """What to test and how.

    Attributes:
        workload: the requests; without ``tokens`` texts are sent whole. A trace is replayed once.
        clients: number of clients of a closed loop; None is the open loop.
        warmup_s: seconds at the start that do not count.
        duration_s: seconds that count; None, with a trace only: to its end.
        marked: make the texts of each request unique; servers may score identical pairs only once.
        length_policy: cuts texts to length; None cuts by words.
    """

    target: Target
    topics: Sequence[Topic]
    workload: Workload
    clients: int | None = None
    warmup_s: float = 5.0
    duration_s: float | None = 30.0
    goal: ServiceLevel | None = None
    marked: bool = True
    length_policy: LengthPolicy | None = None

    def __post_init__(self) -> None:
        if self.warmup_s < 0:
            problem = tr("{value} is negative", value=self.warmup_s)
            raise InvalidInput("--warmup-s", problem, tr("Give 0 or more."))
        if self.duration_s is None and not self.replays:
            raise InvalidInput("--duration-s", tr("is not given"), tr("Give seconds."))
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            problem = tr("{value} is not a finite number above 0", value=f"{self.duration_s:g}")
            raise InvalidInput("--duration-s", problem, tr("Give seconds."))
        check_positive("Give 1 or more.", **{"--clients": self.clients})

    @property
    def mode(self) -> Literal["open", "closed"]:
        """Which loop."""
        return "open" if self.clients is None else "closed"

    @property
    def replays(self) -> bool:
        """Whether a trace is replayed."""
        return isinstance(self.workload.arrivals, ReplayedArrivals)

    @property
    def ends_s(self) -> float | None:
        """When the last request may be due; None: when the trace ends."""
        return None if self.duration_s is None else self.warmup_s + self.duration_s


@dataclass(frozen=True, slots=True)
class LoadTestRun:
    """One run: its records and their summary."""

    outcome: DriveResult
    summary: LoadSummary


@dataclass(frozen=True, slots=True)
class RateProbe:
    """One rate of a search; ``held`` where the goal held and the generator kept up."""

    rate: float
    run: LoadTestRun
    held: bool


@dataclass(frozen=True, slots=True)
class FoundRate:
    """The end of a search.

    Attributes:
        rate: the highest rate that held; 0 where none did.
        limit: why no higher one: the ``server`` missed its goal, the ``generator`` could not keep
            up, the search was ``bounded`` by ``--max-rate``, or ``interrupted``.
    """

    rate: float
    limit: Limit
    probes: tuple[RateProbe, ...]

    @property
    def best(self) -> RateProbe | None:
        """The probe of the highest rate that held."""
        return next((p for p in self.probes if p.held and p.rate == self.rate), None)


class LoadTest:
    """A checked target with open connections, as :func:`opened` gives it."""

    def __init__(
        self, plan: LoadTestPlan, client: Client, stop: asyncio.Event, on_progress: Progress
    ) -> None:
        self.plan = plan
        self._client = client
        self._stop = stop
        self._on_progress = on_progress
        seed, policy = plan.workload.seed, plan.length_policy
        self._texts = TextSource(plan.topics, seed=seed, marked=plan.marked, length_policy=policy)

    async def measure(self, plan: LoadTestPlan | None = None) -> LoadTestRun:
        """Run the plan, or another one for the same target."""
        plan = plan or self.plan
        counts: Counter[bool] = Counter()  # failed requests are False

        def count(record: RequestRecord) -> None:
            counts[record.kind == "answered"] += 1

        driver = Driver(
            self._client, self._texts, warmup_s=plan.warmup_s, stop=self._stop, on_record=count
        )
        async with background(self._report(plan, counts)):
            if plan.clients is None:
                requests = plan.workload.requests(plan.ends_s or math.inf)
                outcome = await open_loop(driver, requests, plan.ends_s)
            else:
                requests = _endless(plan.workload).requests()
                outcome = await closed_loop(driver, requests, plan.clients, plan.ends_s or 0.0)
        return LoadTestRun(outcome, summarise(outcome, plan.goal))

    async def find_max(
        self, search: RateSearch, on_probe: Callable[[RateProbe], object]
    ) -> FoundRate:
        """Probe rate after rate, and wait in between until the server is idle."""
        probes: list[RateProbe] = []
        goal = self.plan.goal
        within_s = self.plan.target.timeout_s if goal is None else goal.latency_s
        while not search.over and not self._stop.is_set():
            rate = search.rate
            run = await self.measure(replace(self.plan, workload=self.plan.workload.at(rate)))
            if run.outcome.interrupted:
                break
            probe = RateProbe(rate, run, run.summary.held and run.summary.trusted)
            probes.append(probe)
            on_probe(probe)
            search.tell(held=probe.held)
            if not search.over:
                self._on_progress(tr("waiting until the server is idle"))
                request = self.one_request()
                await wait_until_idle(self._client, *request, within_s=within_s, stop=self._stop)
        return FoundRate(search.held, _limit(search, probes), tuple(probes))

    def one_request(self) -> tuple[bytes, int]:
        """The body of a request like those of the plan, and the number of its documents."""
        arrival = next(_endless(replace(self.plan.workload, seed=0)).requests())
        target = self.plan.target
        query, documents = self._texts.request(arrival)
        return target.protocol.body(query, documents, target.model), len(documents)

    async def _report(self, plan: LoadTestPlan, counts: Counter[bool]) -> None:
        """Report progress until it is cancelled."""
        loop = asyncio.get_running_loop()
        began, whole_s, rate = loop.time(), plan.ends_s or 0.0, plan.workload.rate
        prefix = f"{rate:.3g}/s: " if plan.mode == "open" and rate and not plan.replays else ""
        while True:
            answered, failed = f"{counts[True]:,}", f"{counts[False]:,}"
            words = tr("answered {answered}, failed {failed}", answered=answered, failed=failed)
            stage = f"{prefix}{words}"
            self._on_progress(stage, min(whole_s, loop.time() - began), whole_s)
            await asyncio.sleep(TICK_S)


def _endless(workload: Workload) -> Workload:
    """The same requests without their times, for a closed loop."""
    return replace(workload, arrivals=ConstantArrivals(1.0))


def _limit(search: RateSearch, probes: Sequence[RateProbe]) -> Limit:
    if not search.over:
        return "interrupted"
    broken = [p for p in probes if p.rate == search.broke]
    if not broken:
        return "bounded"
    return "server" if not broken[-1].run.summary.held else "generator"


@contextlib.asynccontextmanager
async def opened(
    plan: LoadTestPlan, *, stop: asyncio.Event | None = None, on_progress: Progress = no_progress
) -> AsyncIterator[LoadTest]:
    """Connect to a plan's target and check it.

    Set ``stop`` to end a run; what was measured is kept.

    Raises:
        InvalidInput: the server cannot be reached or does not speak the dialect.
    """
    async with Client(plan.target) as client:
        test = LoadTest(plan, client, stop or asyncio.Event(), on_progress)
        await check_target(client, *test.one_request())
        yield test
