"""Every attack of hostile.py on a server with little memory: does it live, does it stay quick?

    python benchmarks/attacks.py

The server is `echelon serve demo`, in turn without and with API keys, in 3 GB of address space
(RLIMIT_AS, as `ulimit -v` sets it), and each body is sent as it is and ten times as large. One
process asks for /health all the time, and one for the score of one document; their longest answers
stand beside the longest step until then. Then come 1,000 connections of each kind that only stay,
and trailers without end.

Writes benchmarks/results/attacks.json and attacks.md; the exit code is 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from echelon import __version__
from echelon.tuning.machine import describe_machine
from hostile import STAYING, endless_trailers, exchange, payloads, port_of, post, status_of, stay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.sharedctypes import Synchronized

RESULTS = Path(__file__).parent / "results"
MEMORY_BYTES = 3 * 10**9
GROWTH_MB, HEALTH_MS, STEPS = 300.0, 250.0, 3
"""The bounds: growth of the server's memory, the longest /health, and another client's request."""

KEY = "attack-key"
SMALL = json.dumps({"query": "rain", "documents": ["It rains at the window."]})
STAY_S = 14.0
"""Longer than the limits of the server's connections, which are 10 s here."""

CONNECTIONS = 1000


class Server:
    """`echelon serve demo` with little memory."""

    def __init__(self, *, keys: bool, home: Path) -> None:
        command = [sys.executable, "-m", "echelon", "serve", "demo", "--port", "0"]
        command += ["--device", "cpu", "--threads", "1", "--max-connections", "1500"]
        command += ["--score-cache", "0"]  # the small request always comes again
        command += ["--body-timeout-s", "10", "--send-timeout-s", "10"]
        self.log = (home / f"server-{keys}.log").open("w+", encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if keys:
            environment["ECHELON_API_KEYS"] = KEY
        self.headers = f"Authorization: Bearer {KEY}\r\n" if keys else ""
        self.process = subprocess.Popen(
            command,
            stderr=self.log,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES,) * 2),  # noqa: PLW1509 - no threads yet
        )
        self.port = port_of(self.process, self.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def resident_mb(self) -> float:
        """Memory of the server's process, its workers' not included."""
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def longest_step_ms(self) -> float:
        """The upper bound of the class of the longest step until now."""
        connected = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connected.request("GET", "/metrics")
        lines = connected.getresponse().read().decode().splitlines()
        steps = [line for line in lines if line.startswith("echelon_step_seconds_bucket")]
        counts = [(line.split('"')[1], float(line.rpartition(" ")[2])) for line in steps]
        total = counts[-1][1]
        return next(float(bound) for bound, count in counts if count == total) * 1000


def _probe(port: int, request: tuple[str, str, str, dict[str, str]], longest: Synchronized[float],
           failures: Synchronized[int], ending: Any) -> None:  # fmt: skip
    """Ask again and again, on a new connection each time; note the longest answer in ms."""
    method, path, body, headers = request
    while not ending.is_set():
        began = time.perf_counter()
        try:
            connected = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connected.request(method, path, body or None, headers)
            answer = connected.getresponse()
            answer.read()
            failures.value += answer.status not in {200, 429}
            connected.close()
        except (OSError, http.client.HTTPException):
            failures.value += 1
        longest.value = max(longest.value, (time.perf_counter() - began) * 1000)
        time.sleep(0.01)


class Probes:
    """Two other clients, each a process of its own, and a thread that watches the memory."""

    def __init__(self, server: Server, *, headers: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._ending, self._server = context.Event(), server
        self.health, self.small = context.Value("d", 0.0), context.Value("d", 0.0)
        self.failures = context.Value("i", 0)
        self.peak_mb = 0.0
        asked = {"Content-Type": "application/json", **headers}
        requests = {("GET", "/health", ""): self.health, ("POST", "/v1/rerank", SMALL): self.small}
        self._processes = [
            context.Process(
                target=_probe,
                args=(server.port, (*request, asked), longest, self.failures, self._ending),
            )
            for request, longest in requests.items()
        ]
        for process in self._processes:
            process.start()
        self._watching = threading.Thread(target=self._watch)
        self._watching.start()
        time.sleep(3)  # they have started
        self.reset()

    def reset(self) -> None:
        """Forget what was seen until now."""
        self.health.value = self.small.value = 0.0
        self.failures.value, self.peak_mb = 0, 0.0

    def end(self) -> None:
        """Stop asking."""
        self._ending.set()
        for process in self._processes:
            process.join()
        self._watching.join()

    def _watch(self) -> None:
        while not self._ending.wait(0.02):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.peak_mb = max(self.peak_mb, self._server.resident_mb())


def attacks(server: Server, connections: int) -> Iterator[tuple[str, Any]]:
    """Names of the attacks, each with what runs it."""
    for scale in (1, 10):
        for payload in payloads(scale):
            request = post(payload.path, payload.body, server.headers)
            yield f"{payload.name} ×{scale}", exchange(server.port, request)
    for kind in STAYING:
        yield f"{connections} connections: {kind}", stay(server.port, kind, connections, STAY_S)
    yield "trailers", endless_trailers(server.port, 300)


def measured(server: Server, *, keys: bool, connections: int) -> list[dict[str, Any]]:
    """Run every attack once, one after another."""
    headers = {"Authorization": f"Bearer {KEY}"} if keys else {}
    rows, probes = [], Probes(server, headers=headers)
    idle_mb = server.resident_mb()
    for name, attack in attacks(server, connections):
        probes.reset()
        began = time.perf_counter()
        found = asyncio.run(attack)
        seconds = time.perf_counter() - began
        time.sleep(0.3)
        row = {
            "attack": name,
            "keys": keys,
            "outcome": status_of(found) if isinstance(found, bytes) else found,
            "seconds": round(seconds, 2),
            "growth_mb": round(probes.peak_mb - idle_mb, 1),
            "health_ms": round(probes.health.value, 1),
            "small_ms": round(probes.small.value, 1),
            "failures": probes.failures.value,
            "alive": server.process.poll() is None,
        }
        row["longest_step_ms"] = server.longest_step_ms() if row["alive"] else None
        rows.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if not row["alive"]:
            break
    probes.end()
    return rows


def problems_of(row: dict[str, Any]) -> list[str]:
    """Bounds that a row breaks."""
    if not row["alive"]:
        return ["the server died"]
    found = []
    if row["growth_mb"] > GROWTH_MB:
        found.append(f"memory grew by {row['growth_mb']} MB")
    if row["health_ms"] > HEALTH_MS:
        found.append(f"/health took {row['health_ms']} ms")
    if row["small_ms"] > STEPS * row["longest_step_ms"] + HEALTH_MS:
        found.append(f"a small request took {row['small_ms']} ms")
    if row["failures"]:
        found.append(f"{row['failures']} requests of others failed")
    return found


def page(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The table for readers."""
    names = ("attack", "keys", "outcome", "growth_mb", "health_ms", "small_ms", "longest_step_ms")
    about = (
        f"`python benchmarks/attacks.py` on {machine.get('cpu', machine)}: growth of the server's "
        "memory, the longest /health, another client's longest request for one document, and the "
        "longest step until then (upper bound of its class). Connections: accepted, and closed "
        "by the server at the end."
    )
    lines = [
        "# Attacks on the server",
        "",
        about,
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all, write the results, and fail where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    needed = options.connections + 200
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (needed, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        for keys in (False, True):
            with Server(keys=keys, home=Path(home)) as server:
                rows += measured(server, keys=keys, connections=options.connections)
    problems = [f"{row['attack']}: {found}" for row in rows for found in problems_of(row)]
    machine = describe_machine()
    command = f"python benchmarks/attacks.py --connections {options.connections}"
    result = {"command": command, "machine": machine, "version": __version__}
    result |= {"problems": problems, "rows": rows}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (options.output / "attacks.json").write_text(text + "\n", "utf-8")
    (options.output / "attacks.md").write_text(page(rows, machine), "utf-8")
    print("\n".join(problems) or "All bounds hold.")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
