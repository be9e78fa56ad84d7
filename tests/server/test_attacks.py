"""Each attack on a server in little memory: it lives, stays small, and answers others meanwhile.

The same attacks ten times as large, with latencies: benchmarks/attacks.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from helpers import ROOT
from served import MODEL, Live
from services import GUARD_S

sys.path.insert(0, str(ROOT / "benchmarks"))

from hostile import STAYING, endless_trailers, exchange, is_failure, payloads, post, status_of, stay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAYLOADS = {payload.name: payload for payload in payloads()}
MEMORY_BYTES = 3 * 10**9
GROWTH_BYTES = 300 * 10**6
LIMIT_S = 1
CONNECTIONS = 150
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMALL = post("/v1/rerank", b'{"query": "q", "documents": ["x"]}')

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits a process' address space, which is Linux's"
)


class Attacked(Live):
    """`echelon serve` with little memory; ``idle`` is its memory before the first attack."""

    def __init__(self, model: Path):
        timeouts = [f"--{part}-timeout-s" for part in ("header", "body", "send")]
        limits = [word for flag in timeouts for word in (flag, LIMIT_S)]
        super().__init__(model, *MODEL, *limits, "--max-connections", CONNECTIONS + 50)
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (MEMORY_BYTES,) * 2)
        self.idle = self.memory()

    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss


@pytest.fixture(scope="module")
def server(bert: Path) -> Iterator[Attacked]:
    with Attacked(bert) as live:
        asyncio.run(exchange(live.port, SMALL))  # warm
        yield live
        assert live.process.poll() is None


async def meanwhile(server: Attacked, attack) -> object:
    """The outcome of an attack, during which others are answered and memory is watched."""
    attacking = asyncio.create_task(attack)
    rounds = 0
    while rounds == 0 or not attacking.done():
        assert status_of(await exchange(server.port, HEALTH)) == 200
        assert status_of(await exchange(server.port, SMALL)) == 200
        assert server.memory() - server.idle < GROWTH_BYTES
        rounds += 1
    return await attacking


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_body_is_answered_or_refused_and_others_are_served(server, name):
    payload = PAYLOADS[name]
    request = post(payload.path, payload.body)
    status = status_of(asyncio.run(meanwhile(server, exchange(server.port, request, GUARD_S))))
    assert status
    assert not is_failure(status)


@pytest.mark.parametrize("kind", STAYING)
def test_connections_that_only_stay_are_closed_and_others_are_served(server, kind):
    staying = stay(server.port, kind, CONNECTIONS, 3 * LIMIT_S)
    accepted, closed = asyncio.run(meanwhile(server, staying))
    assert accepted == closed == CONNECTIONS


def test_trailers_do_not_pile_up(server):
    assert asyncio.run(meanwhile(server, endless_trailers(server.port, 100)))


def test_half_sent_bodies_do_not_pile_up(server):
    body = b'{"query": "' + b"x" * 20 * 10**6

    async def half_sent() -> None:
        parts = [post("/v1/rerank", body + b"x" * 10)[:-10]] * 30
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3 * LIMIT_S):
                await asyncio.gather(*(exchange(server.port, part) for part in parts))

    asyncio.run(meanwhile(server, half_sent()))
