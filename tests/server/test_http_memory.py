"""A server whose worker really runs out of memory, under load: torch's own errors, over HTTP."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from helpers import WIDE, make_toy
from served import LiveFake, sample
from services import GUARD_S
from streams import PATH, client_of

from echelon import Reranker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="limits another process' address space, which is Linux's"
)

LONG = WIDE | {"max_position_embeddings": 8200, "hidden_size": 16}
"""A step's largest tensor has 64 KiB a token: 10,000 tokens take 640 MiB, a pair of 8,192 512.
With few hidden values it is quickly computed."""

SPARE_BYTES = 300 * 2**20
"""Address space that the worker may still have. With much less, native code crashes where it
cannot map a few pages (docs/LOG.md)."""

CLIENTS = 6


class LiveModel(LiveFake):
    """``echelon serve``, which scores every text again, with what :class:`LiveFake` tells of it."""

    def __init__(self, model, *arguments):
        command = ["-m", "echelon", "serve", model, "--port", 0, "--score-cache", 0, *arguments]
        super()._start(command, {})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Path:
    return make_toy(tmp_path_factory.mktemp("wide"), "bert", tokenizers["bert"], **LONG)


def documents(seed: int) -> list[str]:
    """Some 4,500 tokens that belong to a seed alone."""
    return ["rain " * (length - 4 - seed) for length in range(512, 64, -28)]


def asked(seed: int) -> dict:
    return {"query": "rain", "documents": documents(seed), "raw_scores": True}


def held(server) -> int:
    """Bytes of address space that the server's worker has."""
    (worker,) = server.workers
    return worker.memory_info().vms


def limit(server, new: int) -> None:
    """Leave the server's worker, and all that follow it, little address space from now on.

    Args:
        server: it.
        new: what a worker has that was just opened.
    """
    import resource

    (worker,) = server.workers
    for pid, limit in ((worker.pid, held(server)), (server.process.pid, new)):
        limits = limit + SPARE_BYTES, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_AS, limits)  # children have their parent's


def check(response, expected) -> None:
    assert response.status_code == 200, response.text
    found = {hit["index"]: hit["relevance_score"] for hit in response.json()["results"]}
    logits = [found[index] for index in range(len(expected))]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def refused(response) -> None:
    assert response.status_code == 507, response.text
    message = response.json()["message"]
    assert message.startswith(
        "out of memory: documents[0] of 8192 tokens does not fit in the memory of cpu"
    )


def test_every_request_gets_correct_scores_or_a_clear_error(wide):
    with Reranker(wide, device="cpu", threads=2) as reranker:
        expected = {
            seed: reranker.score([["rain", text] for text in documents(seed)])
            for seed in range(CLIENTS)
        }

    impossible = {"query": "rain", "documents": ["rain " * 9000]}

    async def burst(client, *more):
        bodies = [*map(asked, range(CLIENTS)), *more]
        answers = await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))
        for seed in range(CLIENTS):
            check(answers[seed], expected[seed])
        return answers

    async def main(server):
        async with asyncio.timeout(GUARD_S), client_of(server) as client:
            new = held(server)
            for answer in await burst(client):
                assert answer.headers["X-Echelon-Ladder"] == ""
            limit(server, new)
            answers = await burst(client)
            rungs = [rung for a in answers for rung in a.headers["X-Echelon-Ladder"].split(",")]
            assert {"drop_caches", "halve_budget"} <= set(rungs)
            text = (await client.get("/metrics")).text
            for rung in ("drop_caches", "halve_budget"):
                assert sample(text, f'echelon_ladder_steps_total{{rung="{rung}"}}') >= 1
            assert sample(text, 'echelon_token_budget_moves_total{reason="memory"}') >= 1
            assert sample(text, "echelon_token_budget") <= 5000
            assert sample(text, 'echelon_requests_total{outcome="failed"}') == 0

            for _ in range(2):
                refused((await burst(client, impossible))[-1])
            await burst(client)
            text = (await client.get("/metrics")).text
            assert sample(text, 'echelon_requests_total{outcome="failed"}') == 2
            assert sample(text, 'echelon_ladder_steps_total{rung="give_up"}') == 2
            renewed = sample(text, 'echelon_worker_changes_total{state="renewed"}')
            assert renewed == sample(text, 'echelon_ladder_steps_total{rung="fresh_worker"}') >= 1
            for state in ("died", "wedged", "failed"):
                assert sample(text, f'echelon_worker_changes_total{{state="{state}"}}') == 0

    flags = ("--device", "cpu", "--threads", 2, "--token-budget", 10_000, "--max-length", 8192)
    flags += ("--max-wait-s", 60)  # the memory refuses, not the queue
    with LiveModel(wide, *flags) as server:
        asyncio.run(main(server))
        assert server.end(signal.SIGTERM) == 0
