"""Large files: constant memory, speed beside the engine alone, the same bytes after twenty kills.

    python benchmarks/batch_files.py                       # two million pairs, twenty kills
    python benchmarks/batch_files.py --pairs 20000 --kills 3 --demo-pairs 200

Three parts, each in processes of its own. The first two score with a fake model behind the demo
model's tokenizer, so that reading, packing and writing take most of the time. Memory is sampled
while the file is scored, after its first tenth, since buffers and caches fill at first. The third
part compares `batch` on the demo model with the engine alone on the same encoded pairs, in turn.

Writes benchmarks/results/batch_files.json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from echelon.data import load_texts
from echelon.engine import precision_check
from echelon.engine.engine import Engine, StepLimits
from echelon.models.base import FakeScorer
from echelon.models.hub import resolve
from echelon.models.registry import open_scorer
from echelon.offline.job import OfflineJob
from echelon.offline.progress import ProgressDisplay
from echelon.offline.run import run
from echelon.options import Options
from echelon.profile import library_versions
from echelon.scheduling.packing import step_budget
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.machine import describe_machine

if TYPE_CHECKING:
    from echelon.types import FloatArray, Pair, TokenBatch

RESULTS = Path(__file__).parent / "results" / "batch_files.json"
DOCUMENTS = 50
"""Documents of a query."""
WORDS = (6, 30)
DEMO_WORDS = (40, 160)
SAMPLE_S = 0.1
STARTING_S = 1.0
"""A process needs this long before it scores anything."""
MAX_LENGTH = 512


class ForgetfulScorer(FakeScorer):
    """A fake scorer that does not remember its steps."""

    def score(self, batch: TokenBatch) -> FloatArray:
        """Score one step."""
        logits = super().score(batch)
        self.batches.clear()
        return logits


def child(source: str, output: str) -> None:
    """One run of a job on the fake model."""
    precision_check.open_scorer = lambda *_, **__: ForgetfulScorer()  # type: ignore[assignment]  # a stand-in
    with ProgressDisplay(quiet=True) as display:
        run(OfflineJob(source, output), display)


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start :func:`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", str(source), str(output)]
    return subprocess.Popen(command)


def texts(count: int, words: tuple[int, int], seed: int) -> list[Pair]:
    """Pairs cut out of the built-in English texts."""
    chance = random.Random(seed)
    topics = load_texts(language="en").topics
    known = " ".join(document for topic in topics for document in topic.documents).split()

    def cut(count: int) -> str:
        begin = chance.randrange(len(known) - count)
        return " ".join(known[begin : begin + count])

    return [(cut(8), cut(chance.randint(*words))) for _ in range(count)]


def write_input(path: Path, pairs: int) -> None:
    """Write queries with documents as JSONL, in parts, so that memory stays small."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(-(-pairs // DOCUMENTS)):
            part = texts(min(DOCUMENTS, pairs - number * DOCUMENTS), WORDS, number)
            record = {"id": number, "query": part[0][0], "documents": [text for _, text in part]}
            file.write(json.dumps(record) + "\n")


def uninterrupted(source: Path, output: Path, pairs: int) -> dict[str, Any]:
    """One whole run, with samples of its memory."""
    process = start(source, output)
    observed, samples = psutil.Process(process.pid), []
    part = Path(f"{output}.part")
    started = time.perf_counter()
    while True:
        try:
            process.wait(SAMPLE_S)
            break
        except subprocess.TimeoutExpired:
            if part.exists():
                samples.append((part.stat().st_size, observed.memory_info().rss))
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit("the run failed")
    total = output.stat().st_size
    steady = [rss for written, rss in samples if written >= total / 10]
    return {
        "pairs": pairs,
        "input_bytes": source.stat().st_size,
        "output_bytes": total,
        "seconds": seconds,
        "pairs_per_s": pairs / seconds,
        "peak_bytes": max((rss for _, rss in samples), default=0),
        "growth_bytes": max(steady) - min(steady) if steady else None,
    }


def killed(source: Path, output: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Run again and again, killed at random times, until a run ends by itself."""
    chance = random.Random()
    done, runs = 0, 0
    while True:
        process = start(source, output)
        runs += 1
        try:
            if done < kills:
                # Some while the process starts, and all before the job can be finished.
                process.wait(chance.uniform(0, STARTING_S + seconds / kills))
            if process.wait():
                raise SystemExit("a run failed")
            return {"kills": done, "runs": runs, "sha256": digest(output)}
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Speed of a job on the demo model, relative to the engine alone."""
    pairs = texts(count, DEMO_WORDS, 0)
    source = folder / "demo.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("query", "document"), *pairs])
    model = resolve("demo").path
    engine = Engine(open_scorer(model), StepLimits(step_budget(None, None, "cpu")))
    encoded = PairEncoder(model).encode(pairs, MAX_LENGTH, "longest_first")
    whole, forward = [], []
    for turn in range(rounds + 1):
        output = folder / f"demo{turn}.jsonl"
        watch = Stopwatch()
        run(OfflineJob(str(source), str(output), options=Options(max_length=MAX_LENGTH)), watch)
        started = time.perf_counter()
        engine.run(encoded)
        if turn:  # the first one warms up
            forward.append(time.perf_counter() - started)
            whole.append(watch.seconds)
    engine.close()
    shares = sorted(b / a for a, b in zip(whole, forward, strict=True))
    return {
        "pairs": count,
        "tokens": int(encoded.lengths.sum()),
        "file_s": statistics.median(whole),
        "engine_s": statistics.median(forward),
        "share": statistics.median(shares),
        "share_range": [shares[0], shares[-1]],
        "rounds": rounds,
    }


class Stopwatch(ProgressDisplay):
    """Measures the time from when the model is loaded until the last window is on disk."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self._loaded: float | None = None
        self._last = 0.0

    def step(self, pairs: int) -> None:
        """Show nothing."""
        del pairs

    def loaded(self) -> None:
        """The model is loaded."""
        self._loaded = time.perf_counter()

    def window(self, scored: Any) -> None:
        """A window is on disk."""
        del scored
        self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of the job without loading."""
        return self._last - (self._loaded or 0.0)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--demo-pairs", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the files go [a temporary one]")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        write_input(source, arguments.pairs)
        memory = uninterrupted(source, folder / "whole.jsonl", arguments.pairs)
        print(json.dumps(memory))
        again = killed(source, folder / "out.jsonl", arguments.kills, memory["seconds"])
        again["identical"] = again.pop("sha256") == digest(folder / "whole.jsonl")
        print(json.dumps(again))
        speed = share(folder, arguments.demo_pairs, arguments.rounds)
        print(json.dumps(speed))
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": library_versions(),
        "memory": memory,
        "kills": again,
        "speed": speed,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
