"""Rank a few documents with the demo model, using the tuned profile where there is one."""

from pathlib import Path

from echelon import Reranker

QUERY = "How do I restart a frozen laptop?"
DOCUMENTS = [
    "Laptop sleeves come in three sizes and keep out dust and rain.",
    "To restart a frozen laptop, hold its power button for ten seconds, then press it again.",
    "Frozen berries keep for a year if the freezer stays below minus eighteen degrees.",
    "If one program stops answering, close it first: a restart loses unsaved work.",
]


def main() -> None:
    """Print the documents, best first."""
    profile = Path("echelon-profile.json")
    with Reranker("demo", profile=profile if profile.exists() else None) as reranker:
        ranking = reranker.rank(QUERY, DOCUMENTS)
    print(f"\n{QUERY}")
    for place, result in enumerate(ranking.results, 1):
        print(f"{place}. {result.score:.4f}  {result.document}")


if __name__ == "__main__":
    main()
