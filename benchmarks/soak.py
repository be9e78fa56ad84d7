"""Hours of good, bad, slow and vanishing clients with killed workers: what has grown at the end?

    make soak                 # 30 minutes
    SOAK_MIN=120 make soak

The server is `echelon serve demo` with two workers. Good clients compare every answer with the
scores that the library gives. They have a key of their own: the documents that the server counted
for it must be those that they got answers for, so that every request was answered once. The score
cache has room for a quarter of their texts, so that scores come, are used and go all the time.
Memory, descriptors, threads and temporary files are sampled after the first sixth, since caches
fill at first, and compared with the last sixth.

Writes benchmarks/results/soak.json; the exit code is 1 where something grew or was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from echelon import Reranker, __version__
from echelon.server.protocols import PROTOCOLS
from echelon.tuning.machine import describe_machine
from hostile import (
    OK,
    STAYING,
    TRUE_5XX,
    connection,
    exchange,
    fuzzed,
    is_failure,
    port_of,
    post,
    status_of,
)

RESULTS = Path(__file__).parent / "results" / "soak.json"
SAMPLE_S = 5.0
KILL_S = 45.0
"""Seconds between two kills of a worker."""
KEYS = {"good": "key-of-the-good", "others": "key-of-the-others"}
OTHERS = f"Authorization: Bearer {KEYS['others']}\r\n"
GOOD_CLIENTS, BAD_CLIENTS, SLOW_CLIENTS, VANISHING_CLIENTS = 6, 4, 8, 4
TOLERANCE = 1e-3
"""Two batches of the same pair may differ in the last bits."""

CACHE = "50kB"
"""Room for 97 scores."""
CACHE_METRICS = ("hits_total", "misses_total", "entries", "bytes", "max_bytes")

GROWTH = {"rss_mb": 32.0, "files": 16.0, "threads": 4.0, "temporary": 0.0}
"""How much each may be larger at the end: noise of the allocator, and clients of the moment."""

WORDS = ("rain", "window", "kitchen", "bananas", "router", "button", "yellow", "falls", "stone")


class Soak:
    """One run.

    Attributes:
        counts: what clients met, by its name.
        documents: documents of the good clients' answers.
        samples: the server over time.
    """

    def __init__(self, model: str, port: int, process: psutil.Process, temporary: Path) -> None:
        self.port, self.process, self.temporary = port, process, temporary
        self.counts: Counter[str] = Counter()
        self.documents = 0
        self._ended = False
        self.wrong: list[str] = []
        self.samples: list[dict[str, float]] = []
        self.examples = [(d.own_paths[0], dict(d.example)) for d in PROTOCOLS]
        chance = random.Random(1)
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 60))) for _ in range(400)]
        with Reranker(model, device="cpu", precision="fp32", threads=1) as reranker:
            scores = reranker.score([("rain at the window", text) for text in texts])
        self.known = dict(zip(texts, map(float, scores), strict=True))

    async def run(self, seconds: float) -> None:
        """Let all clients work for some seconds."""
        jobs = [self._good(i) for i in range(GOOD_CLIENTS)]
        jobs += [self._bad(i) for i in range(BAD_CLIENTS)]
        jobs += [self._slow(i) for i in range(SLOW_CLIENTS)]
        jobs += [self._vanishing(i) for i in range(VANISHING_CLIENTS)]
        tasks = [asyncio.create_task(job) for job in (*jobs, self._kills(), self._sampling())]
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        self._ended = True
        await asyncio.gather(*tasks[:GOOD_CLIENTS])  # no request is left half counted
        for task in tasks[GOOD_CLIENTS:]:
            if task.done():
                task.result()
            task.cancel()

    async def _good(self, number: int) -> None:
        chance = random.Random(number)
        headers = {"Authorization": f"Bearer {KEYS['good']}"}
        url = f"http://127.0.0.1:{self.port}"
        async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers) as http:
            while not self._ended:
                texts = chance.sample(list(self.known), chance.randint(1, 40))
                body = {"query": "rain at the window", "documents": texts, "raw_scores": True}
                await self._ask(http, body, texts)
                await asyncio.sleep(chance.random() * 0.02)

    async def _ask(self, http: httpx.AsyncClient, body: dict[str, Any], texts: list[str]) -> None:
        answer = await http.post("/v1/rerank", json=body)
        self.counts[f"good {answer.status_code}"] += 1
        if answer.status_code != OK:
            if answer.status_code not in {429, *TRUE_5XX}:
                self.wrong.append(f"{answer.status_code}: {answer.text[:200]}")
            return
        self.documents += len(texts)
        results = answer.json()["results"]
        found = {one["index"]: one["relevance_score"] for one in results}
        if sorted(found) != list(range(len(texts))) or len(results) != len(texts):
            self.wrong.append(f"{len(results)} results for {len(texts)} documents")
        elif any(abs(found[i] - self.known[text]) > TOLERANCE for i, text in enumerate(texts)):
            self.wrong.append("a score differs")

    async def _bad(self, number: int) -> None:
        chance = random.Random(1000 + number)
        while True:
            status = status_of(
                await exchange(self.port, fuzzed(self.examples, chance, OTHERS), 10.0)
            )
            self.counts[f"bad {status}"] += 1
            if is_failure(status):
                self.wrong.append(f"a bad request got {status}")

    async def _slow(self, number: int) -> None:
        chance = random.Random(2000 + number)
        while True:
            kind = chance.choice(list(STAYING))
            with contextlib.suppress(OSError):
                async with connection(self.port) as connected:
                    await STAYING[kind](connected)
                    await asyncio.sleep(chance.uniform(0.1, 15.0))
            self.counts[f"slow: {kind}"] += 1

    async def _vanishing(self, number: int) -> None:
        chance = random.Random(3000 + number)
        while True:
            texts = chance.sample(list(self.known), 30)
            body = json.dumps({"query": "q", "documents": texts}).encode()
            request = post("/v1/rerank", body, OTHERS)
            with contextlib.suppress(OSError):
                async with connection(self.port) as (_, writer):
                    writer.write(request[: chance.choice((20, len(request) // 2, len(request)))])
                    await asyncio.sleep(chance.random() * 0.3)
            self.counts["vanished"] += 1

    async def _kills(self) -> None:
        chance = random.Random(4000)
        while True:
            await asyncio.sleep(KILL_S)
            workers = self.process.children()
            if workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    chance.choice(workers).kill()
                    self.counts["workers killed"] += 1

    async def _sampling(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.samples.append(self._sample())

    def _sample(self) -> dict[str, float]:
        own = self.process
        return {
            "at_s": time.monotonic(),
            "rss_mb": own.memory_info().rss / 2**20,
            "files": own.num_fds(),
            "threads": own.num_threads(),
            "temporary": sum(1 for _ in self.temporary.rglob("*")),
        }

    def growth(self) -> dict[str, float]:
        """By how much each measure is larger in the last sixth than in the second one."""
        part = max(1, len(self.samples) // 6)
        early, late = self.samples[part : 2 * part], self.samples[-part:]
        return {
            name: statistics.median(one[name] for one in late)
            - statistics.median(one[name] for one in early)
            for name in GROWTH
        }


def started(model: str, temporary: Path) -> tuple[subprocess.Popen[str], int]:
    """`echelon serve` and its port."""
    command = [sys.executable, "-m", "echelon", "serve", model, "--port", "0"]
    command += ["--device", "cpu", "--precision", "fp32", "--threads", "1", "--workers", "2"]
    command += ["--score-cache", CACHE]
    command += ["--header-timeout-s", "5", "--body-timeout-s", "5", "--send-timeout-s", "5"]
    log = (temporary.parent / "server.log").open("w+", encoding="utf-8")
    keys = temporary.parent / "keys"
    keys.write_text("".join(f"{key} name={name}\n" for name, key in KEYS.items()), "utf-8")
    keys.chmod(0o600)
    command += ["--api-keys", str(keys)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen(command, stderr=log, text=True, env=environment)
    return process, port_of(process, log)


def metrics_of(port: int) -> dict[str, float]:
    """The server's own counts of requests."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("echelon_")]
    return {name: float(value) for name, _, value in lines}


def main() -> None:
    """Run, write the result, and fail where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MIN", "30")))
    parser.add_argument("--model", default="demo", help="a small model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        temporary = Path(home, "tmp")
        temporary.mkdir()
        process, port = started(options.model, temporary)
        soak = Soak(options.model, port, psutil.Process(process.pid), temporary)
        began = time.monotonic()
        asyncio.run(soak.run(options.minutes * 60))
        seconds = time.monotonic() - began
        time.sleep(2)  # the server has noticed that the clients are gone
        counted = metrics_of(port)
        process.terminate()
        code = process.wait(90)
        left = sum(1 for _ in temporary.rglob("*"))
    inside = counted["echelon_requests_inside"]
    counted_documents = counted['echelon_key_documents_total{key="good"}']
    result = {
        "command": f"python benchmarks/soak.py --minutes {options.minutes:g}",
        "machine": describe_machine(),
        "version": __version__,
        "minutes": round(seconds / 60, 1),
        "counts": dict(sorted(soak.counts.items())),
        "documents_of_the_good": soak.documents,
        "documents_counted_by_the_server": counted_documents,
        "still_inside": inside,
        "score_cache": {name: counted[f"echelon_score_cache_{name}"] for name in CACHE_METRICS},
        "wrong": soak.wrong[:20],
        "growth": {name: round(value, 1) for name, value in soak.growth().items()},
        "allowed_growth": GROWTH,
        "first_sample": soak.samples[0],
        "last_sample": soak.samples[-1],
        "exit_code": code,
        "temporary_files_left": left,
    }
    problems = [f"{n} grew by {v}" for n, v in result["growth"].items() if v > GROWTH[n]]
    if counted_documents != soak.documents:
        problems.append("the server counted other documents than came back")
    cache = result["score_cache"]
    if not cache["hits_total"] or cache["bytes"] > cache["max_bytes"]:
        problems.append("the score cache was not used, or is too large")
    problems += [*soak.wrong[:5], *(["requests are still inside"] if inside else [])]
    problems += ["the server ended with an error"] if code else []
    result["problems"] = problems
    options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(result, indent=2, ensure_ascii=False))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
