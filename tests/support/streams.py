"""Steady traffic for a server; every answer is checked to the last bit."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import httpx
from services import GUARD_S, scores, texts

PATH = "/cohere/v1/rerank"


def asked(seed: int, count: int = 8, **more) -> dict:
    """A request body whose documents depend on its seed."""
    pairs = texts(seed, count)
    return {"query": pairs[0][0], "documents": [text for _, text in pairs], "raw_scores": True} | (
        more
    )


def client_of(server) -> httpx.AsyncClient:
    """A client that loads no certificates, which takes longer than a request."""
    return httpx.AsyncClient(base_url=server.url, timeout=GUARD_S, verify=False)


def check(response, seed: int, count: int = 8) -> None:
    """Check that the answer holds the score of each document."""
    assert response.status_code == 200, response.text
    found = {hit["index"]: hit["relevance_score"] for hit in response.json()["results"]}
    assert [found[index] for index in range(count)] == [
        float(s) for s in scores(texts(seed, count))
    ]


class Stream:
    """Clients that send one request after another, without a pause.

    Attributes:
        answered: right answers so far.
        ids: ids of their requests.
        ending: whether a refused or closed connection ends its client; else it is a failure.
    """

    def __init__(self, server, clients: int = 6):
        self.answered = 0
        self.ids: set[str] = set()
        self.ending = False
        self._server = server
        self._seeds = itertools.count(1)
        self._news = asyncio.Event()
        self._stop = False
        self._clients = [asyncio.create_task(self._ask()) for _ in range(clients)]

    async def more(self, count: int) -> None:
        """Wait for ``count`` more right answers; raise if an answer is wrong or missing."""
        goal = self.answered + count
        while self.answered < goal:
            self._news.clear()
            news = asyncio.create_task(self._news.wait())
            done, _ = await asyncio.wait(
                {news, *self._clients}, return_when=asyncio.FIRST_COMPLETED
            )
            news.cancel()
            for ended in done - {news}:
                ended.result()

    async def finish(self) -> None:
        """Wait for the last answer of each client."""
        self._stop = True
        await asyncio.gather(*self._clients)

    async def end(self) -> None:
        """Wait until the server has ended for every client."""
        self.ending = True
        await asyncio.gather(*self._clients)

    async def _ask(self) -> None:
        async with client_of(self._server) as client:
            while not self._stop:
                seed = next(self._seeds)
                number = f"request-{seed}"
                try:
                    response = await client.post(
                        PATH, json=asked(seed), headers={"X-Request-Id": number}
                    )
                except httpx.TransportError:
                    if self.ending:
                        return
                    raise
                check(response, seed)
                self.answered += 1
                self.ids.add(number)
                self._news.set()


@asynccontextmanager
async def streaming(server, clients: int = 6):
    """Send requests before, during and after the block."""
    async with asyncio.timeout(GUARD_S):
        stream = Stream(server, clients)
        await stream.more(2 * clients)
        yield stream
        await stream.more(2 * clients)
        await stream.finish()


async def readiness(server, status: int) -> None:
    """Wait until ``/ready`` answers with the status."""
    async with client_of(server) as client:
        while (await client.get("/ready")).status_code != status:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.02)


async def counted(server, name: str, minimum: float) -> None:
    """Wait until a metric has reached a value."""
    while server.metric(name) < minimum:  # noqa: ASYNC110 - another process counts
        await asyncio.sleep(0.02)
