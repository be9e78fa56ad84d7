"""A server whose workers are in trouble, under steady traffic: every request has its one answer."""

from __future__ import annotations

import asyncio
import signal

import pytest
from scorers import GROW, KILL, MEBIBYTE
from served import LiveFake
from streams import PATH, asked, check, client_of, counted, readiness, streaming

PACE = {"pace_s": 0.00002}


@pytest.fixture
def gate(tmp_path):
    """A folder: workers that start again wait until there is a file ``go`` in it."""
    return tmp_path


def changes(server, state: str) -> float:
    return server.metric(f'echelon_worker_changes_total{{state="{state}"}}')


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "wedged")]
)
def test_a_worker_that_is_killed_or_stopped_is_replaced(gate, number, state):
    settings = {"scorer": PACE, "gate": str(gate), "service": {"wedge_after_s": 1.0}}

    async def main(server):
        async with streaming(server) as stream:
            (worker,) = server.workers
            worker.send_signal(number)
            await readiness(server, 503)
            async with client_of(server) as client:
                late = await client.post(PATH, json=asked(0, timeout_ms=200))
                assert late.status_code == 504
                assert "The deadline passed" in late.json()["message"]
                patient = asyncio.create_task(client.post(PATH, json=asked(0)))
                await counted(server, "echelon_requests_inside", 7)  # six clients, and this one
                (gate / "go").touch()
                check(await patient, 0)
            await readiness(server, 200)
            await stream.more(20)
        assert changes(server, state) == 1
        assert changes(server, "up") == 2
        assert server.metric('echelon_requests_total{outcome="failed"}') == 0

    with LiveFake(**settings) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0


def test_a_worker_that_is_killed_again_and_again():
    async def main(server):
        async with streaming(server) as stream:
            for ups in (2, 3, 4):
                (worker,) = server.workers
                worker.kill()
                await counted(server, 'echelon_worker_changes_total{state="up"}', ups)
                await stream.more(12)
        assert changes(server, "died") == 3

    with LiveFake(scorer=PACE) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0


def test_two_workers_cover_for_each_other(gate):
    async def main(server):
        async with streaming(server) as stream:
            first, second = server.workers
            first.kill()
            await counted(server, 'echelon_worker_changes_total{state="died"}', 1)
            assert server.metric("echelon_workers_up") == 1
            await stream.more(12)
            await readiness(server, 200)
            second.kill()
            await readiness(server, 503)
            (gate / "go").touch()
            await readiness(server, 200)
            await counted(server, "echelon_workers_up", 2)
        assert changes(server, "died") == 2

    (gate / "opened").touch()
    (gate / "go").touch()
    with LiveFake(scorer=PACE, gate=str(gate), service={"workers": 2}) as server:
        (gate / "go").unlink()
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0


def test_a_request_that_kills_workers_fails_alone():
    async def main(server):
        async with streaming(server) as stream:
            async with client_of(server) as client:
                body = {"query": "q", "documents": ["harmless", chr(KILL)]}
                response = await client.post(PATH, json=body)
            assert response.status_code == 503
            words = (
                "documents[0]: the scoring process ended twice with this or one of 1 others in it"
            )
            assert response.json()["message"].startswith(words)
            await stream.more(12)
        assert changes(server, "died") >= 2

    with LiveFake(scorer=PACE) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0


def test_workers_out_of_memory_take_smaller_steps():
    async def main(server):
        async with streaming(server) as stream:
            await stream.more(20)
            async with client_of(server) as client:
                body = {"query": "q", "documents": ["d" * 400]}
                response = await client.post(PATH, json=body)
                assert response.status_code == 507
                assert "documents[0] of 404 tokens does not fit" in response.json()["message"]
        assert server.metric('echelon_ladder_steps_total{rung="halve_budget"}') >= 1
        assert server.metric("echelon_token_budget") <= 300
        assert changes(server, "died") == 0

    with LiveFake(scorer={**PACE, "memory_tokens": 300}) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0


def test_workers_that_grow_are_replaced():
    limit = 250 * MEBIBYTE  # a new worker holds less than 100, and each request adds 128

    async def main(server):
        async with streaming(server) as stream:
            async with client_of(server) as client:
                for seed in range(3):
                    body = {"query": f"{seed}", "documents": [chr(GROW)]}
                    response = await client.post(PATH, json=body)
                    assert response.status_code == 200
            await counted(server, 'echelon_worker_changes_total{state="recycled"}', 1)
            await counted(server, 'echelon_worker_changes_total{state="up"}', 2)
            await stream.more(12)
        assert changes(server, "died") == 0

    with LiveFake(scorer=PACE, service={"memory_limit_bytes": limit}) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0
