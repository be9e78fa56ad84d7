"""Whether the load generator itself was the bottleneck, and when its numbers cannot be trusted.

A generator that is too slow sends late and reads late, and the server is blamed for it. So it
watches itself: how late each request was sent, how late its event loop woke, how much of its CPU
it used.

Sending a workload to a server, and writing down what becomes of each request.

In an *open loop* requests are sent when they are due, whatever became of those before: as callers
do who know nothing of each other. Latency counts from the time a request was due. A loop that
waits for a slow answer before it asks again, or that counts from when it got to it, leaves out
just those requests that would have waited ("coordinated omission"). In a *closed loop* so many
clients ask one request after another; it says what a server does at most, and not how long
callers wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from echelon.loadtest.records import RequestRecord, RequestRecords
from echelon.messages import Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator

    from echelon.loadtest.client import Client, Reply
    from echelon.loadtest.texts import TextSource
    from echelon.simulation.workload import Arrival

BEAT_S = 0.02
"""Between two looks at the event loop."""

LATE_S, LATE_SHARE = 0.01, 0.1
"""Lateness at P99 that spoils a measurement: more than 10 ms, and more than a tenth of the P99
latency or of the goal. Timers of event loops are a millisecond coarse; the first is well above."""

BUSY_SHARE = 0.9
"""Share of one CPU above which a generator of one thread cannot be told from a saturated one."""


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """What the generator noticed of itself in the measured part.

    Attributes:
        loop_lag_s: P99 of how late the event loop woke.
        cpu_share: CPU seconds a second; 1 is one CPU in full use.
        own_faults: requests that this machine could not send.
    """

    loop_lag_s: float = 0.0
    cpu_share: float = 0.0
    own_faults: int = 0


class HealthMonitor:
    """Looks on while requests are sent. Times are those of the event loop's clock."""

    def __init__(self) -> None:
        self.own_faults = 0
        self._lags = array("d")
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        """The measured part begins; what was before does not count."""
        del self._lags[:]
        self.own_faults = 0
        self._began = (time.perf_counter(), time.process_time())

    def health(self) -> GeneratorHealth:
        """What was noticed since then."""
        wall_s = time.perf_counter() - self._began[0]
        cpu_s = time.process_time() - self._began[1]
        lag_s = float(np.percentile(self._lags, 99)) if self._lags else 0.0
        return GeneratorHealth(lag_s, cpu_s / wall_s if wall_s > 0 else 0.0, self.own_faults)

    @contextlib.asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """Look at the event loop for as long as the context is open."""
        task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._lags.append(max(0.0, loop.time() - due))


def doubts(health: GeneratorHealth, send_lag_s: float, latency_s: float) -> list[str]:
    """Why numbers cannot be trusted, each with its remedy; nothing where they can.

    Args:
        health: what the generator noticed of itself.
        send_lag_s: P99 of how late requests were sent.
        latency_s: P99 of the latency, or the goal where that is longer. Lateness is a part of the
            latency, so it never makes a goal hold that would not.
    """
    found = []
    bearable_s = max(LATE_S, LATE_SHARE * latency_s)
    if send_lag_s > bearable_s:
        found.append(Message("loadtest.sent_late", {"ms": f"{1000 * send_lag_s:.0f}"}))
    if health.loop_lag_s > bearable_s:
        found.append(Message("loadtest.read_late", {"ms": f"{1000 * health.loop_lag_s:.0f}"}))
    if health.cpu_share > BUSY_SHARE:
        found.append(Message("loadtest.generator_busy", {"share": f"{100 * health.cpu_share:.0f}"}))
    if health.own_faults:
        found.append(Message("loadtest.no_connections", {"faults": health.own_faults}))
    return found


MOST_COMPLAINTS = 20
"""Kinds of trouble that are told apart."""


@dataclass(frozen=True, slots=True)
class DriveResult:
    """What a run left behind.

    Attributes:
        ledger: what became of each request, the warm-up's included.
        warmup_s: requests due before this do not count.
        ended_s: until when requests were due.
        health: what the generator noticed of itself.
        complaints: for each kind of trouble after the warm-up, how often and the first message.
        unfinished: requests whose answers nobody waited for, as the run was told to stop.
        interrupted: whether it was.
    """

    ledger: RequestRecords
    warmup_s: float
    ended_s: float
    health: GeneratorHealth = GeneratorHealth()
    complaints: dict[str, tuple[int, str]] = field(default_factory=dict)
    unfinished: int = 0
    interrupted: bool = False


async def open_loop(
    drive: Driver, requests: Iterable[Arrival], ends_s: float | None
) -> DriveResult:
    """Send each request when it is due, and wait for all answers.

    Args:
        drive: a new one.
        requests: in the order of their times, an end to them.
        ends_s: until when they were to come; None: until the last.
    """
    return await drive.run(drive.send(requests, ends_s), ends_s)


async def closed_loop(
    drive: Driver, requests: Iterator[Arrival], clients: int, ends_s: float
) -> DriveResult:
    """Let so many clients ask one request after another, whose times are not looked at.

    Args:
        drive: a new one.
        requests: without an end.
        clients: how many.
        ends_s: when they stop to ask.
    """

    async def all_of_them() -> None:
        await asyncio.gather(*(drive.keep_asking(requests, ends_s) for _ in range(clients)))

    return await drive.run(all_of_them(), ends_s)


class Driver:
    """One run against one server.

    Args:
        client: open connections.
        material: texts.
        warmup_s: seconds at the start that do not count.
        stop: set it to end the run; what was measured is kept.
        told: called with each record, e.g. for a progress bar.
    """

    def __init__(
        self,
        client: Client,
        material: TextSource,
        *,
        warmup_s: float = 0.0,
        stop: asyncio.Event | None = None,
        told: Callable[[RequestRecord], object] | None = None,
    ) -> None:
        self._client = client
        self._material = material
        self._warmup_s = warmup_s
        self._stop = stop or asyncio.Event()
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._ledger = RequestRecords()
        self._watch = HealthMonitor()
        self._complaints: dict[str, tuple[int, str]] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._bug: BaseException | None = None
        self._started = 0.0
        self._due = 0.0
        self._unfinished = 0

    async def run(self, sending: Coroutine[None, None, None], ends_s: float | None) -> DriveResult:
        """Send until all is sent or the run is told to stop."""
        self._started = self._loop.time()
        self._watch.begin()
        begin = self._loop.call_later(self._warmup_s, self._watch.begin)
        async with self._watch.looking():
            interrupted = await self._unless_stopped(sending)
            health = self._watch.health()
            ended_s = self._now() if interrupted else self._due if ends_s is None else ends_s
            interrupted = await self._unless_stopped(self._all_answered()) or interrupted
        begin.cancel()
        await self._give_up()
        if self._bug is not None:
            raise self._bug
        return DriveResult(
            self._ledger,
            self._warmup_s,
            ended_s,
            replace(health, own_faults=self._watch.own_faults),
            self._complaints,
            self._unfinished,
            interrupted,
        )

    async def send(self, requests: Iterable[Arrival], ends_s: float | None) -> None:
        """Send each request when it is due, its body made before; then wait for the end."""
        for arrival in requests:
            body = self._body(arrival)
            self._due = arrival.at_s
            await asyncio.sleep(max(0.0, arrival.at_s - self._now()))
            task = self._loop.create_task(self._ask(body, arrival.documents, arrival.at_s))
            self._under_way.add(task)
            task.add_done_callback(self._done)
        if ends_s is not None:
            await asyncio.sleep(max(0.0, ends_s - self._now()))

    async def keep_asking(self, requests: Iterator[Arrival], ends_s: float) -> None:
        """One client of a closed loop."""
        while True:
            arrival = next(requests)
            body = self._body(arrival)
            now = self._now()
            if now >= ends_s:
                return
            await self._ask(body, arrival.documents, now)

    def _now(self) -> float:
        return self._loop.time() - self._started

    def _body(self, arrival: Arrival) -> bytes:
        query, documents = self._material.request(arrival)
        target = self._client.target
        return target.shape.body(query, documents, target.model)

    async def _ask(self, body: bytes, documents: int, scheduled: float) -> None:
        sent = self._now()
        try:
            reply = await self._client.ask(body, documents)
        except asyncio.CancelledError:
            self._unfinished += 1
            raise
        record = RequestRecord(scheduled, sent, self._now(), reply.kind, reply.status, documents)
        self._ledger.add(record)
        if scheduled >= self._warmup_s:
            self._watch.own_faults += reply.own_fault
            if reply.kind != "answered":
                self._complain(reply)
        if self._told is not None:
            self._told(record)

    def _complain(self, reply: Reply) -> None:
        name = f"status {reply.status}" if reply.kind in {"refused", "error"} else reply.kind
        name = reply.detail if reply.kind == "error" and not reply.status else name
        if name not in self._complaints and len(self._complaints) >= MOST_COMPLAINTS:
            name = "other"
        count, first = self._complaints.get(name, (0, reply.detail))
        self._complaints[name] = count + 1, first

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._bug = task.exception()
            self._stop.set()

    async def _all_answered(self) -> None:
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _unless_stopped(self, work: Coroutine[None, None, None]) -> bool:
        """Do it until it ends or the run is told to stop; whether it was."""
        working = self._loop.create_task(work)
        stopping = self._loop.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
        return self._stop.is_set()

    async def _give_up(self) -> None:
        """Leave what is still under way."""
        left = list(self._under_way)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
