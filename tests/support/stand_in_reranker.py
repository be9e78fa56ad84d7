"""A reranking server with scripted answers, and a test of it, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

from aiohttp import web

from echelon.data import Topic
from echelon.loadtest.client import CLIENT_PROTOCOLS, Client, Target, route_of
from echelon.loadtest.run import LoadTestPlan
from echelon.simulation.workload import FixedSize, PoissonArrivals, Workload

TOPICS = (Topic("one query", ("a b c", "d e f g")), Topic("another", ("h i",)))
GUARD_S = 60.0
DOCUMENTS = FixedSize(10)


def good(body, dialect="cohere"):
    """What a server of a dialect answers."""
    protocol = CLIENT_PROTOCOLS[dialect]
    texts = body.get("documents") or body.get("texts") or body.get("text_2") or body["passages"]
    rows = [{"index": i, protocol.score: 0.5} for i in range(len(texts))]
    return rows if protocol.results is None else {protocol.results: rows}


class StandIn:
    """Listens on a free port.

    Attributes:
        bodies: all that it was sent.
        headers: with these headers.
        peers: the other ends of its connections.
        answer: from (number of the request, body) to an answer: a web.Response, or data for JSON.
    """

    def __init__(self, answer=lambda _number, body: good(body)):
        self.answer = answer
        self.bodies, self.headers, self.peers = [], [], set()
        self.inside = self.most_inside = 0
        self.url = ""

    async def __aenter__(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _handle(self, request):
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.peers.add(request.transport.get_extra_info("peername"))
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        try:
            answer = self.answer(len(self.bodies), body)
            if asyncio.iscoroutine(answer):
                answer = await answer
        finally:
            self.inside -= 1
        return answer if isinstance(answer, web.Response) else web.json_response(answer)


def target_of(url, dialect="cohere", **more):
    protocol = CLIENT_PROTOCOLS[dialect]
    return Target(route_of(url, protocol), protocol, **more)


def plan_of(url, *, rate=200.0, documents=DOCUMENTS, tokens=None, seed=0, **changes):
    """A short test; ``arrivals`` replaces those at random at ``rate``."""
    arrivals = changes.pop("arrivals", PoissonArrivals(rate))
    target = target_of(
        url, changes.pop("dialect", "cohere"), timeout_s=changes.pop("timeout_s", 10.0)
    )
    workload = Workload(arrivals, documents, tokens, seed)
    settings = {"topics": TOPICS, "warmup_s": 0.0, "duration_s": 0.2}
    return LoadTestPlan(target, workload=workload, **(settings | changes))


@contextlib.asynccontextmanager
async def connected(answer=None, **target):
    """A stand-in and a client of it."""
    server = StandIn() if answer is None else StandIn(answer)
    async with server, Client(target_of(server.url, **target)) as client:
        yield server, client


def run(main):
    async def guarded():
        async with asyncio.timeout(GUARD_S):
            return await main

    return asyncio.run(guarded())


@contextlib.contextmanager
def in_a_thread(answer=None):
    """A stand-in beside a test that runs a whole command."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    server = StandIn() if answer is None else StandIn(answer)

    async def serve():
        ended = asyncio.Event()
        async with server:
            server.end = lambda: loop.call_soon_threadsafe(ended.set)
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(GUARD_S)
        yield server
    finally:
        server.end()
        thread.join(GUARD_S)
        loop.close()
