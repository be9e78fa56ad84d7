"""Speed of scoring texts, relative to the forward passes alone.

Times `Reranker.score` on texts, and the forward passes on the same encoded pairs, in turn. The
ratio shows what tokenizing, packing and sorting cost. The demo model is the hard case: it is small
and fast, so everything else takes a larger share.

    python benchmarks/overlap.py                        # demo model, fp32, bf16 and int8
    python benchmarks/overlap.py --model FOLDER --pairs 500

Writes benchmarks/results/overlap.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echelon import Reranker
from echelon.data import load_texts
from echelon.engine.engine import Engine, StepLimits
from echelon.engine.precision_check import check_precision
from echelon.models.hub import resolve
from echelon.models.registry import open_scorer
from echelon.profile import library_versions
from echelon.scheduling.packing import step_budget
from echelon.tokenization.tokenizer import PairEncoder
from echelon.tuning.machine import describe_machine

if TYPE_CHECKING:
    from echelon.types import Pair

RESULTS = Path(__file__).parent / "results" / "overlap.json"
MAX_LENGTH = 512
WORDS = (40, 90, 160)
"""Words of a document, in turn."""


def texts(count: int) -> list[Pair]:
    """Distinct pairs cut out of the built-in English texts."""
    topics = load_texts(language="en").topics
    words = " ".join(document for topic in topics for document in topic.documents).split()
    pairs = []
    for i in range(count):
        start, length = (i * 37) % (len(words) - max(WORDS)), WORDS[i % len(WORDS)]
        query = topics[i % len(topics)].query
        pairs.append((query, f"{i} " + " ".join(words[start : start + length])))
    return pairs


def measure(model: str, precision: str, pairs: list[Pair], rounds: int) -> dict[str, Any]:
    """Medians of both, in seconds, and their ratio round by round."""
    folder = resolve(model)
    encoder = PairEncoder(folder.path)
    with Reranker(model, precision=precision, device="cpu", max_length=MAX_LENGTH) as reranker:
        options = replace(reranker.options, precision=precision)
        kept = check_precision(folder, options, encoder, None)
        scorer = open_scorer(folder.path, device="cpu", precision=precision, keep_bf16=kept)
        engine = Engine(scorer, StepLimits(step_budget(None, None, "cpu")))
        encoded = encoder.encode(pairs, MAX_LENGTH, "longest_first")
        whole, forward = [], []
        for turn in range(rounds + 1):
            started = time.perf_counter()
            reranker.score(pairs)
            middle = time.perf_counter()
            engine.run(encoded)
            if turn:  # the first one warms up
                whole.append(middle - started)
                forward.append(time.perf_counter() - middle)
        engine.close()
    shares = sorted(b / a for a, b in zip(whole, forward, strict=True))
    return {
        "precision": precision,
        "pairs": len(pairs),
        "tokens": int(encoded.lengths.sum()),
        "from_texts_s": statistics.median(whole),
        "forward_alone_s": statistics.median(forward),
        "share": statistics.median(shares),
        "share_range": [shares[0], shares[-1]],
        "rounds": rounds,
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    arguments = parser.parse_args()
    pairs = texts(arguments.pairs)
    rows = []
    for precision in arguments.precisions.split(","):
        rows.append(measure(arguments.model, precision, pairs, arguments.rounds))
        print(json.dumps(rows[-1]))
    content = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe_machine(),
        "versions": library_versions(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
