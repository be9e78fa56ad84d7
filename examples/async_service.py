"""Rank several queries at once from asyncio: the event loop never waits for the model."""

import asyncio

from echelon import AsyncReranker

DOCUMENTS = [
    "Water boils at a lower temperature high up in the mountains.",
    "A kettle with scale inside takes longer; vinegar removes it.",
    "Mountain huts open in June and close in October.",
]
QUERIES = ["why does my kettle take so long?", "when do mountain huts open?"]


async def main() -> None:
    """Ask all questions at the same time."""
    async with AsyncReranker("demo") as reranker:
        rankings = await asyncio.gather(*(reranker.rank(q, DOCUMENTS, 1) for q in QUERIES))
    for ranking in rankings:
        print(f"{ranking.query}\n  {ranking.results[0].document}")


if __name__ == "__main__":
    asyncio.run(main())
