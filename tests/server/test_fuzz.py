"""Requests that are nearly right get an answer of HTTP that is no failure of the server's.

Ten minutes of the same: benchmarks/fuzz.py.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import TYPE_CHECKING

import pytest
from helpers import ROOT
from served import MODEL, Live

sys.path.insert(0, str(ROOT / "benchmarks"))

from echelon.server.protocols import PROTOCOLS
from hostile import exchange, fuzzed, is_failure, post, status_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXAMPLES = [(protocol.own_paths[0], dict(protocol.example)) for protocol in PROTOCOLS]
GOOD = post("/v1/rerank", b'{"query": "q", "documents": ["x", "y"]}')
REQUESTS, CLIENTS = 16, 30


@pytest.fixture(scope="module")
def server(bert: Path) -> Iterator[Live]:
    timeouts = ("--header-timeout-s", 0.5, "--body-timeout-s", 0.5)
    with Live(bert, *MODEL, *timeouts) as live:
        yield live


def test_no_request_makes_the_server_fail(server):
    async def client(number: int) -> list[int]:
        chance = random.Random(number)
        statuses = []
        for _ in range(REQUESTS):
            request = fuzzed(EXAMPLES, chance)
            status = status_of(await exchange(server.port, request, 5.0))
            assert not is_failure(status), request
            statuses.append(status)
        assert status_of(await exchange(server.port, GOOD)) == 200
        return statuses

    async def all_clients() -> list[list[int]]:
        return await asyncio.gather(*map(client, range(CLIENTS)))

    found = [status for statuses in asyncio.run(all_clients()) for status in statuses]
    assert {200, 400, 422} <= set(found)
    assert not [line for line in server.lines if "Traceback" in str(line)]
