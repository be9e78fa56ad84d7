"""Sends a workload to a server, records the outcome of each request, and measures itself.

In an *open loop* requests are sent when they are due, whether or not earlier ones are answered:
callers do not know of each other. Latency counts from the time a request was due. A loop that waits
for a slow answer before it sends the next, or that counts from when it sent, leaves out the
requests that would have waited ("coordinated omission"). In a *closed loop* a number of clients
send one request after another; it measures the highest throughput, not how long callers wait.

A generator that is too slow sends late and reads late, and the server is blamed for it. So it
measures how late requests were sent, how late its event loop woke, and how much CPU it used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.loadtest.summary import (
    OTHER,
    DriveResult,
    GeneratorHealth,
    RequestRecord,
    RequestRecords,
)
from echelon.messages import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator

    from echelon.loadtest.client import Client, Reply
    from echelon.loadtest.texts import TextSource
    from echelon.simulation.workload import Arrival

BEAT_S = 0.02
"""Seconds between two samples of the event loop."""


class HealthMonitor:
    """Measures the generator while requests are sent, on the event loop's clock."""

    def __init__(self) -> None:
        self.own_faults = 0
        self._lags = array("d")
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        """Begin to measure; earlier samples do not count."""
        del self._lags[:]
        self.own_faults = 0
        self._began = (time.perf_counter(), time.process_time())

    def health(self) -> GeneratorHealth:
        """The generator's state since the beginning."""
        wall_s = time.perf_counter() - self._began[0]
        cpu_s = time.process_time() - self._began[1]
        lag_s = float(np.percentile(self._lags, 99)) if self._lags else 0.0
        return GeneratorHealth(lag_s, cpu_s / wall_s if wall_s > 0 else 0.0, self.own_faults)

    async def sample(self) -> None:
        """Sample the event loop until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._lags.append(max(0.0, loop.time() - due))


@contextlib.asynccontextmanager
async def background(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Run ``work`` for as long as the context is open."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


MAX_PROBLEMS = 20
"""Kinds of problems that are counted apart."""


async def open_loop(
    driver: Driver, requests: Iterable[Arrival], ends_s: float | None
) -> DriveResult:
    """Send each request when it is due, up to ``ends_s`` or the last, and wait for all answers."""
    return await driver.run(driver.send(requests, ends_s), ends_s)


async def closed_loop(
    driver: Driver, requests: Iterator[Arrival], clients: int, ends_s: float
) -> DriveResult:
    """Let clients send one request after another until ``ends_s``, whatever the requests' times."""

    async def all_clients() -> None:
        await asyncio.gather(*(driver.keep_sending(requests, ends_s) for _ in range(clients)))

    return await driver.run(all_clients(), ends_s)


class Driver:
    """One run against one server.

    Args:
        warmup_s: seconds at the start that do not count.
        stop: set it to end the run; what was measured is kept.
        on_record: called with each record.
    """

    def __init__(
        self,
        client: Client,
        texts: TextSource,
        *,
        warmup_s: float = 0.0,
        stop: asyncio.Event | None = None,
        on_record: Callable[[RequestRecord], object] | None = None,
    ) -> None:
        self._client = client
        self._texts = texts
        self._warmup_s = warmup_s
        self._stop = stop or asyncio.Event()
        self._on_record = on_record
        self._loop = asyncio.get_running_loop()
        self._records = RequestRecords()
        self._monitor = HealthMonitor()
        self._problems: dict[str, tuple[int, str]] = {}
        self._in_flight: set[asyncio.Task[None]] = set()
        self._bug: BaseException | None = None
        self._started = 0.0
        self._due = 0.0
        self._unfinished = 0

    async def run(self, sending: Coroutine[None, None, None], ends_s: float | None) -> DriveResult:
        """Send until all is sent or the run is stopped."""
        self._started = self._loop.time()
        self._monitor.begin()
        begin = self._loop.call_later(self._warmup_s, self._monitor.begin)
        async with background(self._monitor.sample()):
            interrupted = await self._unless_stopped(sending)
            health = self._monitor.health()
            ended_s = self._now() if interrupted else self._due if ends_s is None else ends_s
            interrupted = await self._unless_stopped(self._all_answered()) or interrupted
        begin.cancel()
        await self._cancel_rest()
        if self._bug is not None:
            raise self._bug
        return DriveResult(
            self._records,
            self._warmup_s,
            ended_s,
            replace(health, own_faults=self._monitor.own_faults),
            self._problems,
            self._unfinished,
            interrupted,
        )

    async def send(self, requests: Iterable[Arrival], ends_s: float | None) -> None:
        """Send each request when it is due, its body written before; then wait for the end."""
        for arrival in requests:
            body = self._body(arrival)
            self._due = arrival.at_s
            await asyncio.sleep(max(0.0, arrival.at_s - self._now()))
            task = self._loop.create_task(self._request(body, arrival.documents, arrival.at_s))
            self._in_flight.add(task)
            task.add_done_callback(self._done)
        if ends_s is not None:
            await asyncio.sleep(max(0.0, ends_s - self._now()))

    async def keep_sending(self, requests: Iterator[Arrival], ends_s: float) -> None:
        """One client of a closed loop."""
        while True:
            arrival = next(requests)
            body = self._body(arrival)
            now = self._now()
            if now >= ends_s:
                return
            await self._request(body, arrival.documents, now)

    def _now(self) -> float:
        return self._loop.time() - self._started

    def _body(self, arrival: Arrival) -> bytes:
        query, documents = self._texts.request(arrival)
        target = self._client.target
        return target.protocol.body(query, documents, target.model)

    async def _request(self, body: bytes, documents: int, scheduled: float) -> None:
        sent = self._now()
        try:
            reply = await self._client.send(body, documents)
        except asyncio.CancelledError:
            self._unfinished += 1
            raise
        record = RequestRecord(scheduled, sent, self._now(), reply.kind, reply.status, documents)
        self._records.add(record)
        if scheduled >= self._warmup_s:
            self._monitor.own_faults += reply.own_fault
            if reply.kind != "answered":
                self._complain(reply)
        if self._on_record is not None:
            self._on_record(record)

    def _complain(self, reply: Reply) -> None:
        name: str = reply.kind
        if reply.status and reply.kind in {"refused", "error"}:
            name = Message("loadtest.status", {"status": reply.status})
        elif reply.kind == "error":
            name = reply.detail
        if name not in self._problems and len(self._problems) >= MAX_PROBLEMS:
            name = OTHER
        count, first = self._problems.get(name, (0, reply.detail))
        self._problems[name] = count + 1, first

    def _done(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug = task.exception()
            self._stop.set()

    async def _all_answered(self) -> None:
        while self._in_flight:
            await asyncio.wait(self._in_flight)

    async def _unless_stopped(self, work: Coroutine[None, None, None]) -> bool:
        """Run ``work`` until it ends or the run is stopped; return whether it was stopped."""
        working = self._loop.create_task(work)
        stopping = self._loop.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return self._stop.is_set()

    async def _cancel_rest(self) -> None:
        left = list(self._in_flight)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
