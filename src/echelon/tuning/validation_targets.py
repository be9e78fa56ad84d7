"""``echelon serve`` in a process of its own, as a user starts it, for as long as a proof lasts.

The reranker under requests: all at once, or one caller after another.
"""

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
from echelon.tuning.machine import meter_of
from echelon.types import monotonic

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from echelon.reranker import Reranker

ENV_PREFIXES = ("ECHELON_SERVE_", "ECHELON_API_KEY", "OTEL_")
"""Settings of the user's own server, which is not the one that is started here."""

PATIENCE_S = 20.0
"""For answers under way and workers to end; then the process is killed."""

KEPT_LINES = 20

SCRAPE_S = 10.0


class ServerFailed(EchelonError):
    """The server that a setting was to be proved with did not start, or ended."""


class ServerProcess:
    """A server on a free port of the loopback. To be used as a context.

    Args:
        arguments: of ``echelon serve``, the model first.

    Raises:
        ServerFailed: it did not start; its last words are in the message.
    """

    def __init__(self, arguments: list[str]) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIXES)}
        command = [sys.executable, "-m", "echelon", "serve", *arguments]
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, our own command
            [*command, "--host", "127.0.0.1", "--port", "0", "--log-format", "json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=kept,
        )
        self._reader: threading.Thread | None = None
        self.url = ""

    def __enter__(self) -> Self:
        stream = self._process.stderr
        if stream is None:
            raise RuntimeError("This is a bug: the stream was asked for.")
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
        """Its metrics now: name with labels to value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=SCRAPE_S) as answer:  # noqa: S310 - our own server
            text = answer.read().decode("utf-8")
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
        words = " ".join("".join(self._lines).split()) or "it said nothing"
        raise ServerFailed(
            f"The server that should prove the settings ended with exit code {code}: {words}. "
            "Start it yourself with `echelon serve` to see why, or give --verify-s 0."
        )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._reader is not None:
            self._reader.join()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _url_in(line: str) -> str | None:
    """Where it listens, if this line of its log says so."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    url = said.get("url") if isinstance(said, dict) else None
    return url if isinstance(url, str) else None


Texts = list[tuple[str, list[str]]]
"""Query and documents of each request."""


@dataclass(frozen=True, slots=True)
class RerankTask:
    """What to rerank, and how.

    Attributes:
        model: as the user gave it.
        keywords: of :class:`echelon.Reranker`.
        warm: requests that do not count.
        texts: those that do.
        at_once: one call for all of them; else one caller after another.
        within_s: seconds after which no further caller is asked for; None serves them all.
    """

    model: str | os.PathLike[str]
    keywords: dict[str, Any]
    warm: Texts
    texts: Texts
    at_once: bool
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class RerankRun:
    """What came of it.

    Attributes:
        waits: seconds that each caller waited; empty where all was one call.
        whole_s: seconds of everything.
        peak_bytes: peak memory, warm-up and libraries included.
    """

    waits: list[float]
    whole_s: float
    peak_bytes: int


def run(task: RerankTask, told: Callable[[float], object] = lambda _: None) -> RerankRun:
    """Rerank.

    Args:
        task: what.
        told: called with the share that is done.
    """
    from echelon.reranker import Reranker

    with Reranker(task.model, **task.keywords) as reranker:
        for query, documents in task.warm:
            reranker.rank(query, documents)
        meter = meter_of(reranker.facts.device)
        meter.reset()
        if task.at_once:
            return RerankRun([], _all_at_once(reranker, task.texts), meter.peak_bytes())
        waits = _one_after_another(reranker, task, told)
        return RerankRun(waits, sum(waits), meter.peak_bytes())


def _all_at_once(reranker: Reranker, texts: Texts) -> float:
    pairs = [(query, document) for query, documents in texts for document in documents]
    began = monotonic()
    reranker.score_pairs(pairs)
    return monotonic() - began


def _one_after_another(
    reranker: Reranker, task: RerankTask, told: Callable[[float], object]
) -> list[float]:
    """Each caller's wait; where they are slower than thought, those of the time there is."""
    began, waits = monotonic(), []
    for number, (query, documents) in enumerate(task.texts, 1):
        started = monotonic()
        reranker.rank(query, documents)
        ended = monotonic()
        waits.append(ended - started)
        gone = number / len(task.texts)
        if task.within_s is not None:
            gone = (ended - began) / task.within_s
        told(min(1.0, gone))
        if gone >= 1:
            break
    return waits
