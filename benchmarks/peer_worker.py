"""One engine in a process of its own, spoken to in JSON lines.

A crash loses one engine, memory belongs to one engine, and every engine has the environment that
it wants. The measuring side holds a :class:`Worker`; the other side is this file as a script.

    {"do": "open", "kind": …, "folder": …, "graphs": …, "options": {…}}  → {"seconds": …}
    {"do": "score", "texts": FILE, "indices": […] or null, "size": 8}    → {"seconds", "logits"}

An answer with ``error`` says why it failed. Whatever else the libraries print goes to a log file.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
MEMORY_LINES = {"Rss": "rss", "Pss": "pss", "Anonymous": "anonymous"}
REASON_LENGTH = 300
PATIENCE_SECONDS = 1800
"""An engine that hangs does not hold up the others for longer."""

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SOURCE),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
    "DO_NOT_TRACK": "1",
}
"""Offline, quiet, with this checkout's Echelon; threads are left to the engines."""


class EngineFailed(Exception):
    """An engine could not be opened or could not score; the message is the reason in one line."""


class Worker:
    """A process that serves one engine.

    Args:
        python: interpreter of the engine's environment.
        log: file for whatever the engine prints.
    """

    def __init__(self, python: Path, log: Path) -> None:
        self.started = time.perf_counter()
        self.log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [python, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=ENVIRONMENT,
                bufsize=0,  # so that select() sees what is there
            )

    def open(self, kind: str, folder: Path, graphs: Path, options: dict[str, Any]) -> float:
        """Open an engine of :mod:`peer_engines`; seconds. Once a process."""
        answer = self._ask(
            do="open", kind=kind, folder=str(folder), graphs=str(graphs), options=options
        )
        return float(answer["seconds"])

    def score(
        self, texts: Path, size: int, indices: Sequence[int] | None = None
    ) -> tuple[float, list[float]]:
        """Score the pairs of a file, all or some: seconds, and logits in order."""
        answer = self._ask(
            do="score", texts=str(texts), size=size, indices=None if indices is None else [*indices]
        )
        return float(answer["seconds"]), answer["logits"]

    def memory(self) -> dict[str, int]:
        """Bytes that the process holds now: resident, its fair share of them, and anonymous."""
        held = dict.fromkeys(MEMORY_LINES.values(), 0)
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup")
        for line in rollup.read_text(encoding="ascii").splitlines()[1:]:
            name, _, rest = line.partition(":")
            if name in MEMORY_LINES:
                held[MEMORY_LINES[name]] = int(rest.split()[0]) * 1024
        return held

    def close(self) -> None:
        """End the process; it holds nothing worth saving."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, **message: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], PATIENCE_SECONDS)[0]:
                raise EngineFailed(f"no answer in {PATIENCE_SECONDS} s: {last_line(self.log)}")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.wait()
            raise EngineFailed(f"the process ended with {code}: {last_line(self.log)}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:REASON_LENGTH]


def serve() -> None:
    """Answer requests from stdin until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print; the protocol's pipe is not theirs
    engine: list[Any] = []
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), engine)
        except Exception as error:  # noqa: BLE001 - any failure of a peer is a result
            traceback.print_exc()
            answer = {"error": _reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(message: dict[str, Any], engine: list[Any]) -> dict[str, Any]:
    import peer_engines

    if message["do"] == "open":
        started = time.perf_counter()
        kind = getattr(peer_engines, message["kind"])
        folders = Path(message["folder"]), Path(message["graphs"])
        engine.append(kind(*folders, **message["options"]))
        return {"seconds": time.perf_counter() - started}
    pairs = [tuple(pair) for pair in json.loads(Path(message["texts"]).read_bytes())]
    if message["indices"] is not None:
        pairs = [pairs[i] for i in message["indices"]]
    started = time.perf_counter()
    logits = engine[0].score(pairs, message["size"])
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "logits": [float(logit) for logit in logits]}


def _reason(error: Exception) -> str:
    """Kind and last line of an error, in one line."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[-1].strip()}"[:REASON_LENGTH]


if __name__ == "__main__":
    serve()
