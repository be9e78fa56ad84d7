"""Minutes of requests that are nearly right: does any get a 5xx that is not true?

    python benchmarks/fuzz.py               # 10 minutes
    python benchmarks/fuzz.py --minutes 1 --seed 7

Bodies and raw HTTP are changed at random (hostile.py), the same for the same seed. One request in a
hundred is good and must get its scores. Writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from attacks import Server
from echelon import __version__
from echelon.server.protocols import PROTOCOLS
from echelon.tuning.machine import describe_machine
from hostile import OK, exchange, fuzzed, is_failure, often, post, status_of

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CLIENTS = 8
GOOD = json.dumps({"query": "q", "documents": ["x", "y"]}).encode()


async def fuzz(port: int, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Statuses that were met, and requests that met a wrong one."""
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    examples = [(d.own_paths[0], dict(d.example)) for d in PROTOCOLS]
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            if often(chance, 1):
                status = status_of(await exchange(port, post("/v1/rerank", GOOD)))
                if status != OK:
                    wrong.append(f"a good request got {status}")
                continue
            request = fuzzed(examples, chance)
            status = status_of(await exchange(port, request, 8.0))
            statuses[str(status) if status else "none"] += 1
            if is_failure(status):
                wrong.append(f"{status}: {request[:500]!r}")

    await asyncio.gather(*map(client, range(CLIENTS)))
    return statuses, wrong


def main() -> None:
    """Run, write the result, and fail where a status was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, Server(keys=False, home=Path(home)) as server:
        before = server.resident_mb()
        statuses, wrong = asyncio.run(fuzz(server.port, options.minutes * 60, options.seed))
        alive, after = server.process.poll() is None, {}
        if alive:
            files = psutil.Process(server.process.pid).num_fds()
            after = {"rss_mb": round(server.resident_mb(), 1), "files": files}
    result = {
        "command": f"python benchmarks/fuzz.py --minutes {options.minutes:g} --seed {options.seed}",
        "machine": describe_machine(),
        "version": __version__,
        "minutes": options.minutes,
        "seed": options.seed,
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong[:20],
        "rss_mb_before": round(before, 1),
        "after": after,
        "alive": alive,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    options.output.write_text(text + "\n", "utf-8")
    print(text)
    sys.exit(bool(wrong) or not alive)


if __name__ == "__main__":
    main()
