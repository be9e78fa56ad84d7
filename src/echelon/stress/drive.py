"""Sending a workload to a server, and writing down what becomes of each request.

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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from echelon.stress.ledger import Ledger, Record
from echelon.stress.watch import Health, Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from echelon.simulation.workload import Arrival
    from echelon.stress.client import Client, Reply
    from echelon.stress.texts import Material


MOST_COMPLAINTS = 20
"""Kinds of trouble that are told apart."""


@dataclass(frozen=True, slots=True)
class Outcome:
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

    ledger: Ledger
    warmup_s: float
    ended_s: float
    health: Health = Health()  # noqa: RUF009 - frozen, so that all may share one
    complaints: dict[str, tuple[int, str]] = field(default_factory=dict)
    unfinished: int = 0
    interrupted: bool = False


async def open_loop(drive: Drive, requests: Iterable[Arrival], ends_s: float | None) -> Outcome:
    """Send each request when it is due, and wait for all answers.

    Args:
        drive: a new one.
        requests: in the order of their times, an end to them.
        ends_s: until when they were to come; None: until the last.
    """
    return await drive.run(drive.send(requests, ends_s), ends_s)


async def closed_loop(
    drive: Drive, requests: Iterator[Arrival], clients: int, ends_s: float
) -> Outcome:
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


class Drive:
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
        material: Material,
        *,
        warmup_s: float = 0.0,
        stop: asyncio.Event | None = None,
        told: Callable[[Record], object] | None = None,
    ) -> None:
        self._client = client
        self._material = material
        self._warmup_s = warmup_s
        self._stop = stop or asyncio.Event()
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._ledger = Ledger()
        self._watch = Watch()
        self._complaints: dict[str, tuple[int, str]] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._bug: BaseException | None = None
        self._started = 0.0
        self._due = 0.0
        self._unfinished = 0

    async def run(self, sending: Coroutine[None, None, None], ends_s: float | None) -> Outcome:
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
        return Outcome(
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
        record = Record(scheduled, sent, self._now(), reply.kind, reply.status, documents)
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
