"""The asyncio batcher that tutorials show, over sentence-transformers: what Echelon replaces.

A queue, batches of at most 16 pairs, and 0.1 s of waiting for more. One request's documents go into
the queue one by one. Started by benchmarks/serving.py:

    python benchmarks/tutorial_server.py MODEL PORT bf16 [DEVICE]
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from sentence_transformers import CrossEncoder
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

MAX_BATCH = 16
TIMEOUT_S = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Waiting = tuple[tuple[str, str], "asyncio.Future[float]"]


class Batcher:
    """Collects pairs until a batch is full or the time is over."""

    def __init__(self, model: CrossEncoder) -> None:
        self._model = model
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def score(self, pair: tuple[str, str]) -> float:
        """The score of one pair."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        await self._queue.put((pair, future))
        return await future

    async def work(self) -> None:
        """Batch after batch."""
        while True:
            batch = [await self._queue.get()]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT_S):
                    while len(batch) < MAX_BATCH:
                        batch.append(await self._queue.get())
            pairs = [pair for pair, _ in batch]
            scores = await asyncio.to_thread(self._model.predict, pairs, batch_size=MAX_BATCH)
            for (_, future), score in zip(batch, scores, strict=True):
                if not future.done():
                    future.set_result(float(score))


def make_app(model: CrossEncoder) -> Starlette:
    """Cohere's shape, so that the same clients can ask."""
    batcher = Batcher(model)

    @contextlib.asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        working = asyncio.create_task(batcher.work())
        yield
        working.cancel()

    async def rerank(request: Request) -> JSONResponse:
        body: dict[str, Any] = await request.json()
        pairs = [(body["query"], document) for document in body["documents"]]
        scores = await asyncio.gather(*(batcher.score(pair) for pair in pairs))
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        results = [{"index": i, "relevance_score": scores[i]} for i in order]
        return JSONResponse({"results": results})

    async def health(_: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/v2/rerank", rerank, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, lifespan=life)


def main() -> None:
    """Serve."""
    folder, port, precision, *device = sys.argv[1:]
    where, dtype = (device or ["cpu"])[0], DTYPES[precision]
    model = CrossEncoder(folder, device=where, max_length=512, model_kwargs={"dtype": dtype})
    uvicorn.run(make_app(model), port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
