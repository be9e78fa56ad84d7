"""Servers for tests: one in this process without weights, and one as people start it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import uvicorn
from scorers import HANG
from services import GUARD_S, service

from echelon.engine.events import ListenerGroup
from echelon.scheduling.admission import AdmissionLimits
from echelon.server.app import make_app
from echelon.server.context import ServerContext
from echelon.server.dashboard import SLICE_S, RollingStats
from echelon.server.http_server import HttpServer
from echelon.server.limits import ServerLimits
from echelon.server.metrics import Metrics

KEY = "a-key-for-tests"
QUERY = "rain at the kitchen window"
MODEL = ("--device", "cpu", "--threads", 1)
DOCUMENTS = [f"document {i}" for i in range(5)]
ASKED = {"query": "q", "documents": DOCUMENTS}
JSON = {"Content-Type": "application/json"}


@contextlib.asynccontextmanager
async def app_of(made=None, limits=None, access=None, slice_s=SLICE_S, stats=None, **settings):
    """A client of an application in this process, and its context."""
    metrics, stats = Metrics(), stats or RollingStats(slice_s)
    made = made or service(listener=ListenerGroup(metrics, stats), **settings)

    async def launch():
        await made.start()
        return made

    context = ServerContext(launch, "the-model", metrics, limits, access=access, stats=stats)
    await context.open()
    transport = httpx.ASGITransport(make_app(context))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, context
    finally:
        await context.close()


def run_app(main, *arguments, **settings):
    async def guarded():
        async with asyncio.timeout(GUARD_S), app_of(*arguments, **settings) as (client, context):
            await main(client, context)

    asyncio.run(guarded())


def metric(context, name) -> float:
    """A sample of the metrics, such as ``echelon_requests_total{outcome="answered"}``."""
    return sample(context.metrics.text().decode(), name)


def sample(text: str, name: str) -> float:
    """A sample in Prometheus' text format; 0 where there is none."""
    for line in text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0


@contextlib.contextmanager
def counted(shared):
    """The queries that an AsyncReranker is asked meanwhile."""
    queries, rank = [], shared.rank

    async def noted(query, *arguments, **settings):
        queries.append(query)
        return await rank(query, *arguments, **settings)

    shared.rank = noted
    try:
        yield queries
    finally:
        del shared.rank


LAST = 40
"""Lines of a server's log that are shown if it ends with an error."""


class Live:
    """``echelon serve`` in a process of its own, on a free port of the loopback.

    Attributes:
        url: where it listens.
        lines: its log, as objects.
    """

    def __init__(self, model, *arguments, **environment):
        command = ["-m", "echelon", "serve", model, "--port", 0, *arguments]
        self._start(command, environment)

    def _start(self, command, environment):
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list = []
        self.url = self._await_url()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def end(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        self.process.stderr.close()
        if code:
            said = "\n".join(map(str, self.lines[-LAST:]))
            sys.stdout.write(f"The server ended with {code}; its last lines:\n{said}\n")
        return code

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
            self.wait()

    def _await_url(self) -> str:
        for line in self.process.stderr:
            self._keep(line)
            if isinstance(self.lines[-1], dict) and "url" in self.lines[-1]:
                return self.lines[-1]["url"]
        raise AssertionError(f"the server did not start: {self.lines}")

    def _read(self) -> None:
        for line in self.process.stderr:
            self._keep(line)

    def _keep(self, line: str) -> None:
        try:
            self.lines.append(json.loads(line))
        except ValueError:
            self.lines.append(line)


DAY_S = 86_400.0
HOLDING = {"query": "q", "documents": [chr(HANG)]}


@contextlib.contextmanager
def full_server():
    """URL of a server in this process whose only place a request has taken that never ends."""
    metrics = Metrics()
    made = service(listener=metrics, bounds=AdmissionLimits(max_requests=1), wedge_after_s=DAY_S)

    async def launch():
        await made.start()
        return made

    context = ServerContext(launch, "the-model", metrics, ServerLimits(drain_s=0.01))
    server = Threaded(uvicorn.Config(make_app(context), lifespan="on", log_config=None), context)
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(2) as threads:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        serving = threads.submit(server.run, sockets=[taken])
        holding = threads.submit(httpx.post, f"{url}/v1/rerank", json=HOLDING, timeout=None)
        guard = time.monotonic() + GUARD_S
        while metric(context, "echelon_requests_inside") < 1:
            assert time.monotonic() < guard
            time.sleep(0.005)
        try:
            yield url
        finally:
            server.should_exit = True
            serving.result(GUARD_S)
            assert holding.result(GUARD_S).status_code == 503


class Threaded(HttpServer):
    """A server in a thread, which signals never reach."""

    capture_signals = contextlib.nullcontext


class LiveFake(Live):
    """:mod:`serve_fake` in a process of its own; keywords are its settings."""

    def __init__(self, environment=None, **settings):
        script = Path(__file__).with_name("serve_fake.py")
        self._start([script, json.dumps(settings)], environment or {})

    @property
    def workers(self) -> list:
        return psutil.Process(self.process.pid).children()

    def metric(self, name: str) -> float:
        """A sample of its metrics; 0 where there is none."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            return sample(reply.read().decode(), name)
