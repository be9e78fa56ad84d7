"""The servers of benchmarks/serving.py: how each is started, found ready, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from echelon.loadtest.client import Target, protocol_of, route_of

if TYPE_CHECKING:
    from types import TracebackType

HERE = Path(__file__).parent
START_S = 300.0
PATIENCE_S = 60.0
"""Seconds after which no client waits any more."""

ENVIRONMENT = Path("~/.cache/echelon-bench/infinity").expanduser()
"""Where infinity's server is installed: its pins ask for an environment of its own.

    python -m venv ~/.cache/echelon-bench/infinity
    ~/.cache/echelon-bench/infinity/bin/pip install torch==2.13.0 "infinity-emb[torch,server]" \
        "optimum<2" "transformers<4.49" "click<8.2"
"""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(slots=True)
class Server:
    """A server in a process of its own.

    Attributes:
        name: what the results call it.
        command: starts it; PORT stands for its port.
        dialect: what it is asked in.
        start_s: seconds that it may take to start.
    """

    name: str
    command: list[str]
    dialect: str = "cohere"
    start_s: float = START_S
    port: int = field(default=0, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def target(self, **settings: float) -> Target:
        """What the load generator is pointed at."""
        protocol = protocol_of(self.dialect)
        return Target(route_of(self.url, protocol), protocol, timeout_s=PATIENCE_S, **settings)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE_S) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def __enter__(self) -> Self:
        self.port = _free_port()
        log = tempfile.NamedTemporaryFile(
            prefix=f"{self.name.replace(' ', '-')}-", suffix=".log", delete=False
        )
        command = [part.replace("PORT", str(self.port)) for part in self.command]
        print(f"starting {self.name}; its log is {log.name}", flush=True)
        environment = {**os.environ, "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            self._wait_until_ready(log.name)
        except BaseException:
            self._end()  # or it would keep its port and its card
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _wait_until_ready(self, log: str) -> None:
        ends = time.monotonic() + self.start_s
        while time.monotonic() < ends:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended at once; see {log}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not start in {self.start_s:.0f} s; see {log}")


def echelon(model: str, precision: str) -> Server:
    """Ours."""
    command = [sys.executable, "-m", "echelon", "serve", model, "--port", "PORT"]
    command += ["--score-cache", "0"]  # others have none
    return Server(
        "echelon", [*command, "--precision", precision, "--device", "cpu", "--log-level", "warning"]
    )


def tutorial(model: str, precision: str) -> Server:
    """The tutorial's batcher."""
    script = str(HERE / "tutorial_server.py")
    return Server("tutorial batcher", [sys.executable, script, model, "PORT", precision])


def infinity(model: str, precision: str) -> Server:
    """Infinity's server at the flags that were fastest beside the other peers."""
    command = [str(ENVIRONMENT / "bin" / "infinity_emb"), "v2", "--model-id", model]
    more = ["--engine", "torch", "--device", "cpu", "--dtype", DTYPES[precision]]
    more += ["--bettertransformer", "--batch-size", "32", "--port", "PORT", "--host", "127.0.0.1"]
    return Server("infinity", [*command, *more], "infinity")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
