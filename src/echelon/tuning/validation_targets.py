"""What a setting is validated on: `echelon serve` in its own process, or a reranker in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

from echelon.errors import EchelonError
from echelon.progress import no_progress
from echelon.reranker import Reranker
from echelon.tuning.machine import meter_of
from echelon.types import monotonic

if TYPE_CHECKING:
    from types import TracebackType

    from echelon.progress import Progress

ENV_PREFIXES = ("ECHELON_SERVE_", "ECHELON_API_KEY", "OTEL_")
"""Environment of the user's own server, which must not reach the server that is started here."""

STOP_TIMEOUT_S = 20.0
"""Time to answer open requests and to stop the workers; then the process is killed."""

MAX_LINES = 20
"""Last lines of the log that an error message shows."""

SCRAPE_TIMEOUT_S = 10.0


class ServerFailed(EchelonError):
    """The server for a validation did not start, or ended."""


class ServerProcess:
    """A server on a free port of the loopback interface, as a context manager.

    Args:
        arguments: of ``echelon serve``, the model first.

    Raises:
        ServerFailed: the server did not start; the end of its log is in the message.
    """

    def __init__(self, arguments: list[str]) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIXES)}
        command = [sys.executable, "-m", "echelon", "serve", *arguments]
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own command
            [*command, "--host", "127.0.0.1", "--port", "0", "--log-format", "json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        self._reader: threading.Thread | None = None
        self.url = ""

    def __enter__(self) -> Self:
        stream = self._process.stderr
        if stream is None:
            raise RuntimeError("This is a bug: stderr is a pipe.")
        try:
            self.url = self._await_url(stream)
        except BaseException:
            self._end()
            raise
        self._reader = threading.Thread(target=self._lines.extend, args=(stream,), daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def metrics(self) -> dict[str, float]:
        """Read the server's metrics: name with labels to value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=SCRAPE_TIMEOUT_S) as response:  # noqa: S310 - our own server
            text = response.read().decode("utf-8")
        lines = (line for line in text.splitlines() if line and not line.startswith("#"))
        pairs = (line.rpartition(" ") for line in lines)
        return {name: float(value) for name, _, value in pairs}

    def _await_url(self, stream: IO[str]) -> str:
        for line in stream:
            self._lines.append(line)
            url = _url_in(line)
            if url is not None:
                return url
        code = self._process.wait()
        words = " ".join("".join(self._lines).split()) or "nothing was logged"
        raise ServerFailed(
            f"The server for the validation ended with exit code {code}: {words}. "
            "Start it yourself with `echelon serve` to see why, or give --verify-s 0."
        )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _url_in(line: str) -> str | None:
    """The address in a line of the server's log; None where there is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    url = entry.get("url") if isinstance(entry, dict) else None
    return url if isinstance(url, str) else None


Texts = list[tuple[str, list[str]]]
"""Query and documents of each request."""


@dataclass(frozen=True, slots=True)
class RerankTask:
    """What to rerank, and how.

    Attributes:
        model: the name that the user gave.
        keywords: of :class:`echelon.Reranker`.
        warm: requests that do not count.
        texts: requests that count.
        at_once: whether all requests are one call; otherwise one call follows another.
        within_s: seconds after which no further call is started; None makes all calls.
    """

    model: str | os.PathLike[str]
    keywords: dict[str, Any]
    warm: Texts
    texts: Texts
    at_once: bool
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class RerankRun:
    """A finished task.

    Attributes:
        waits: seconds of each call; empty where all requests were one call.
        whole_s: seconds of all calls.
        peak_bytes: peak memory, warm-up and libraries included.
    """

    waits: list[float]
    whole_s: float
    peak_bytes: int


def run(task: RerankTask, on_progress: Progress = no_progress) -> RerankRun:
    """Run a task with a new reranker."""
    on_progress("reranking")
    with Reranker(task.model, **task.keywords) as reranker:
        for query, documents in task.warm:
            reranker.rank(query, documents)
        meter = meter_of(reranker.facts.device)
        meter.reset()
        if task.at_once:
            return RerankRun([], _all_at_once(reranker, task.texts), meter.peak_bytes())
        waits = _one_after_another(reranker, task, on_progress)
        return RerankRun(waits, sum(waits), meter.peak_bytes())


def _all_at_once(reranker: Reranker, texts: Texts) -> float:
    pairs = [(query, document) for query, documents in texts for document in documents]
    began = monotonic()
    reranker.score_pairs(pairs)
    return monotonic() - began


def _one_after_another(reranker: Reranker, task: RerankTask, on_progress: Progress) -> list[float]:
    """Seconds of each call, as many calls as the time allows."""
    began, waits = monotonic(), []
    for number, (query, documents) in enumerate(task.texts, 1):
        started = monotonic()
        reranker.rank(query, documents)
        ended = monotonic()
        waits.append(ended - started)
        share = number / len(task.texts)
        if task.within_s is not None:
            share = (ended - began) / task.within_s
        on_progress("reranking", min(1.0, share), 1.0)
        if share >= 1:
            break
    return waits
