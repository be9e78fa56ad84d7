"""The tutorial's loop over sentence-transformers' CrossEncoder, with Echelon beside it.

10, 50 and 100 pairs of one short question and four short sentences in turn, batch sizes 1 to 32;
sizes above the number of pairs are skipped. Both engines do the same work: every pair goes
through the model (Echelon's folding of identical pairs is left out), texts in, scores out.
Engines take turns, point by point and round by round, so that a drift of the machine hits all.

    python benchmarks/tutorial_grid.py --tokenizer FOLDER     # XLM-RoBERTa-large, random weights
    python benchmarks/tutorial_grid.py --checkpoint FOLDER    # any cross-encoder
    python benchmarks/tutorial_grid.py                        # the demo model

Writes a JSON file and a chart (SVG) under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from make_checkpoint import SHAPES, make_checkpoint
from peer_engines import Echelon, SentenceTransformers
from workloads import DOCUMENTS, tutorial

if TYPE_CHECKING:
    from collections.abc import Callable

PAIRS = (10, 50, 100)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
RESULTS = Path(__file__).parent / "results"

BUDGETS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine to measure.

    Attributes:
        score: pairs and a step size to logits.
        unit: what the step size counts.
    """

    score: Callable[[list[tuple[str, str]], int], Any]
    unit: str = "pairs a step"

    def sizes(self, pairs: int) -> tuple[int, ...]:
        """Step sizes worth trying; token budgets at the most pairs only."""
        if self.unit == "pairs a step":
            return tuple(size for size in BATCH_SIZES if size <= pairs)
        return BUDGETS if pairs == max(PAIRS) else ()


@dataclass(slots=True)
class Cell:
    """One engine at one number of pairs and one step size."""

    engine: str
    unit: str
    pairs: int
    size: int
    seconds: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Medians and spread; times in seconds."""
        low, median, high = np.percentile(self.seconds, [25, 50, 75])
        return {
            "engine": self.engine,
            "pairs": self.pairs,
            "size": self.size,
            "unit": self.unit,
            "samples": len(self.seconds),
            "median_s": median,
            "quartiles_s": [low, high],
            "pairs_per_s": self.pairs / median,
            "seconds": self.seconds,
        }


def peer(folder: Path, dtype: str) -> Contender:
    """sentence-transformers' CrossEncoder in a precision."""
    return Contender(SentenceTransformers(folder, folder, dtype=dtype).score)


def ours(folder: Path, precision: str, *, unit: str) -> Contender:
    """Echelon; ``size`` counts tokens a step, or pairs."""
    engine = Echelon(folder, folder, precision=precision, unit=unit)
    return Contender(engine.score, f"{unit} a step")


def measure(engines: dict[str, Contender], rounds: int) -> list[Cell]:
    """Every cell once a round, in turn, after an uncounted run of each engine."""
    cells = [
        Cell(name, contender.unit, count, size)
        for count in PAIRS
        for size in (*BATCH_SIZES, *BUDGETS)
        for name, contender in engines.items()
        if size in contender.sizes(count)
    ]
    for contender in engines.values():
        contender.score(tutorial(min(PAIRS)), 8 if contender.unit == "pairs a step" else 256)
    for turn in range(1, rounds + 1):
        for cell in cells:
            pairs = tutorial(cell.pairs)
            started = time.perf_counter()
            engines[cell.engine].score(pairs, cell.size)
            cell.seconds.append(time.perf_counter() - started)
        print(f"round {turn} of {rounds} done", file=sys.stderr)
    return cells


def best(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each engine's best size for each number of pairs."""
    keys = dict.fromkeys((cell["engine"], cell["pairs"]) for cell in cells)
    return [
        min((c for c in cells if (c["engine"], c["pairs"]) == key), key=lambda c: c["median_s"])
        for key in keys
    ]


def agreement(engines: dict[str, Contender], reference: str) -> dict[str, float]:
    """Largest difference of a logit from the reference engine's, by engine."""
    pairs = tutorial(len(DOCUMENTS))
    exact = np.asarray(engines[reference].score(pairs, 1))
    scored = {name: np.asarray(engine.score(pairs, 256)) for name, engine in engines.items()}
    return {name: float(np.abs(logits - exact).max()) for name, logits in scored.items()}


def chart(cells: list[dict[str, Any]], path: Path, title: str) -> None:
    """Throughput against batch size at the most pairs, one line an engine."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    lines = [c for c in cells if c["pairs"] == max(PAIRS) and c["unit"] == "pairs a step"]
    for name in dict.fromkeys(cell["engine"] for cell in lines):
        mine = [cell for cell in lines if cell["engine"] == name]
        rates = [cell["pairs_per_s"] for cell in mine]
        spread = np.array([[cell["pairs"] / q for q in cell["quartiles_s"]] for cell in mine])
        errors = np.abs(np.column_stack([spread[:, 1] - rates, spread[:, 0] - rates])).T
        axes.errorbar([c["size"] for c in mine], rates, errors, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES])
    axes.set(xlabel="batch size (pairs a step)", ylabel="pairs a second", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="model folder to measure with")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer of an XLM-R-large stand-in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="tutorial_grid", help="name of the result files")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(arguments, Path(scratch))
        _run(folder, arguments)


def _folder(arguments: argparse.Namespace, scratch: Path) -> Path:
    if arguments.checkpoint is not None:
        return Path(arguments.checkpoint)
    if arguments.tokenizer is not None:
        return make_checkpoint(scratch, SHAPES["xlm-roberta-large"], arguments.tokenizer)
    from echelon.models.demo import pull

    return pull()


def _run(folder: Path, arguments: argparse.Namespace) -> None:
    from echelon.profile import library_versions
    from echelon.tuning.machine import describe_machine

    engines = {
        "sentence-transformers fp32": peer(folder, "float32"),
        "sentence-transformers bf16": peer(folder, "bfloat16"),
        "echelon fp32": ours(folder, "fp32", unit="pairs"),
        "echelon bf16": ours(folder, "bf16", unit="pairs"),
        "echelon bf16, token budget": ours(folder, "bf16", unit="tokens"),
    }
    cells = [cell.as_dict() for cell in measure(engines, arguments.rounds)]
    top = {(c["engine"], c["pairs"]): c for c in best(cells)}
    most = max(PAIRS)
    rates = {name: top[name, most]["pairs_per_s"] for name in engines}
    fastest = max(rates[n] for n in ("echelon bf16", "echelon bf16, token budget"))
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": {**library_versions(), "platform": platform.platform()},
        "best": list(top.values()),
        "ratios_at_100_pairs": {
            "echelon bf16 / sentence-transformers fp32": fastest
            / rates["sentence-transformers fp32"],
            "echelon bf16 / sentence-transformers bf16": fastest
            / rates["sentence-transformers bf16"],
            "echelon fp32 / sentence-transformers fp32": rates["echelon fp32"]
            / rates["sentence-transformers fp32"],
        },
        "max_logit_difference": agreement(engines, "sentence-transformers fp32"),
        "cells": cells,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    chart(cells, path.with_suffix(".svg"), f"100 pairs, {folder.name}: best of both")
    print(json.dumps({k: content[k] for k in ("ratios_at_100_pairs", "max_logit_difference")}))
    print(f"{path}\n{path.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
