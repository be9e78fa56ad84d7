"""New model families beside transformers: the same token ids through both, at true shapes.

    python benchmarks/families.py
    python benchmarks/families.py --models modernbert --precisions bf16 --rounds 5 --keep

Random weights of ModernBERT-base's and Qwen3-0.6B's shape (of Qwen3 with a smaller vocabulary). The
peer is transformers as sentence-transformers runs it: sorted by length, padded, at the best of some
batch sizes, of a language model the last position's logits only. ModernBERT scores pairs of mixed
lengths; Qwen3 scores documents of one query, whose prompt comes first. The engines take turns.

Writes benchmarks/results/families.json and families.md, a row each after its last round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from echelon.models.registry import open_scorer
from echelon.tuning.machine import describe_machine
from echelon.types import TokenBatch, monotonic

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
BATCH_SIZES = (4, 8, 16)
ANSWERS = 9, 10  # ids of the answers of the toy vocabulary
PROMPT, SUFFIX = 90, 9  # tokens before and behind a document
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A true shape, and how the peer scores with it."""

    architecture: str
    config: dict[str, Any]
    decodes: bool = False


MODELS = {
    "modernbert": Model(
        "ModernBertForSequenceClassification", {"num_labels": 1, "classifier_pooling": "mean"}
    ),
    "qwen3": Model(
        "Qwen3ForCausalLM",
        {
            "vocab_size": 20_000,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
        decodes=True,
    ),
}


def checkpoint(name: str, home: Path) -> Path:
    """A folder with random weights, whose name says that it reranks."""
    folder = home / {"modernbert": "modernbert", "qwen3": "Qwen3-Reranker"}[name]
    torch.manual_seed(0)
    model = MODELS[name]
    kind = getattr(transformers, model.architecture)
    built = kind(kind.config_class(**model.config))
    built.to(torch.bfloat16).save_pretrained(folder)
    if model.decodes:  # where the answers' ids are looked up
        vocabulary = dict(zip(("yes", "no"), ANSWERS, strict=True))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def pairs_of(name: str, count: int) -> list[np.ndarray]:
    """Token ids of each pair."""
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(4.7, 0.6, count).astype(int), 16, 700)

    def ids(length: int) -> np.ndarray:
        return random.integers(100, 19_000, length).astype(np.int32)

    if name == "modernbert":
        return [ids(length) for length in lengths]
    prompt, suffix = ids(PROMPT), ids(SUFFIX)
    return [np.concatenate((prompt, ids(min(length, 300)), suffix)) for length in lengths]


def echelon_engine(folder: Path, precision: str, pairs: list[np.ndarray]) -> Callable[[], Any]:
    """Score all pairs in one step."""
    scorer = open_scorer(folder, device="cpu", precision=precision)
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids in pairs]))).astype(np.int32)
    batch = TokenBatch(np.concatenate(pairs), None, offsets)

    def run() -> Any:
        scorer.release()  # what an earlier round kept of the query
        return scorer.score(batch)

    return run


def peer_engine(
    folder: Path, precision: str, pairs: list[np.ndarray], *, decodes: bool
) -> Callable[[int], Any]:
    """Score all pairs in padded batches of a size, longest first."""
    kind: Any = transformers.AutoModelForSequenceClassification
    if decodes:
        kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    order = sorted(range(len(pairs)), key=lambda place: -len(pairs[place]))

    def run(size: int) -> Any:
        found = np.zeros(len(pairs), np.float32)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = _padded([pairs[place] for place in chosen], left=decodes)
            with torch.inference_mode():
                if decodes:
                    logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
                    logits = logits[:, ANSWERS[0]] - logits[:, ANSWERS[1]]
                else:
                    logits = model(**inputs).logits[:, 0].float()
            found[chosen] = logits.numpy()
        return found

    return run


def _padded(rows: list[np.ndarray], *, left: bool) -> dict[str, torch.Tensor]:
    longest = len(rows[0])
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[place, where] = torch.from_numpy(row).long()
        mask[place, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def measured(name: str, precision: str, folder: Path, own: argparse.Namespace) -> dict[str, Any]:
    """A row: both engines in turn, the peer at its best batch size."""
    pairs = pairs_of(name, own.pairs)
    ours = echelon_engine(folder, precision, pairs)
    theirs = peer_engine(folder, precision, pairs, decodes=MODELS[name].decodes)
    found, tried = ours(), {}
    for size in own.batch_sizes:
        began = monotonic()
        expected = theirs(size)
        tried[size] = monotonic() - began
    best = min(tried, key=lambda size: tried[size])
    seconds: dict[str, list[float]] = {"echelon": [], "transformers": []}
    for number in range(own.rounds):
        turns = [("echelon", ours), ("transformers", lambda: theirs(best))]
        for engine, run in turns[:: 1 if number % 2 else -1]:
            seconds[engine].append(_timed(run))
    gc.collect()
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "model": name,
        "precision": precision,
        "pairs": len(pairs),
        "tokens": int(sum(map(len, pairs))),
        "batch_size": best,
        "batch_sizes": list(tried),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratios": [min(ratios), max(ratios)],
        "largest_difference": float(np.abs(found - expected).max()),
        "deviation": float(expected.std()),
    }


def _timed(run: Callable[[], Any]) -> float:
    began = monotonic()
    run()
    return monotonic() - began


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = result["machine"]
    about = (
        f"{machine['usable_cpus']} cores of an {machine['cpu']}, random weights; each row has its "
        f"command in families.json, the last was `{result['command']}`. The ratio is that of "
        "transformers' time to Echelon's in the same round: median, and least to greatest. The "
        "difference is that of logits, beside their deviation."
    )
    columns = ("model", "precision", "pairs, tokens", "peer's batch (tried)", "Echelon s")
    columns += ("transformers s", "ratio", "difference / deviation")
    lines = ["# New families beside transformers", "", about, "", f"| {' | '.join(columns)} |"]
    lines.append("|---" * len(columns) + "|")
    for row in result["rows"]:
        times = [f"{statistics.median(row['seconds'][n]):.2f}" for n in row["seconds"]]
        low, high = row["ratios"]
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['pairs']}, {row['tokens']:,} "
            f"| {row['batch_size']} ({', '.join(map(str, row['batch_sizes']))}) "
            f"| {times[0]} | {times[1]} "
            f"| **{row['ratio']:.2f}** ({low:.2f}–{high:.2f}, n={len(row['seconds']['echelon'])}) "
            f"| {row['largest_difference']:.2g} / {row['deviation']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def _subject(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], row["precision"]


def main() -> None:
    """Measure every row and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, help="that the peer tries"
    )
    parser.add_argument("--keep", action="store_true", help="this processor's other rows")
    own = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/families.py {' '.join(sys.argv[1:])}".strip(),
        "machine": describe_machine(),
        "rows": [],
    }
    about = {"command": result["command"], "cpu": result["machine"]["cpu"]}
    path, kept = RESULTS / "families.json", []
    if own.keep and path.is_file():
        kept = json.loads(path.read_text("utf-8"))["rows"]
    with tempfile.TemporaryDirectory() as home:
        for name in own.models:
            folder = checkpoint(name, Path(home))
            for precision in own.precisions:
                row = about | measured(name, precision, folder, own)
                kept = [old for old in kept if old.get("cpu") == row["cpu"]]
                kept = [old for old in kept if _subject(old) != _subject(row)]
                result["rows"] = kept = [*kept, row]
                text = json.dumps(result, indent=1, ensure_ascii=False)
                (RESULTS / "families.json").write_text(text + "\n", "utf-8")
                (RESULTS / "families.md").write_text(page(result), "utf-8")
                print(page(result).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
