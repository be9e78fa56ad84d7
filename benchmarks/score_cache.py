"""Traffic that repeats itself through `echelon serve`, without and with the score cache.

    python benchmarks/score_cache.py
    python benchmarks/score_cache.py --queries 200 --requests 500 --sizes 0 64MB

Each request is one of 1,000 queries, drawn by Zipf's law (the query of rank r with a weight of
1 / r), with its own 50 documents: most queries of a search come from few. Several callers send one
and the same trace, each its next request when it has its answer, to a new server of each size.
Every logit must be that of the server without a cache, but for rounding.

Writes benchmarks/results/score_cache.json and score_cache.md; the exit code is 1 where scores
differ or memory exceeds its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self, TextIO

import httpx
import numpy as np
import psutil

from echelon import __version__
from echelon.data import load_texts
from echelon.tuning.machine import describe_machine
from hostile import port_of

RESULTS = Path(__file__).parent / "results"
SIZES = ("0", "8MB", "64MB")
"""Without a cache, with room for a third of the pairs, and for all."""

ROUNDING = 1e-3
"""A logit may differ by this much with the pairs of its step."""

WARM_REQUESTS = 20
NUMBERS = ("queries", "documents", "words", "requests", "exponent", "callers", "seed")
"""Options that make the trace."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests: each the number of its query."""

    queries: list[str]
    documents: list[list[str]]  # of each query
    numbers: list[int]

    @classmethod
    def of(cls, own: argparse.Namespace) -> Trace:
        """A trace of built-in texts, cut to words; a mark makes each query and document unique."""
        topics = load_texts(language="en").topics
        asked = cycle(topic.query for topic in topics)
        texts = (text for topic in topics for text in topic.documents)
        read = cycle(" ".join(text.split()[: own.words]) for text in texts)
        weights = 1.0 / np.arange(1, own.queries + 1) ** own.exponent
        generator = np.random.default_rng(own.seed)
        taken = [list(islice(read, own.documents)) for _ in range(own.queries)]
        return cls(
            [f"{query} {number}" for number, query in enumerate(islice(asked, own.queries))],
            [
                [f"{number}.{place} {text}" for place, text in enumerate(texts)]
                for number, texts in enumerate(taken)
            ],
            generator.choice(own.queries, own.requests, p=weights / weights.sum()).tolist(),
        )


class Server:
    """`echelon serve demo` with a cache of a size."""

    def __init__(self, size: str, log: TextIO) -> None:
        command = [sys.executable, "-m", "echelon", "serve", "demo", "--port", "0"]
        command += ["--device", "cpu", "--max-wait-s", "600", "--log-format", "json"]
        self._process = subprocess.Popen([*command, "--score-cache", size], stderr=log)
        self.url = f"http://127.0.0.1:{port_of(self._process, log)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait()

    def resident_bytes(self) -> int:
        """Memory of the process that has the cache; its worker's is not in it."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def metrics(self) -> dict[str, float]:
        """Its metrics without labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = (line.split(" ") for line in lines if line.startswith("echelon_"))
        return {name: float(value) for name, value in pairs if "{" not in name}


@dataclass(slots=True)
class Replay:
    """One trace through one server."""

    trace: Trace
    url: str
    seconds: list[float] = field(default_factory=list)  # of each request
    # float32 [documents] of each query, every one that was seen
    logits: dict[int, set[bytes]] = field(default_factory=dict)

    async def warm_up(self) -> None:
        """Send a few requests of other texts."""
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            for number in range(WARM_REQUESTS):
                await self._ask(client, [f"warm {number} {place}" for place in range(10)], "warm")

    async def run(self, callers: int) -> float:
        """Send all requests; the seconds that they took together."""
        waiting = iter(self.trace.numbers)
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            began = time.perf_counter()
            await asyncio.gather(*(self._call(client, waiting) for _ in range(callers)))
            return time.perf_counter() - began

    async def _call(self, client: httpx.AsyncClient, waiting: Any) -> None:
        for number in waiting:
            began = time.perf_counter()
            found = await self._ask(
                client, self.trace.documents[number], self.trace.queries[number]
            )
            self.seconds.append(time.perf_counter() - began)
            self.logits.setdefault(number, set()).add(found.tobytes())

    async def _ask(self, client: httpx.AsyncClient, documents: list[str], query: str) -> Any:
        body = {"query": query, "documents": documents, "raw_scores": True}
        answer = await client.post("/infinity/rerank", json=body)
        answer.raise_for_status()
        logits = np.empty(len(documents), dtype=np.float32)
        for row in answer.json()["results"]:
            logits[row["index"]] = row["relevance_score"]
        return logits


def measured(size: str, trace: Trace, callers: int, home: Path) -> tuple[dict[str, Any], Replay]:
    """Replay the trace with a cache of a size."""
    with (
        (home / f"{size}.log").open("w+", encoding="utf-8") as log,
        Server(size, log) as server,
    ):
        replay = Replay(trace, server.url)
        asyncio.run(replay.warm_up())
        warm, before = server.metrics(), server.resident_bytes()
        took_s = asyncio.run(replay.run(callers))
        metrics, after = server.metrics(), server.resident_bytes()
    counts = [f"echelon_score_cache_{name}_total" for name in ("hits", "misses")]
    hits, misses = (metrics[name] - warm[name] for name in counts)
    documents = sum(len(trace.documents[number]) for number in trace.numbers)
    p50, p99 = np.percentile(replay.seconds, [50, 99])
    row = {
        "size": size,
        "seconds": round(took_s, 2),
        "documents_per_s": round(documents / took_s, 1),
        "p50_ms": round(p50 * 1000, 1),
        "p99_ms": round(p99 * 1000, 1),
        "hit_rate": round(hits / (hits + misses), 4) if hits + misses else 0.0,
        "entries": int(metrics["echelon_score_cache_entries"]),
        "cache_mb": round(metrics["echelon_score_cache_bytes"] / 1e6, 2),
        "max_mb": round(metrics["echelon_score_cache_max_bytes"] / 1e6, 2),
        "process_grew_mb": round((after - before) / 1e6, 1),
    }
    print(json.dumps(row), flush=True)
    return row, replay


def problems_of(rows: list[dict[str, Any]], replays: list[Replay]) -> list[str]:
    """What is not as it should be; the first row is that without a cache."""
    found, plain = [], replays[0]
    for row, replay in zip(rows, replays, strict=True):
        if row["cache_mb"] > row["max_mb"]:
            found.append(f"{row['size']}: {row['cache_mb']} MB are more than {row['max_mb']}")
        for number, seen in replay.logits.items():
            expected = np.frombuffer(next(iter(plain.logits[number])), dtype=np.float32)
            for logits in seen:
                apart = np.abs(np.frombuffer(logits, dtype=np.float32) - expected).max()
                if apart > ROUNDING:
                    found.append(f"{row['size']}: query {number} differs by {apart:.2g}")
    return found


def page(result: dict[str, Any]) -> str:
    """The table for readers."""
    columns = {
        "size": "`--score-cache`",
        "documents_per_s": "documents/s",
        "p50_ms": "P50 ms",
        "p99_ms": "P99 ms",
        "hit_rate": "hit rate",
        "entries": "scores",
        "cache_mb": "MB counted",
        "process_grew_mb": "process grew by MB",
    }
    about = (
        f"`{result['command']}` on {result['machine'].get('cpu', 'a processor')}, "
        f"{result['machine'].get('usable_cpus')} cores: the same {result['requests']:,} requests "
        f"for {result['queries']:,} queries with {result['documents']} documents of at most "
        f"{result['words']} words each, by Zipf's law, from {result['callers']} callers."
    )
    lines = [
        "# The score cache under repeated traffic",
        "",
        about,
        "",
        "| " + " | ".join(columns.values()) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[name]) for name in columns) + " |" for row in result["rows"]),
        "",
        "; ".join(result["problems"]) or "Every score is that without a cache, but for rounding.",
    ]
    return "\n".join(lines) + "\n"


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--words", type=int, default=30, help="words of a document")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main() -> None:
    """Replay the trace with each size, and write the results."""
    own = options_of()
    trace = Trace.of(own)
    with tempfile.TemporaryDirectory() as home:
        found = [measured(size, trace, own.callers, Path(home)) for size in own.sizes]
    rows, replays = [row for row, _ in found], [replay for _, replay in found]
    result = {
        "command": f"python benchmarks/score_cache.py {' '.join(sys.argv[1:])}".strip(),
        "version": __version__,
        "machine": describe_machine(),
        **{name: getattr(own, name) for name in NUMBERS},
        "distinct_pairs": len(set(trace.numbers)) * own.documents,
        "problems": problems_of(rows, replays),
        "rows": rows,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (own.output / "score_cache.json").write_text(text + "\n", "utf-8")
    (own.output / "score_cache.md").write_text(page(result), "utf-8")
    print("\n".join(result["problems"]) or "Scores and memory are as they should be.")
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
