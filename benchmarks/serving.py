"""`echelon serve` under load, beside the engine alone, the tutorial's batcher and infinity.

    python benchmarks/serving.py                                # the demo model
    python benchmarks/serving.py --model FOLDER --name large --tokens 60 --seconds 120

Parts (a letter each): a saturated, b half of the capacity, c twice of it, d single documents beside
thousands, e beside the tutorial's batcher and infinity, f overhead of a request. Whatever is
compared takes turns in one run; parts may be run one by one and are merged. Writes
benchmarks/results/serving.json and serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from echelon import Reranker
from echelon.data import load_texts
from echelon.models.hub import resolve
from echelon.profile import library_versions
from echelon.tuning.machine import describe_machine
from serving_page import page
from serving_parts import (
    Bench,
    beside_large,
    beside_peers,
    half_load,
    overhead,
    saturated,
    twice,
)
from serving_servers import ENVIRONMENT, Server, echelon, infinity, tutorial

RESULTS = Path(__file__).parent / "results"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the parts asked for, our server up all the time; the first says what it can do."""
    model = str(resolve(arguments.model).path)
    ours = echelon(model, arguments.precision)
    with (
        Reranker(model, precision=arguments.precision, device="cpu") as reranker,
        ours,
    ):
        topics = load_texts(language="en").topics
        bench = Bench(reranker, ours, topics, arguments.tokens, arguments.seconds, arguments.rounds)
        found: dict[str, Any] = {"a": _told("a", saturated, bench)}
        capacity = sorted(found["a"]["served_pairs_per_s"])[arguments.rounds // 2]
        for letter, part in (("b", half_load), ("c", twice), ("d", beside_large)):
            if letter in arguments.parts:
                found[letter] = _told(letter, part, bench, capacity)
        if "f" in arguments.parts:
            found["f"] = _told("f", overhead, bench)
        if "e" in arguments.parts:
            found["e"] = _beside(arguments, bench, model, capacity)
    for numbers in found.values():
        numbers["capacity_pairs_per_s"] = capacity
        numbers["command"] = shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]])
    return {k: v for k, v in found.items() if k in arguments.parts}


def _beside(
    arguments: argparse.Namespace, bench: Bench, model: str, capacity: float
) -> dict[str, Any]:
    peers = [tutorial(model, arguments.precision)]
    if ENVIRONMENT.exists():
        peers.append(infinity(model, arguments.precision))
    else:
        print(f"infinity is left out: {ENVIRONMENT} does not exist", file=sys.stderr)
    with contextlib.ExitStack() as started:
        running: list[Server] = [started.enter_context(peer) for peer in peers]
        return dict(_told("e", beside_peers, bench, running, capacity))


def _told(letter: str, part: Any, *arguments: Any) -> Any:
    print(f"part {letter}", flush=True)
    found = part(*arguments)
    print(json.dumps(found, default=float)[:600], flush=True)
    return found


def main() -> None:
    """Parse, measure, merge with what other models gave, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--name", help="what the results call the model [its name]")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--tokens", type=int, default=100, help="mean tokens of a pair")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="turns of part a")
    parser.add_argument("--parts", default="abcdef")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = {
        "model": arguments.name or arguments.model,
        "command": shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": library_versions(),
        "precision": arguments.precision,
        "tokens": arguments.tokens,
        "seconds": arguments.seconds,
        "parts": measure(arguments),
    }
    file = arguments.results / "serving.json"
    models = json.loads(file.read_text())["models"] if file.exists() else []
    for entry in models:
        if (entry["model"], entry["machine"]) == (found["model"], found["machine"]):
            found["parts"] = entry["parts"] | found["parts"]  # measured one by one
            models.remove(entry)
            break
    models.append(found)
    models.sort(key=lambda entry: (str(entry["model"]), str(entry["date"])))
    arguments.results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"models": models}, indent=1) + "\n")
    (arguments.results / "serving.md").write_text(page(models))


if __name__ == "__main__":
    main()
