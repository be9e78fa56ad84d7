"""Compare this checkout with another one, call by call in turn: engine, and a request over HTTP.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py --before /tmp/before

Both checkouts run in the same environment, each in a process of its own that holds the model. Every
round asks one, then the other; the order changes from round to round. What is compared is the
median of the time over the rounds, and the ratio of each round's two times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from echelon.models.device import cpu_name, usable_cpus
from workloads import DOCUMENTS, QUERY, tutorial

HERE = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "bf16", "int8")
OK = 200
REQUESTS = 20
"""Requests over HTTP that one round sends to each server, one after another."""

ENGINE = """
import json, sys, time
from echelon import Reranker
model, precision, pairs = json.loads(sys.argv[1])
with Reranker(model, precision=precision) as reranker:
    pairs = [tuple(pair) for pair in pairs]
    reranker.score(pairs)
    print(json.dumps([float(x) for x in reranker.score(pairs)]), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        reranker.score(pairs)
        print(time.perf_counter() - began, flush=True)
"""


class EngineProcess:
    """A process of one checkout that scores the pairs when it is asked."""

    def __init__(self, checkout: Path, model: str, precision: str) -> None:
        # A call scores identical pairs once: a number at the end makes each pair different.
        pairs = [(query, f"{text} {number}") for number, (query, text) in enumerate(tutorial())]
        argument = json.dumps([model, precision, pairs])
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, argument],
            env=environment(checkout),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.logits = json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def seconds(self) -> float:
        """Seconds of one call of all pairs."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


class ServerProcess:
    """``echelon serve`` of one checkout."""

    def __init__(self, checkout: Path, model: str, port: int) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "echelon", "serve", model),
                *("--port", str(port), "--precision", "fp32", "--log-level", "warning"),
            ],
            env=environment(checkout),
        )
        self._port = port
        self._wait()
        self._connection = HTTPConnection("127.0.0.1", port, timeout=60)
        self._body = json.dumps({"query": QUERY, "documents": [DOCUMENTS[0]]}).encode()
        for _ in range(REQUESTS):
            self.seconds()

    def _wait(self) -> None:
        for _ in range(600):
            try:
                connection = HTTPConnection("127.0.0.1", self._port, timeout=15)
                connection.request("GET", "/ready")
                if connection.getresponse().status == OK:
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit("The server is not ready.")

    def seconds(self) -> float:
        """Seconds of one request with one document; the headers say what of it was compute."""
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/rerank", self._body, headers)
        response = self._connection.getresponse()
        response.read()
        took = time.perf_counter() - began
        if response.status != OK:
            raise SystemExit(f"The server answered {response.status}.")
        return took - float(response.headers["X-Echelon-Compute-Ms"]) / 1000

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(60)


def environment(checkout: Path) -> dict[str, str]:
    """The environment in which Python imports a checkout's package, and a server scores always."""
    own = {"PYTHONPATH": str(checkout / "src"), "ECHELON_SERVE_SCORE_CACHE": "0"}
    return {**os.environ, **own}


def compare(sides: list[Any], rounds: int, calls: int) -> dict[str, Any]:
    """Ask both sides in turn.

    Args:
        sides: before and after.
        rounds: rounds; each asks both.
        calls: calls of each side in a round, whose median counts.

    Returns:
        Median, fastest and slowest seconds of each side, and the same of after over before.
    """
    times: list[list[float]] = [[], []]
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            times[index].append(statistics.median(sides[index].seconds() for _ in range(calls)))
    ratios = [after / before for before, after in zip(*times, strict=True)]
    return {
        "before_s": spread(times[0]),
        "after_s": spread(times[1]),
        "after_over_before": spread(ratios),
        "rounds": rounds,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def engines(before: Path, model: str, precision: str, rounds: int) -> dict[str, Any]:
    """Compare the engines in one precision on 100 short pairs."""
    sides = [EngineProcess(checkout, model, precision) for checkout in (before, HERE)]
    try:
        found = compare(sides, rounds, 1)
        old, new = (side.logits for side in sides)
        found["largest_logit_difference"] = max(abs(a - b) for a, b in zip(old, new, strict=True))
    finally:
        for side in sides:
            side.close()
    return found


def servers(before: Path, model: str, rounds: int) -> dict[str, Any]:
    """Compare what a request of one document costs besides its compute."""
    sides = [
        ServerProcess(checkout, model, port) for checkout, port in ((before, 18471), (HERE, 18472))
    ]
    try:
        return compare(sides, rounds, REQUESTS)
    finally:
        for side in sides:
            side.close()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "benchmarks/results/before_after.json")
    asked = parser.parse_args()

    def commit(checkout: Path) -> str:
        command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    result: dict[str, Any] = {
        "command": f"python benchmarks/before_after.py --before CHECKOUT --rounds {asked.rounds}",
        "machine": {"cpu": cpu_name(), "cpus": usable_cpus(), "system": platform.system()},
        "model": asked.model,
        "before": commit(asked.before),
        "after": commit(HERE),
        "engine": {},
    }
    for precision in PRECISIONS:
        found = engines(asked.before, asked.model, precision, asked.rounds)
        result["engine"][precision] = found
        print(precision, json.dumps(found["after_over_before"]))
    result["request_overhead"] = servers(asked.before, asked.model, asked.rounds)
    print("request overhead", json.dumps(result["request_overhead"]))
    asked.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
